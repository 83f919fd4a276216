"""The exceptions that plphp raises on purpose. Each message says what to do about it."""


class PlphpError(Exception):
    """Base of every error raised on purpose."""


class UnsupportedModelError(PlphpError):
    """This model cannot be pruned: its vision tokens or its attention layers cannot be used."""


class UnsupportedModeError(PlphpError):
    """This way of running the model cannot be combined with pruning."""


class UnsupportedTransformersError(PlphpError):
    """The installed transformers lacks a seam that plphp attaches to."""


class UnsupportedVllmError(PlphpError):
    """The installed vLLM is not the version that the plugin was written for."""


class InputError(PlphpError, ValueError):
    """What was given cannot be used: a file, a prompt, an option."""


class InputTypeError(InputError, TypeError):
    """What was given is of a type that cannot be used."""


def how_to_install(extra: str) -> str:
    """The pip command for the packages of an extra, such as "eval".

    It names those packages, since plphp itself is on no package index yet.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        needs = [Requirement(line) for line in metadata.requires("plphp") or ()]
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        needs = []
    packages = [
        f"'{need.name}{need.specifier}'"
        for need in needs
        if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]
    return " ".join(["pip install", *(packages or [f"'.[{extra}]' in a checkout of plphp"])])
