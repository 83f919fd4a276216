"""`plphp generate --retry`: the lines of a finished batch that have an error are answered again."""

from __future__ import annotations

import os
from pathlib import Path

from plphp.errors import InputError
from plphp.inputs import lines


def reopen(out: Path) -> None:
    """Make a finished batch one in progress, whose lines with an error have no record yet.

    The batch is then continued as after an interruption. Raises InputError for a file that is not
    the JSONL output of a batch.
    """
    part = out.with_name(out.name + ".part")
    if out.suffix == ".parquet":
        raise InputError("--retry reads answers from JSONL: give --out another ending")
    if os.path.lexists(part):
        raise InputError(f"{out} and {part} exist: move one of them away")
    rows = lines.split_lines(lines.read_bytes(out, f"--out {out}"))
    good = [row for row in rows if "error" not in _record(row, out)]
    ready = part.with_name(f"{part.name}.retry")
    try:
        ready.write_bytes(b"".join(row + b"\n" for row in good))
        os.replace(ready, part)
        out.unlink()
    except OSError as error:
        raise InputError(f"{ready}: {error.strerror}") from error


def _record(row: bytes, out: Path) -> dict[str, object]:
    try:
        record = lines.load(row)
    except InputError:
        record = None
    if not isinstance(record, dict) or not {"line", "request"} <= record.keys():
        raise InputError(f"{out} is not the output of a batch: give --retry with one")
    return record
