"""easy-VQA (MIT, by Victor Zhou): a third party's pictures of one coloured shape, and questions.

Only its test split: the embedded model was trained on the other one. The data come inside the PyPI
package `easy-vqa`; nothing is downloaded.
"""

from __future__ import annotations

import easy_vqa
import numpy as np

from plphp.eval.sample import Sample
from plphp.inputs import open_image


def draw(count: int, seed: int) -> list[Sample]:
    """Questions of the test split in an order drawn from the seed, none twice."""
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
