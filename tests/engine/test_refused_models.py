"""Models whose layers cannot be pruned are refused, with the name of the layer and the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import serving
import transformers
from checkpoints import CHECKPOINTS, GEMMA3, Checkpoint, wide

import plphp
import tiny
from tiny import decoders
from tiny.base import TEXT

LLAVA, QWEN = CHECKPOINTS["llava"], CHECKPOINTS["qwen2_vl"]
KINDS = {**tiny.FAMILIES, **tiny.DECODERS, **tiny.REFUSED}
WINDOW = "sliding_attention"


def gemma4(head_dim: int, shared: int) -> Callable[[], Any]:
    """The decoder of Gemma 4, whose layers with full attention have heads of their own size.

    head_dim: of layers with full attention, 32 in the others
    shared: number of last layers that read the cache of an earlier layer
    """

    def config() -> Any:
        return transformers.Gemma4TextConfig(
            **TEXT,
            head_dim=32,
            per_layer_config={layer: {"head_dim": head_dim} for layer in (1, 3)},
            layer_types=[WINDOW, decoders.FULL] * 2,
            sliding_window=24,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=shared,
        )

    return decoders.llava(config)


KINDS |= {
    name: tiny.Family(name, decoders.LLAVA, config, decoders.llava_image, dict)
    for name, config in {
        "llava + gemma4": gemma4(64, 0),
        "llava + gemma4, shared": gemma4(32, 2),
    }.items()
}


@pytest.mark.parametrize(
    ("name", "processor", "reason"),
    [
        ("llava + deepseek_v3", LLAVA, "cache is of kind MLAAttentionSpec"),
        ("qwen3_5", QWEN, "it has a recurrent state, to whose size vLLM enlarges the blocks"),
        ("llava + gemma4, shared", LLAVA, r"layers\.3\S* cannot .* the cache of \S*layers\.1"),
        ("llava + gemma4", LLAVA, "layers have blocks of 32 and 64 tokens, because their keys"),
        ("gemma3", GEMMA3, "image tokens attend to each other in both directions"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(
    name: str, processor: Checkpoint, reason: str, tmp_path: Path
) -> None:
    config = KINDS[name].config()
    if "gemma4" not in name:
        config = wide(config)
    config.architectures = [KINDS[name].model_class]
    config.save_pretrained(tmp_path)
    processor.save_processor(tmp_path)
    refused = (plphp.UnsupportedModelError, plphp.UnsupportedModeError)
    with pytest.raises(refused, match=reason):  # noqa: SIM117
        with serving.engine(model=str(tmp_path), load_format="dummy"):
            pass
