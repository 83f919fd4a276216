"""Many prompts from a file or a directory: resumable, one JSON line out per line in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plphp.cli.console import stderr
from plphp.errors import InputError, PlphpError


@dataclass(frozen=True)
class Line:
    """One prompt of a batch, or the reason why the line cannot be read."""

    number: int
    images: tuple[str, ...] = ()
    prompt: str = ""
    id: Any = None
    error: str = ""


def run_batch(
    job: Any, source: Path, out: Path, prompt: str | None, answer: Callable[..., Any], quiet: bool
) -> None:
    """Answer every line of `source` into `out`.

    Work in progress stands in `out`.part, a line at a time: an interrupted batch is resumed by the
    same command, and `out` itself appears only when it is whole.
    """
    part = out.with_name(out.name + ".part")
    lines = list(read_lines(source, prompt))
    out.parent.mkdir(parents=True, exist_ok=True)
    done, failed = finished(part)
    if done > len(lines):
        raise InputError(f"{part} has more lines than {source}: it belongs to another batch")
    with part.open("a", encoding="utf-8") as file, _progress(quiet) as progress:
        task = progress.add_task("answering", total=len(lines), completed=done)
        for line in lines[done:]:
            record = _record(job, line, answer)
            failed += "error" in record
            _write(file, record)
            progress.advance(task)
    os.replace(part, out)
    print(f"{len(lines)} lines in {out}, errors: {failed}", file=sys.stderr)


def read_lines(source: Path, prompt: str | None) -> Iterator[Line]:
    """The prompts of a directory of images, or of a JSONL file with images and prompt."""
    if source.is_dir():
        known = Image.registered_extensions()
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in known)
        if not files:
            raise InputError(f"--batch {source}: no image files in this directory")
        for number, path in enumerate(files):
            yield Line(number, (str(path),), prompt or "", path.name)
        return
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--batch {source}: not UTF-8 text ({error.reason})") from error
    for number, row in enumerate(text.splitlines()):
        yield _parse(number, row, prompt, source.parent)


def finished(part: Path) -> tuple[int, int]:
    """Whole lines that an earlier run left and how many are errors; a torn last line is cut off."""
    if not part.exists():
        return 0, 0
    data = part.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with part.open("r+b") as file:
            file.truncate(len(whole))
    rows = whole.decode("utf-8").splitlines()
    return len(rows), sum("error" in json.loads(row) for row in rows)


def _parse(number: int, row: str, prompt: str | None, folder: Path) -> Line:
    try:
        entry = json.loads(row)
    except json.JSONDecodeError as error:
        return Line(number, error=f"not JSON: {error.msg} at column {error.colno}")
    if not isinstance(entry, dict):
        return Line(number, error="not a JSON object with images and prompt")
    images, question = entry.get("images", []), entry.get("prompt", prompt)
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        return Line(number, id=entry.get("id"), error="images must be a list of file names")
    if not isinstance(question, str):
        return Line(number, id=entry.get("id"), error="prompt must be a text")
    paths = tuple(str(folder / image) for image in images)  # as seen from the JSONL file
    return Line(number, paths, question, entry.get("id"))


def _record(job: Any, line: Line, answer: Callable[..., Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"line": line.number}
    if line.id is not None:
        record["id"] = line.id
    if line.error:
        return {**record, "error": line.error}
    try:
        text, report = answer(job, line.images, line.prompt)
    except PlphpError as error:
        return {**record, "error": " ".join(str(error).split())}
    costs = {name: getattr(report, name) for name in ("retention", "kv_bytes", "kv_bytes_full")}
    return {**record, "answer": text, **costs}


def _write(file: IO[str], record: dict[str, Any]) -> None:
    """One line in one write, on the disk before the next begins."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _progress(quiet: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr(), disable=quiet)
