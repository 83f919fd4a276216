"""A mode of `elsewhere` is run, and its answers are compared with those of transformers."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answers
import elsewhere
import pytest
import torch
from test_families import Reference

from plphp.demo.model import Embedded, load

SEED = 70  # of the requests of all modes, so that transformers answers each of them once


@cache
def parent(kind: str) -> subprocess.Popen[str]:
    """The process that serves modes of a kind. It ends when its input is closed with this one."""
    command = [sys.executable, elsewhere.__file__, kind]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(mode: str, count: int, folder: Path) -> dict[str, Any]:
    """What `elsewhere` wrote about a mode. folder: for its files"""
    out, process = folder / "answers.json", parent(elsewhere.MODES[mode].kind)
    assert process.stdin and process.stdout
    print(json.dumps([mode, count, SEED, str(out)]), file=process.stdin, flush=True)
    told = select.select([process.stdout], [], [], 60 * count)[0]
    assert told, "timed out"
    assert process.stdout.readline() == "0\n", Path(f"{out}.log").read_text()[-3000:]
    answers: dict[str, Any] = json.loads(out.read_text())
    return answers


def compare(name: str, count: int, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """How many answers are equal, and what the process counted.

    told, folder: as in `run`
    """
    mode = elsewhere.MODES[name]
    requests, expect = mode.requests(count, SEED), expected_in(mode, folder / "answers")
    counts: dict[str, Any] = {"answers": 0, "equal": 0, "nearly equal logits": 0, "pruned": 0}
    different = []
    for place, answer in told["answers"].items():
        request = requests[int(place)]
        if mode.hard:
            room = elsewhere.LONGEST - answer["prompt"]
            request = replace(request, tokens=min(request.tokens, room))
        expected = expect(request, answer["tokens"])
        retention = answer["told"] and answer["told"]["plphp"]["retention"]
        if retention and "bfloat16" not in mode.options.values():
            kept = [layer.retention for layer in expected.report.layers if layer.pruned]
            assert retention == pytest.approx(sum(kept) / len(kept))
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer["tokens"])])
        found = answers.same(output, expected)
        counts["answers"] += 1
        counts["pruned"] += bool(retention and retention < 1)
        counts["equal"] += found is True
        counts["nearly equal logits"] += found is None
        if found is False:
            different.append((int(place), answer["tokens"], expected.tokens))
    return counts | {"different": different} | told["found"]


def expected_in(
    mode: elsewhere.Mode, checkpoint: Path
) -> Callable[[Any, list[int]], answers.Answer]:
    """A function that returns what transformers says to an engine's tokens after a request.

    checkpoint: the folder of the mode's family
    """
    if mode.family:
        there = Reference.load(checkpoint)
        return lambda request, given: there.answer(request, given, mode.block)
    model = embedded(mode.options.get("dtype", "float32"))
    return lambda request, given: answers.answer(model, request, given, mode.block)


@cache
def embedded(dtype: str) -> Embedded:
    return load(getattr(torch, dtype))


def check(mode: elsewhere.Mode, count: int, found: dict[str, Any]) -> None:
    """Assert that a mode did what it must. found: of `compare`"""
    assert not found["different"], f"other tokens: {found['different']}"
    assert found["nearly equal logits"] <= 1 + count // 100, "many answers differ at close logits"
    assert found["blocks left"] == found["entries left"] == 0, "something is left"
    if mode.hard:
        assert found["preempted after pruning"], "the pool was large enough for all"
        assert found["aborted"], "none was aborted"
