"""`plphp eval`: compares what methods lose on each task, at equal budgets."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from plphp._words import counted
from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.cluster import Cluster
from plphp.cli.console import progress, resumable, say, shown
from plphp.errors import InputError, how_to_install
from plphp.policy.checks import meant_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from plphp.eval.run import Plan
    from plphp.eval.sample import Task

NEEDS = ("anls_star", "easy_vqa", "jiwer", "matplotlib", "rouge_score", "sklearn")  # plphp[eval]
NEEDS_WITHOUT_LABELS = ("matplotlib",)  # of --images, whose score is agreement
SECONDS = 600.0  # over which the speed is estimated


def evaluate(
    *,
    out: flags.RunOut,
    tasks: flags.Tasks = "all",
    methods: flags.Methods = "plphp,random,uniform",
    budgets: flags.Budgets = ".6,.4,.2,.1",
    limit: flags.Limit = 300,
    seed: flags.SampleSeed = 7001,
    batch: flags.Rows = 16,
    max_new_tokens: o.MaxNewTokens = 128,
    images: flags.Folder = None,
    prompt: flags.FolderPrompt = None,
    shard: flags.Shard = "0/1",
    source: o.Source,
    cluster: Cluster,
    as_json: o.Json = False,
) -> None:
    """Compare what pruning methods lose on each task, at equal budgets."""
    needs = NEEDS if images is None else NEEDS_WITHOUT_LABELS
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} not installed: {how_to_install('eval')}")
    plan, added = _plan(
        out, tasks, methods, budgets, limit, seed, batch, max_new_tokens, images, prompt, shard
    )
    if added:
        say(f"added to --methods, as controls: {', '.join(added)}")
    pool = cluster.pool(source.device)
    with resumable(lambda: f"the same command goes on with the run in {out}"):
        if pool is None:
            _run(source, plan, prompt, as_json)
            problems = []
        else:
            from plphp.cli.shared_eval import run_shared

            problems = run_shared(pool, source, plan, prompt, _about, as_json)
    for problem in problems:
        say(f"not finished, {problem}")
    _finish(plan, as_json)
    if problems:
        raise typer.Exit(3)


def _run(source: o.Source, plan: Plan, prompt: str | None, quiet: bool) -> None:
    from plphp.eval.run import run

    loaded = source.load()
    if prompt is not None:
        from plphp.inputs import check_prompt

        check_prompt(loaded, prompt)
    with _progress(plan, quiet) as watch:
        run(loaded, plan, _about(source, loaded), watch)


def _plan(
    out: Path, tasks: str, methods: str, budgets: str, limit: int, seed: int, batch: int,
    longest: int, images: Path | None, prompt: str | None, shard: str,
) -> tuple[Plan, list[str]]:  # fmt: skip
    from plphp.eval.methods import known_methods, parse
    from plphp.eval.run import Plan

    names = ",".join(known_methods()) if methods == "all" else methods
    settings, added = parse(names, budgets)
    chosen = _tasks(tasks, images, prompt)
    return (
        Plan(chosen, tuple(settings), out, limit, seed, batch, longest, _shard(shard)),
        added,
    )


def _tasks(names: str, images: Path | None, prompt: str | None) -> tuple[Task, ...]:
    from plphp.eval.tasks import SUITES, TASKS, folder

    if images is not None and prompt is not None:
        return (folder(images, prompt),)
    wanted = list(TASKS) if names == "all" else [n.strip() for n in names.split(",") if n.strip()]
    wanted = [name for one in wanted for name in SUITES.get(one, [one])]
    known = TASKS | {name: task for suite in SUITES.values() for name, task in suite.items()}
    for name in wanted:
        if name not in known:
            raise InputError(
                f"--tasks: unknown task {name!r}{meant_name(name, [*known, *SUITES])}; known are "
                f"{', '.join(TASKS)}, the suites "
                f"{', '.join(SUITES)}, and single tasks of a suite, such as what@redundant-4"
            )
    if not wanted:
        raise InputError("--tasks is empty: give at least one name")
    return tuple(known[name] for name in dict.fromkeys(wanted))


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal()) or not int(i) < int(n):
        raise InputError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/2")
    return int(i), int(n)


def _about(source: o.Source, loaded: Any) -> dict[str, Any]:
    """The settings, besides the plan, that must be equal for a run to be continued."""
    import torch
    import transformers

    from plphp._version import __version__
    from plphp.cli.requests import digest, model_identity

    return {
        "model": source.model,
        "files": digest(model_identity(source.model)),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": source.device,
        "attn": source.attn,
        **({"weights": source.weights} if source.weights else {}),
        "plphp": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


Watch = Callable[[str, int, int], Callable[[int], None]]


@contextmanager
def _progress(plan: Plan, quiet: bool) -> Iterator[Watch]:
    guess = plan.limit * len(plan.settings) // plan.shard[1]  # lines of a task in this shard
    bars = progress(quiet, speed_estimate_period=SECONDS)

    def watch(name: str, total: int, done: int) -> Callable[[int], None]:
        if not bars.tasks:  # nothing is shown before there is something to do
            bars.start()
            bars.add_task(name, total=guess * len(plan.tasks))
        bar = bars.tasks[0]
        # Lines of an earlier call do not count: they would make this one look fast.
        more = total - done - guess
        bars.update(bar.id, description=name, total=(bar.total or 0) + more)
        return lambda lines: bars.advance(bar.id, lines)

    try:
        yield watch
    finally:
        if bars.tasks:
            bars.stop()


def _finish(plan: Plan, as_json: bool) -> None:
    from plphp.eval.present import write
    from plphp.eval.summary import missing, summarize

    left = missing(plan.out, plan.settings, [task.name for task in plan.tasks])
    if left:
        i, n = plan.shard
        if n == 1:
            say(f"missing: {counted(left, 'line')}; give the same command again to continue")
        else:
            say(
                f"shard {i}/{n} is done; missing of other shards: {counted(left, 'line')}. The "
                "last shard to finish writes the summary, or the same command given again"
            )
        return
    found = summarize(plan.out)
    write(found, plan.out)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(shown((plan.out / "summary.md").read_text(encoding="utf-8")))
    say(f"summary.json, summary.md and curves are in {plan.out}")
