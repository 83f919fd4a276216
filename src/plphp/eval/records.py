"""The lines that a run stores for each sample, made from answers."""

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
    """A batch and the answers of the unpruned model to it."""

    loaded: Runnable
    batch: Batch
    reference: Reference

    @cached_property
    def own(self) -> list[str]:
        """The unpruned model's answers as text."""
        return self.texts(self.reference.tokens)

    def texts(self, tokens: Tensor) -> list[str]:
        """Answers (B, T) int64 as text."""
        return [self.loaded.decode(row) for row in tokens]

    def full_lines(self) -> list[Line]:
        """The lines of the unpruned model, one per sample.

        kept: share of vision K/V
        kv_bytes: bytes of the batch's cache divided by the number of rows
        vision: number of vision tokens; tokens: of the answer, its end token included
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
        """The lines of a pruned model, one per sample.

        kl, agree: KL(full || pruned) in nats and top-1 agreement, one number per token of the
            unpruned model's answer
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
        """Whether the first token, which comes from the unpruned prompt, determines the answer."""
        if not sample.answers:
            return self.reference.lengths[row] <= 2  # a token and the end token
        return _shortest(self.loaded.tokenizer, sample.answers) <= 1


def _shortest(tokenizer: Any, answers: Sequence[str]) -> int:
    return min(answer_tokens(tokenizer, answer) for answer in answers)
