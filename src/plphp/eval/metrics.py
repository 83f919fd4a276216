"""How right a text is: scores of one answer, from kept libraries where they exist.

All but `wer` are 0 to 1, 1 the best. CIDEr needs all answers of a task at once: see `cider.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import jiwer
from anls_star import anls_score

Answers = Sequence[str]  # what counts as right, at least one text

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
# A comma or a point inside a number belongs to it; other marks part words.
MARKS = re.compile(rf"(?<!\d)[.,]|[.,](?!\d)|[{re.escape(string.punctuation.replace('.', ''))}]")
PEOPLE = 3  # who must agree for a VQA answer to count in full


def exact(said: str, answers: Answers) -> float:
    """Whether the answer is one of the right ones, to the letter."""
    return float(said.strip() in answers)


def words(said: str, answers: Answers) -> float:
    """The share of words that are right and in their place; the longer text counts."""
    return max(_words(said.split(), answer.split()) for answer in answers)


def vqa(said: str, answers: Answers) -> float:
    """VQA accuracy (Antol et al. 2015): three people of those asked must have said the same.

    Mean over the answers of all people but one; with a single right answer, whether it is said.
    Case, articles, punctuation and numbers as words do not count.
    """
    plain = _plain(said)
    agree = [_plain(answer) == plain for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    total = sum(agree)
    return sum(min((total - one) / PEOPLE, 1.0) for one in agree) / len(agree)


def anls(said: str, answers: Answers) -> float:
    """Normalized Levenshtein similarity to the nearest right answer, 0 where it is under .5.

    By `anls_star`, which generalizes the measure of Biten et al. 2019.
    """
    return float(anls_score(tuple(answers), said))


def rouge_l(said: str, answers: Answers) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by `rouge_score`."""
    return max(float(_rouge().score(answer, said)["rougeL"].fmeasure) for answer in answers)


def wer(said: str, answers: Answers) -> float:
    """Word error rate by `jiwer`, the lowest over the answers: 0 is perfect, no upper bound."""
    return min(float(jiwer.wer(answer, said)) for answer in answers)


TEXT_METRICS: dict[str, Callable[[str, Answers], float]] = {
    "exact": exact,
    "vqa": vqa,
    "words": words,
    "anls": anls,
    "rouge_l": rouge_l,
    "wer": wer,
}


def score(said: str, answers: Answers) -> dict[str, float]:
    """Every metric of one answer; none where there is no right one."""
    return dict(_score(said, tuple(answers))) if answers else {}


@lru_cache(1024)  # most methods say the same of the same sample
def _score(said: str, answers: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    return tuple((name, round(metric(said, answers), 6)) for name, metric in TEXT_METRICS.items())


def _words(said: list[str], wanted: list[str]) -> float:
    right = sum(a == b for a, b in zip(said, wanted, strict=False))
    return right / max(len(said), len(wanted), 1)


def _plain(text: str) -> str:
    found = MARKS.sub(" ", text.lower()).split()
    return " ".join(NUMBERS.get(word, word) for word in found if word not in ARTICLES)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
