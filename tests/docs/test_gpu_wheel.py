"""dev/gpu/vllm_parts.py: a wheel is cut into pieces, joined again, and installed."""

import importlib
import sys
import zipfile
from pathlib import Path

import pytest
from makers import DOCS

sys.path.insert(0, str(DOCS.parent / "dev" / "gpu"))
vllm_parts = importlib.import_module("vllm_parts")
sys.path.pop(0)
NAME = "stand_in-1.0"


def a_wheel(folder: Path) -> Path:
    """A wheel with one module of 5,000 bytes, which are stored as they are."""
    files = {
        "stand_in.py": "VALUE = 7\n" + "#" * 5000,
        f"{NAME}.dist-info/METADATA": "Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n",
        f"{NAME}.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = f"{NAME}.dist-info/RECORD"
    files[record] = "".join(f"{name},,\n" for name in (*files, record))
    wheel = folder / f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def test_a_wheel_travels_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_parts, "PIECE", 1000)
    wheel = a_wheel(tmp_path)
    pieces = vllm_parts.cut(wheel, tmp_path / "pieces")
    assert len(pieces) > 5 and max(piece.stat().st_size for piece in pieces) == 1000
    vllm_parts.join(tmp_path / "pieces", tmp_path / "site")
    assert (tmp_path / "site" / "stand_in.py").read_text().startswith("VALUE = 7\n")
    assert (tmp_path / "pieces" / wheel.name).read_bytes() == wheel.read_bytes()
