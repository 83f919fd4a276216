"""JSON lines: one JSON value a line, whatever the texts in it hold.

Only a line feed ends a line. Characters that other readers also take for the end of one, such as
U+2028, are written as escapes.
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
except ImportError:  # Windows: there an open file cannot be replaced by another process
    fcntl = None  # type: ignore[assignment]

DEEPEST = 64  # levels of lists and objects in a line
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def split_lines(data: bytes) -> list[bytes]:
    """The lines of a file without their ends; what follows the last line feed counts if there is
    something. A byte order mark at the start is left out."""
    rows = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not rows[-1]:
        rows.pop()
    return [row.removesuffix(b"\r") for row in rows]


def read_bytes(path: Path, name: str) -> bytes:
    """A file of UTF-8 lines. name: how messages begin. Raises InputError if it cannot be one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{name}: UTF-16 text; save it as UTF-8")
    return data


def load(row: bytes) -> Any:
    """The value of one line. Raises InputError that says what is wrong with it.

    Stricter than Python's own reader: NaN, infinite numbers and a key that stands twice in an
    object are refused, since something of them would be lost.
    """
    try:
        value = json.loads(
            row.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} at column {error.colno}") from None
    except InputError:
        raise
    except ValueError:
        raise InputError("not usable JSON: a number has too many digits") from None
    except RecursionError:
        raise InputError(f"not usable JSON: nested deeper than {DEEPEST} levels") from None
    if _too_deep(value):
        raise InputError(f"not usable JSON: nested deeper than {DEEPEST} levels")
    return value


def dump(value: Any, allow_nan: bool = False) -> str:
    """One line of text, its end included, that every reader takes for one line."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def lock(file: IO[Any], name: str) -> None:
    """Keep other processes from writing this file until it is closed.

    Raises InputError if another process has done so already. Does nothing where the system or the
    file system knows no locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{name}: another process is writing it; wait for its end, or write elsewhere"
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
        raise InputError(f"the key {twice!r} stands twice in one object")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise InputError(f"{text} is too large for a number")
    return number


def _refuse_constant(text: str) -> Any:
    raise InputError(f"not JSON: {text} is no number that JSON knows")
