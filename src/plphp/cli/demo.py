"""`plphp demo`: the ways to hold a cache on one screen, with the embedded or another model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from plphp._words import counted
from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.bits import KvBits, Weights
from plphp.cli.console import progress, say, shown, stdout
from plphp.cli.generate import check_files
from plphp.errors import InputError

if TYPE_CHECKING:
    from plphp.bench import Way
    from plphp.cli.demo_prompts import Item, LongBatch
    from plphp.cli.demo_run import Asked, Result
    from plphp.inputs import Runnable

NOTE = (
    "The embedded model is a small one for demonstration, which reads coloured letters and shapes. "
    "Large models differ: plphp demo --model DIR_OR_HUB_ID makes this table for yours."
)
OWN_NOTE = (
    "Nothing is known to be right here: an answer counts if it is, word for word, the greedy "
    "answer of the full cache. Another answer may be as good."
)
ON_CPU = "On a CPU the device is main memory too: what recall host parks is in it as well."


def demo(
    *,
    r: o.Rate = None,
    delta_r: o.DeltaR = None,
    alpha: o.Alpha = None,
    beta: o.Beta = None,
    model: o.Model = "embedded",
    image: flags.Image = None,
    prompt: flags.DemoPrompt = None,
    details: flags.Details = False,
    batch: flags.DemoRows = 8,
    vision_tokens: flags.VisionTokens = 1500,
    max_new_tokens: o.MaxNewTokens = 64,
    rounds: flags.Rounds = 3,
    kv_bits: KvBits = None,
    device: flags.DemoDevice = None,
    dtype: o.Dtype = "auto",
    attn: o.Attention = None,
    trust_remote_code: o.TrustRemoteCode = False,
    weights: Weights = None,
    as_json: o.Json = False,
) -> None:
    """Show what pruning and recall cost and save, on one screen: answers, bytes and times."""
    policy = o.chosen_policy("plphp", r=r, delta_r=delta_r, alpha=alpha, beta=beta)
    images, prompts = image or [], prompt or []
    _check(images, prompts, model)
    from plphp.cli import demo_run
    from plphp.cli.demo_prompts import bundled_questions, long_batch, own_questions

    known = model == "embedded" and not images and not prompts
    where = device or ("cpu" if weights else _device(model))
    loaded = o.Source(model, dtype, where, attn, trust_remote_code, weights).load()
    if known:
        items = bundled_questions(loaded)
    else:
        _say_bundled(images, prompts)
        items = own_questions(loaded, images, prompts, max_new_tokens)
    long = long_batch(loaded, images, items[0].question, batch, vision_tokens)
    every, left_out = demo_run.possible(loaded.model, demo_run.ways(policy, kv_bits))
    asked, results = _measured(loaded, items, long, every, rounds, as_json)
    if as_json:
        found = _found(loaded, asked, results, long, rounds, known)
        print(json.dumps({**found, "left_out": left_out}, indent=1))
        return
    _print(loaded, asked, results, long, known, details)
    for name, reason in left_out.items():
        stdout().print(shown(f"{name} is left out: {reason}"))
    if known:
        line = f"See what question 1 kept: {_command()} inspect, then open report.html."
        stdout().print(shown(line))


def _check(images: Sequence[str], prompts: Sequence[str], model: str) -> None:
    """Raise InputError for an empty prompt and for files that cannot be read."""
    if any(not text.strip() for text in prompts):
        raise InputError("the prompt is empty: give --prompt TEXT")
    check_files(images, [], model)


def _say_bundled(images: Sequence[str], prompts: Sequence[str]) -> None:
    """Say that bundled pictures or questions stand for those that were not given."""
    bundled = [what for what, own in (("pictures", images), ("questions", prompts)) if not own]
    if bundled:
        say(f"{' and '.join(bundled)} are plphp's own: give --image FILE and --prompt TEXT")


def _device(model: str) -> str:
    """Where a model of the user's runs if nothing is said: on all GPUs that there are."""
    import torch

    if model == "embedded" or not torch.cuda.is_available():
        return "cpu"
    return "auto" if torch.cuda.device_count() > 1 else "cuda"


def _measured(
    loaded: Runnable,
    items: Sequence[Item],
    long: LongBatch,
    every: Sequence[Way],
    rounds: int,
    quiet: bool,
) -> tuple[list[Asked], list[Result]]:
    """Ask and measure, with a progress bar on stderr."""
    from plphp.cli import demo_run

    with progress(quiet, transient=True) as bar:
        work = len(items) * len(every) + 2 * rounds * len(every) + 1
        task = bar.add_task(counted(len(items), "question"), total=work)
        asked = demo_run.ask(loaded, items, every, lambda: bar.advance(task))
        size = f"{long.rows} x {long.vision:,} vision tokens"
        bar.update(task, description=size)
        measured = demo_run.measure(loaded, asked, long, every, rounds, lambda: bar.advance(task))
    return asked, measured


