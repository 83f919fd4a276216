"""Checks of options. Each raises InputError that names the option and says how to write it."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

from plphp.errors import InputError


def check_share(name: str, value: object) -> None:
    """Raise InputError, naming the option, unless it is a number from 0 to 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]
        meant = meant_share(value) or meant_plain(value)
        raise InputError(f"{name} must be a share from 0 to 1, got {value!r}{meant}")


def meant_share(value: object) -> str:
    """The end of a message about a value that is a percentage: how to write it as a share."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return ""
    if not (text.endswith("%") or number >= 2) or not 0 <= number <= 100:
        return ""
    return f": write {number / 100:g} for {number:g} %"


def meant_plain(value: object) -> str:
    """The end of a message about a number of numpy or torch: how to make it one of Python."""
    return ": give a number of Python, its .item()" if hasattr(value, "item") else ""


def meant_name(given: str, known: Collection[str]) -> str:
    """A part of a message about an unknown name: the known name that is nearest to it, if any."""
    return "".join(
        f" (did you mean {near!r}?)" for near in get_close_matches(given.lower(), known, 1)
    )


def check_count(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    """Raise InputError, naming the option, unless it is an integer from `least` to `most`.

    Larger integers than the default for `most` are not accepted by every function of torch.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            f"{name} must be an integer of at least {least}, got {value!r}{meant_plain(value)}"
        )
    if value > most:
        raise InputError(f"{name} must be an integer of at most {most}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise InputError, naming the option, unless it is one of the choices."""
    if value not in choices:
        raise InputError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
