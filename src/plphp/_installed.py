"""What is installed: versions outside the tested range; the torchvision that fits the torch."""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from importlib import metadata, util

from packaging.version import InvalidVersion, Version

# Package -> the oldest and the newest release line that pyproject.toml allows.
TESTED = {
    "torch": (Version("2.11"), Version("2.13")),
    "transformers": (Version("5.16"), Version("5.24")),
}
# torch 2.N and torchvision 0.(N + 15) are released together, with equal patch numbers.
TORCHVISION_AHEAD = 15
TORCHCODEC = "torchcodec>=0.12"  # the first for every torch from 2.11 on
BUILDS = re.compile(r"(cpu|xpu|cu\d+|rocm[\d.]+)?")  # each has its index; PyPI's has no such part
INDEX = "https://download.pytorch.org/whl"
PAGE = "docs/your-model.md#torchvision"


def bounds(package: str) -> str:
    """The versions that plphp is tested with, as pip reads them, such as ">=2.11,<2.14"."""
    oldest, newest = TESTED[package]
    return f">={oldest},<{newest.major}.{newest.minor + 1}"


def version(package: str) -> Version | None:
    """The version of an installed package, with its local part; None if it is not installed."""
    try:
        return Version(metadata.version(package))
    except (metadata.PackageNotFoundError, InvalidVersion):
        return None


def untested() -> tuple[str, ...]:
    """One sentence for torch and for transformers, each if its release line is not a tested one."""
    said = []
    for package, (oldest, newest) in TESTED.items():
        found = version(package)
        if found is None or (oldest.release <= found.release[:2] <= newest.release):
            continue
        said.append(
            f"{package} {found} is installed, and plphp was tested with {oldest} to {newest}: "
            f"pip install '{package}{bounds(package)}'"
        )
    return tuple(said)


@functools.cache
def warn_if_untested() -> None:
    """Warn once in a process of each package whose installed version was not tested."""
    for sentence in untested():
        warnings.warn(sentence, UserWarning, stacklevel=3)  # 3: the caller of `prune`


def has_torchvision() -> bool:
    return util.find_spec("torchvision") is not None


def torchvision_for(torch: Version) -> str | None:
    """The torchvision that is built for a torch, None for a build that is not PyTorch's own."""
    if torch.major != 2 or torch.is_prerelease or not BUILDS.fullmatch(torch.local or ""):
        return None
    return f"0.{torch.minor + TORCHVISION_AHEAD}.{torch.micro}"


def install_torchvision(again: bool = False) -> str:
    """The command that installs torchvision and leaves the installed torch as it is.

    A plain `pip install torchvision` brings the newest one, and with it another torch.

    again: whether the same version of another build is installed, which pip would leave there
    """
    torch = version("torch")
    fitting = None if torch is None else torchvision_for(torch)
    if torch is None or fitting is None:
        return f"install the torchvision that was built for your torch; see {PAGE}"
    what = "--force-reinstall --no-deps" if again else f"torch=={torch.public}"
    index = f" --index-url {INDEX}/{torch.local}" if torch.local else ""
    return f"pip install {what} torchvision=={fitting}{index}; see {PAGE}"


def has_torchcodec() -> bool:
    """Whether videos can be decoded: torchvision does it no longer, from the one of torch 2.11."""
    return util.find_spec("torchcodec") is not None


def decoding_fault() -> str:
    """What is wrong with torchcodec, which decodes videos, and what to do; '' if it can be loaded.

    It begins with the name of the package, so that it can end a sentence.
    """
    if not has_torchcodec():
        return f"torchcodec, which is not installed: {install_torchcodec()}"
    try:
        importlib.import_module("torchcodec")
    except Exception as error:  # an OSError of the linker, or an error that quotes several
        cause, ffmpeg = _why_not_loaded(str(error))
        what = "install FFmpeg" if ffmpeg else "install the torchcodec that fits your torch"
        return f"torchcodec, which is installed and cannot be loaded ({cause}): {what}; see {PAGE}"
    return ""


def _why_not_loaded(said: str) -> tuple[str, bool]:
    """The cause in an error of torchcodec, in one line, and whether it is that FFmpeg is missing.

    torchcodec tries one library for each version of FFmpeg and quotes the error of each. Only the
    error of a version that is there says more than that the others are not.
    """
    causes = re.findall(r"^(?:OSError: )?(.*lib.*\.(?:so|dylib|dll).*: .+)$", said, re.MULTILINE)
    missing = re.compile("no such file|library not loaded", re.IGNORECASE)
    absent = [cause for cause in causes if missing.search(cause)]
    others = [cause for cause in causes if cause not in absent]
    cause = " ".join([*others, *absent, said.partition(". ")[0]][0].split())
    return cause[:200], bool(absent) and not others


def install_torchcodec() -> str:
    """The command that installs torchcodec. It requires no torch, so that pip leaves yours."""
    torch = version("torch")
    index = f" --index-url {INDEX}/cpu" if torch is not None and torch.local else ""
    return f"pip install '{TORCHCODEC}'{index}, and FFmpeg for your system; see {PAGE}"


def misfit() -> str:
    """A sentence if the installed torchvision was not built for the installed torch, else ''."""
    torch, found = version("torch"), version("torchvision")
    fitting = None if torch is None else torchvision_for(torch)
    if torch is None or found is None or fitting is None:
        return ""
    same = found.release[:2] == Version(fitting).release[:2]
    if same and (found.local == torch.local or _torchvision_loads()):
        return ""
    command = install_torchvision(again=same)
    return (
        f"torchvision {found} was not built for torch {torch}: {command}; or pip uninstall "
        "torchvision, if the processor of your model needs none"
    )


def _torchvision_loads() -> bool:
    """Whether torchvision can be imported; one that was built for another torch cannot."""
    try:
        importlib.import_module("torchvision")
    except Exception:
        return False
    return True


def misfit_behind(error: BaseException) -> str:
    """The sentence of `misfit` if an error, or one that led to it, comes from torchvision."""
    seen: BaseException | None = error
    while seen is not None:
        if "torchvision" in str(seen):
            return misfit()
        seen = seen.__cause__ or seen.__context__
    return ""


def notes() -> tuple[str, ...]:
    """What a user should read about the installed packages, one sentence each."""
    fault = decoding_fault() if has_torchcodec() else ""
    videos = f"videos cannot be decoded by {fault}" if fault else ""
    return tuple(note for note in (*untested(), misfit(), videos) if note)
