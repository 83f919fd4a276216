"""The demo's second comparison: the recommended policy and recall on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plphp.policy import Policy, policy

if TYPE_CHECKING:
    from plphp.recall import Recall

Prompt = tuple[dict[str, Any], dict[str, Any]]  # an entry of questions.json, inputs of the model


@dataclass(frozen=True)
class Variant:
    """The answers of one variant of pruning to all questions.

    right: number of right answers
    questions: number of questions
    share: share of the bytes of the vision K/V that is on the device, averaged over the questions
    """

    name: str
    right: int
    questions: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "right": self.right, "vision_kv_on_device": self.share}


def answers_of_variants(embedded: Any, prompts: Sequence[Prompt]) -> list[Variant]:
    """Answer every question with the recommended policy, without recall and with both homes."""
    from plphp.recall import Recall

    chosen = policy("recommended")
    variants = {
        'policy("recommended", budget=.4)': None,
        'recall=Recall("int4", .4)': Recall("int4", 0.4),
        'recall=Recall("host", .2)': Recall("host", 0.2),
    }
    return [_ask(embedded, prompts, name, chosen, recall) for name, recall in variants.items()]


def _ask(
    embedded: Any, prompts: Sequence[Prompt], name: str, chosen: Policy, recall: Recall | None
) -> Variant:
    import torch

    from plphp.hf import prune

    right, shares = 0, []
    with torch.inference_mode(), prune(embedded.model, chosen, recall=recall) as pruning:
        for question, inputs in prompts:
            tokens = embedded.model.generate(**inputs, do_sample=False)
            answer = embedded.decode(tokens[0, inputs["input_ids"].shape[1] :])
            right += answer == question["expected"]
            report = pruning.report
            assert report is not None
            shares.append(report.retention if report.recall is None else report.recall.share)
    return Variant(name, right, len(prompts), sum(shares) / len(shares))


def table(found: Sequence[Variant]) -> Table:
    """A table with one row per variant."""
    shown = Table(title="The same questions with the recommended policy, and with recall")
    shown.add_column("")
    shown.add_column("right", justify="right")
    shown.add_column("vision K/V on the device", justify="right")
    for row in found:
        shown.add_row(row.name, f"{row.right} of {row.questions}", f"{row.share:.0%}")
    return shown
