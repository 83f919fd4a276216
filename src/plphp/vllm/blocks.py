"""Cache groups of a few layers each, and the reservation and release of their blocks.

Changes in vLLM: KVCacheSpec and the single-type manager are subclassed, because they alone decide
which layers share a block table and when its blocks are returned. The coordinator is wrapped,
because calling every group for every request in every step would take milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from plphp.errors import UnsupportedModelError
from plphp.paged.blocks import Lockstep, PromptBlocks, pruned_table


@dataclass(frozen=True, kw_only=True)
class LayerSpec(FullAttentionSpec):
    """The spec of full attention whose layers share a block table within their group only.

    group: index of the group
    """

    group: int = -1

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """The common spec of layers of one group.

        Raises AssertionError for layers of different groups, which vLLM expects and handles.
        """
        if len({getattr(spec, "group", None) for spec in specs}) != 1:
            raise AssertionError("layers of different groups do not share a block table")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return len({getattr(spec, "group", None) for spec in kv_cache_specs.values()}) == 1


def refusal(layer: str, reason: str) -> UnsupportedModelError:
    """The error for a layer that cannot be pruned."""
    return UnsupportedModelError(
        f"{layer} cannot be pruned in vLLM: {reason}; start vLLM without PLPHPConnector"
    )


LEFT_ALONE = (SlidingWindowSpec, ChunkedLocalAttentionSpec)  # specs of layers that are not pruned


def other_cache(spec: KVCacheSpec) -> str:
    """The reason to refuse a layer whose cache is not that of full attention."""
    if isinstance(spec, MambaSpec):
        return (
            "it has a recurrent state, to whose size vLLM enlarges the blocks of all layers, so "
            "that dropped tokens would seldom fill one"
        )
    return f"its cache is of kind {type(spec).__name__}, and only full attention can be pruned"


def prunable(groups: Sequence[Any]) -> list[Any]:
    """The cache groups with a `LayerSpec`, which are pruned. Those of `LEFT_ALONE` are not.

    Layers of other classes than Attention (chunked, linear, latent) make specs of their own. Raises
    UnsupportedModelError for a spec of another kind, for blocks of several sizes, and if no layer
    can be pruned.
    """
    for group in groups:
        if type(group.kv_cache_spec) not in (LayerSpec, *LEFT_ALONE):
            raise refusal(group.layer_names[0], other_cache(group.kv_cache_spec))
        sizes = sorted({groups[0].kv_cache_spec.block_size, group.kv_cache_spec.block_size})
        if len(sizes) > 1:
            reason = "layers have blocks of {} and {} tokens, because their keys differ in size"
            raise refusal(group.layer_names[0], reason.format(*sizes))
    own = [group for group in groups if isinstance(group.kv_cache_spec, LayerSpec)]
    if not own:
        raise refusal(groups[0].layer_names[0], "no layer of the model has full attention")
    return own


class LayerBlocks(FullAttentionManager):
    """The manager of the blocks of one cache group.

    prompts: by request id; all groups share this dict, and `SchedulerSide` fills it
    reserved: request id -> fresh blocks, during the step that computes the prompt's last token
    pruned: ids of requests whose prompts have been pruned
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prompts: dict[str, PromptBlocks] = {}
        self.reserved: dict[str, list[KVCacheBlock]] = {}
        self.pruned: set[str] = set()

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
        return needed + self.blocks_to_reserve(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if reserve := self.blocks_to_reserve(request_id, num_tokens):
            self.reserved[request_id] = self.block_pool.get_new_blocks(reserve)
        new: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        return new

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Add full blocks to the prefix cache; of a pruned request, only unpruned prompt blocks."""
        if num_tokens := self.cacheable_tokens(request.request_id, num_tokens):
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.pruned.discard(request_id)
        held: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return held + self.reserved.pop(request_id, [])

    def drop(self, request_id: str, freed: int) -> None:
        """Free the blocks that hold no tokens after pruning.

        freed: number of leading blocks of the table that hold no tokens any more. Where tokens were
            moved into fresh blocks, the blocks that they came from are freed as well
        """
        self.pruned.add(request_id)
        held = self.req_to_blocks[request_id]
        fresh = self.reserved.pop(request_id, [])
        full = self.prompts[request_id].length // self.block_size
        held[:], gone = pruned_table(held, fresh, full, freed, self._null_block)
        self.block_pool.free_blocks(gone)

    def cacheable_tokens(self, request_id: str, num_tokens: int) -> int:
        """The number of tokens, of `num_tokens` computed ones, that the prefix cache may hold."""
        prompt = self.prompts.get(request_id)
        return num_tokens if prompt is None else prompt.cacheable(num_tokens)

    def blocks_to_reserve(self, request_id: str, num_tokens: int) -> int:
        """The number of fresh blocks to reserve before a request grows to `num_tokens` tokens."""
        prompt = self.prompts.get(request_id)
        if prompt is None or request_id in self.pruned or request_id in self.reserved:
            return 0
        return prompt.to_reserve(num_tokens)


class LockstepCoordinator:
    """A wrapper of vLLM's coordinator that answers for all groups as far as their tables are alike.

    Where all groups are pruned, their block tables always have equal lengths, and all need as many
    blocks as the first group. In most steps no group needs any, and the wrapper then answers
    without calling the groups. Beside layers that are left alone, every group is called.
    """

    def __init__(self, coordinator: Any, freed: Callable[[str], None], window: int) -> None:
        """freed: called with the id of a request that has given all its blocks back.

        window: number of last prompt tokens whose queries the method reads, so that they are
            computed even where the prefix cache holds them
        """
        self.coordinator = coordinator
        self.freed = freed
        self.window = window
        managers = coordinator.single_type_managers
        self.alike = all(isinstance(manager, LayerBlocks) for manager in managers)
        self.first = next(manager for manager in managers if isinstance(manager, LayerBlocks))
        self.lockstep = Lockstep(self.first.req_to_blocks, self.first.block_size)
        self.no_blocks: tuple[list[KVCacheBlock], ...] = tuple([] for _ in managers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coordinator, name)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Any, *args: Any, **kwargs: Any
    ) -> int:
        if self._has_slots(request_id, num_tokens) and not any(new_computed_blocks):
            return 0
        needed: int = self.coordinator.get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        return needed

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        if self._has_slots(request_id, num_tokens):
            return self.no_blocks
        new: tuple[list[KVCacheBlock], ...] = self.coordinator.allocate_new_blocks(
            request_id, num_tokens, *args, **kwargs
        )
        return new

    def find_longest_cache_hit(self, block_hashes: Any, max_cache_hit_length: int) -> Any:
        """The cached blocks of a prompt. vLLM asks for all of its tokens but the last one."""
        most = max(max_cache_hit_length - (self.window - 1), 0)
        return self.coordinator.find_longest_cache_hit(block_hashes, most)

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Add full blocks of all groups to the prefix cache.

        Of a pruned request no group adds more than its prompt: in layers that are left alone, too,
        keys and values of the answer follow from pruned layers.
        """
        request_id, first = request.request_id, self.first
        most = first.cacheable_tokens(request_id, num_computed_tokens)
        cached = first.num_cached_block.get(request_id, 0) if self.alike else 0
        if most // first.block_size > cached:
            self.coordinator.cache_blocks(request, most)

    def free(self, request_id: str) -> None:
        self.coordinator.free(request_id)
        self.freed(request_id)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        blocks = self.coordinator.pop_blocks_for_free(request_id)
        self.freed(request_id)
        return blocks

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Free blocks that are outside of windows. `LayerBlocks.drop` frees the pruned blocks."""
        if not self.alike:
            self.coordinator.remove_skipped_blocks(*args, **kwargs)

    def _has_slots(self, request_id: str, num_tokens: int) -> bool:
        """Whether the blocks that a request holds have slots for `num_tokens` tokens."""
        enough = self.alike and self.lockstep.has_slots(request_id, num_tokens)
        return enough and not self.first.blocks_to_reserve(request_id, num_tokens)


def register() -> None:
    """Register `LayerSpec` with vLLM. The engine core and every worker call this."""
    # vLLM fills an empty registry with its own specs; they would be missing if plphp's came first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LayerSpec, LayerBlocks, uniform_type_base_spec=LayerSpec)
