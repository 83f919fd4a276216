"""The exceptions of plphp. Each message says what is wrong and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import Distribution


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

    It names the checkout from which plphp was installed. Without one it names the packages
    themselves, because plphp is not on a package index yet.
    """
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        own = metadata.distribution("plphp")
    except metadata.PackageNotFoundError:  # plphp runs from its sources and is not installed
        return f"pip install '.[{extra}]' in a clone of its repository"
    if checkout := _checkout(own):
        return f"pip install {checkout[0]}'{checkout[1]}[{extra}]'"
    requirements = [Requirement(line) for line in own.requires or ()]
    packages = [
        f"'{need.name}{_extras(need.extras)}{need.specifier}'"
        for need in requirements
        if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]
    return " ".join(["pip install", *packages])


def _checkout(own: Distribution) -> tuple[str, Path] | None:
    """The checkout from which pip has installed plphp, if it is there; "-e " if it is editable."""
    import json
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    found = json.loads(own.read_text("direct_url.json") or "{}")
    url = urlsplit(found.get("url", ""))
    path = Path(url2pathname(url.path))
    if url.scheme != "file" or not (path / "pyproject.toml").is_file():
        return None
    return ("-e " if found.get("dir_info", {}).get("editable") else ""), path


def _extras(names: set[str]) -> str:
    return f"[{','.join(sorted(names))}]" if names else ""
