"""easy-VQA (MIT, by Victor Zhou): pictures of one coloured shape, and questions about them.

Only the test split is used, because the embedded model was trained on the other one. The data are
part of the PyPI package `easy-vqa`; nothing is downloaded.
"""

from __future__ import annotations

import numpy as np

from plphp.eval.sample import Sample
from plphp.inputs import open_image


def draw(count: int, seed: int) -> list[Sample]:
    """Different questions of the test split, in an order that the seed determines."""
    import easy_vqa

    questions, answers, pictures = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    order = np.random.default_rng([seed, 1]).permutation(len(questions))
    return [
        Sample(
            id=f"easyvqa-{int(i)}",
            images=(open_image(paths[pictures[i]]),),
            question=questions[i],
            answers=(f"the answer is {answers[i]}",),
        )
        for i in order[:count]
    ]
