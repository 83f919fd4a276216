"""Models that cannot be pruned: no vision tokens are in the KV cache of their decoder."""

from collections.abc import Callable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tiny.base import PATCH, TEXT, VISION

SMALL = TEXT | {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


@dataclass(frozen=True)
class Refused:
    name: str
    model_class: str
    config: Callable[[], PreTrainedConfig]

    @property
    def available(self) -> bool:
        return hasattr(transformers, self.model_class)

    def build(self) -> PreTrainedModel:
        return getattr(transformers, self.model_class)(self.config()).eval()


def mllama_config() -> PreTrainedConfig:
    return transformers.MllamaConfig(
        text_config=SMALL | {"cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": PATCH,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    )


def llama_config() -> PreTrainedConfig:
    """No vision at all."""
    return transformers.LlamaConfig(**SMALL)


def t5gemma2_config() -> PreTrainedConfig:
    """An encoder reads the images."""
    layers = {"layer_types": ["full_attention"] * 2, "head_dim": 8}
    return transformers.T5Gemma2Config(
        encoder={
            "text_config": SMALL | layers,
            "vision_config": {**VISION, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4},
        },
        decoder=SMALL | layers,
        image_token_index=3,
    )


MODELS = (
    Refused("mllama", "MllamaForConditionalGeneration", mllama_config),
    Refused("t5gemma2", "T5Gemma2ForConditionalGeneration", t5gemma2_config),
    Refused("llama", "LlamaForCausalLM", llama_config),
)
