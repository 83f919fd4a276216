"""Answers a batch with the workers of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from plphp.cli.batch import Answer, Record, answer_line
from plphp.cli.batch_lines import Line
from plphp.cli.requests import model_identity
from plphp.cluster import Lost, Pool
from plphp.cluster import share as share_on
from plphp.errors import InputError


def share(
    pool: Pool,
    lines: Sequence[Line],
    key: Mapping[str, Any],
    make_job: Callable[[], Any],
    answer: Answer,
) -> Iterator[list[Record]]:
    """Yield the records of lines as they arrive. A line that kills its worker gets an error.

    key: what all lines share; make_job: called in every worker, where it loads the model
    """

    def make() -> Callable[[Line], Record]:
        check_same_model(key)
        job = make_job()
        return lambda line: answer_line(job, line, key, answer)

    for found in share_on(pool, make, lines):
        yield [
            _lost(lines[index], key, record) if isinstance(record, Lost) else record
            for index, record in found
        ]


def check_same_model(key: Mapping[str, Any]) -> None:
    """Raise InputError in a worker whose versions or model are not those of the command.

    Times of files may differ: every machine may have a copy of its own.
    """
    asked, here = key["model"], model_identity(key["source"]["model"])
    if _untimed(asked) != _untimed(here):
        raise InputError(
            f"a worker has {_untimed(here)} where the command has {_untimed(asked)}: install the "
            "same versions, and the same model's files, on every machine"
        )


def _untimed(identity: Sequence[Any]) -> list[Any]:
    return [[f[:2] for f in part] if isinstance(part, list) else part for part in identity]


def _lost(line: Line, key: Mapping[str, Any], lost: Lost) -> Record:
    named = {} if line.id is None else {"id": line.id}
    return {"line": line.number, **named, "error": lost.reason, "request": line.request(key)}
