"""The overview of docs/support.md: the modes in which not every family works."""

from collections.abc import Iterable, Mapping, Sequence

HEAD = "| in this mode | works with | not with |\n| --- | --- | --- |\n"
MANY = 4  # more families than this are counted, not named


def exceptions(table: Mapping[str, Mapping[str, str]], works: str) -> Iterable[str]:
    """One line for each mode in which not every family works.

    table: for each mode, from the name of a family to the text of its cell, such as "refused (3)"
    works: how the text begins of a cell that works
    """
    for mode, cells in table.items():
        wrong: dict[str, list[str]] = {}
        for family, text in cells.items():
            if not text.startswith(works):
                wrong.setdefault(text, []).append(family)
        if wrong:
            right = len(cells) - sum(map(len, wrong.values()))
            said = "; ".join(
                f"{_names(names, len(cells))}: {text}" for text, names in wrong.items()
            )
            yield f"| {mode} | {right} of {len(cells)} | {said} |\n"


def _names(names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return "all"
    return ", ".join(names) if len(names) <= MANY else f"{len(names)} of them"
