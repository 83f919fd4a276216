"""What a run leaves on the disk, so that an interrupted one goes on where it stopped.

OUT/run.json               what was asked for: another setting of it belongs into another OUT
OUT/policies.json          every method's options, calibrated ones included
OUT/tasks/TASK.json        the questions and what counts as right
OUT/samples/TASK.jsonl     a line a sample, method and budget; TASK.0-of-2.jsonl of a shard
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from plphp.errors import InputError
from plphp.eval.methods import Setting
from plphp.eval.sample import Sample, Task

Line = dict[str, Any]
Done = set[tuple[str, Setting]]  # sample and setting


@dataclass
class Store:
    """The directory of a run, and this process's own files in it.

    shard: (i, n): which part of the work this process does
    """

    out: Path
    shard: tuple[int, int] = (0, 1)
    files: dict[str, IO[str]] = field(default_factory=dict)

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begin or go on. Raises InputError if the directory holds a run of other settings."""
        run = self.out / "run.json"
        try:
            (self.out / "samples").mkdir(parents=True, exist_ok=True)
            (self.out / "tasks").mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.out}: {error.strerror}") from error
        if not run.exists():
            write_json(run, settings)
        before = json.loads(run.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"--out {self.out} holds a run with {name} {before.get(name)!r}, not "
                    f"{value!r}: give another --out, or the same settings to go on with it"
                )

    def describe(self, task: Task, samples: Iterable[Sample]) -> None:
        """Write down what a task asks."""
        found = {
            "task": task.name,
            "what": task.what,
            "metric": task.metric,
            "samples": [
                {
                    "id": s.id,
                    "pictures": len(s.images),
                    "question": s.question,
                    "answers": list(s.answers),
                    **({"earlier": s.earlier} if s.earlier is not None else {}),
                }
                for s in samples
            ],
        }
        write_json(self.out / "tasks" / f"{task.name}.json", found)

    def note_policies(self, policies: Mapping[str, str]) -> None:
        """Write down the options of every method, beside those of earlier calls."""
        path = self.out / "policies.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**before, **policies})

    def finished(self, task: str) -> Done:
        """Samples that need no more work; settings that could not run are tried again."""
        self._mend(self._own(task))
        return {
            (line["id"], Setting(line["method"], line["budget"]))
            for line in read_lines(self.out, task)
            if "id" in line
        }

    def append(self, task: str, lines: Iterable[Line]) -> None:
        """Add lines in one write, handed to the system before this returns."""
        if task not in self.files:
            self.files[task] = self._own(task).open("a", encoding="utf-8")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.files[task].write(text)
        self.files[task].flush()

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _own(self, task: str) -> Path:
        i, n = self.shard
        name = f"{task}.jsonl" if n == 1 else f"{task}.{i}-of-{n}.jsonl"
        return self.out / "samples" / name

    @staticmethod
    def _mend(path: Path) -> None:
        """Cut off a last line that a kill left half written. Other shards' files are theirs."""
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)


def read_lines(out: Path, task: str) -> Iterator[Line]:
    """Every whole line of a task, of all shards, each sample and setting once."""
    seen = set()
    for path in sorted((out / "samples").glob(f"{task}.*jsonl")):
        for row in path.read_text(encoding="utf-8").split("\n")[:-1]:
            line: Line = json.loads(row)
            key = line.get("id"), line["method"], line["budget"]
            if key not in seen:
                seen.add(key)
                yield line


def read_tasks(out: Path) -> list[dict[str, Any]]:
    """What was written by `describe`, of every task of a run."""
    return [json.loads(path.read_text()) for path in sorted((out / "tasks").glob("*.json"))]


def write_json(path: Path, content: Any) -> None:
    """The whole file or none of it, also when two processes write the same."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(part, path)
