"""CIDEr-D: similarity of a text to references, with rare n-grams weighted higher.

    g_n(t)   = tf(t) * log(D / df(t))             over n-grams, df in the references of D samples
    CIDEr_n  = min(g(c), g(r)) . g(r) / (|g(c)| |g(r)|) * exp(-(|c| - |r|)^2 / (2 sigma^2))
    CIDEr-D  = 10 * mean over n = 1..4 and references

Vedantam et al. 2015 (arXiv 1411.5726). It is implemented here because the usual package
(pycocoevalcap) brings a hundred megabytes of Java for its other metrics. `tests/peers/cider.py`
compares the two.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # most words of an n-gram
SIGMA = 6.0  # words; scale of the penalty on differences in length

Grams = Counter[tuple[str, ...]]


def cider(said: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each sample, 0 to 10.

    said: one text per sample; answers: the references of each sample, at least one

    The scores depend on all samples together: an n-gram that occurs in the references of every
    sample has weight 0. With a single sample all weights, and the score, are therefore 0.
    """
    references = [[_grams(text) for text in texts] for texts in answers]
    frequency: Grams = Counter()
    for several in references:
        frequency.update(set().union(*several))
    unit = math.log(max(len(references), 1))
    scores = []
    for text, several in zip(said, references, strict=True):
        candidate = _grams(text)
        each = [_alike(candidate, reference, frequency, unit) for reference in several]
        scores.append(10 * sum(each) / len(each))
    return scores


def _grams(text: str) -> Grams:
    tokens = re.findall(r"\w+", text.lower())
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(tokens) - n + 1)
    )


def _alike(candidate: Grams, reference: Grams, frequency: Grams, unit: float) -> float:
    """The clipped cosine similarity of two texts, averaged over n, with the length penalty."""
    weights = [
        {gram: count * (unit - math.log(max(frequency[gram], 1))) for gram, count in grams.items()}
        for grams in (candidate, reference)
    ]
    total = 0.0
    for n in range(1, LONGEST + 1):
        one, other = ({g: w for g, w in each.items() if len(g) == n} for each in weights)
        dot = sum(min(w, other[gram]) * other[gram] for gram, w in one.items() if gram in other)
        norm = math.hypot(*one.values()) * math.hypot(*other.values())
        total += dot / norm if norm else 0.0
    apart = _words(candidate) - _words(reference)
    return total / LONGEST * math.exp(-(apart**2) / (2 * SIGMA**2))


def _words(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)
