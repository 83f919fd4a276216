"""The pieces of the GPU work, in the order in which they matter if time runs out.

Every piece is one Python program with a time limit. In a dry run the same program runs on the CPU
with tiny sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PARTS = ("check", "bench", "vllm")
PART_SECONDS = 480  # of one part: a lent machine takes commands of at most 10 minutes
DRY_MODEL = "--shape tiny --layers 3 --dtype bfloat16"
DRY_SIZES = {"--context": "64", "--batch": "1", "--rounds": "1"}


@dataclass(frozen=True)
class Piece:
    """A program of the GPU work.

    limit: seconds after which it is stopped
    argv: a module after "-m", or a file below the root of the repository, and its arguments
    dry: its arguments in a dry run
    form: what it leaves: "json" on standard output, or "tests", the outcomes that `tally` records
    """

    part: str
    name: str
    limit: int
    argv: tuple[str, ...]
    dry: tuple[str, ...]
    form: str = "json"


def pieces(part: str, dry: bool) -> list[Piece]:
    """The pieces of a part that have no committed result.

    In a dry run, all pieces, except those that would run what an earlier one has run.
    """
    found = {"check": _check, "bench": _bench, "vllm": _vllm}[part]()
    if not dry:
        return [piece for piece in found if piece.name not in measured()]
    different: dict[tuple[str, ...], Piece] = {}
    for piece in found:
        different.setdefault(piece.dry, piece)
    return list(different.values())


def measured() -> set[str]:
    """The names of the pieces that have a committed result."""
    return {path.stem for path in (ROOT / "docs" / "benchmarks").glob("gpu*/*.json")}


def asked() -> dict[str, Any]:
    """The file that names the runs of `plphp bench` on a GPU, and the options of all of them."""
    found: dict[str, Any] = json.loads((ROOT / "docs/benchmarks/gpu-runs.json").read_text())
    return found


def runs() -> dict[str, str]:
    """The runs of `plphp bench` on a GPU by name, with their options."""
    return {name: f"{asked()['model']} {options}" for name, options in asked()["runs"].items()}


def _tests(name: str, limit: int, *options: str, dry: tuple[str, ...]) -> Piece:
    plain = ("-W", "default", "-p", "no:cacheprovider", "-p", "tally", "-q", "--tb=short")
    argv = ("-m", "pytest", *plain)
    return Piece("check", name, limit, (*argv, *options), (*argv, *dry), "tests")


def _check() -> list[Piece]:
    machine = ("-m", "plphp", "env", "--json")
    one = "not keeps_and_says or qwen2_vl"  # the other families run the same lines
    few = "captured or (test_on_a_gpu and sizes0 and dtype1 and options0 and not 16)"
    return [
        Piece("check", "machine", 60, machine, machine),
        _tests("device", 150, "-m", "gpu", "tests/gpu", dry=("-m", "gpu", "tests/gpu", "-k", one)),
        _tests(
            "kernels", 260, "-n", "8", "--dist", "worksteal", "tests/kernels",
            dry=("-m", "gpu", "tests/kernels", "-k", few),
        ),
    ]  # fmt: skip


def _bench() -> list[Piece]:
    made = [_run(name, options) for name, options in runs().items()]
    tune = Piece("bench", "tune", 90, ("dev/gpu/tune.py",), ("dev/gpu/tune.py", "--dry"))
    return [*made[:3], tune, *made[3:5], _recall(), *made[5:]]


def _recall() -> Piece:
    """Decoding steps with recall beside stock transformers."""
    study = ("dev/studies/recall_speed.py", "--json", "--dtype", "bfloat16")
    real = "--device cuda --shape qwen2-vl-7b --layers 28 --context 32768 --batch 8 --rounds 2"
    tiny = "--device cpu --shape tiny --layers 2 --context 64 --batch 1 --rounds 1 --steps 1"
    return Piece("bench", "recall-32k-x8", 150, (*study, *real.split()), (*study, *tiny.split()))


def _run(name: str, options: str) -> Piece:
    """A run of `plphp bench`."""
    begin = ("-m", "plphp", "bench", "--json")
    limit = 240 if "static" in options else 120
    tiny = (*DRY_MODEL.split(), *_small(asked()["runs"][name]), "--new-tokens", "2")
    return Piece("bench", name, limit, (*begin, *options.split()), (*begin, *tiny))


def _small(options: str) -> list[str]:
    """The options of a run with tiny sizes, and one round."""
    words = options.split()
    for place, word in enumerate(words):
        if word in DRY_SIZES:
            words[place + 1] = DRY_SIZES[word]
    return [*words, *(["--rounds", "1"] if "--rounds" not in words else [])]


def _vllm() -> list[Piece]:
    argv = ("dev/gpu/vllm_parts.py", "--json")
    return [Piece("vllm", "vllm", 300, argv, argv)]
