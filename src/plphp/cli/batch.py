"""Batches: many prompts from a file or a directory, answered with one JSON line per prompt.

An interrupted batch can be continued by the same command.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from plphp.cli.batch_lines import Line, read_lines
from plphp.cli.console import one_line, progress, resumable, say
from plphp.errors import InputError
from plphp.inputs import lines, parquet
from plphp.report import undefined_note

Record = dict[str, Any]  # what is written of a line
Answer = Callable[..., tuple[str, Any]]  # (job, images, prompt) -> the text and the report

TOLD = 5  # lines with an error that the end of a batch lists
TORN = re.compile(rb'\{"line": \d+[,}]')  # the beginning of a record


@dataclass
class Batch:
    """A batch in progress. Its answers are in `part`, which no other process may write meanwhile.

    key: what all lines share
    done: the byte of `part` at which the record of a line begins, by the number of the line; the
        records may have any order
    failed: the text of the error, by the number of the line, of those among them that have one
    """

    source: Path
    out: Path
    part: Path
    key: Mapping[str, Any]
    lines: list[Line]
    file: IO[bytes]
    done: dict[int, int] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def left(self) -> list[Line]:
        """The lines that have no record yet."""
        return [line for line in self.lines if line.number not in self.done]

    def run(self, answers: Iterable[Sequence[Record]], quiet: bool) -> int:
        """Write records as they come. `out` appears only when it is complete.

        answers: groups of records, in any order, each with the `request` of its line
        Returns the number of lines whose record is an error.
        """
        with resumable(self._so_far), progress(quiet) as bar:
            task = bar.add_task("answering", total=len(self.lines), completed=len(self.done))
            for records in answers:
                self.write(records)
                bar.advance(task, len(records))
        if self.out.exists():
            raise InputError(
                f"{self.out} was made while this batch ran: the answers are in {self.part}; move "
                "one of the two files away"
            )
        self._finish()
        say(self._told())
        return len(self.failed)

    def _so_far(self) -> str:
        """What an interrupted batch has, and how to go on."""
        return (
            f"{len(self.done)} of {len(self.lines)} lines are in {self.part}; the same command "
            "goes on there"
        )

    def _told(self) -> str:
        """What the finished batch has: lines, errors with the first of them, prompts of text."""
        text = sum(not line.images and not line.error for line in self.lines)
        told = f"{self.out} has {len(self.lines)} lines, errors: {len(self.failed)}"
        told += f", without images: {text}" if text else ""
        rows = [f"line {number}: {self.failed[number]}" for number in sorted(self.failed)]
        more = len(rows) - TOLD
        rows[TOLD:] = [f"and {more} more, under 'error' in {self.out}"] if more > 0 else []
        return "\n".join([told, *rows])

    def _note(self, record: Mapping[str, Any], begin: int) -> None:
        """Note a record that begins at a byte of `part`."""
        self.done[record["line"]] = begin
        if "error" in record:
            self.failed[record["line"]] = str(record["error"])

    def write(self, records: Sequence[Record]) -> None:
        """Write some records with one call, and put them on the disk before the next ones."""
        rows = [lines.dump(record).encode("utf-8") for record in records]
        with self._writing(self.part):
            begin = self.file.seek(0, os.SEEK_END)
            self.file.write(b"".join(rows))
            self.file.flush()
            os.fsync(self.file.fileno())
        for record, row in zip(records, rows, strict=True):
            self._note(record, begin)
            begin += len(row)

    def _finish(self) -> None:
        """Make `out` of `part`: in the order of the lines, as JSON lines or as Parquet."""
        begins = [self.done[line.number] for line in self.lines]
        as_parquet = self.out.suffix == ".parquet"
        if begins == sorted(begins) and not as_parquet:
            os.replace(self.part, self.out)
            return
        ready = self.out.with_name(f"{self.part.name}.sorted")
        with self._writing(ready):
            rows = self._rows(begins)
            if as_parquet:
                parquet.write(ready, map(lines.load, rows), [line.id for line in self.lines])
            else:
                with ready.open("wb") as file:
                    file.writelines(rows)
            os.replace(ready, self.out)
            self.part.unlink()

    def _rows(self, begins: Iterable[int]) -> Iterator[bytes]:
        for begin in begins:
            self.file.seek(begin)
            yield self.file.readline()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; give the same command again to continue the batch"
            ) from error

    def resume(self) -> None:
        """Find the records of an earlier run. Raises InputError for a record of another batch.

        The file is changed only after every line is known to belong to this batch. Then an
        incomplete last line is removed.
        """
        self.file.seek(0)
        data = self.file.read()
        whole, begin = data.rfind(b"\n") + 1, 0
        for row in data[:whole].split(b"\n")[:-1]:
            record = self.known(row)
            self.check(record)
            self._note(record, begin)
            begin += len(row) + 1
        torn = data[whole:]
        if torn and not TORN.match(torn) and not b'{"line": 0123456789'.startswith(torn):
            raise self._foreign()
        self.file.truncate(whole)

    def known(self, row: bytes) -> dict[str, Any]:
        """The record of a row. Raises InputError for one that is not of a batch."""
        try:
            record = lines.load(row)
        except InputError:
            raise self._foreign() from None
        if not isinstance(record, dict) or not {"line", "request"} <= record.keys():
            raise self._foreign()
        number = record["line"]
        if type(number) is not int or number < 0 or number in self.done:
            raise self._foreign()
        return record

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise InputError unless the record answers what this batch asks."""
        number = record["line"]
        if number >= len(self.lines):
            raise InputError(
                f"{self.part} has more lines than {self.source}, so it belongs to another batch: "
                "move it away, or give another --out"
            )
        if record["request"] != self.lines[number].request(self.key):
            raise InputError(
                f"{self.part} belongs to another batch: an image, the prompt, the model, the "
                f"method or an option of its line {number} differs; continue with the same command "
                "and files, or move the file away, or give another --out"
            )

    def _foreign(self) -> InputError:
        return InputError(
            f"{self.part} is needed for work in progress, but this file is not from a batch: move "
            "it away, or give another --out"
        )


