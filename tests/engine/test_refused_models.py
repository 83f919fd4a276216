"""Models whose layers cannot be pruned are refused, with the name of the layer and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import serving
import transformers
from checkpoints import CHECKPOINTS, Checkpoint, wide
from processors import square

import plphp
import tiny
from tiny.base import BREAK, GRID, IMAGE, NEWLINE, VISION_END, VISION_START


def gemma3(tokenizer: Any) -> Any:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(**square(24)), tokenizer, image_seq_length=9
    )


GEMMA3 = Checkpoint(
    "gemma3",
    {
        IMAGE: "<image>",
        VISION_START: "<soi>",
        VISION_END: "<eoi>",
        **{token: "\n" * count for count, token in enumerate((NEWLINE, BREAK, GRID), 2)},
    },
    gemma3,
    "<soi>",
    roles={"boi_token": "<soi>", "eoi_token": "<eoi>", "image_token": "<image>"},
)
LLAVA, QWEN = CHECKPOINTS["llava"], CHECKPOINTS["qwen2_vl"]
KINDS = {**tiny.FAMILIES, **tiny.DECODERS, **tiny.REFUSED}


@pytest.mark.parametrize(
    ("name", "processor", "reason"),
    [
        ("llava + deepseek_v3", LLAVA, "cache is of kind MLAAttentionSpec"),
        ("qwen3_5", QWEN, "it has a recurrent state, to whose size vLLM enlarges the blocks"),
        ("gemma3", GEMMA3, "image tokens attend to each other in both directions"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(
    name: str, processor: Checkpoint, reason: str, tmp_path: Path
) -> None:
    config = wide(KINDS[name].config())
    config.architectures = [KINDS[name].model_class]
    config.save_pretrained(tmp_path)
    processor.save_processor(tmp_path)
    refused = (plphp.UnsupportedModelError, plphp.UnsupportedModeError)
    with pytest.raises(refused, match=reason):  # noqa: SIM117
        with serving.engine(model=str(tmp_path), load_format="dummy"):
            pass
