"""The run: every method answers every sample of every task at every budget.

The loops are task -> batch -> setting, so that the images of a batch are computed once for all
settings. The unpruned model answers each batch first. Its answers are the row "full", and the
answers of the other settings are compared with them token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plphp.errors import PlphpError
from plphp.eval.answers import Answers, Reference, answer, refer
from plphp.eval.batches import Batch, in_batches, make_batch
from plphp.eval.feature_cache import remembered
from plphp.eval.methods import CALIBRATED, FULL, Setting, make
from plphp.eval.records import Asked
from plphp.eval.sample import Sample, Task
from plphp.eval.shrink import Shrinker, shrinker
from plphp.eval.store import Done, Store
from plphp.eval.tasks import TASKS
from plphp.hf.shared_prefill import SharedPrefill, read
from plphp.inputs import Runnable
from plphp.policy import Policy, policy

CALIBRATE_ON = ("needle", "describe", "transcribe", "long")  # tasks, drawn with another seed
CALIBRATE_SAMPLES = 8  # per task


@dataclass(frozen=True)
class Plan:
    """The tasks and settings of a run.

    out: directory of the run
    limit: samples per task
    batch: rows per batch
    longest: the most tokens of an answer
    shard: (i, n): this process runs every n-th batch, beginning with the i-th
    """

    tasks: tuple[Task, ...]
    settings: tuple[Setting, ...]
    out: Path
    limit: int
    seed: int
    batch: int
    longest: int
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Job:
    """A plan that is being run.

    policies: the policy of each setting that can run
    skipped: the reason for each setting that cannot run
    advance: called with the number of lines that were added
    """

    loaded: Runnable
    plan: Plan
    store: Store
    policies: Mapping[Setting, Policy]
    skipped: Mapping[Setting, str]
    advance: Callable[[int], None]


def run(
    loaded: Runnable, plan: Plan, about: Mapping[str, Any], watch: Callable[[str, int, int], Any]
) -> None:
    """Run the part of a plan that is not finished.

    about: further settings that must be equal for an interrupted run to be continued
    watch: called with a task's name, its number of lines in this shard and the number of finished
        lines; it returns a function to call with the number of lines that were added
    Raises InputError if `plan.out` holds a run with other settings.
    """
    store = Store(plan.out, plan.shard)
    fixed = {"limit": plan.limit, "seed": plan.seed, "batch": plan.batch}
    store.open({**about, **fixed, "max_new_tokens": plan.longest})
    try:
        policies, skipped = _policies(loaded, plan)
        store.note_policies({str(s): s.described(found) for s, found in policies.items()})
        for task in plan.tasks:
            samples = task.draw(plan.limit, plan.seed)
            store.describe(task, samples)
            batches = in_batches(samples, plan.batch, loaded.tokenizer)
            mine = batches[plan.shard[0] :: plan.shard[1]]
            done = store.finished(task.name)
            rows = {sample.id for batch in mine for sample in batch}
            before = sum(name in rows and setting in plan.settings for name, setting in done)
            total = len(rows) * len(plan.settings)
            job = Job(loaded, plan, store, policies, skipped, watch(task.name, total, before))
            _run_task(job, task, mine, done)
    finally:
        store.close()


def _policies(loaded: Runnable, plan: Plan) -> tuple[dict[Setting, Policy], dict[Setting, str]]:
    """The policy of each setting that can run, and the reason for each other setting."""
    policies: dict[Setting, Policy] = {}
    skipped: dict[Setting, str] = {}
    samples = (
        _calibration(loaded, plan)
        if any(setting.method.endswith(CALIBRATED) for setting in plan.settings)
        else []
    )
    for setting in plan.settings:
        try:
            policies[setting] = make(setting, loaded.model, samples)
        except (ValueError, PlphpError) as error:
            skipped[setting] = " ".join(str(error).split())
    return policies, skipped


def _calibration(loaded: Runnable, plan: Plan) -> list[Mapping[str, Any]]:
    """The inputs of prompts with another seed than the evaluated ones."""
    drawn = [TASKS[name].draw(CALIBRATE_SAMPLES, plan.seed + 1) for name in CALIBRATE_ON]
    return [loaded.inputs(s.images, s.question) for samples in drawn for s in samples]


def _run_task(job: Job, task: Task, batches: Sequence[Sequence[Sample]], done: Done) -> None:
    skipped = dict(job.skipped)
    for setting, reason in skipped.items():
        _skip(job, task, setting, reason)
    for samples in batches:
        left = {
            setting: [s for s in samples if (s.id, setting) not in done]
            for setting in job.plan.settings
        }
        for setting in skipped:
            job.advance(len(left.pop(setting, ())))
        wanted = {setting: rows for setting, rows in left.items() if rows}
        if wanted:
            skipped |= _run_batch(job, task, samples, wanted)


def _run_batch(
    job: Job, task: Task, samples: Sequence[Sample], wanted: Mapping[Setting, Sequence[Sample]]
) -> dict[Setting, str]:
    """Append the lines of a batch. Returns the settings that failed, with the reason."""
    failed = {}
    batch = make_batch(job.loaded, samples, job.plan.longest)
    with torch.inference_mode(), remembered(job.loaded.model):
        reference = refer(job.loaded.model, batch)
        asked = Asked(job.loaded, batch, reference)
        prompt = read(job.loaded.model, batch.prompt, max(p.window for p in job.policies.values()))
        for setting, rows in wanted.items():
            if setting == FULL:
                lines = asked.full_lines()
            else:
                try:
                    found = _answer(job, setting, batch, reference, prompt)
                except (ValueError, PlphpError) as error:
                    failed[setting] = " ".join(str(error).split())
                    _skip(job, task, setting, failed[setting])
                    job.advance(len(rows))
                    continue
                lines = asked.lines(found)
            head = {"task": task.name, "method": setting.method, "budget": setting.budget}
            names = {sample.id for sample in rows}
            job.store.append(task.name, [{**head, **x} for x in lines if x["id"] in names])
            job.advance(len(rows))
    return failed


def _answer(
    job: Job, setting: Setting, batch: Batch, reference: Reference, prompt: SharedPrefill
) -> Answers:
    model, chosen = job.loaded.model, job.policies[setting]
    if chosen.kind == "images":
        # The smaller images are not pruned: `full` runs the same code and keeps everything.
        batch, chosen = _smaller(job, batch, chosen), policy("full")
        prompt = read(model, batch.prompt, chosen.window)
    recall, bits = setting.recall, setting.kv_bits
    return answer(model, chosen, batch, reference, prompt, recall, bits)


def _smaller(job: Job, batch: Batch, chosen: Policy) -> Batch:
    by: Shrinker = shrinker(job.loaded)
    small = make_batch(by.loaded, by.shrink(batch.samples, chosen), job.plan.longest)
    # The kept share counts against the vision tokens of the original images.
    return replace(small, vision=batch.vision)


def _skip(job: Job, task: Task, setting: Setting, reason: str) -> None:
    line = {"task": task.name, "method": setting.method, "budget": setting.budget}
    job.store.append(task.name, [{**line, "skipped": reason}])
