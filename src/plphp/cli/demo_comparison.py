"""Beside PLPHP in the demo: what other policies and recall answer to the same questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plphp.policy import Policy, policy

if TYPE_CHECKING:
    from plphp.recall import Recall


@dataclass(frozen=True)
class Beside:
    """right: answers, of so many questions; share: of the vision K/V's bytes, on the device"""

    name: str
    right: int
    questions: int
    share: float

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "right": self.right, "vision_kv_on_device": self.share}


def beside(embedded: Any) -> list[Beside]:
    """Ask every question of the demo once more, with the recommended policy and with recall."""
    from plphp.recall import Recall

    chosen = policy("recommended")
    ways = {
        'policy("recommended", budget=.4)': (chosen, None),
        'recall=Recall("int4", .4)': (chosen, Recall("int4", 0.4)),
        'recall=Recall("host", .2)': (chosen, Recall("host", 0.2)),
    }
    return [_ask(embedded, name, *way) for name, way in ways.items()]


def _ask(embedded: Any, name: str, chosen: Policy, recall: Recall | None) -> Beside:
    import torch

    from plphp.hf import prune
    from plphp.inputs import open_image

    root = Path(str(files("plphp.demo")))
    questions = json.loads((root / "questions.json").read_text(encoding="utf-8"))
    right, shares = 0, []
    with torch.inference_mode(), prune(embedded.model, chosen, recall=recall) as pruning:
        for q in questions:
            pictures = [open_image(root / "pictures" / name) for name in q["images"]]
            inputs = embedded.inputs(pictures, q["question"])
            tokens = embedded.model.generate(**inputs, do_sample=False)
            right += embedded.decode(tokens[0, inputs["input_ids"].shape[1] :]) == q["expected"]
            report = pruning.report
            assert report is not None
            shares.append(report.retention if report.recall is None else report.recall.share)
    return Beside(name, right, len(questions), sum(shares) / len(shares))


def table(found: list[Beside]) -> Table:
    shown = Table(title="Beside it: one recommended policy, and recall of what it drops")
    shown.add_column("")
    shown.add_column("right", justify="right")
    shown.add_column("vision K/V on the device", justify="right")
    for row in found:
        shown.add_row(row.name, f"{row.right} of {row.questions}", f"{row.share:.0%}")
    return shown
