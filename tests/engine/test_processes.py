"""Modes that need own processes: what a GPU has and a CPU has not, tensor parallel, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import elsewhere
import modes
import pytest

COUNT, FEW = 12, 8  # `make test-vllm-200` serves 200 in every hard mode


def cases() -> list[Any]:
    return [
        pytest.param(name, marks=[pytest.mark.slow] if mode.slow else [])
        for name, mode in elsewhere.MODES.items()
    ]


@pytest.mark.parametrize("mode", cases())
def test_tokens_equal_transformers(mode: str, tmp_path: Path) -> None:
    made = elsewhere.MODES[mode]
    # The kernels of V2 run in Triton's interpreter; graphs need prompts that come twice.
    count = FEW if "v2" in made.standins and "graphs" not in made.standins else COUNT
    found = modes.compare(mode, count, modes.run(mode, count, tmp_path), tmp_path)
    if mode == "bfloat16":  # the engines round differently
        parted = len(found["different"]) + found["nearly equal logits"]
        assert parted <= 5
        found |= {"different": [], "nearly equal logits": 0}
    modes.check(made, count, found)
    assert found["pruned"] > (0 if made.family else 2)
    if "graphs" in made.standins:
        assert found["replays"] > 10 and found["prompts that end in one"] > 0
