"""Say whether vLLM can run on the card, and cut its wheel for a machine without a network.

    python dev/gpu/vllm_parts.py [--json]            the state, on a GPU or without one
    python dev/gpu/vllm_parts.py --cut WHEEL DIR     cut a wheel into pieces that a transfer takes
    python dev/gpu/vllm_parts.py --join DIR TARGET   join them again and unpack the wheel

A lent machine takes 64 MiB a transfer. Ignored files of an earlier transfer stay there as long as
the machine is warm, so that a wheel may travel in pieces, one command each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

PIECE = 56 << 20  # bytes; the sources of plphp take the rest of a transfer


def state() -> dict[str, object]:
    """Whether vLLM is here, and what to do next."""
    import torch

    if find_spec("vllm") is None:
        note = "skipped: vllm is not installed here; dev/gpu/README.md says how its wheel travels"
    else:
        note = "vllm is here: run docs/benchmarks/vllm/measure.py capacity, and make test-vllm"
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "note": note}


def cut(wheel: Path, folder: Path) -> list[Path]:
    """Write pieces of a wheel into a folder, each small enough for one transfer."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = []
    with wheel.open("rb") as file:
        while data := file.read(PIECE):
            pieces.append(folder / f"{wheel.name}.{len(pieces):03d}")
            pieces[-1].write_bytes(data)
    return pieces


def join(folder: Path, target: Path) -> None:
    """Join the pieces of a folder, and unpack the wheel without its dependencies."""
    pieces = sorted(folder.glob("*.whl.[0-9][0-9][0-9]"))
    wheel = folder / pieces[0].name[:-4]
    with wheel.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)


def main(asked: list[str]) -> None:
    if asked[:1] == ["--cut"]:
        pieces = cut(Path(asked[1]), Path(asked[2]))
        print(f"{len(pieces)} transfers: " + " ".join(map(str, pieces)))
    elif asked[:1] == ["--join"]:
        join(Path(asked[1]), Path(asked[2]))
    else:
        found = state()
        print(json.dumps(found) if "--json" in asked else found["note"])


if __name__ == "__main__":
    main(sys.argv[1:])
