"""Runs an evaluation with the workers of Ray. Each worker runs whole shards of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plphp.cli.console import one_line, progress
from plphp.cluster import Lost, Pool, share
from plphp.errors import PlphpError

if TYPE_CHECKING:
    from plphp.cli.options import Source
    from plphp.eval.run import Plan

SHARDS_A_WORKER = 4  # so that a slow worker does fewer; each shard draws the samples again
MOST_SHARDS = 64  # where the number of workers is not known


def shards_of(plan: Plan, workers: int | None) -> int:
    """The number of shards: at most one for each batch of a task."""
    batches = -(-plan.limit // plan.batch)
    return min(batches, SHARDS_A_WORKER * workers if workers else MOST_SHARDS)


def run_shared(
    pool: Pool,
    source: Source,
    plan: Plan,
    prompt: str | None,
    about: Callable[[Source, Any], dict[str, Any]],
    quiet: bool,
) -> list[str]:
    """Run what is left of a plan. Returns what kept single shards from being finished.

    The lines are written by the workers, each shard into its own files in `plan.out`, so that a
    shard whose worker died goes on where it stopped.
    about: what a run that goes on must share, of a loaded model
    Raises InputError for what would keep every shard from running.
    """
    count = shards_of(plan, pool.workers)

    def make() -> Callable[[int], str]:
        from plphp.eval.run import run
        from plphp.inputs import check_prompt

        loaded = source.load()
        if prompt is not None:
            check_prompt(loaded, prompt)
        settings = about(source, loaded)

        def work(shard: int) -> str:
            try:
                run(loaded, replace(plan, shard=(shard, count)), settings, _unwatched)
            except PlphpError:
                raise
            except Exception as error:  # one shard of many: the others are run
                return one_line(error)
            return ""

        return work

    problems = []
    with progress(quiet) as bar:
        task = bar.add_task("shards", total=count)
        for found in share(pool, make, range(count), size=1):
            for shard, said in found:
                reason = said.reason if isinstance(said, Lost) else said
                problems += [f"shard {shard}/{count}: {reason}"] if reason else []
            bar.advance(task, len(found))
    return problems


def _unwatched(name: str, total: int, done: int) -> Callable[[int], None]:
    return lambda lines: None
