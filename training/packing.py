"""Packs several questions about the same pictures into one row, to compute the pictures once.

A row is a prefix with the pictures, followed by questions. The tokens of a question attend to the
prefix and to their own question only (a block-causal mask), and their rotary positions begin after
the prefix. So each question gives the same result as alone. A question may contain an earlier
question and its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from plphp.demo.questions import Question
from plphp.demo.regimes import Frame
from training.towers import run_text

IGNORED = -100  # the label that ``cross_entropy`` ignores
PREFIX = 0  # segment of the prefix; the segments of questions begin at 1
PADDING = 99  # segment of the padding


@dataclass(frozen=True)
class Packed:
    ids: Tensor  # [B, L]
    positions: Tensor  # [3, B, L]
    labels: Tensor  # [B, L]
    prefix: int  # P, the length of the prefix
    mask: Tensor  # [B, 1, L - P, L], True where a token after the prefix attends
    answers: list[list[tuple[str, int, int]]]  # for each row: task, first token, end


class Answered(NamedTuple):
    logits: Tensor  # [T, V], at the T answer tokens of all rows
    labels: Tensor  # [T]
    where: Tensor  # [B, L - P - 1], True T times
    early: Tensor  # [B, L, d], hidden states after the first layers


class _Row:
    """One sample under construction: four lists with one entry per token, and its answers."""

    def __init__(self, prefix: list[int]) -> None:
        length = len(prefix)
        self.ids, self.segments = list(prefix), [PREFIX] * length
        self.positions, self.labels = [0] * length, [IGNORED] * length
        self.answers: list[tuple[str, int, int]] = []

    def add(self, task: str, question: list[int], answer: list[int], start: int) -> None:
        """Append a question whose positions begin at ``start``."""
        length = len(question) + len(answer)
        self.answers.append((task, len(self.ids) + len(question), len(self.ids) + length))
        self.positions += range(start, start + length)
        self.segments += [len(self.answers)] * length
        self.labels += [IGNORED] * len(question) + answer
        self.ids += question + answer


class Packer:
    """Turns questions into tensors with the token ids and positions of a model."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        names = [
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
        ]
        start, self.end, self.vision_start, self.vision_end, self.image = (
            tokenizer.convert_tokens_to_ids(names)
        )
        # Cached in each instance, because the same words are repeated often.
        self._encode = lru_cache(60_000)(lambda t: tokenizer.encode(t, add_special_tokens=False))
        self._prefix = lru_cache(500)(self._make_prefix)
        self._model = model.model
        self._user = [start, *self._encode("user\n")]
        self._close = [self.end, *self._encode("\n")]
        self._turn = [*self._close, start, *self._encode("assistant\n")]
        self._start = start

    def pack(self, frame: Frame, samples: Sequence[Sequence[Question]], second: bool) -> Packed:
        """Pack samples of a frame.

        second: whether each question follows the question before it and its answer
        """
        prefix, prefix_positions, start = self._prefix(frame)
        rows = []
        for questions in samples:
            row = _Row(prefix)
            earlier: list[int] = []
            for task, text, answer in questions:
                question = self._encode(text) + self._turn
                row.add(task, earlier + question, [*self._encode(answer), self.end], start)
                if second:
                    earlier = [*question, *self._encode(answer), *self._close, *self._user]
            rows.append(row)
        length = max(len(row.ids) for row in rows)
        length += -length % 8  # kernels are faster with multiples of 8
        segments = _stack([row.segments for row in rows], length, PADDING)
        positions = _stack([row.positions for row in rows], length, 0)[None].repeat(3, 1, 1)
        positions[:, :, : len(prefix)] = prefix_positions[:, None]
        return Packed(
            ids=_stack([row.ids for row in rows], length, 0),
            positions=positions,
            labels=_stack([row.labels for row in rows], length, IGNORED),
            prefix=len(prefix),
            mask=_block_causal(segments, len(prefix))[:, None],
            answers=[row.answers for row in rows],
        )

    def _make_prefix(self, frame: Frame) -> tuple[list[int], Tensor, int]:
        """The tokens of the chat template, their positions [3, P], and the next position."""
        ids, preamble = [], frame.preamble
        if preamble.system:
            ids += self._message("system", preamble.system)
        for said, answered in preamble.turns:
            ids += self._message("user", said) + self._message("assistant", answered)
        ids += self._user
        for i, (high, wide) in enumerate(frame.sizes):
            # They are encoded together with the lead, because a tokenizer may join both.
            header = self._encode(f"{'' if i else preamble.lead}Picture {i + 1}:")
            ids += [*header, self.vision_start, *[self.image] * (high * wide), self.vision_end]
        tokens = torch.tensor([ids])
        grid = torch.tensor([[1, 2 * high, 2 * wide] for high, wide in frame.sizes])
        is_image = (tokens == self.image).int()
        positions, _ = self._model.get_rope_index(tokens, is_image, image_grid_thw=grid)
        return ids, positions[:, 0], int(positions.max()) + 1

    def _message(self, role: str, text: str) -> list[int]:
        return [self._start, *self._encode(f"{role}\n"), *self._encode(text), *self._close]


def answer(model: Any, packed: Packed, features: Tensor, image: int) -> Answered:
    """Run the language model with ``features`` in place of the ``image`` tokens."""
    text = model.model.language_model
    embedded = text.embed_tokens(packed.ids).to(features.dtype)
    embedded = embedded.masked_scatter((packed.ids == image)[..., None], features)
    hidden, early = run_text(text, embedded, packed.positions, packed.mask, packed.prefix)
    labels = packed.labels[:, packed.prefix + 1 :]
    where = labels != IGNORED
    logits = model.lm_head(hidden[:, :-1][where]).float()
    return Answered(logits, labels[where], where, early)


def _block_causal(segments: Tensor, prefix: int) -> Tensor:
    behind, length = segments[:, prefix:, None], segments.shape[1]
    looks_back = torch.ones(length - prefix, length, dtype=torch.bool).tril(prefix)
    own_question = segments[:, None, :] == behind
    return ((segments[:, None, :] == PREFIX) | own_question) & looks_back


def _stack(rows: Sequence[list[int]], length: int, padding: int) -> Tensor:
    return torch.stack(
        [functional.pad(torch.tensor(row), (0, length - len(row)), value=padding) for row in rows]
    )
