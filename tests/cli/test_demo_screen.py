"""The demo's screen: stars on the best, and a line that is true whatever the numbers are."""

import random
import re
from dataclasses import replace

import pytest
from rich.console import Console

from plphp.cli.demo_run import Result
from plphp.cli.demo_screen import advice, table

FULL = Result("full", 9, 10, 1.0, 1000 << 20, 0, 20.0, 1.0, 100.0, 1.0)
SMALL = replace(FULL, name="small", on_device=0.2, kv_bytes=300 << 20, step_ms=18.0, step_ratio=0.9)
QUICK = replace(FULL, name="quick", on_device=0.4, kv_bytes=500 << 20, step_ms=10.0, step_ratio=0.5)


def lines(results: list[Result], known: bool = True) -> list[str]:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(results, known))
    assert max(map(len, captured.get().splitlines())) <= 80
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_best_of_a_column_has_a_star() -> None:
    *head, full, small, quick = lines([FULL, replace(SMALL, right=8), QUICK])
    assert "of 10" in " ".join(head)
    assert [cell.endswith("*") for cell in cells(full)] == [True, False, False, False, True]
    assert [cell.endswith("*") for cell in cells(small)] == [False, True, True, False, True]
    assert [cell.endswith("*") for cell in cells(quick)] == [True, False, False, True, True]


def cells(line: str) -> list[str]:
    return re.findall(r"[\d,.]+%?(?: \([\d.]+\))?\*?", line)


def test_stars_are_given_by_what_is_shown() -> None:
    """Two ways that print the same number are both the best."""
    near = replace(SMALL, name="near", step_ms=SMALL.step_ms + 0.001)
    *_, small, near_line = lines([FULL, SMALL, near])
    assert cells(small)[3].endswith("*") and cells(near_line)[3].endswith("*")


def test_a_ratio_is_that_of_the_times_that_are_shown() -> None:
    """Medians of ratios, which JSON holds, would be other numbers than a reader divides."""
    results = [FULL, replace(SMALL, step_ratio=1.4, first_ratio=0.7, first_ms=103.4), QUICK]
    shown = lines(results)[-3:]
    for line in shown:
        for cell, whole in zip(cells(line)[3:], cells(shown[0])[3:], strict=True):
            time, ratio = re.findall(r"[\d.]+", cell)
            assert ratio == f"{float(time) / float(whole.split()[0]):.2f}"
    assert results[1].to_dict("right")["ms_per_token_over_full"] == 1.4


def test_large_numbers_fit_into_80_columns() -> None:
    big = [replace(r, name="PLPHP() as published", kv_bytes=2**33, first_ms=9876.0, right=18)
           for r in (FULL, SMALL)]  # fmt: skip
    assert "8,192.0" in lines([replace(big[0], questions=20), big[1]], known=False)[-1]


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([SMALL, QUICK], "For memory take small: 9 of 10 answers right, as many as with the full "
         "cache, in 0.30 of its bytes. For speed take quick: 9 of 10 answers right, and 0.50 of "
         "the full cache's time a token."),
        ([replace(SMALL, right=10), replace(QUICK, right=3)], "For memory take small: 10 of 10 "
         "answers right, more than with the full cache, in 0.30 of its bytes. The fastest is "
         "quick, with 0.50 of the full cache's time a token, but only 3 of 10 answers right: take "
         "it only where your own questions keep their answers."),
        ([replace(SMALL, right=7), replace(QUICK, right=3, step_ms=24.0)], "Keep the full cache "
         "where every answer counts: small comes next, with 7 of 10 answers right in 0.30 of the "
         "bytes. The fastest is small, with 0.90 of the full cache's time a token, but only 7 of "
         "10 answers right: take it only where your own questions keep their answers."),
        ([SMALL], "For memory take small: 9 of 10 answers right, as many as with the full cache, "
         "in 0.30 of its bytes. It is also the fastest, with 0.90 of the full cache's time a "
         "token."),
        ([replace(SMALL, kv_bytes=1001 << 20, step_ms=19.98)], "For memory take the full "
         "cache: no way with as many answers takes fewer bytes. For speed take the full cache: no "
         "other way decodes faster."),
    ],
)  # fmt: skip
def test_the_line_says_when_to_take_which(others: list[Result], says: str) -> None:
    assert advice([FULL, *others], known=True) == says


def test_where_nothing_is_right_or_wrong_the_line_says_so() -> None:
    full = replace(FULL, right=10)
    said = advice([full, replace(SMALL, right=10), replace(QUICK, right=4)], known=False)
    assert "right" not in said and "4 of 10 answers as with the full cache" in said


def test_where_every_other_way_loses_everything_none_comes_next() -> None:
    full = replace(FULL, right=2, questions=2)
    others = [replace(one, right=0, questions=2) for one in (SMALL, QUICK)]
    assert advice([full, *others], known=False) == (
        "Keep the full cache: every other way has none of 2 answers as with the full cache. The "
        "fastest is quick, with 0.50 of the full cache's time a token."
    )


def test_the_line_is_true_whatever_the_numbers_are() -> None:
    rng = random.Random(0)
    for _ in range(300):
        full, *others = results = [
            replace(FULL, name=name, right=rng.randint(0, 3), kv_bytes=rng.randint(1, 4) * 500,
                    step_ms=20 * (rng.choice([0.5, 0.9, 0.999, 1, 1.3]) if name != "full" else 1))
            for name in ("full", "a", "b", "c")
        ]  # fmt: skip
        by_name = {r.name: r for r in results}
        said = advice(results, known=True)
        assert not re.search(r"\b0 of", said)
        if not full.right:
            assert said == ("Nothing follows from these answers: the full cache has none of 10 "
                            "answers right.")  # fmt: skip
            continue
        taken = re.findall(r"take (?:the )?(a|b|c|full)\b", said)
        for name in taken:
            assert by_name[name].right >= full.right
        if memory := re.search(r"For memory take (a|b|c):", said):
            enough = [r.kv_bytes for r in others if r.right >= full.right]
            assert by_name[memory[1]].kv_bytes == min(enough) < full.kv_bytes
        else:
            assert not [r for r in others if r.right >= full.right and r.kv_bytes < full.kv_bytes]
        fastest = min(r.step_ms for r in results)
        if fast := re.search(r"(?:fastest is|For speed take) (a|b|c)", said):
            assert by_name[fast[1]].step_ms == fastest < 19.95
