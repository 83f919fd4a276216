"""One decoder layer in a worker: vLLM's Attention, read and written for `plphp.paged`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plphp.paged.compaction import PagedLayer
from plphp.vllm.layout import Reader


@dataclass(frozen=True)
class Layer(PagedLayer):
    """One decoder layer.

    name, group, index: as in `PagedLayer`
    module: vLLM's Attention, which owns the paged cache
    reader: function that reads the cache of the layer's attention backend
    """

    name: str
    group: int
    index: int
    module: Any
    reader: Reader

    @property
    def kv_heads(self) -> int:
        return int(self.module.num_kv_heads)

    @property
    def scale(self) -> float:
        return float(self.module.impl.scale)

    @property
    def softcap(self) -> float | None:
        return self.module.impl.logits_soft_cap or None

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        return self.reader(self.module.kv_cache, blocks)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.module.impl.do_kv_cache_update(self.module, keys, values, self.module.kv_cache, slots)
