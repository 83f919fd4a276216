"""What a run leaves on the disk, so that an interrupted one goes on where it stopped.

OUT/run.json               what was asked for: another setting of it belongs into another OUT
OUT/policies.json          every method's options, calibrated ones included
OUT/tasks/TASK.json        the questions and what counts as right
OUT/samples/TASK.jsonl     a line a sample, method and budget; TASK.0-of-2.jsonl of a shard
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from plphp.errors import InputError
from plphp.eval.methods import Setting
from plphp.eval.sample import Sample, Task
from plphp.inputs import lines as jsonl

RESULTS = ("policies.json", "summary.json", "summary.md", "curves.png", "kl.png")  # beside run.json
Line = dict[str, Any]
Done = set[tuple[str, Setting]]  # sample and setting


@dataclass
class Store:
    """The directory of a run, and this process's own files in it.

    shard: (i, n): which part of the work this process does
    """

    out: Path
    shard: tuple[int, int] = (0, 1)
    files: dict[str, IO[bytes]] = field(default_factory=dict)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin or go on. Raises InputError if the directory holds a run of other settings."""
        run = self.out / "run.json"
        if self.out.is_dir() and not run.exists():
            self._check_empty()
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            (self.out / "tasks").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}") from error
        if not run.exists():
            write_json(run, settings)
        before = read_json(run)
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"--out {self.out} holds a run with {name} {before.get(name)!r}, not "
                    f"{value!r}: give another --out, or the same settings to go on with it"
                )

    def _check_empty(self) -> None:
        """Raise InputError if files that are no run's would be among a run's, or lost."""
        for path in sorted(self.out.iterdir()):
            # Another process may begin the same run just now: its results come after run.json.
            if path.name in RESULTS and not (self.out / "run.json").exists():
                raise InputError(
                    f"--out {self.out} holds a {path.name} and no run.json, so it is not a run: "
                    "give another --out"
                )

    def describe(self, task: Task, samples: Iterable[Sample]) -> None:
        """Write down what a task asks. Raises InputError if an earlier call asked other things."""
        found = {
            "task": task.name,
            "what": task.what,
            "metric": task.metric,
            "samples": [
                {
                    "id": s.id,
                    "pictures": len(s.images),
                    "pixels": _pixels(s),
                    "question": s.question,
                    "answers": list(s.answers),
                    **({"earlier": s.earlier} if s.earlier is not None else {}),
                }
                for s in samples
            ],
        }
        path = self.out / "tasks" / f"{task.name}.json"
        if path.exists() and read_json(path) != json.loads(json.dumps(found)):
            raise InputError(
                f"--out {self.out} holds a run whose task {task.name} asked something else (the "
                "prompt or the images differ): give another --out, or the same to go on with it"
            )
        write_json(path, found)

    def note_policies(self, policies: Mapping[str, str]) -> None:
        """Write down the options of every method, beside those of earlier calls."""
        path = self.out / "policies.json"
        before = read_json(path) if path.exists() else {}
        write_json(path, {**before, **policies})

    def finished(self, task: str) -> Done:
        """Samples that need no more work; settings that could not run are tried again.

        From here on no other process may write this shard of the task. Raises InputError if one
        does so already.
        """
        self._begin(task)
        return {
            (line["id"], Setting(line["method"], line["budget"]))
            for line in read_lines(self.out, task)
            if "id" in line
        }

    def append(self, task: str, lines: Iterable[Line]) -> None:
        """Add lines in one write, handed to the system before this returns."""
        self._begin(task)
        text = "".join(jsonl.dump(line, allow_nan=True) for line in lines)
        self.files[task].write(text.encode("utf-8"))
        self.files[task].flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _begin(self, task: str) -> None:
        """Open this process's own file and cut off a last line that a kill left half written."""
        if task in self.files:
            return
        i, n = self.shard
        path = self.out / "samples" / (f"{task}.jsonl" if n == 1 else f"{task}.{i}-of-{n}.jsonl")
        file = path.open("a+b")
        try:
            jsonl.lock(file, str(path))
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        except BaseException:
            file.close()
            raise
        self.files[task] = file


def read_lines(out: Path, task: str) -> Iterator[Line]:
    """Every whole line of a task, of all shards, each sample and setting once.

    Raises InputError for a line that no run wrote.
    """
    seen = set()
    for path in sorted((out / "samples").glob(f"{task}.*jsonl")):
        for number, row in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line: Line = json.loads(row)
                key = line.get("id"), line["method"], line["budget"]
            except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
                raise InputError(
                    f"{path}, line {number}: not a line of a run; remove it, or give another --out"
                ) from error
            if key not in seen:
                seen.add(key)
                yield line


def read_tasks(out: Path) -> list[dict[str, Any]]:
    """What was written by `describe`, of every task of a run."""
    return [read_json(path) for path in sorted((out / "tasks").glob("*.json"))]


def read_json(path: Path) -> dict[str, Any]:
    """An object that `write_json` wrote. Raises InputError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of a run ({error}); give another --out") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a file of a run (no JSON object); give another --out")
    return found


def write_json(path: Path, content: Any) -> None:
    """The whole file or none of it, also when two processes write the same."""
    part = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    part.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(part, path)


def _pixels(sample: Sample) -> str:
    """16 characters that differ where the pictures do."""
    seen = hashlib.sha256()
    for image in sample.images:
        seen.update(repr((image.mode, image.size)).encode() + image.tobytes())
    return seen.hexdigest()[:16]
