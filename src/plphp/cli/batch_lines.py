"""The prompts of a batch, from a JSONL or Parquet file or from a directory of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plphp.cli.requests import digest, file_digest
from plphp.errors import InputError
from plphp.inputs import image_files, lines, parquet
from plphp.policy.checks import meant_name

KEYS = ("id", "images", "prompt")


@dataclass(frozen=True)
class Line:
    """One prompt of a batch, or the reason why the line cannot be read."""

    number: int
    images: tuple[str, ...] = ()
    prompt: str = ""
    id: Any = None
    error: str = ""
    row: bytes = b""

    def request(self, key: Mapping[str, Any]) -> str:
        """A digest of what is asked: the line, the bytes of its images, and the key.

        key: what all lines share, which is the model, the method and the options
        """
        pictures = [file_digest(path) for path in self.images]
        return digest([key, self.id, self.prompt, pictures, self.error, self.row.hex()])


def read_lines(source: Path, prompt: str | None) -> Iterator[Line]:
    """The prompts of a batch: one per image of a directory, or per line of JSONL or Parquet."""
    if source.suffix == ".parquet" and not source.is_dir():
        for number, entry in enumerate(parquet.read(source)):
            yield _line(number, entry, prompt, source.parent)
        return
    if source.is_dir():
        files = image_files(source)
        if not files:
            raise InputError(f"--batch {source}: there are no image files in this directory")
        for number, path in enumerate(files):
            yield Line(number, (str(path),), prompt or "", path.name)
        return
    data = lines.read_bytes(source, f"--batch {source}")
    for number, row in enumerate(lines.split_lines(data)):
        yield _parse(number, row, prompt, source.parent)


def _parse(number: int, row: bytes, prompt: str | None, folder: Path) -> Line:
    if not row.strip():
        return Line(number, error="the line is empty: remove it", row=row)
    try:
        entry = lines.load(row)
    except InputError as error:
        return Line(number, error=str(error), row=row)
    if not isinstance(entry, dict):
        return Line(number, error="the line is not a JSON object with images and prompt", row=row)
    return _line(number, entry, prompt, folder, row)


def _line(
    number: int, entry: Mapping[str, Any], prompt: str | None, folder: Path, row: bytes = b""
) -> Line:
    images, question = entry.get("images", []), entry.get("prompt", prompt)
    images = [images] if isinstance(images, str) else images
    wrong = _wrong(entry, images, question)
    if wrong:
        return Line(number, id=entry.get("id"), error=wrong, row=row)
    # Relative to the file. A URL stays as it is: pathlib would take one of its slashes away.
    paths = tuple(image if "://" in image else str(folder / image) for image in images)
    return Line(number, paths, str(question), entry.get("id"))


def _wrong(entry: Mapping[str, Any], images: Any, question: Any) -> str:
    """The reason why the object of a line cannot be answered, or an empty text."""
    unknown = [key for key in entry if key not in KEYS]
    if unknown:
        meant = meant_name(unknown[0], KEYS)
        return f"unknown key {unknown[0]!r}{meant}: the keys of a line are {', '.join(KEYS)}"
    if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
        return "images must be a list of file names"
    if question is None:
        return "there is no prompt: give one in the line, or --prompt for all lines without one"
    return "" if isinstance(question, str) else "prompt must be a string"
