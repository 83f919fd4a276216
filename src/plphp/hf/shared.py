"""`Shared`, the state that all layers of a pruned cache share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plphp.cache import bucketed
from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.prompt import Prefill
from plphp.policy import Policy, SequencePolicy, cache_stage, policy, sequence_stage
from plphp.policy.checks import check_count
from plphp.recall import KeptBits, Recall


@dataclass
class Shared:
    """State that all layers of one conversation share.

    It holds no reference to a layer or cache. A reference cycle would keep the keys and values of
    finished generations allocated until Python's garbage collector runs.

    config: of the language model
    max_len, static: as given to `PrunedCache`
    policy: of the pruning that reads or has read the prompt
    attached: indices of the layers that pruning is attached to
    over_ranks: mean over tensor-parallel ranks, None without them
    depth: number of decoder layers in the cache
    prunable: indices of the layers that are pruned
    prefill: state of the prompt that is being read, None between prompts
    last_image: the column after the last vision token of the conversation, 0 without any
    watch: a function called after a layer's attention, see `attention_probe`, or None
    recall: where and how dropped tokens are parked, None if they are lost
    spans: (B, columns) int64 of all prompts read so far, with recall only, else None
    kept: the bits of kept codes, None if kept tokens are stored in full
    """

    config: Any
    max_len: int | None
    static: bool
    policy: Policy
    attached: frozenset[int]
    over_ranks: Any
    depth: int = 0
    prunable: tuple[int, ...] = ()
    prefill: Prefill | None = None
    last_image: int = 0
    watch: Callable[..., None] | None = None
    recall: Recall | None = None
    spans: Tensor | None = None
    kept: KeptBits | None = None

    @property
    def compacts_all(self) -> bool:
        """Whether every layer is compacted after every prompt, whatever the policy drops."""
        return self.static or self.kept is not None

    def stages(self, layer: int) -> tuple[SequencePolicy | None, Policy | None]:
        """The policies that look at the attention of a layer: a sequence and a cache method.

        Where every layer has to be compacted, the cache method is `full` if the policy has none.
        """
        first, second = sequence_stage(self.policy), cache_stage(self.policy)
        if first is not None and not first.scores_layer(layer, self.depth):
            first = None
        if second is None and self.compacts_all:
            second = policy("full")
        if layer not in self.prunable or (second and not second.scores_layer(layer, self.depth)):
            second = None
        return first, second

    def reserve(self, longest: int, logical: int) -> int | None:
        """Slots to keep free after a compaction, for the columns up to `max_len`.

        longest: slots in use; logical: columns seen. None without `max_len`: the store decides.
        """
        if self.max_len is None:
            return None
        to_come = max(self.max_len - logical, 1)
        return bucketed(longest + to_come) - longest if self.static else to_come


def shared_by(pruning: Pruning, max_len: int | None, static: bool) -> Shared:
    """The state of a new cache of an attached model. max_len, static: as given to `PrunedCache`.

    Raises InputError and UnsupportedModeError for options that cannot be combined.
    """
    if max_len is not None:
        check_count("max_len", max_len, 1)
    if static and max_len is None:
        raise InputError("static=True needs max_len, the columns of prompt and answer together")
    if static and pruning.recall is not None:
        raise UnsupportedModeError(
            "recall chooses tokens between the kernels of a step: use static=False"
        )
    if static and pruning.kept is not None:
        raise UnsupportedModeError(
            "the codes of kv_bits differ in length between prompts: use static=False"
        )
    return Shared(
        config=compat.text_config(pruning.model),
        max_len=max_len,
        static=static,
        policy=pruning.policy,
        attached=frozenset(pruning.layers),
        over_ranks=pruning.over_ranks,
        recall=pruning.recall,
        kept=pruning.kept,
    )
