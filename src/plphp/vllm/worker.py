"""The worker side: attention metadata without freed blocks, and compaction at the end of a step.

The calls of one step: `begin`, `place`, `shift` once per cache group, `after_attention` once per
layer, `finish`, `report`. A step without tokens has no calls between `begin` and `finish`, and a
batch that vLLM makes up (to warm up, or to capture a CUDA graph) is outside a step.

Reads in vLLM: the CommonAttentionMetadata of each cache group, because later code has no access to
sequence lengths and block tables. It is copied and not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plphp.paged.choosing import choose_again, draft, settle
from plphp.paged.compaction import PagedLayer, with_fresh
from plphp.paged.fixed import FixedTensors
from plphp.paged.prompts import Choice, PromptEnd, PromptPart, spans_of
from plphp.paged.tables import BatchTables, PrunedRequest, to_device
from plphp.policy import LayerView
from plphp.vllm.messages import Pruned, Step


@dataclass(frozen=True)
class Ending:
    """A prompt whose last token is computed in this step.

    end: the scheduler's message
    row: its row in the batch
    start: index of its first token in the batch
    queries: by layer name, (W, H, D) of the last prompt tokens
    columns: by layer name, (Hkv, K), of layers whose tokens were selected before the end of the
        step
    """

    end: PromptEnd
    row: int
    start: int
    queries: dict[str, Tensor]
    columns: dict[str, Tensor]

    @property
    def last(self) -> int:
        """The index of the last prompt token in the batch."""
        return self.start + self.end.length - 1 - self.end.start


class WorkerSide:
    """The state of the plugin next to a model runner.

    layers: the decoder layers that are pruned
    depth: number of all layers of the decoder
    block_size: tokens per block
    over_ranks: as in `plphp.policy.LayerView`
    device: of the caches
    fixed: tensors for full CUDA graphs, or None

    Two fields last longer than a step: `pruned_requests`, the pruned requests that are being
    decoded, and `queries`, by request id and layer name the queries of the last prompt tokens, of
    prompts whose last token has not been computed.
    """

    def __init__(
        self,
        layers: Sequence[PagedLayer],
        depth: int,
        block_size: int,
        over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
        fixed: FixedTensors | None = None,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.places = {layer.name: place for place, layer in enumerate(layers)}
        self.groups = 1 + max(layer.group for layer in layers)
        self.depth = depth
        self.block_size = block_size
        self.over_ranks = over_ranks
        self.device = device
        self.fixed = fixed
        self.pruned_requests: dict[str, PrunedRequest] = {}
        self.queries: dict[str, dict[str, Tensor]] = {}
        self.batch_tables = BatchTables((), self.groups, device)
        self.step: Step | None = None
        self.endings: dict[str, Ending] = {}
        self.parts: dict[str, tuple[int, PromptPart]] = {}
        self.seen: set[str] = set()  # names of layers whose queries were stored in this step
        self.tables: dict[int, Tensor] = {}
        self.choices: dict[str, Choice] = {}

    @property
    def layers_per_group(self) -> int:
        """The number of layers that share a block table."""
        return len(self.layers) // self.groups

    def begin(self, step: Step) -> None:
        """Begin a step, and forget the requests that finished or were preempted.

        vLLM announces a step once or twice; the second call does nothing.
        """
        if step is self.step:
            return
        self.step, self.endings, self.parts, self.tables, self.choices = step, {}, {}, {}, {}
        self.seen = set()
        for request_id in step.released:
            self.pruned_requests.pop(request_id, None)
            self.queries.pop(request_id, None)
        if not self.pruned_requests:
            self.batch_tables = BatchTables((), self.groups, self.device)

    def place(self, ids: Sequence[str], tokens: Mapping[str, int]) -> None:
        """Take note of the requests of a batch. The rows after them, if any, are padding.

        ids: request ids in the order of the rows; tokens: by request id, number of tokens in this
            step
        """
        assert self.step is not None
        start = 0
        for row, request_id in enumerate(ids):
            end = self.step.ends.get(request_id)
            part = end.part if end else self.step.parts.get(request_id)
            if part:
                self.parts[request_id] = start, part
                self.queries.setdefault(request_id, {})
            if end:
                self.endings[request_id] = Ending(end, row, start, self.queries[request_id], {})
            start += tokens[request_id]
        rows = tuple(self.pruned_requests.get(request_id) for request_id in ids)
        if rows != self.batch_tables.rows:
            self.batch_tables = BatchTables(rows, self.groups, self.device)

    def shift(self, group: int, common: Any) -> Any:
        """vLLM's CommonAttentionMetadata of a group without freed blocks.

        Attention sees a shorter sequence. Its causal mask is aligned to the end of the sequence, so
        that kernels work unchanged. `seq_lens_cpu_upper_bound` is shifted by the same numbers,
        because FlashInfer's plans take it for the lengths themselves. Outside a step vLLM records
        CUDA graphs, and nothing is shifted.
        """
        if self.step is not None:
            self.tables[group] = common.block_table_tensor
            if not self.batch_tables.empty:
                common = self._shifted(group, common)
        if self.fixed is None:
            return common
        lengths, table = self.fixed.place(group, common.seq_lens, common.block_table_tensor)
        return common.replace(seq_lens=lengths, block_table_tensor=table)

    def _shifted(self, group: int, common: Any) -> Any:
        batch, block = self.batch_tables, self.block_size
        on_host = batch.shorten(group, block, common.seq_lens_cpu_upper_bound)
        return common.replace(
            seq_lens=batch.shorten(group, block, common.seq_lens),
            block_table_tensor=batch.apply(group, common.block_table_tensor),
            seq_lens_cpu_upper_bound=on_host,
            max_seq_len=int(on_host.max()),
            _num_computed_tokens_cache=None,
        )

    def after_attention(self, name: str, query: Tensor, output: Tensor) -> None:
        """Store the queries of last prompt tokens after the attention of a layer.

        A full CUDA graph calls this when it is recorded, and not when it is replayed.

        query: (T, H, D) of T tokens in the batch; output: (T, H * D) or (T, H, D), in which the
        rows of answers that follow a pruned prompt are replaced
        """
        if self.fixed is not None:
            self.fixed.keep(name, query)
        self._store(name, query)
        for ending in self.endings.values():
            if ending.end.end > ending.end.length:
                self._recompute_answer(self.layers[name], ending, query, output)

    def _store(self, name: str, query: Tensor) -> None:
        """Store the queries of last prompt tokens, from those (T, H, D) of all tokens of a step."""
        self.seen.add(name)
        for request_id, (first, part) in self.parts.items():
            queries = self.queries[request_id]
            new = query[first : first + part.end - part.start]
            queries[name] = part.join(queries.get(name), new)

    def finish(self) -> None:
        """Prune the prompts whose last token was computed in this step.

        The host waits for the device once, for all prompts that are pruned for the first time.
        """
        if self.fixed is not None and self.parts:
            for name in self.layers.keys() - self.seen:  # a graph was replayed
                self._store(name, self.fixed.queries[name])
        block, per_group = self.block_size, self.layers_per_group
        new = {name: one for name, one in self.endings.items() if one.end.choice is None}
        drafts = [draft(self._views(one), one.end.policy, block, per_group) for one in new.values()]
        choices = settle(drafts, [one.end for one in new.values()], block, per_group)
        for ending, made, choice in zip(new.values(), drafts, choices, strict=True):
            columns = made.columns(choice, ending.end.text)
            ending.columns.update(zip(self.layers, columns, strict=True))
        chosen = dict(zip(new, choices, strict=True))
        for request_id, ending in self.endings.items():
            choice = ending.end.choice or chosen[request_id]
            self.choices[request_id] = choice
            self._compact(ending, choice)
            if any(choice.freed):
                self.pruned_requests[request_id] = PrunedRequest.of(choice.freed, ending.end, block)
            del self.queries[request_id]
        self.endings, self.parts, self.step = {}, {}, None

    def report(self) -> Pruned | None:
        """The message to the scheduler; None if no prompt was pruned."""
        return Pruned(self.choices) if self.choices else None

    def _blocks(self, layer: PagedLayer, ending: Ending) -> Tensor:
        """The blocks (n,) of a request up to its last token of this step, from vLLM's table."""
        used = -(-ending.end.end // self.block_size)
        return self.tables[layer.group][ending.row, :used].long()

    def _choose_again(self, layer: PagedLayer, ending: Ending) -> Tensor:
        """The kept columns (Hkv, K) of one layer of a request that was preempted.

        They are computed once per step.
        """
        end, choice = ending.end, ending.end.choice
        assert choice is not None
        if layer.name not in ending.columns:
            place = self.places[layer.name]
            ending.columns[layer.name] = choose_again(
                self._view(layer, ending, self._spans(ending)),
                end.policy,
                choice.rates[place],
                choice.kept[place],
                end.text,
            )
        return ending.columns[layer.name]

    def _spans(self, ending: Ending) -> Tensor:
        """The spans (N,) int64 of a prompt, on the device."""
        return to_device(spans_of(ending.end.images, ending.end.length), self.device)

    def _views(self, ending: Ending) -> Iterator[LayerView]:
        """The inputs of the policy for all layers, one after the other."""
        spans = self._spans(ending)
        return (self._view(layer, ending, spans) for layer in self.layers.values())

    def _view(self, layer: PagedLayer, ending: Ending, spans: Tensor) -> LayerView:
        """The input of the policy for one layer."""
        queries, blocks = ending.queries[layer.name], self._blocks(layer, ending)
        return replace(
            layer.view(queries, blocks, spans),
            layer=layer.index,
            layers=self.depth,
            over_ranks=self.over_ranks,
            images=ending.end.images[-1][0],
        )

    def _compact(self, ending: Ending, choice: Choice) -> None:
        """Copy the kept tokens of a prompt to its end in every layer.

        The tokens after the prompt then keep their slots.
        """
        end, block = ending.end, self.block_size
        fresh = to_device(torch.tensor(end.fresh or (), dtype=torch.int64), self.device)
        for layer in self.layers.values():
            freed = choice.freed[layer.group]
            if not freed:
                continue
            columns = ending.columns.get(layer.name)
            if columns is None:
                columns = self._choose_again(layer, ending)
            source = target = self._blocks(layer, ending)
            if end.fresh is not None:
                target = with_fresh(source, fresh[layer.group], end.length // block)
            layer.move(columns, source, target, freed * block, block)

    def _recompute_answer(
        self, layer: PagedLayer, ending: Ending, query: Tensor, output: Tensor
    ) -> None:
        """Replace the attention output of answer tokens that follow a pruned prompt in this step.

        A request that was preempted computes its answer again, together with the last tokens of its
        prompt. The answer tokens must attend to the pruned prompt, as they did before.
        """
        end, choice = ending.end, ending.end.choice
        assert choice is not None, (
            "only a request that was preempted has an answer to compute again"
        )
        if not choice.freed[layer.group]:
            return
        first, new = ending.last + 1, end.end - end.length
        kept, blocks = self._choose_again(layer, ending), self._blocks(layer, ending)
        out = layer.attend_kept(query[first : first + new], blocks, kept, end.length)
        rows = output[first : first + new]
        rows.copy_(out.reshape(rows.shape))
