"""The local task set, and lmms-eval's own command line run on it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import plphp.demo
from plphp.eval.tasks import TASKS

TASK_FOLDER = Path(__file__).parent / "tasks"
DRAWN = {"what": 12, "describe": 6, "transcribe": 6}  # tasks of `plphp eval` and how many samples
SEED = 0


@dataclass(frozen=True)
class Question:
    """One line of boards.jsonl, its pictures as they were drawn."""

    images: list[Image.Image]
    text: str
    answer: str


@dataclass(frozen=True)
class Run:
    """What lmms-eval printed, and what it wrote: results, and samples in order by task."""

    printed: str
    code: int
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def questions() -> list[Question]:
    """The demo's ten, and samples that `plphp eval` draws with the same seed."""
    folder = Path(plphp.demo.__file__).parent
    found = [
        Question(
            [Image.open(folder / "pictures" / name).convert("RGB") for name in entry["images"]],
            entry["question"],
            entry["expected"],
        )
        for entry in json.loads((folder / "questions.json").read_text())
    ]
    for name, count in DRAWN.items():
        drawn = TASKS[name].draw(count, SEED)
        found += [Question(list(s.images), s.question, s.answers[0]) for s in drawn]
    return found


def write(asked: list[Question], folder: Path) -> None:
    """boards.jsonl and its pictures, without loss, where lmms-eval is going to run."""
    with (folder / "boards.jsonl").open("w") as lines:
        for k, question in enumerate(asked):
            paths = [str(folder / f"{k}-{i}.png") for i in range(len(question.images))]
            for image, path in zip(question.images, paths, strict=True):
                image.save(path)
            wrong = asked[k - 1].answer
            choices = {"choices": [wrong, question.answer], "right": 1}
            line = {"images": paths, "question": question.text, "answer": question.answer}
            lines.write(json.dumps({**line, **choices}) + "\n")


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