@contextmanager
def open_batch(
    source: Path, out: Path, prompt: str | None, key: Mapping[str, Any]
) -> Iterator[Batch]:
    """Open a batch, or continue one that was interrupted.

    The answers of a batch in progress are in the file `out`.part, one line per prompt. Raises
    InputError if that file belongs to another batch, or if another process uses it.
    """
    part = out.with_name(out.name + ".part")
    asked = list(read_lines(source, prompt))
    if os.path.lexists(part) and not part.is_file():
        raise InputError(f"{part} is needed for work in progress, but it is no file: move it away")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("a+b")
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}: give a file in a directory that can be made or written"
        ) from error
    with file:
        lines.lock(file, str(part))
        if out.exists() or not _is_still(part, file):
            raise InputError(f"another process has just finished {out}")
        batch = Batch(source, out, part, key, asked, file)
        batch.resume()
        yield batch


def _is_still(part: Path, file: IO[bytes]) -> bool:
    """Whether an open file still has the name with which it was opened."""
    return part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno()))


def answer_line(job: Any, line: Line, key: Mapping[str, Any], answer: Answer) -> Record:
    """The record of one line. What goes wrong with it is its error: the others are answered."""
    record: Record = {"line": line.number}
    if line.id is not None:
        record["id"] = line.id
    if line.error:
        return {**record, "error": line.error, "request": line.request(key)}
    try:
        text, report = answer(job.seeded(line.number), line.images, line.prompt)
    except Exception as error:  # an error of one line does not end the batch
        return {**record, "error": one_line(error), "request": line.request(key)}
    if report.undefined:  # what was answered is noise
        said = undefined_note(report.undefined)[0]
        return {**record, "error": said, "request": line.request(key)}
    costs = {name: getattr(report, name) for name in ("retention", "kv_bytes", "kv_bytes_full")}
    return {**record, "answer": text, **costs, "request": line.request(key)}
