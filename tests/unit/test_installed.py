"""Versions outside the tested range are named, and torchvision's is the one of the torch."""

import re
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from test_bounds import NEEDS, PINS, ROOT, bounds

from plphp import _installed
from plphp.cli.console import one_line


def has(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that these packages are installed, and no others."""
    found = {name: Version(text) for name, text in versions.items()}
    monkeypatch.setattr(_installed, "version", found.get)


@pytest.mark.parametrize("name", [*_installed.TESTED])
def test_the_tested_versions_are_the_bounds_of_the_package(name: str) -> None:
    assert NEEDS[name] == SpecifierSet(_installed.bounds(name))
    assert _installed.TESTED[name][0] == bounds(name)[0]


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.0+cpu", "2.13.5+cu130"])
@pytest.mark.parametrize("transformers", ["5.16.0", "5.24.9", "5.24.0.dev0"])
def test_nothing_is_said_within_the_range(
    torch: str, transformers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, torch=torch, transformers=transformers)
    assert _installed.untested() == ()


@pytest.mark.parametrize("torch", ["2.10.9", "2.14.0+cpu", "3.0.0"])
@pytest.mark.parametrize("transformers", ["5.15.2", "5.25.0.dev0", "6.0.0"])
def test_versions_outside_the_range_are_named(
    torch: str, transformers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, torch=torch, transformers=transformers)
    first, second = _installed.untested()
    assert f"torch {torch} is installed" in first and "pip install 'torch>=2.11,<2.14'" in first
    assert f"transformers {transformers} is installed" in second


def test_prune_warns_once_at_the_line_of_the_caller() -> None:
    """In a process of its own, since it warns once in a process."""
    code = (
        "import warnings, plphp, torch\n"
        "from plphp import _installed\n"
        "_installed.untested = lambda: ('torch 9 is installed',)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2):\n"
        "        try: plphp.prune(torch.nn.Linear(1, 1))\n"
        "        except plphp.PlphpError: pass\n"
        "found = [w for w in said if 'torch 9' in str(w.message)]\n"
        "assert [w.filename for w in found] == ['<string>'], found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("torch", "command"),
    [
        ("2.13.0", "pip install torch==2.13.0 torchvision==0.28.0; see"),
        ("2.11.1+cpu", "pip install torch==2.11.1 torchvision==0.26.1 --index-url "
         "https://download.pytorch.org/whl/cpu; see"),
        ("2.12.0+cu130", "torchvision==0.27.0 --index-url https://download.pytorch.org/whl/cu130"),
        ("2.14.0.dev20261101", "install the torchvision that was built for your torch"),
        ("2.13.0+nv26", "install the torchvision that was built for your torch"),
        ("3.0.0", "install the torchvision that was built for your torch"),
    ],
)  # fmt: skip
def test_torchvision_is_the_one_of_the_torch(
    torch: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, torch=torch)
    assert command in _installed.install_torchvision()
    assert _installed.misfit() == ""


@pytest.mark.parametrize(
    ("torchvision", "loads", "command"),
    [
        ("0.28.1+cpu", False, ""),
        ("0.28.0", True, ""),
        ("0.28.0", False, "pip install --force-reinstall --no-deps torchvision==0.28.0 --index"),
        ("0.27.0+cpu", True, "pip install torch==2.13.0 torchvision==0.28.0 --index-url"),
    ],
)
def test_a_torchvision_of_another_torch_is_named(
    torchvision: str, loads: bool, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, torch="2.13.0+cpu", torchvision=torchvision)
    monkeypatch.setattr(_installed, "_torchvision_loads", lambda: loads)
    said = _installed.misfit()
    wanted = f"torchvision {torchvision} was not built for torch 2.13.0+cpu: {command}"
    assert said.startswith(wanted) if command else said == ""
    assert ("; or pip uninstall torchvision" in said) == bool(command)


ABSENT = "OSError: libavutil.so.{}: cannot open shared object file: No such file or directory"
QUOTED = (
    "Could not load libtorchcodec. Likely causes: 1. FFmpeg is not properly installed. 2. ...\n"
    'FFmpeg version 8:\nTraceback (most recent call last):\n  File "/ops.py", line 1\n'
    + ABSENT.format(60)
    + "\nFFmpeg version 7:\n"
)
SYMBOL = "OSError: /x/libtorchcodec_core7.so: undefined symbol: _ZN3c104"


@pytest.mark.parametrize(
    ("error", "cause", "advice"),
    [
        (OSError(ABSENT[9:].format(60)), "libavutil.so.60: cannot open shared", "install FFmpeg;"),
        (RuntimeError(QUOTED + ABSENT.format(59)), "libavutil.so.60: cannot", "install FFmpeg;"),
        (RuntimeError(QUOTED + SYMBOL), "undefined symbol: _ZN3c104", "that fits your torch; see"),
        (ImportError("no words"), "no words", "that fits your torch; see"),
    ],
)
def test_a_torchcodec_that_cannot_be_loaded_says_why(
    error: Exception, cause: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(_installed, "has_torchcodec", lambda: True)
    monkeypatch.setattr(_installed.importlib, "import_module", refuse)
    said = _installed.decoding_fault()
    assert said.startswith("torchcodec, which is installed and cannot be loaded (")
    assert cause in said and advice in said and "\n" not in said
    assert _installed.notes()[-1] == f"videos cannot be decoded by {said}"
    monkeypatch.setattr(_installed.importlib, "import_module", lambda name: None)
    assert _installed.decoding_fault() == ""


def test_an_import_that_such_a_torchvision_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers hides the reason behind the name of what it could not import."""
    has(monkeypatch, torch="2.13.0", torchvision="0.27.0")
    hidden = ModuleNotFoundError("Could not import module 'AutoProcessor'.")
    hidden.__cause__ = RuntimeError("operator torchvision::nms does not exist")
    assert one_line(hidden).startswith("torchvision 0.27.0 was not built for torch 2.13.0: pip ")
    assert one_line(ModuleNotFoundError("No module named 'x'")) == "No module named 'x'"


@pytest.mark.parametrize("page", ["docs/your-model.md", "docs/reproduce.md"])
def test_pages_give_the_torchvision_of_the_pinned_torch(page: str) -> None:
    text = (ROOT / page).read_text()
    assert {*re.findall(r"torch==([\d.]+)", text)} <= {str(PINS["torch"])}
    found = {*re.findall(r"torchvision==([\d.]+)", text)}
    assert found == {_installed.torchvision_for(PINS["torch"])}
