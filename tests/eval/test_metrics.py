"""Scores against values computed by hand."""

import math

import pytest

from plphp.eval.cider import cider
from plphp.eval.metrics import anls, exact, rouge_l, score, vqa, wer, words


def test_exact_is_to_the_letter() -> None:
    assert exact("red K ", ["red K"]) == 1
    assert exact("red k", ["red K"]) == 0


def test_words_count_in_their_place() -> None:
    assert words("picture 1: A B C", ["picture 1: A X C"]) == 4 / 5
    assert words("A B", ["A B C D"]) == 1 / 2
    assert words("A B C D", ["A B"]) == 1 / 2
    assert words("", ["A"]) == 0


@pytest.mark.parametrize(
    ("said", "answers", "value"),
    [
        ("The answer is Teal.", ["the answer is teal"], 1),
        ("two dogs", ["2 dogs"], 1),
        ("1,000.5", ["1000.5"], 0),  # a comma inside a number stays
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1),
        ("cat", ["dog"] * 10, 0),
    ],
)
def test_vqa_accuracy(said: str, answers: list[str], value: float) -> None:
    assert vqa(said, answers) == pytest.approx(value)


def test_anls_is_cut_at_one_half() -> None:
    assert anls("kitten", ["sitting", "kittens"]) == pytest.approx(1 - 1 / 7)
    assert anls("abcd", ["wxyz"]) == 0
    assert anls("abcx", ["ab12"]) == 0.5


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # "the K is": 3 words of 4 said and 5 wanted
    assert rouge_l("the K is blue", ["the red K is teal"]) == pytest.approx(2 * 3 / (4 + 5))


def test_word_error_rate() -> None:
    assert wer("a x c d", ["a b c"]) == pytest.approx(2 / 3)  # one replaced, one added
    assert wer("a b c", ["x y z", "a b c"]) == 0


def test_nothing_is_scored_without_a_right_answer() -> None:
    assert score("whatever", []) == {}


def test_cider_by_hand() -> None:
    # Two samples, "red" in both references: it weighs log(2/2) = 0; "k" and "star" weigh log 2.
    # 1-grams agree in all that weighs, 2-grams ("red k") too, there are no 3- and 4-grams.
    assert cider(["red k", "blue"], [["red k"], ["red star"]]) == pytest.approx([5.0, 0.0])
    # One word more: "k" is 1 of the 2 weights that the candidate has, lengths differ by one.
    said = cider(["red k star", "x"], [["red k"], ["red star"]])
    one = 1 / math.sqrt(2)
    two = 1 / math.sqrt(2)  # "red k" of "red k" and "k star", which no reference has: log(2/1)
    assert said[0] == pytest.approx(10 * (one + two) / 4 * math.exp(-1 / 72))


def test_cider_of_words_that_all_references_have_is_zero() -> None:
    assert cider(["the"], [["the"]]) == [0.0]
