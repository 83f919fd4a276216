"""The files of a run, with which an interrupted run is continued.

OUT/run.json               the settings of the run; others, but a larger limit, need another OUT
OUT/policies.json          the options of each method, calibrated ones included
OUT/tasks/TASK.json        the questions and the reference answers
OUT/samples/TASK.jsonl     one line per sample, method and budget; TASK.0-of-2.jsonl for a shard
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
from plphp.eval.sample import Sample, Task, frames
from plphp.inputs import lines as jsonl

RESULTS = ("policies.json", "summary.json", "summary.md", "curves.png", "kl.png")  # with run.json
Line = dict[str, Any]
Done = set[tuple[str, Setting]]  # sample and setting


@dataclass
class Store:
    """The directory of a run, and the files in it that this process writes.

    shard: (i, n): this process does part i of n parts of the work
    """

    out: Path
    shard: tuple[int, int] = (0, 1)
    files: dict[str, IO[bytes]] = field(default_factory=dict)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin or continue a run, whose `limit` may grow.

        Raises InputError for a directory with another run.
        """
        run = self.out / "run.json"
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out {self.out} is a file: give a directory for the results")
        if self.out.is_dir() and not run.exists():
            self._check_empty()
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            (self.out / "tasks").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.out}: {error.strerror}: give a directory that can be made or written"
            ) from error
        if not run.exists():
            write_json(run, settings)
        before = read_json(run)
        for name, value in settings.items():
            known = before.get(name)
            if known != value and not (name == "limit" and value > (known or value)):
                raise InputError(
                    f"--out {self.out} has a run with {name} {known!r}, not {value!r}: "
                    "give another --out, or the same settings to continue that run"
                )
        if before != settings:
            write_json(run, {**before, **settings})

    def _check_empty(self) -> None:
        """Raise InputError if the directory has files with the names of results, but no run."""
        for path in sorted(self.out.iterdir()):
            # Another process may begin the same run just now: its results come after run.json.
            if path.name in RESULTS and not (self.out / "run.json").exists():
                raise InputError(
                    f"--out {self.out} has a {path.name} but no run.json, so it is not a run: give "
                    "another --out"
                )

    def describe(self, task: Task, samples: Iterable[Sample]) -> None:
        """Write the questions of a task.

        Raises InputError if an earlier call asked other ones than the first of these.
        """
        found: dict[str, Any] = {
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
        if path.exists() and not _continues(read_json(path), json.loads(json.dumps(found))):
            raise InputError(
                f"--out {self.out} has a run whose task {task.name} has another prompt or other "
                "images: give another --out, or the same prompt and images to continue that run"
            )
        write_json(path, found)

    def note_policies(self, policies: Mapping[str, str]) -> None:
        """Add the options of methods to those that earlier calls have written."""
        path = self.out / "policies.json"
        before = read_json(path) if path.exists() else {}
        write_json(path, {**before, **policies})

    def finished(self, task: str) -> Done:
        """The samples and settings of a task that are finished.

        Settings that could not run are not among them, so that they are tried again. From now on no
        other process can write this shard of the task. Raises InputError if another one already
        does.
        """
        self._begin(task)
        return {
            (line["id"], Setting(line["method"], line["budget"]))
            for line in read_lines(self.out, task)
            if "id" in line
        }

    def append(self, task: str, lines: Iterable[Line]) -> None:
        """Add lines with one write, and pass them to the operating system at once."""
        self._begin(task)
        text = "".join(jsonl.dump(line, allow_nan=True) for line in lines)
        self.files[task].write(text.encode("utf-8"))
        self.files[task].flush()

    def close(self) -> None:
        """Close the files, so that other processes can write them."""
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _begin(self, task: str) -> None:
        """Open the file of a task, and remove a last line that a killed process left incomplete."""
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
    """The complete lines of a task from all shards, one for each sample and setting.

    Raises InputError for a line that cannot come from a run.
    """
    seen = set()
    for path in sorted((out / "samples").glob(f"{task}.*jsonl")):
        for number, row in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line: Line = json.loads(row)
                key = line.get("id"), line["method"], line["budget"]
            except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
                raise InputError(
                    f"{path}, line {number} is not a line of a run: remove it, or give another "
                    "--out"
                ) from error
            if key not in seen:
                seen.add(key)
                yield line


def read_tasks(out: Path) -> list[dict[str, Any]]:
    """The objects that `describe` wrote, one for each task of a run."""
    return [read_json(path) for path in sorted((out / "tasks").glob("*.json"))]


def read_json(path: Path) -> dict[str, Any]:
    """An object that `write_json` wrote. Raises InputError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a file of a run ({error}): give another --out") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a file of a run (no JSON object): give another --out")
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all, even if two processes write it at once."""
    part = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    part.write_bytes(text.encode("utf-8", "backslashreplace"))
    os.replace(part, path)


def _continues(before: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a task is the same as before, perhaps with further samples."""
    first = found["samples"][: len(before["samples"])]
    return {**found, "samples": first} == before


def _pixels(sample: Sample) -> str:
    """A digest of the images, 16 characters."""
    seen = hashlib.sha256()
    for image in sample.images:
        if isinstance(image, tuple):
            seen.update(f"{len(image)} frames".encode())
        for frame in frames(image):
            seen.update(repr((frame.mode, frame.size)).encode() + frame.tobytes())
    return seen.hexdigest()[:16]
