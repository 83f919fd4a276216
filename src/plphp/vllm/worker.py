"""The worker's side: shifted metadata for pruned requests, and one compaction at a step's end.

The order of a step: `begin`, `shift` once a cache group, `watch` once a layer, `finish`, `report`.

Touches: the CommonAttentionMetadata that vLLM gives every backend, because nothing later knows a
sequence's length and blocks; it is copied, never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.attention import attend
from plphp.vllm.compaction import Layer, choose, choose_again, summary
from plphp.vllm.frame import Frame, Live
from plphp.vllm.messages import Choice, PromptEnd, Pruned, Step, spans_of


@dataclass(frozen=True)
class Ending:
    """A prompt that ends in this step.

    row, start: its row in the batch and its first token there
    queries: layer's name -> (H, D) of the last prompt token
    columns: layer's name -> (Hkv, K), of layers that had to choose before the step's end
    """

    end: PromptEnd
    row: int
    start: int
    queries: dict[str, Tensor]
    columns: dict[str, Tensor]

    @property
    def last(self) -> int:
        """Where the last prompt token is in the batch."""
        return self.start + self.end.length - 1 - self.end.start


class WorkerSide:
    """Lives beside a model runner. What outlives a step is `live`: requests that are decoded."""

    def __init__(
        self, layers: Sequence[Layer], block_size: int, over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.groups = 1 + max(layer.group for layer in layers)
        self.block_size = block_size
        self.over_ranks = over_ranks
        self.live: dict[str, Live] = {}
        self.frame = Frame((), self.groups)
        self.begin(None)

    @property
    def together(self) -> int:
        """Layers that share a block table."""
        return len(self.layers) // self.groups

    def begin(self, step: Step | None) -> None:
        """A step starts: what finished or was preempted is pruned no more."""
        self.step = step
        self.matched = False
        self.endings: dict[str, Ending] = {}
        self.tables: dict[int, Tensor] = {}
        self.choices: dict[str, Choice] = {}
        for request_id in step.gone if step else ():
            self.live.pop(request_id, None)
        if not self.live:
            self.frame = Frame((), self.groups)

    def shift(self, group: int, common: Any) -> Any:
        """vLLM's CommonAttentionMetadata of a group, without the blocks that hold nothing.

        Attention is causal from the bottom right: it sees a shorter sequence, no more.
        """
        if self.step is None:
            return common
        if not self.matched:
            self._match_rows(common)
        self.tables[group] = common.block_table_tensor
        if self.frame.empty:
            return common
        table, dead = self.frame.apply(group, common.block_table_tensor)
        seq_lens = common.seq_lens - dead * self.block_size
        return common.replace(
            seq_lens=seq_lens,
            block_table_tensor=table,
            max_seq_len=int(seq_lens.max()),
            _num_computed_tokens_cache=None,
        )

    def watch(self, name: str, query: Tensor, output: Tensor) -> None:
        """A layer's attention has run: query (T, H, D), output (T, H * D) or (T, H, D)."""
        for ending in self.endings.values():
            ending.queries[name] = query[ending.last].clone()
            if ending.end.end > ending.end.length:
                self._redo_tail(self.layers[name], ending, query, output)

    def finish(self) -> None:
        """The forward has run: prune what ended in this step."""
        for request_id, ending in self.endings.items():
            choice, columns = self._choose(ending)
            self.choices[request_id] = choice
            for layer in self.layers.values():
                self._compact(layer, ending.end, self._blocks(layer, ending), choice, columns)
            if any(choice.dead):
                self.live[request_id] = Live.of(choice.dead, ending.end, self.block_size)
        self.endings = {}

    def report(self) -> Pruned | None:
        """What the scheduler has to know."""
        return Pruned(self.choices) if self.choices else None

    def _match_rows(self, common: Any) -> None:
        """Find which row is which request, by the block that it writes last in group 0."""
        assert self.step is not None
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        last = torch.tensor(starts[1:], device=common.slot_mapping.device) - 1
        blocks = (common.slot_mapping[last] // self.block_size).tolist()
        ids = [self.step.rows[block] for block in blocks]
        for row, request_id in enumerate(ids):
            if request_id in self.step.ends:
                end = self.step.ends[request_id]
                self.endings[request_id] = Ending(end, row, starts[row], {}, {})
        rows = tuple(self.live.get(request_id) for request_id in ids)
        if rows != self.frame.rows:
            self.frame = Frame(rows, self.groups)
        self.matched = True

    def _blocks(self, layer: Layer, ending: Ending) -> Tensor:
        """Blocks (n,) of the request up to the end of this step, as the runner has them."""
        used = -(-ending.end.end // self.block_size)
        return self.tables[layer.group][ending.row, :used].long()

    def _choose(self, ending: Ending) -> tuple[Choice, dict[str, Tensor]]:
        """What a prompt keeps: in numbers, and as columns (Hkv, K) of the layers that drop some."""
        end, layers = ending.end, list(self.layers.values())
        if end.choice is not None:
            drop = [layer for layer in layers if end.choice.dead[layer.group]]
            return end.choice, {layer.name: self._choose_again(layer, ending) for layer in drop}
        probs = torch.stack([self._score(layer, ending) for layer in layers])
        spans = spans_of(end.images, end.length).to(probs.device)
        plan = choose(probs, spans, end.policy, layers[0].kv_heads, self.together, self.over_ranks)
        choice = summary(plan, spans, self.block_size, self.together)
        kept = [end.length - self.block_size * choice.dead[layer.group] for layer in layers]
        columns = (row[:, -count:] for row, count in zip(plan.columns, kept, strict=True))
        return choice, dict(zip(self.layers, columns, strict=True))

    def _choose_again(self, layer: Layer, ending: Ending) -> Tensor:
        """Columns (Hkv, K) of one layer of a request that was preempted, found once a step."""
        end, choice = ending.end, ending.end.choice
        assert choice is not None
        if layer.name not in ending.columns:
            index = list(self.layers).index(layer.name)
            probs = self._score(layer, ending)
            spans = spans_of(end.images, end.length).to(probs.device)
            ending.columns[layer.name] = choose_again(
                probs, spans, end.policy, layer.kv_heads, choice.rates[index], choice.kept[index]
            )
        return ending.columns[layer.name]

    def _score(self, layer: Layer, ending: Ending) -> Tensor:
        """(H, N) float32 attention of the last prompt token."""
        query, blocks = ending.queries[layer.name], self._blocks(layer, ending)
        return layer.score(query, blocks, ending.end.length)

    def _compact(
        self,
        layer: Layer,
        end: PromptEnd,
        blocks: Tensor,
        choice: Choice,
        columns: dict[str, Tensor],
    ) -> None:
        """Pack what a layer keeps against the end of its prompt, so that later slots stay."""
        dead = choice.dead[layer.group]
        if not dead:
            return
        target = blocks
        if end.fresh is not None:
            full = end.length // self.block_size
            fresh = torch.tensor(end.fresh[layer.group], device=blocks.device)
            target = blocks.clone()
            target[full - len(fresh) : full] = fresh
        first = dead * self.block_size
        layer.move(columns[layer.name], blocks, target, first, self.block_size)

    def _redo_tail(self, layer: Layer, ending: Ending, query: Tensor, output: Tensor) -> None:
        """A request that was preempted reads its answer again, in one chunk with the prompt's end.

        What it generated has to see the pruned prompt, as it did the first time.
        """
        end, choice = ending.end, ending.end.choice
        assert choice is not None, "only what was preempted after its prompt has a tail"
        if not choice.dead[layer.group]:
            return
        kept = self._choose_again(layer, ending)
        tail = torch.arange(end.length, end.end, device=kept.device)
        columns = torch.cat([kept, tail.expand(len(kept), -1)], 1)
        keys, values = layer.gather(self._blocks(layer, ending), columns)
        first, new, held = ending.last + 1, len(tail), keys.shape[1]
        seen = torch.ones(new, held, dtype=torch.bool, device=kept.device).tril(held - new)
        asked = query[first : first + new].transpose(0, 1)[None]
        out = attend(asked, keys[None], values[None], seen[None, None], layer.scale, layer.softcap)
        rows = output[first : first + new]
        rows.copy_(out[0].transpose(0, 1).reshape(rows.shape))
