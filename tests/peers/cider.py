"""Our CIDEr-D against pycocoevalcap's, which brings 100 MB of Java for other measures.

    pip install --no-deps pycocoevalcap==1.2 && python tests/peers/cider.py

2026-11-22: largest difference 2e-15 over 200 samples.
"""

from __future__ import annotations

import random

from pycocoevalcap.cider.cider_scorer import CiderScorer

from plphp.eval.cider import cider

WORDS = ["the", "a", "red", "blue", "k", "star", "in", "picture", "is", "1", "2", "3"]


def main() -> None:
    rng = random.Random(0)
    said, answers = [], []
    for _ in range(200):
        references = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(3)]
        words = references[0].split()
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        said.append(" ".join(words))
        answers.append(references)
    theirs = CiderScorer()
    for text, references in zip(said, answers, strict=True):
        theirs += (text, references)
    _, wanted = theirs.compute_score()
    difference = max(abs(a - b) for a, b in zip(cider(said, answers), wanted, strict=True))
    print(f"largest difference: {difference:.1e}")
    assert difference < 1e-9


if __name__ == "__main__":
    main()
