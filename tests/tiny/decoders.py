"""The LLaVA class with text models in which some layers have no ordinary attention.

Most of these pairs have never been trained, but real models have their decoders. How pruning treats
a layer depends on the decoder alone.
"""

from collections.abc import Callable
from dataclasses import replace

import transformers
from transformers import PreTrainedConfig

from tiny.base import IMAGE, TEXT, Family, siglip_config
from tiny.llava import llava_collate, llava_image
from tiny.refused import Refused

WINDOW = 20  # shorter than every prompt of the tests
FULL = "full_attention"
LLAVA = "LlavaForConditionalGeneration"


def llava(text: Callable[[], PreTrainedConfig]) -> Callable[[], PreTrainedConfig]:
    def config() -> PreTrainedConfig:
        inner = text()
        inner.tie_word_embeddings = False
        return transformers.LlavaConfig(
            text_config=inner,
            vision_config=siglip_config(image_size=24),
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-2,
        )

    return config


def gemma3n() -> PreTrainedConfig:
    """Layer 3 attends to the keys and values of layer 2, which is left alone; layer 1 slides."""
    return transformers.Gemma3nTextConfig(
        **TEXT,
        head_dim=16,
        layer_types=[FULL, "sliding_attention", FULL, FULL],
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=TEXT["vocab_size"],
        laurel_rank=4,
        sliding_window=WINDOW,
        activation_sparsity_pattern=None,
        altup_num_inputs=2,
    )


def qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(
        **TEXT,
        head_dim=16,
        layer_types=["linear_attention", FULL, FULL, FULL],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def lfm2() -> PreTrainedConfig:
    return transformers.Lfm2Config(**TEXT, layer_types=["conv", FULL, FULL, FULL])


def llama4() -> PreTrainedConfig:
    return transformers.Llama4TextConfig(
        **TEXT,
        head_dim=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", FULL, FULL, FULL],
    )


def gemma2() -> PreTrainedConfig:
    """Soft-capped attention logits; sliding and full layers in turn, with a window never left."""
    return transformers.Gemma2Config(
        **TEXT, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
    )


def deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(
        **TEXT | {"num_key_value_heads": 8},
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )


def gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(
        **TEXT, head_dim=16, num_local_experts=2, num_experts_per_tok=1, layer_types=[FULL] * 4
    )


def _family(
    name: str,
    text: Callable[[], PreTrainedConfig],
    alone: tuple[int, ...] = (),
    keyless: tuple[int, ...] = (),
) -> Family:
    family = Family(f"llava + {name}", LLAVA, llava(text), llava_image, llava_collate)
    return replace(family, alone=alone, longer=WINDOW, keyless=keyless)


# In these decoders the layers without ordinary attention are left alone and reported.
HYBRID = (
    _family("gemma3n", gemma3n, (1, 2, 3), (3,)),
    _family("qwen3_next", qwen3_next, (0,), (0,)),
    _family("lfm2", lfm2, (0,), (0,)),
    _family("llama4", llama4, (0,)),
    _family("gemma2", gemma2),
)
# In these decoders no layer can be pruned.
HOPELESS = (
    Refused("llava + deepseek_v3", LLAVA, llava(deepseek_v3)),
    Refused("llava + gpt_oss", LLAVA, llava(gpt_oss)),
)
