"""Reads and writes JSON lines: one JSON value per line.

Only a line feed ends a line. Some readers also end a line at other characters, such as U+2028.
Therefore these characters are written as escapes.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any

from plphp.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows, where another process cannot replace an open file
    fcntl = None  # type: ignore[assignment]

DEEPEST = 64  # the largest number of nested lists and objects in a line
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a file, without line feeds and without a byte order mark at the start.

    Bytes after the last line feed are a line too.
    """
    rows = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not rows[-1]:
        rows.pop()
    return [row.removesuffix(b"\r") for row in rows]


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of a file of UTF-8 lines. name: the beginning of messages.

    Raises InputError for a file that cannot be read, or that is UTF-16 text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: the file cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: the file is UTF-16 text: save it as UTF-8")
    return data


def load(row: bytes) -> Any:
    """The value of one line. Raises InputError that says what is wrong with it.

    This is stricter than Python's `json.loads`: NaN, infinite numbers, and a key that an object has
    twice are refused, because a part of them would be lost.
    """
    try:
        value = json.loads(
            row.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise InputError(
            f"the line is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"the line is not JSON: {error.msg} at character {error.colno}") from None
    except InputError:
        raise
    except ValueError:
        raise InputError("a number in the line has too many digits") from None
    except RecursionError:
        raise InputError(f"the JSON is nested deeper than {DEEPEST} levels") from None
    if _too_deep(value):
        raise InputError(f"the JSON is nested deeper than {DEEPEST} levels")
    return value


def dump(value: Any, allow_nan: bool = False) -> str:
    """A value as JSON on one line, with the line feed. Every reader takes it for a single line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def lock(file: IO[Any], name: str) -> None:
    """Keep other processes from writing this file until it is closed.

    name: the beginning of the message
    Raises InputError if another process holds the lock. Does nothing if the system or the file
    system has no locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{name}: another process is writing this file: wait until it ends, or write to "
            "another file"
        ) from None
    except OSError:
        return


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
    return bool(level)


def _inside(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"an object has the key {twice!r} twice")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise InputError(f"{text} is too large for a number")
    return number


def _refuse_constant(text: str) -> Any:
    raise InputError(f"the line is not JSON: {text} is not a JSON number")
