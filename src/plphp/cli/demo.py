"""`plphp demo`: answers of the embedded model with the full and with the pruned cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Table
from rich.text import Text

from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.console import shown, stderr, stdout
from plphp.policy import Policy

if TYPE_CHECKING:
    from plphp.bench import Comparison
    from plphp.cli.demo_comparison import Prompt

NOTE = (
    "The embedded model is a small one for demonstration (5.4M parameters, pictures of coloured "
    "letters and shapes). Its answers show what pruning does to answers; its milliseconds say "
    "little about large models, where keys and values weigh more than Python does."
)


@dataclass(frozen=True)
class Answer:
    """One question of the demo, answered with the full and with the pruned cache."""

    task: str
    images: tuple[str, ...]
    question: str
    expected: str
    full: str
    pruned: str
    compared: Comparison

    def to_dict(self) -> dict[str, Any]:
        full, pruned = self.compared.full, self.compared.pruned
        return {
            "task": self.task,
            "images": list(self.images),
            "question": self.question,
            "expected": self.expected,
            "full": {
                "answer": self.full,
                "right": self.full == self.expected,
                "kv_bytes": full.kv_bytes,
                "first_token_ms": full.first_ms,
                "ms_per_token": full.step_ms,
            },
            "pruned": {
                "answer": self.pruned,
                "right": self.pruned == self.expected,
                "kv_bytes": pruned.kv_bytes,
                "first_token_ms": pruned.first_ms,
                "ms_per_token": pruned.step_ms,
            },
            "report": self.compared.report.to_dict(),
        }


def demo(
    r: o.Rate = None,
    delta_r: o.DeltaR = None,
    alpha: o.Alpha = None,
    beta: o.Beta = None,
    device: o.Device = "cpu",
    dtype: flags.FloatDtype = "float32",
    rounds: flags.Rounds = 3,
    as_json: o.Json = False,
) -> None:
    """Ask the embedded model about bundled pictures, with the full and with a pruned cache."""
    policy = o.chosen_policy("plphp", r=r, delta_r=delta_r, alpha=alpha, beta=beta)
    from plphp.cli.demo_comparison import answers_of_variants, table
    from plphp.inputs import load

    embedded = load("embedded", dtype, device)
    prompts = bundled_prompts(embedded)
    answers = ask(embedded, prompts, policy, rounds, quiet=as_json)
    others = answers_of_variants(embedded, prompts)
    if as_json:
        questions = [answer.to_dict() for answer in answers]
        numbers = summary(answers)
        numbers["beside"] = [other.to_dict() for other in others]
        found = {"note": NOTE, "summary": numbers, "questions": questions}
        print(json.dumps(found, indent=1))
        return
    console = stdout()
    console.print(_answers(answers))
    console.print(_layers(max(answers, key=lambda a: sum(a.compared.report.prompt))))
    console.print(_costs(answers))
    console.print(table(others))
    for line in _words(answers):
        console.print(line)
    console.print(NOTE, style="dim")
    console.print(shown(f"See what question 1 kept: {_command()} inspect, then open report.html."))


def _command() -> str:
    """The command that calls plphp from the current directory."""
    called = Path(sys.argv[0])
    on_path = shutil.which("plphp")
    if on_path is not None and called.exists() and Path(on_path).samefile(called):
        return "plphp"
    return os.path.relpath(called) if called.name == "plphp" and called.exists() else "plphp"


def bundled_prompts(embedded: Any) -> list[Prompt]:
    """The questions of the demo, each with the inputs of the model."""
    from plphp.inputs import open_image

    root = Path(str(files("plphp.demo")))
    prompts = []
    for q in json.loads((root / "questions.json").read_text(encoding="utf-8")):
        pictures = [open_image(root / "pictures" / name) for name in q["images"]]
        prompts.append((q, embedded.inputs(pictures, q["question"])))
    return prompts


def ask(
    embedded: Any, prompts: Sequence[Prompt], policy: Policy, rounds: int, quiet: bool
) -> list[Answer]:
    """Answer every question with the full and with the pruned cache in turn."""
    from plphp.bench import compare

    answers = []
    for q, inputs in track(prompts, "asking", console=stderr(), disable=quiet, transient=True):
        compared = compare(embedded.model, inputs, policy, rounds, do_sample=False)
        answers.append(
            Answer(
                task=q["task"],
                images=tuple(q["images"]),
                question=q["question"],
                expected=q["expected"],
                full=embedded.decode(compared.full.tokens),
                pruned=embedded.decode(compared.pruned.tokens),
                compared=compared,
            )
        )
    return answers


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """The results of the demo in a few numbers. Times are medians over the questions."""
    runs = [(a.compared.full, a.compared.pruned) for a in answers]
    return {
        "questions": len(answers),
        "right_full": sum(a.full == a.expected for a in answers),
        "right_pruned": sum(a.pruned == a.expected for a in answers),
        "retention": sum(a.compared.report.retention for a in answers) / len(answers),
        "kv_bytes_full": sum(full.kv_bytes for full, _ in runs),
        "kv_bytes_pruned": sum(pruned.kv_bytes for _, pruned in runs),
        "ms_per_token_full": median(full.step_ms for full, _ in runs),
        "ms_per_token_pruned": median(pruned.step_ms for _, pruned in runs),
        "first_token_pruned_over_full": median(p.first_ms / f.first_ms for f, p in runs),
    }


def _answers(answers: Sequence[Answer]) -> Table:
    table = Table(title="Answers: green is right, underlined words are wrong", show_lines=True)
    table.add_column("#", justify="right")
    for name in ("question", "expected", "full cache", "pruned cache"):
        table.add_column(name, overflow="fold")
    for number, a in enumerate(answers, start=1):
        pictures = f"({len(a.images)} picture{'s' if len(a.images) > 1 else ''})"
        table.add_row(
            str(number),
            Text.assemble(a.question, " ", (pictures, "dim")),
            a.expected,
            _mark(a.full, a.expected),
            _mark(a.pruned, a.expected),
        )
    return table


def _mark(answer: str, expected: str) -> Text:
    """The answer: green if it is right, otherwise red with each wrong word underlined."""
    if answer == expected:
        return Text(shown(answer), style="green")
    wanted = expected.split()
    words = [
        Text(shown(word), style="" if wanted[i : i + 1] == [word] else "underline")
        for i, word in enumerate(answer.split())
    ]
    marked = Text(" ").join(words)
    marked.stylize("red")
    return marked


def _layers(answer: Answer) -> Table:
    table = Table(title=f"Layers, for: {answer.question} ({len(answer.images)} pictures)")
    for name in ("layer", "gamma", "class", "rate", "kept tokens a head", "K/V kept"):
        table.add_column(name, justify="right")
    for layer in answer.compared.report.layers:
        kept = int((layer.kept[0] >= 0).sum()) // layer.kept.shape[1]
        table.add_row(
            str(layer.layer),
            f"{layer.gamma[0]:.3f}",
            layer.layer_class[0] or "-",
            f"{layer.rate[0]:.2f}",
            f"{kept} of {layer.vision[0]}",
            f"{layer.retention:.0%}",
        )
    return table


def _costs(answers: Sequence[Answer]) -> Table:
    table = Table(title="Cost: K/V allocated after the prompt; times measured in turn")
    for name in (
        "#",
        "vision kept",
        "KV bytes full",
        "pruned",
        "ratio",
        "ms/token full",
        "pruned",
        "first token, ratio",
    ):
        table.add_column(name, justify="right")
    for number, a in enumerate(answers, start=1):
        full, pruned = a.compared.full, a.compared.pruned
        table.add_row(
            str(number),
            f"{a.compared.report.retention:.0%}",
            f"{full.kv_bytes:,}",
            f"{pruned.kv_bytes:,}",
            f"{pruned.kv_bytes / full.kv_bytes:.2f}",
            f"{full.step_ms:.2f}",
            f"{pruned.step_ms:.2f}",
            f"{pruned.first_ms / full.first_ms:.2f}",
        )
    return table


def _words(answers: Sequence[Answer]) -> list[str]:
    """Lines that say what pruning saved and which answers it changed."""
    s = summary(answers)
    hurt = [a.task for a in answers if a.full == a.expected != a.pruned]
    lines = [
        f"Right: {s['right_full']} of {s['questions']} with the full cache, "
        f"{s['right_pruned']} with {s['retention']:.0%} of the vision K/V kept.",
        f"KV cache: {s['kv_bytes_pruned'] / s['kv_bytes_full']:.2f} of the full bytes. "
        f"Decode: {s['ms_per_token_pruned'] / s['ms_per_token_full']:.2f} of the full time a "
        f"token. First token: {s['first_token_pruned_over_full']:.2f} of the full time.",
    ]
    if hurt:
        lines.append(
            f"Pruning broke: {', '.join(sorted(set(hurt)))}. Long answers and reading "
            "suffer first: the last prompt token attends to what the first words need."
        )
    return lines
