"""A mode of `elsewhere` is run, and its answers are compared with those of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elsewhere
import pytest
import serving
import torch
from test_families import Reference
from transformers import AutoProcessor

from plphp.demo.model import WEIGHTS, load

SEED = 70  # of the requests of all modes, so that transformers answers each of them once


def run(mode: str, count: int, folder: Path) -> dict[str, Any]:
    """What `elsewhere.main` wrote. folder: for its files"""
    out = folder / "answers.json"
    command = [sys.executable, elsewhere.__file__, mode, str(count), str(SEED), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * count)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(out.read_text())
    return told


def compare(name: str, count: int, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How many answers are equal, and what the process counted.

    told, folder: as in `run`
    """
    mode = elsewhere.MODES[name]
    requests, expect = mode.requests(count, SEED), expected_in(mode, folder / "answers")
    counts: dict[str, Any] = {"answers": 0, "equal": 0, "nearly equal logits": 0, "pruned": 0}
    different = []
    for place, answer in told["answers"].items():
        expected = expect(int(place), requests[int(place)])
        retention = answer["told"] and answer["told"]["plphp"]["retention"]
        if retention and "bfloat16" not in mode.options.values():
            kept = [layer.retention for layer in expected.report.layers if layer.pruned]
            assert retention == pytest.approx(sum(kept) / len(kept))
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer["tokens"])])
        found = serving.same(output, expected)
        counts["answers"] += 1
        counts["pruned"] += bool(retention and retention < 1)
        counts["equal"] += found is True
        counts["nearly equal logits"] += found is None
        if found is False:
            different.append((int(place), answer["tokens"], expected.tokens))
    return counts | {"different": different} | told["found"]


def expected_in(mode: elsewhere.Mode, checkpoint: Path) -> Callable[[int, Any], serving.Answer]:
    """A function that returns the answer of transformers to the request at a place.

    checkpoint: the folder of the mode's family
    """
    if mode.family:
        there = Reference.load(checkpoint)
        return lambda place, request: there.answer(request, mode.block)
    dtype = mode.options.get("dtype", "float32")
    kind = "hard" if mode.hard else "tiny" if mode.tiny else str("graphs" in mode.standins)

    def expect(place: int, request: serving.Request) -> serving.Answer:
        key = (kind, place, dtype, mode.block)
        if key not in ANSWERS:
            ANSWERS[key] = embedded(dtype).answer(request, mode.block)
        return ANSWERS[key]

    return expect


ANSWERS: dict[tuple[str, int, str, int], serving.Answer] = {}


@cache
def embedded(dtype: str) -> Reference:
    """The embedded model, for requests with videos too."""
    return Reference(load(getattr(torch, dtype)).model, AutoProcessor.from_pretrained(WEIGHTS))


def check(mode: elsewhere.Mode, count: int, found: dict[str, Any]) -> None:
    """Assert that a mode did what it must. found: of `compare`"""
    assert not found["different"], f"other tokens: {found['different']}"
    assert found["nearly equal logits"] <= 1 + count // 100, "many answers differ at close logits"
    assert found["blocks left"] == found["entries left"] == 0, "something is left"
    if mode.hard:
        assert found["preempted after pruning"], "the pool was large enough for all"
        assert found["aborted"], "none was aborted"
