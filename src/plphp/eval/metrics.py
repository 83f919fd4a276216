"""Metrics of a single answer, from maintained libraries where there are any.

A library is imported when its metric is computed: images without reference answers need none.
All metrics but `wer` are from 0 to 1, and 1 is best. CIDEr needs all answers of a task at once; see
`cider.py`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

Answers = Sequence[str]  # the reference answers, at least one

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
# A comma or a point inside a number belongs to the number; other marks separate words.
MARKS = re.compile(rf"(?<!\d)[.,]|[.,](?!\d)|[{re.escape(string.punctuation.replace('.', ''))}]")
PEOPLE = 3  # the number of people with the same answer from which a VQA answer scores 1


def exact(said: str, answers: Answers) -> float:
    """Exact match: 1 if the answer, without surrounding spaces, equals a reference; else 0."""
    return float(said.strip() in answers)


def words(said: str, answers: Answers) -> float:
    """The share of words that are equal at equal positions, of the length of the longer text."""
    return max(_words(said.split(), answer.split()) for answer in answers)


def vqa(said: str, answers: Answers) -> float:
    """VQA accuracy (Antol et al. 2015): 1 if three reference answers equal the answer.

    It is a third of the number of equal reference answers, at most 1, averaged over all subsets of
    the references with one left out. With a single reference it is 1 or 0. Case, articles,
    punctuation and number words are normalized.
    """
    plain = _plain(said)
    agree = [_plain(answer) == plain for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    total = sum(agree)
    return sum(min((total - one) / PEOPLE, 1.0) for one in agree) / len(agree)


def anls(said: str, answers: Answers) -> float:
    """ANLS: normalized Levenshtein similarity to the nearest reference answer, 0 if below .5.

    Computed by `anls_star`, which generalizes the metric of Biten et al. 2019.
    """
    from anls_star import anls_score

    return float(anls_score(tuple(answers), said))


def rouge_l(said: str, answers: Answers) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common word subsequence, by `rouge_score`."""
    return max(float(_rouge().score(answer, said)["rougeL"].fmeasure) for answer in answers)


def wer(said: str, answers: Answers) -> float:
    """Word error rate by `jiwer`, the lowest over the references. 0 is best; no upper bound."""
    import jiwer

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
    """All metrics of one answer by name; empty without a reference answer."""
    return dict(_score(said, tuple(answers))) if answers else {}


@lru_cache(1024)  # most methods give the same answer to a sample
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
