"""`plphp generate`: answers one prompt about images, or a batch of prompts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.bits import Bits
from plphp.cli.cluster import Cluster
from plphp.cli.console import say, shown, stdout, streamer, waiting
from plphp.cli.sampling import Sampling
from plphp.errors import InputError
from plphp.policy import Policy

if TYPE_CHECKING:
    from plphp.bench import Comparison
    from plphp.hf import Pruning
    from plphp.inputs import Runnable
    from plphp.recall import Recall
    from plphp.report import Report


@dataclass(frozen=True)
class Job:
    """A loaded model, how it is pruned, and the options of generate()."""

    loaded: Runnable
    policy: Policy
    policy_name: str
    generation: Mapping[str, Any]
    recall: Recall | None = None
    bits: Bits = field(default_factory=Bits)
    seed: int | None = None

    def seeded(self, number: int) -> Job:
        """The same job with the seed of a line, so that an interruption changes no answer."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**32)


def generate(
    *,
    image: flags.Image = None,
    video: flags.Video = None,
    prompt: flags.Prompt = None,
    batch: flags.Batch = None,
    out: flags.BatchOut = None,
    retry: flags.Retry = False,
    method: o.Method,
    bits: Bits,
    compare: flags.Compare = False,
    rounds: flags.Rounds = 3,
    report: flags.FullReport = False,
    memory: flags.MemoryLimit = None,
    sampling: Sampling,
    source: o.Source,
    cluster: Cluster,
    as_json: o.Json = False,
) -> None:
    """Answer a prompt about images with a pruned cache, and print the answer word by word."""
    policy, parked = method.chosen(), method.parked()
    generation = sampling.options()
    images, videos = image or [], video or []
    check_files(images, videos, source.model)
    if compare and generation["do_sample"]:
        raise InputError("--compare needs greedy answers: leave out the sampling options")
    if batch is not None and out is not None:
        _check_batch(batch, out, prompt, retry)
        how = (method, bits, sampling, source)
        _answer_batch(batch, out, prompt, retry, how, cluster, as_json)
        return
    prompt = _standard_input() if prompt is None else prompt
    if not prompt.strip():
        raise InputError("the prompt is empty: give --prompt TEXT, or standard input")
    if memory is not None:
        from plphp.cli.memory import fitted

        longest, typed = sampling.max_new_tokens, (method, bits, source)
        setup, why = fitted(memory, images, videos, prompt, longest, typed)
        say(why)
        method, bits, source = setup.method, setup.bits, setup.source
        policy, parked = method.chosen(), method.parked()
    job = Job(source.load(), policy, method.policy, generation, parked, bits, sampling.seed)
    if compare:
        _print_comparison(job, images, videos, prompt, rounds, report, as_json)
    else:
        _print_answer(job, images, videos, prompt, report, as_json)


def _answer_batch(
    batch: Path, out: Path, prompt: str | None, retry: bool,
    given: tuple[o.Method, Bits, Sampling, o.Source], cluster: Cluster, quiet: bool,
) -> None:  # fmt: skip
    """Answer what is left of a batch. Exits with 3 if some of its lines hold an error."""
    from plphp.cli.batch import answer_line, open_batch
    from plphp.cli.retry import reopen

    method, bits, sampling, source = given
    key = _key(method, bits, sampling, source)
    if retry and os.path.lexists(out):
        reopen(batch, out, prompt, key)

    def make_job() -> Job:
        policy, recall = method.chosen(), method.parked()
        options = sampling.options()
        return Job(source.load(), policy, method.policy, options, recall, bits, sampling.seed)

    pool = cluster.pool(source.device)
    with open_batch(batch, out, prompt, key) as work:
        if pool is None:
            job = make_job() if work.left else None
            answers = ([answer_line(job, line, key, answer)] for line in work.left)
            failed = work.run(answers, quiet)
        else:
            from plphp.cli.shared_batch import share

            failed = work.run(share(pool, work.left, key, make_job, answer), quiet)
    if failed:
        raise typer.Exit(3)


def _key(method: o.Method, bits: Bits, sampling: Sampling, source: o.Source) -> dict[str, Any]:
    """What all lines of a batch share. A batch with another key is not continued."""
    from plphp.cli.requests import model_identity

    how = {**vars(method), **vars(bits)}
    said = {"method": how, "sampling": vars(sampling), "source": vars(source)}
    return {**said, "model": model_identity(source.model)}


