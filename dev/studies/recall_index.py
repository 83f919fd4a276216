"""Which index finds the tokens that a step needs, how many it must read, and how often to choose.

    python dev/studies/recall_index.py --limit 96 --tasks describe,long,grid

The whole cache is held; at every step each layer and KV head may read all text and the vision
tokens that a variant chooses for the step's own query:

exact         by the query's product with the keys themselves
rank r        with the keys' projections onto their r first principal directions
int8 r        the same projections in 8 bits; "int8 sum": by the sum of a KV head's queries; "int8
              max": by the highest logit, each query head's own maximum taken off
bits b        with keys rounded to b bits, per channel in groups of 32 tokens
blocks n      whole blocks of n tokens, by the product with their mean key
random        by lot, anew at every step
every m       exact, but chosen at every m-th step only
novelty       chosen once, at the prompt
int b         nothing is left out, everything rounded: keys per channel in groups of 32 tokens,
              values per token (KIVI)
flip b        the same with keys per token, once their mean is taken off and their channels are
              scaled alike, and values per channel in groups of 64 tokens

A simulation of what is read: nothing is freed. The findings are in docs/recall-results.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import plphp
from plphp.attention import reference
from plphp.eval.answers import _continue_answer, _crop, _generate, end_tokens
from plphp.eval.batches import Batch, in_batches, make_batch
from plphp.eval.tasks import TASKS
from plphp.hf.shared_prefill import SharedPrefill, read
from plphp.inputs import load
from plphp.policy.novelty import novelty

SEED, BATCH, GROUP, LAYERS = 8, 16, 32, 6


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """To 2**bits levels between the extremes along a dimension."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low).clamp(min=1e-8) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def in_groups(x: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """(B, H, V, D) rounded per channel in groups of tokens."""
    short = -x.shape[2] % group
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, short, -1)], 2)
    parts = padded.unflatten(2, (-1, group))
    return rounded(parts, bits, 3).flatten(2, 3)[:, :, : x.shape[2]]


@dataclass
class Reader:
    """Stands in for the package's decode attention. vision (B, prompt slots) bool."""

    kind: str
    number: int
    budget: float
    vision: Tensor
    spans: Tensor
    calls: int = 0
    known: dict[Any, Any] = field(default_factory=dict)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, cap: Any = None
    ) -> Tensor:
        layer, step = self.calls % LAYERS, self.calls // LAYERS
        self.calls += 1
        if q.shape[2] > 1 or self.kind == "full":  # a later turn's question sees everything
            self.calls = 0
            return reference.attend(q, k, v, visible, scale, cap)
        n = self.vision.shape[1]
        if self.kind == "int":
            k, v = k.clone(), v.clone()
            lot = self.vision[:, None, :, None]
            k[:, :, :n] = torch.where(lot, in_groups(k[:, :, :n], self.number), k[:, :, :n])
            v[:, :, :n] = torch.where(lot, rounded(v[:, :, :n], self.number, 3), v[:, :, :n])
            return reference.attend(q, k, v, visible, scale, cap)
        if self.kind == "flip":
            lot = self.vision[:, None, :, None]
            k, v = k.clone(), v.clone()
            k[:, :, :n] = torch.where(lot, self.flipped(k[:, :, :n]), k[:, :, :n])
            v[:, :, :n] = torch.where(lot, in_groups(v[:, :, :n], self.number, 64), v[:, :, :n])
            return reference.attend(q, k, v, visible, scale, cap)
        if self.kind != "every" or step % self.number == 0:
            self.known["see", layer] = self.choose(q * scale, k[:, :, :n], v[:, :, :n], layer)
        see = self.known["see", layer]
        see = torch.cat([see, see.new_ones(*see.shape[:2], k.shape[2] - n)], 2)[:, :, None]
        return reference.attend(q, k, v, see if visible is None else see & visible, scale, cap)

    def choose(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """(B, Hkv, prompt slots) bool: text and what is read of the images."""
        scores = self.scores(q, k, v, layer)
        scores = scores.masked_fill(~self.vision[:, None], -torch.inf)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        count = (self.vision.sum(-1) * self.budget).ceil()
        return (rank < count[:, None, None]) | ~self.vision[:, None]

    def scores(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if self.kind == "random":
            return torch.rand(k.shape[:3])
        if self.kind == "novelty":
            return novelty(v, self.spans, int(self.spans.max()))
        keys = self.index(k, layer)
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        if self.kind == "int8 sum":
            grouped = grouped.sum(2, keepdim=True)
        logits = grouped @ keys.transpose(2, 3)  # (B, Hkv, G, slots)
        logits = logits.masked_fill(~self.vision[:, None, None], -torch.inf)
        if self.kind == "int8 max":
            return (logits - logits.amax(-1, keepdim=True)).amax(2)
        return logits.softmax(-1).amax(2)

    def index(self, k: Tensor, layer: int) -> Tensor:
        if (layer, "index") not in self.known:
            self.known[layer, "index"] = self.summary(k)
        return self.known[layer, "index"]

    def centred(self, k: Tensor) -> Tensor:
        own = k * self.vision[:, None, :, None]
        mean = own.sum(2, keepdim=True) / self.vision.sum(-1)[:, None, None, None]
        return (k - mean) * self.vision[:, None, :, None]

    def flipped(self, k: Tensor) -> Tensor:
        own = self.centred(k)
        spread = own.square().mean(2, keepdim=True).sqrt().clamp(min=1e-8)
        return rounded(own / spread, self.number, 3) * spread + (k - own)

    def summary(self, k: Tensor) -> Tensor:
        if self.kind == "bits":
            return in_groups(k, self.number)
        if self.kind == "rank" or self.kind.startswith("int8"):
            own = self.centred(k)
            basis = torch.linalg.eigh(own.transpose(2, 3) @ own).eigenvectors[..., -self.number :]
            found = own @ basis
            if self.kind != "rank":
                step = found.abs().amax(2, keepdim=True).clamp(min=1e-8) / 127
                found = (found / step).round() * step
            return found @ basis.transpose(2, 3)
        if self.kind == "blocks":
            short = -k.shape[2] % self.number
            lead = k[:, :, :1].expand(-1, -1, short, -1)
            parts = torch.cat([lead, k], 2).unflatten(2, (-1, self.number))
            return parts.mean(3, keepdim=True).expand_as(parts).flatten(2, 3)[:, :, short:]
        return k


def answers(model: Any, batch: Batch, variants: list[tuple[str, int, float]]) -> Iterator[Any]:
    prompt = read(model, batch.prompt)
    found = prompt.views[0].spans
    length = max(int((row >= 0).sum()) for row in found)
    spans = found[:, -length:]
    spans = torch.stack([torch.cat([row[row < 0], row[row >= 0]]) for row in spans])
    with plphp.prune(model, plphp.policy("full")) as pruning:
        for variant in variants:
            reader = Reader(*variant, vision=spans > 0, spans=spans)
            with mock.patch("plphp.hf.attention.attend", reader.attend):
                yield variant, _answer(model, batch, prompt, pruning)


def _answer(model: Any, batch: Batch, prompt: SharedPrefill, pruning: Any) -> Tensor:
    cache = prompt.pruned(pruning)
    if batch.first is None:
        return _continue_answer(model, cache, batch, prompt)
    _crop(cache, batch.shared)
    return _generate(model, cache, batch.later(), batch.limit)[0]


def text(embedded: Any, row: Tensor) -> str:
    ends = torch.isin(row, end_tokens(embedded.model)).nonzero()
    return str(embedded.decode(row[: int(ends[0])] if len(ends) else row))


VARIANTS: list[tuple[str, int, float]] = [
    ("full", 0, 1.0),
    *(("exact", 0, b) for b in (0.2, 0.1)),
    ("rank", 8, 0.1),
    *(("int8", 8, b) for b in (0.3, 0.15, 0.1)),
    ("int8 sum", 8, 0.15),
    *(("int8 max", 8, b) for b in (0.15, 0.1)),
    ("bits", 2, 0.1),
    ("blocks", 4, 0.2),
    *(("every", m, 0.2) for m in (2, 4)),
    ("random", 0, 0.4),
    *(("novelty", 0, b) for b in (0.4, 0.2)),
    *((kind, n, 1.0) for kind in ("int", "flip") for n in (4, 2)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=96)
    parser.add_argument("--tasks", default="describe,long,grid")
    options = parser.parse_args()
    embedded = load("embedded", "float32", "cpu")
    torch.manual_seed(0)
    for name in options.tasks.split(","):
        right: dict[Any, int] = defaultdict(int)
        for rows in in_batches(TASKS[name].draw(options.limit, SEED), BATCH, embedded.tokenizer):
            batch = make_batch(embedded, rows, 128)
            with torch.inference_mode():
                for variant, tokens in answers(embedded.model, batch, VARIANTS):
                    said = [text(embedded, row) for row in tokens]
                    right[variant] += sum(
                        a in s.answers for a, s in zip(said, batch.samples, strict=True)
                    )
        for (kind, number, budget), count in right.items():
            line = f"{name:10s} {kind:8s} {number:2d} {budget:4.2f} {count / options.limit:.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
