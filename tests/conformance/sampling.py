"""A few cells of a matrix in which every pair of values of two different axes still occurs."""

from collections.abc import Hashable, Sequence
from itertools import combinations

Cell = tuple[Hashable, ...]


def pairs(cell: Cell) -> set[tuple[tuple[int, Hashable], ...]]:
    return set(combinations(enumerate(cell), 2))


def pairwise(cells: Sequence[Cell]) -> set[Cell]:
    """Greedy: the cell with the most pairs not seen yet, until all are seen."""
    missing = {pair for cell in cells for pair in pairs(cell)}
    left, chosen = list(cells), set()
    while missing:
        best = max(left, key=lambda cell: len(pairs(cell) & missing))
        chosen.add(best)
        missing -= pairs(best)
        left.remove(best)
    return chosen
