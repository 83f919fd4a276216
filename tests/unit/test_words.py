"""Numbers in messages agree with the word after them."""

import pytest

from plphp._words import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1200, "1,200 layers")],
)
def test_what_is_counted_has_its_number(number: int, said: str) -> None:
    assert counted(number, "layer") == said
