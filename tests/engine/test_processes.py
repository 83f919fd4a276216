"""Modes that need own processes: what a GPU has and a CPU has not, tensor parallel, bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elsewhere
import pytest
import serving
import torch
from test_families import Reference

from plphp.demo.model import load

COUNT = 16


def cases() -> list[Any]:
    """(mode, number of requests): some of each mode, and many of the modes of GPUs."""
    some = [
        pytest.param(name, COUNT, marks=[pytest.mark.slow] if mode.slow else [])
        for name, mode in elsewhere.MODES.items()
    ]
    hard = [name for name, mode in elsewhere.MODES.items() if mode.hard]
    return some + [pytest.param(name, 200, marks=pytest.mark.slow) for name in hard]


@pytest.mark.parametrize(("mode", "count"), cases())
def test_tokens_equal_transformers(mode: str, count: int, reference: Any, tmp_path: Path) -> None:
    seed = 70 + list(elsewhere.MODES).index(mode)
    out = tmp_path / "answers.json"
    command = [sys.executable, elsewhere.__file__, mode, str(count), str(seed), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60 * count)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(out.read_text())
    made = elsewhere.MODES[mode]
    requests, parted, pruned = made.requests(count, seed), 0, 0
    expect = expected_in(made, out.with_suffix(""), reference)
    for place, answer in told["answers"].items():
        expected = expect(requests[int(place)])
        retention = answer["told"] and answer["told"]["plphp"]["retention"]
        if retention and mode != "bfloat16":
            kept = [layer.retention for layer in expected.report.layers if layer.pruned]
            assert retention == pytest.approx(sum(kept) / len(kept))
        pruned += bool(retention and retention < 1)
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer["tokens"])])
        found = serving.same(output, expected)
        assert found is not False or mode == "bfloat16", (place, answer, expected.tokens)
        parted += found is not True
    # bfloat16 rounds differently in the engines
    assert parted <= (5 if mode == "bfloat16" else 1 + count // 100)
    assert pruned > (0 if made.tiny else 4)
    assert told["found"]["blocks left"] == told["found"]["entries left"] == 0
    if "graphs" in made.standins:
        assert told["found"]["replays"] > 10 and told["found"]["prompts that end in one"] > 0
    if made.hard:
        assert told["found"]["preempted after pruning"], "the pool was large enough for all"
        assert told["found"]["aborted"], "none was aborted"


def expected_in(mode: Any, folder: Path, reference: Any) -> Callable[[serving.Request], Any]:
    """A function that returns the answer of transformers to a request of a mode.

    folder: of the checkpoint of a family; reference: the embedded model
    """
    if mode.family:
        there = Reference.load(folder)
        return lambda request: serving.read(
            there.model, there.inputs(request), request, round_to=mode.block
        )
    model = load(torch.bfloat16) if mode.options.get("dtype") == "bfloat16" else reference
    return lambda request: serving.answer(model, request, round_to=mode.block)
