"""What the tests of several processes share."""

from pathlib import Path


def once(flag: Path) -> bool:
    """True for the first caller of all processes."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
