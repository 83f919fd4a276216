"""What a GPU has and this machine has not, on vLLM's CPU platform: backends, runner, scheduling.

`install(name)` runs in a process of its own, before an engine is made:
    flash       vLLM's FLASH_ATTN backend, with torch in the place of its three kernels
    flashinfer  the same, but the lengths that kernels get are those of the host, as in FlashInfer
    triton      vLLM's TRITON_ATTN backend, its kernels in Triton's interpreter
    v2          Model Runner V2, its kernels in Triton's interpreter
    async       asynchronous scheduling
    graphs      full CUDA graphs of decoding steps, see `graph_standin`; after `flash`
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from variables import ENGINE

strict = True  # whether a read of the null block is a fault; recordings of graphs read it


def environment(names: tuple[str, ...]) -> dict[str, str]:
    """The environment variables that a process needs before it imports vLLM."""
    found = ENGINE | {"VLLM_USE_V2_MODEL_RUNNER": "1" if "v2" in names else "0"}
    if {"triton", "v2"} & {*names}:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def install(name: str) -> None:
    INSTALL[name]()


def flash() -> None:
    replace_kernels()
    use("standins.flash_backend")


def flashinfer() -> None:
    replace_kernels()
    use("standins.trusting_backend")


def triton() -> None:
    find_triton()
    use("vllm.v1.attention.backends.triton_attn.TritonAttentionBackend")


def v2() -> None:
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    find_triton()
    without_streams()


def asynchronous() -> None:
    """vLLM's CPU platform switches asynchronous scheduling off; this switches it on again."""
    from vllm.platforms.cpu import CpuPlatform

    without_streams()
    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(checked)


def graphs() -> None:
    import graph_standin

    graph_standin.install()


INSTALL: dict[str, Callable[[], None]] = {
    "flash": flash,
    "flashinfer": flashinfer,
    "triton": triton,
    "v2": v2,
    "async": asynchronous,
    "graphs": graphs,
}


def use(backend: str) -> None:
    """Let the CPU platform use a backend by its path."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, backend)


def without_streams() -> None:
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda *args: None


def find_triton() -> None:
    """Let vLLM import Triton, which its CPU platform leaves alone, for Triton's interpreter."""
    import vllm.platforms as platforms

    platforms.current_platform  # noqa: B018 - it is found at the first look
    told = platforms.vllm_version_matches_substr
    platforms.vllm_version_matches_substr = lambda text: text != "cpu" and told(text)
    import vllm.triton_utils.importing as importing

    platforms.vllm_version_matches_substr = told
    assert importing.HAS_TRITON
    torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)


# Torch in the place of FlashAttention's kernels. Only what a dense decoder layer passes is read.


def replace_kernels() -> None:
    from vllm.v1.attention.backends import flash_attn

    flash_attn.reshape_and_cache_flash = write
    flash_attn.flash_attn_varlen_func = attention
    flash_attn.get_scheduler_metadata = schedule
    flash_attn.get_flash_attn_version = lambda *args, **kwargs: 3  # the one that plans ahead
    flash_attn.uses_fa4_hd256_kernel = lambda *args, **kwargs: False
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *args, **kwargs: False


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any) -> None:
    """keys, values: (blocks, block, Hkv, D); slots: (T,), negative for padding"""
    (real,) = torch.where(slots >= 0)
    block, offset = slots[real] // keys.shape[1], slots[real] % keys.shape[1]
    keys[block, offset], values[block, offset] = key[real], value[real]


def schedule(*, cache_seqlens: Tensor, max_seqlen_k: int, **_: Any) -> Tensor:
    """A plan holds for the lengths that it was made for; `attention` checks that it gets them."""
    return torch.cat([cache_seqlens.int(), cache_seqlens.new_tensor([max_seqlen_k]).int()])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    softmax_scale: float,
    scheduler_metadata: Tensor | None,
    **_: Any,
) -> Tensor:
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    if scheduler_metadata is not None:
        planned = scheduler_metadata[: len(lengths)].tolist()
        assert planned == lengths, f"planned for {planned}, called with {lengths}"
    assert max(lengths) <= max_seqlen_k
    for row, length in enumerate(lengths):
        first, end = starts[row], starts[row + 1]
        if first == end:
            continue
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        assert not strict or (blocks > 0).all(), f"the null block is read: {blocks.tolist()}"
        keys, values = (
            part[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for part in (k, v)
        )
        new = end - first
        seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        found = torch.nn.functional.scaled_dot_product_attention(
            q[first:end].transpose(0, 1)[None],
            keys,
            values,
            seen,
            scale=softmax_scale,
            enable_gqa=True,
        )
        out[first:end] = found[0].transpose(0, 1)
    return out


def __getattr__(name: str) -> Any:
    """The backends, whose base class vLLM imports when it looks for one of them by its path."""
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionMetadataBuilder,
    )

    class Trusting(FlashAttentionMetadataBuilder):
        def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
            lengths = common.seq_lens_cpu_upper_bound.clone()
            exact = common.replace(seq_lens=lengths)
            return super().build(common_prefix_len, exact, fast_build)

    class Host(FlashAttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "FLASHINFER"

        @staticmethod
        def get_builder_cls() -> type[Any]:
            return Trusting

    backends = {"flash_backend": FlashAttentionBackend, "trusting_backend": Host}
    if name not in backends:
        raise AttributeError(name)
    return backends[name]
