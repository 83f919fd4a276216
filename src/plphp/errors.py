"""The exceptions of plphp. Each message says what is wrong and what to do about it."""


class PlphpError(Exception):
    """Base class of the exceptions of plphp."""


class UnsupportedModelError(PlphpError):
    """The model cannot be pruned: plphp cannot find its vision tokens, or use its attention."""


class UnsupportedModeError(PlphpError):
    """An option, a cache or another way of running the model cannot be combined with pruning."""


class UnsupportedTransformersError(PlphpError):
    """The installed transformers is too old, or lacks a function or class that plphp needs."""


class UnsupportedVllmError(PlphpError):
    """The installed vLLM is not the version for which the plugin was written."""


class InputError(PlphpError, ValueError):
    """A value that the caller gave cannot be used, such as a file, a prompt or an option."""


class InputTypeError(InputError, TypeError):
    """A value that the caller gave has a type that cannot be used."""


def how_to_install(extra: str) -> str:
    """The pip command that installs the packages of an extra, such as "eval".

    It names the packages themselves, because plphp is not on a package index yet.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("plphp") or ()]
    except metadata.PackageNotFoundError:  # plphp runs from its sources and is not installed
        requirements = []
    packages = [
        f"'{need.name}{_extras(need.extras)}{need.specifier}'"
        for need in requirements
        if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]
    return " ".join(["pip install", *(packages or [f"'.[{extra}]' in a checkout of plphp"])])


def _extras(names: set[str]) -> str:
    return f"[{','.join(sorted(names))}]" if names else ""
