"""From answers to lines: what is written down of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from plphp.eval.answers import Answers, Reference
from plphp.eval.batches import Batch, answer_tokens
from plphp.eval.metrics import score
from plphp.eval.sample import Sample
from plphp.eval.store import Line
from plphp.inputs import Runnable


@dataclass(frozen=True)
class Asked:
    """A batch that the untouched model has answered."""

    loaded: Runnable
    batch: Batch
    reference: Reference

    @cached_property
    def own(self) -> list[str]:
        """The untouched model's answers."""
        return self.texts(self.reference.tokens)

    def texts(self, tokens: Tensor) -> list[str]:
        """Answers (B, T) as text."""
        return [self.loaded.decode(row) for row in tokens]

    def full_lines(self) -> list[Line]:
        """Lines of the untouched model.

        kept: share of the vision K/V; kv_bytes: a row's part of the batch's; vision: tokens of the
        images; tokens: of the answer, its end included
        """
        size = self.reference.kv_bytes // len(self.own)
        return [
            {
                **self._line(row, text),
                "kept": 1.0,
                "kv_bytes": size,
                "kv_bytes_full": size,
                "vision": self.batch.vision[row],
                "tokens": self.reference.lengths[row],
                "one_token": self._one_token(self.batch.samples[row], row),
            }
            for row, text in enumerate(self.own)
        ]

    def lines(self, found: Answers) -> list[Line]:
        """Lines of a pruned model.

        kl, agree: KL(full || pruned) in nats and top-1 agreement, a number each token of the
        untouched model's answer
        """
        rows = len(self.own)
        return [
            {
                **self._line(row, text),
                "kept": round(found.kept[row], 6),
                "kv_bytes": found.kv_bytes // rows,
                "kv_bytes_full": self.reference.kv_bytes // rows,
                "kl": [float(f"{value:.4g}") for value in found.kl[row]],
                "agree": [int(value) for value in found.agree[row]],
            }
            for row, text in enumerate(self.texts(found.tokens))
        ]

    def _line(self, row: int, text: str) -> Line:
        sample = self.batch.samples[row]
        scores = score(text, sample.answers)
        return {"id": sample.id, "answer": text, **scores, "same": text == self.own[row]}

    def _one_token(self, sample: Sample, row: int) -> bool:
        """Whether the answer is decided by its first token, which the unpruned prompt gives."""
        if not sample.answers:
            return self.reference.lengths[row] <= 2  # with its end token
        return _shortest(self.loaded.tokenizer, sample.answers) <= 1


def _shortest(tokenizer: Any, answers: Sequence[str]) -> int:
    return min(answer_tokens(tokenizer, answer) for answer in answers)
