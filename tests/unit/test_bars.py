"""The bars of `plphp doctor`: lengths are shares, and images can be told apart."""

import pytest

from plphp.cli.bars import ASCII, bars


def drawn(line: str) -> str:
    return line.split()[1]


def test_a_bar_is_as_long_as_its_bytes() -> None:
    full, half = bars({"full": (1000, 3000), "half": (1000, 1000)}, images=2, width=40)
    assert drawn(full) == "░" * 10 + "█" * 15 + "▓" * 15
    assert drawn(half) == "░" * 10 + "█" * 5 + "▓" * 5
    assert full.endswith(" 4,000") and half.endswith(" 2,000")
    assert len(full) == len(half)


def test_little_text_is_seen_and_no_text_is_not() -> None:
    (some,) = bars({"full": (1, 10**6)}, images=1, width=10)
    (none,) = bars({"full": (0, 10**6)}, images=1, width=10)
    assert drawn(some) == "░" + "█" * 9 and drawn(none) == "█" * 10


@pytest.mark.parametrize("images", [0, 1, 7, 500])
def test_no_number_of_images_makes_a_bar_longer(images: int) -> None:
    (line,) = bars({"full": (70, 30 * images)}, images, width=20)
    assert len(drawn(line)) == 20 if images else drawn(line) == "░" * 20


def test_nothing_is_drawn_of_nothing() -> None:
    assert bars({"full": (0, 0)}, images=1) == []


def test_other_characters_stand_for_these() -> None:
    (line,) = bars({"full": (10, 20)}, images=2, width=3)
    assert drawn(line.translate(ASCII)) == ".#="