def answer(
    job: Job,
    images: Sequence[str],
    prompt: str,
    videos: Sequence[str] = (),
    streamer: Any = None,
) -> tuple[str, Report]:
    """Answer one prompt. Returns the text and the report."""
    import torch

    from plphp.inputs import make_inputs, told_apart

    inputs = make_inputs(job.loaded, images, prompt, videos)
    if job.seed is not None:
        from transformers import set_seed

        set_seed(job.seed)
    extra = {} if streamer is None else {"streamer": streamer}
    with torch.inference_mode(), _attached(job) as pruning:
        tokens = job.loaded.model.generate(**inputs, **job.generation, **extra)
    assert pruning.report is not None
    text = job.loaded.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return text, told_apart(pruning.report, bool(videos))


def _attached(job: Job) -> Pruning:
    from plphp.hf import prune

    return prune(job.loaded.model, job.policy, recall=job.recall, **vars(job.bits))


def _print_answer(
    job: Job,
    images: Sequence[str],
    videos: Sequence[str],
    prompt: str,
    full_report: bool,
    as_json: bool,
) -> None:
    with waiting("reading the prompt", quiet=as_json) as show:
        printer = None if as_json else streamer(job.loaded.tokenizer, lambda: show(""))
        text, report = answer(job, images, prompt, videos, printer)
    if as_json:
        said = {**_what(job, images, prompt), "answer": text, "report": report.to_dict()}
        print(json.dumps(said))
        return
    sys.stdout.flush()
    short = "\n".join([report.summary, *report.remarks])
    say(report if full_report else short)


def _print_comparison(
    job: Job,
    images: Sequence[str],
    videos: Sequence[str],
    prompt: str,
    rounds: int,
    full_report: bool,
    as_json: bool,
) -> None:
    from plphp.bench import compare
    from plphp.inputs import make_inputs, told_apart

    inputs = make_inputs(job.loaded, images, prompt, videos)
    options = {**vars(job.bits), **job.generation}
    with waiting("generating, full and pruned in turn", quiet=as_json):
        compared = compare(
            job.loaded.model, inputs, job.policy, rounds, recall=job.recall, **options
        )
    numbers, found = _comparison(job, compared), told_apart(compared.report, bool(videos))
    if as_json:
        said = {**_what(job, images, prompt), **numbers, "report": found.to_dict()}
        print(json.dumps(said))
        return
    how = "kept" if found.recall is None and found.codes is None else "on the device"
    share = f"{found.on_device:.0%} of the vision K/V {how}"
    table = Table(title=share if found.has_vision else None)
    for name in ("", "full", "pruned"):
        table.add_column(name, overflow="fold")
    rows = {
        "answer": "{}",
        "kv_bytes": "{:,}",
        "first_token_ms": "{:.1f}",
        "ms_per_token": "{:.2f}",
    }
    for name, form in rows.items():
        full, pruned = (form.format(numbers[which][name]) for which in ("full", "pruned"))
        table.add_row(name.replace("_", " "), shown(full), shown(pruned))
    stdout().print(table)
    for line in [found] if full_report else found.remarks:
        say(line)


def _comparison(job: Job, compared: Comparison) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "answer": job.loaded.decode(run.tokens),
            "kv_bytes": run.kv_bytes,
            "first_token_ms": run.first_ms,
            "ms_per_token": run.step_ms,
        }
        for name, run in (("full", compared.full), ("pruned", compared.pruned))
    }


def _what(job: Job, images: Sequence[str], prompt: str) -> dict[str, Any]:
    settings: dict[str, Any] = asdict(job.policy) if is_dataclass(job.policy) else {}
    return {
        "images": list(images),
        "prompt": prompt,
        "policy": {"name": job.policy_name, **settings},
        "dtype": str(job.loaded.model.dtype).removeprefix("torch."),
    }


def check_files(images: Sequence[str], videos: Sequence[str], model: str) -> None:
    """Raise InputError for files that cannot be read, before the model is loaded."""
    from plphp.inputs import EMBEDDED, open_image
    from plphp.inputs.images import why_missing

    for path in images:
        open_image(path)
    for path in videos:
        if not os.path.isfile(path):
            raise InputError(f"video {path}: {why_missing(path)}")
    if videos and model == EMBEDDED:
        raise InputError("the embedded model reads pictures, not videos: choose a --model")


def _check_batch(batch: Path, out: Path, prompt: str | None, retry: bool) -> None:
    from plphp.inputs import parquet
    from plphp.inputs.images import wildcard

    if os.path.lexists(out) and not retry:
        raise InputError(
            f"{out} exists already: move it away, or give another --out, or --retry to answer the "
            "lines again that have an error"
        )
    if not os.path.exists(batch):
        hint = wildcard(str(batch)).replace("each file", "the directory")
        raise InputError(f"--batch {batch}: no such file or directory{hint}")
    for path in (batch, out):
        parquet.check(path)
    if batch.is_dir() and prompt is None:
        raise InputError("--batch with a directory needs --prompt, the question about each image")


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("give --prompt TEXT, or the prompt on standard input")
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not {error.encoding} text: {error.reason}") from error
