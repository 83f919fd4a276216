"""`plphp generate --retry`: the lines of a finished batch that have an error are answered again."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plphp.cli.batch import Batch
from plphp.cli.batch_lines import read_lines
from plphp.errors import InputError
from plphp.inputs import lines


def reopen(source: Path, out: Path, prompt: str | None, key: Mapping[str, Any]) -> None:
    """Make a finished batch one in progress, in which lines with an error have no record yet.

    The arguments are those of `open_batch`, which then continues the batch as after an
    interruption. Raises InputError, and leaves all files as they are, for a file that is not the
    JSONL output of this batch.
    """
    part = out.with_name(out.name + ".part")
    if out.suffix == ".parquet":
        raise InputError("--retry reads answers from JSONL: give --out another ending")
    if os.path.lexists(part):
        raise InputError(f"{out} and {part} exist: move one of them away")
    batch, good = Batch(source, out, out, key, list(read_lines(source, prompt)), io.BytesIO()), []
    for row in lines.split_lines(lines.read_bytes(out, f"--out {out}")):
        record = batch.known(row)
        if "error" not in record:
            batch.check(record)
            good.append(row + b"\n")
    ready = part.with_name(f"{part.name}.retry")
    try:
        ready.write_bytes(b"".join(good))
        os.replace(ready, part)
        out.unlink()
    except OSError as error:
        raise InputError(f"{ready}: {error.strerror}") from error
