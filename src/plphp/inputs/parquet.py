"""Prompts from a Parquet file, and answers into one. Needs pyarrow, which plphp[ray] brings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from plphp.errors import InputError, how_to_install
from plphp.inputs import lines

ROWS = 10_000  # that are in memory at the same time
TEXTS = ("answer", "error", "request")


def check(path: Path) -> None:
    """Raise InputError that says what to install if a Parquet file is named without pyarrow."""
    if path.suffix == ".parquet":
        _pyarrow(path)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, one dict of columns each. Columns that are null are left out.

    Raises InputError for what is no Parquet file, and for a row that JSON cannot hold.
    """
    arrow = _pyarrow(path)
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                for row in batch.to_pylist():
                    yield {name: value for name, value in row.items() if value is not None}
    except (OSError, arrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a Parquet file that can be read ({reason})") from error


def write(path: Path, records: Iterable[dict[str, Any]], ids: Sequence[Any]) -> None:
    """The records of a batch as a table with the columns line, id, answer, error, retention,
    kv_bytes, kv_bytes_full and request; what a record lacks is null.

    ids: all of them, in any order. The column has integers if all ids are integers, texts if all
        are texts, and else each id as JSON text. Raises OSError.
    """
    arrow = _pyarrow(path)
    kinds = {type(value) for value in ids if value is not None}
    whole = kinds == {int} and all(-(2**63) <= value < 2**63 for value in ids if value is not None)
    schema = arrow.schema(
        [
            ("line", arrow.int64()),
            ("id", arrow.int64() if whole else arrow.string()),
            *((name, arrow.string()) for name in TEXTS[:2]),
            ("retention", arrow.float64()),
            ("kv_bytes", arrow.int64()),
            ("kv_bytes_full", arrow.int64()),
            (TEXTS[2], arrow.string()),
        ]
    )
    left = iter(records)
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        while some := [_row(record, whole, kinds <= {str}) for record in islice(left, ROWS)]:
            writer.write_table(arrow.Table.from_pylist(some, schema=schema))


def _row(record: dict[str, Any], whole: bool, texts: bool) -> dict[str, Any]:
    row = {name: _text(v) if isinstance(v, str) else v for name, v in record.items()}
    if "id" in record and not whole:
        row["id"] = _text(record["id"] if texts else lines.dump(record["id"]).rstrip("\n"))
    return row


def _text(text: str) -> str:
    """A text that UTF-8 can hold: half of a pair of surrogates stands as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow: {how_to_install('ray')}") from None
    return pyarrow
