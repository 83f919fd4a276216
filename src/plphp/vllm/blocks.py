"""Cache groups of few layers, and what they do with the blocks of a pruned prompt.

Touches: vLLM's KVCacheSpec and single-type manager, because only they decide which layers share a
block table and when its blocks are returned; and its coordinator, because asking every group about
every request in every step would take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from plphp.errors import UnsupportedModelError
from plphp.vllm.messages import in_use


@dataclass(frozen=True, kw_only=True)
class LayerSpec(FullAttentionSpec):
    """Full attention whose layers share a block table with their own group only."""

    group: int = -1

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for layers of one group; AssertionError is vLLM's way to hear no."""
        if len({spec.group for spec in specs}) != 1:
            raise AssertionError("layers of different groups do not share a block table")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return len({getattr(spec, "group", None) for spec in kv_cache_specs.values()}) == 1


def refusal(layer: str, reason: str) -> UnsupportedModelError:
    """What to raise for a layer that cannot be pruned."""
    return UnsupportedModelError(
        f"{layer} cannot be pruned in vLLM: {reason}; start vLLM without PLPHPConnector"
    )


def other_cache(spec: KVCacheSpec) -> str:
    """The reason for layers whose cache is not that of full attention."""
    return f"it has a cache of kind {type(spec).__name__}, and only full attention can be pruned"


def check_groups(groups: Sequence[Any]) -> None:
    """Raise UnsupportedModelError where a cache group is not of `LayerSpec`.

    Layers of other classes than Attention (chunked, linear, latent) make their specs themselves.
    """
    for group in groups:
        if not isinstance(group.kv_cache_spec, LayerSpec):
            raise refusal(group.layer_names[0], other_cache(group.kv_cache_spec))


@dataclass(frozen=True)
class PromptBlocks:
    """How the blocks of one prompt are treated.

    length: tokens of the prompt
    fresh: blocks to reserve in every group, for pruning into; None to prune in place, and then the
        prompt neither reads nor feeds the prefix cache
    """

    length: int
    fresh: int | None


class LayerBlocks(FullAttentionManager):
    """Blocks of one cache group. `prompts` is shared by all groups and owned by the scheduler side.

    reserved: request -> fresh blocks, while the step that ends its prompt runs
    done: requests whose prompts have been pruned
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[str, PromptBlocks] = {}
        self.reserved: dict[str, list[KVCacheBlock]] = {}
        self.done: set[str] = set()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        needed: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return needed + self.to_reserve(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if reserve := self.to_reserve(request_id, num_tokens):
            self.reserved[request_id] = self.block_pool.get_new_blocks(reserve)
        new: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        return new

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer full blocks to later prompts: of a pruned prompt only what was there before."""
        if num_tokens := self.to_offer(request.request_id, num_tokens):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.done.discard(request_id)
        held: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return held + self.reserved.pop(request_id, [])

    def drop(self, request_id: str, dead: int) -> None:
        """Free what pruning emptied: `dead` leading blocks, and those that were copied from."""
        self.done.add(request_id)
        held = self.req_to_blocks[request_id]
        fresh = self.reserved.pop(request_id, [])
        full = self.prompts[request_id].length // self.block_size
        used = list(in_use(fresh, full, dead))
        free = held[: dead + len(used)]
        held[: dead + len(used)] = [self._null_block] * dead + used
        self.block_pool.free_blocks(fresh[: len(fresh) - len(used)])
        # The last of a prompt first, so that its beginning stays longest in the prefix cache.
        self.block_pool.free_blocks(reversed(free))

    def to_offer(self, request_id: str, num_tokens: int) -> int:
        """Of so many computed tokens, those that the prefix cache may have."""
        prompt = self.prompts.get(request_id)
        if prompt is None:
            return num_tokens
        return 0 if prompt.fresh is None else min(num_tokens, prompt.length)

    def to_reserve(self, request_id: str, num_tokens: int) -> int:
        """Fresh blocks that a request needs beside those of its table, to get to so many tokens."""
        prompt = self.prompts.get(request_id)
        if prompt is None or not prompt.fresh or num_tokens < prompt.length:
            return 0
        return 0 if request_id in self.done or request_id in self.reserved else prompt.fresh


class Lockstep:
    """vLLM's coordinator, for groups whose block tables always have the same length.

    What the first group needs, all need, and in most steps that is nothing.
    """

    def __init__(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self.first: LayerBlocks = coordinator.single_type_managers[0]
        self.groups = len(coordinator.single_type_managers)
        self.nothing: tuple[list[KVCacheBlock], ...] = tuple([] for _ in range(self.groups))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coordinator, name)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Any, *args: Any, **kwargs: Any
    ) -> int:
        if self._has_room(request_id, num_tokens) and not any(new_computed_blocks):
            return 0
        needed: int = self.coordinator.get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return needed

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        if self._has_room(request_id, num_tokens):
            return self.nothing
        new: tuple[list[KVCacheBlock], ...] = self.coordinator.allocate_new_blocks(
            request_id, num_tokens, *args, **kwargs
        )
        return new

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        request_id, first = request.request_id, self.first
        full = first.to_offer(request_id, num_computed_tokens) // first.block_size
        if full > first.num_cached_block.get(request_id, 0):
            self.coordinator.cache_blocks(request, num_computed_tokens)

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing leaves a window: blocks go in `LayerBlocks.drop`."""

    def _has_room(self, request_id: str, num_tokens: int) -> bool:
        held = self.first.req_to_blocks.get(request_id)
        room = held is not None and len(held) * self.first.block_size >= num_tokens
        return room and not self.first.to_reserve(request_id, num_tokens)


def register() -> None:
    """Make the spec known to vLLM: in the engine core and in every worker."""
    # Registering into an empty registry would keep vLLM's own specs out of it.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LayerSpec, LayerBlocks, uniform_type_base_spec=LayerSpec)
