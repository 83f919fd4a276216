"""A local task set of samples that `plphp eval` draws, and lmms-eval's own command line on it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plphp.eval.sample import Sample
from plphp.eval.tasks import TASKS

TASK_FOLDER = Path(__file__).parent / "tasks"
TASKS_DRAWN = ("what", "describe", "transcribe")
SEED, LIMIT = 0, 12


@dataclass(frozen=True)
class Run:
    """What lmms-eval printed, and what it wrote: results, and samples in order by task."""

    printed: str
    code: int
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def draw() -> list[Sample]:
    return [sample for name in TASKS_DRAWN for sample in TASKS[name].draw(LIMIT, SEED)]


def write(samples: list[Sample], folder: Path) -> None:
    """boards.jsonl and its pictures, without loss, where lmms-eval is going to run."""
    with (folder / "boards.jsonl").open("w") as lines:
        for k, sample in enumerate(samples):
            paths = [str(folder / f"{k}-{i}.png") for i in range(len(sample.images))]
            for image, path in zip(sample.images, paths, strict=True):
                image.save(path)
            line = {"images": paths, "question": sample.question, "answer": sample.answers[0]}
            choices = {"choices": [samples[k - 1].answers[0], line["answer"]], "right": 1}
            lines.write(json.dumps({**line, **choices}) + "\n")


def plphp_eval(folder: Path, *options: str) -> list[dict[str, Any]]:
    """`plphp eval` of the same samples: its lines."""
    command = [str(Path(sys.executable).with_name("plphp")), "eval", "--out", str(folder / "eval")]
    command += ["--tasks", ",".join(TASKS_DRAWN), "--limit", str(LIMIT), "--seed", str(SEED)]
    subprocess.run([*command, *options], check=True, capture_output=True)
    files = sorted((folder / "eval" / "samples").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def lmms_eval(folder: Path, model_args: str, *options: str, tasks: str = "plphp_boards") -> Run:
    """`python -m lmms_eval --model plphp` in a process and a folder of its own."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "plphp", "--tasks", tasks]
    command += ["--model_args", model_args, "--include_path", str(TASK_FOLDER), "--log_samples"]
    command += ["--output_path", str(out), *options]
    keep = {**os.environ, "HF_HOME": str(folder / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=folder, env=keep, capture_output=True, text=True)
    results, samples = {}, {}
    for path in out.rglob("*_results.json"):
        results = json.loads(path.read_text())
    for path in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        name = path.stem.split("_samples_")[1]
        samples[name] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return Run(done.stdout + done.stderr, done.returncode, results, samples)