def _print(
    loaded: Runnable,
    asked: Sequence[Asked],
    results: Sequence[Result],
    long: LongBatch,
    known: bool,
    details: bool,
) -> None:
    from plphp.cli import demo_details, demo_screen

    console, device = stdout(), loaded.model.device
    console.print(demo_screen.table(results, known))
    console.print(demo_screen.advice(results, known), style="bold")
    console.print(shown(_what(loaded, long)), style="dim")
    if device.type == "cpu":
        console.print(ON_CPU, style="dim")
    weak = demo_details.not_read(asked) if known else None
    if weak is not None:
        console.print(weak, style="dim")
    if details:
        pruned = results[1].name
        for table in demo_details.tables(asked, pruned):
            console.print(table)
        for line in demo_details.hard_cases(asked):
            console.print(shown(line))
    console.print(NOTE if known else OWN_NOTE, style="dim")
    if not details:
        console.print("--details shows answers side by side, layers and hard cases.", style="dim")


def _what(loaded: Runnable, long: LongBatch) -> str:
    """What the columns were measured on."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    rows = counted(long.rows, "row")
    return (
        "* the best of its column; in parentheses: the time over that of the full cache. Bytes and "
        f"milliseconds a token are of {rows} with {long.vision:,} vision tokens each, the first "
        "token of one such row, all ways in turn; each time is the median of its rounds. "
        f"{dtype} on {loaded.model.device}."
    )


def _found(
    loaded: Runnable,
    asked: Sequence[Asked],
    results: Sequence[Result],
    long: LongBatch,
    rounds: int,
    known: bool,
) -> dict[str, Any]:
    """Everything for JSON."""
    from plphp.cli import demo_screen

    judge = "right" if known else "same_as_full"
    return {
        "note": NOTE if known else OWN_NOTE,
        "model": str(loaded.model.name_or_path) if not known else "embedded",
        "advice": demo_screen.advice(results, known),
        "ways": [result.to_dict(judge) for result in results],
        "long_prompts": {
            "rows": long.rows,
            "vision_tokens": long.vision,
            "rounds": rounds,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        },
        "summary": summary(asked, [result.name for result in results]),
        "questions": [_question(a, judge) for a in asked],
    }


def summary(asked: Sequence[Asked], names: Sequence[str]) -> dict[str, Any]:
    """The answers in a few numbers: the full cache, PLPHP, and beside them the other ways.

    names: of the ways, the full cache and PLPHP first. Times are medians over the questions.
    """
    from plphp.cli.demo_run import CODE, INT4

    full, pruned, *others = names
    runs = [(a.answers[full].timing, a.answers[pruned].timing) for a in asked]
    shares = {name: [_share(a, name) for a in asked] for name in names[1:]}
    others.sort(key=lambda name: name != INT4 and "recall" in name)
    return {
        "questions": len(asked),
        "right_full": sum(a.right(full) for a in asked),
        "right_pruned": sum(a.right(pruned) for a in asked),
        "retention": sum(shares[pruned]) / len(asked),
        "kv_bytes_full": sum(one.kv_bytes for one, _ in runs),
        "kv_bytes_pruned": sum(other.kv_bytes for _, other in runs),
        "ms_per_token_full": median(one.step_ms for one, _ in runs),
        "ms_per_token_pruned": median(other.step_ms for _, other in runs),
        "first_token_pruned_over_full": median(b.first_ms / a.first_ms for a, b in runs),
        "beside": [
            {
                "name": CODE[name],
                "right": sum(a.right(name) for a in asked),
                "vision_kv_on_device": sum(shares[name]) / len(asked),
            }
            for name in others
        ],
    }


def _share(asked: Asked, name: str) -> float:
    report = asked.answers[name].report
    assert report is not None
    return report.on_device


def _question(asked: Asked, judge: str) -> dict[str, Any]:
    item, (full, pruned, *_) = asked.item, asked.answers
    answers = {
        name: {
            "answer": answer.text,
            judge: asked.right(name),
            "kv_bytes": answer.timing.kv_bytes,
            "first_token_ms": answer.timing.first_ms,
            "ms_per_token": answer.timing.step_ms,
        }
        for name, answer in asked.answers.items()
    }
    report = asked.answers[pruned].report
    assert report is not None
    return {
        "task": item.task,
        "regime": item.regime,
        "images": list(item.images),
        "question": item.question,
        "expected": item.expected,
        "full": answers[full],
        "pruned": answers[pruned],
        "ways": answers,
        "report": report.to_dict(),
    }


def _command() -> str:
    """The command that calls plphp from the current directory."""
    called = Path(sys.argv[0])
    on_path = shutil.which("plphp")
    if on_path is not None and called.exists() and Path(on_path).samefile(called):
        return "plphp"
    return os.path.relpath(called) if called.name == "plphp" and called.exists() else "plphp"
