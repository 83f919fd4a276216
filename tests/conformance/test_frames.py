"""The frames of videos, as the processors of the families lay them out."""

import pytest

from invariants import truth
from plphp.models import frames_of, processor_inputs

GRIDS = [[0] * 8 + [1] * 8, [0] * 4 + [1] * 4 + [2] * 4]
RUNS = [[0] * 9 + [1] * 9 + [2] * 9] * 2
WANTED = {
    "qwen2_vl": GRIDS,
    "qwen3_vl": GRIDS,
    "glm4v": GRIDS,
    "llava_onevision": [[0] * 4 + [1] * 4 + [2] * 5] * 2,  # with the line end of the video
    "smolvlm": RUNS,
    "internvl": RUNS,
}


@pytest.mark.parametrize("family", WANTED)
def test_frames_are_those_of_the_layout(family: str) -> None:
    expected = truth(family, 0, "videos")
    given = (expected.inputs.get(name) for name in ("input_ids", "mm_token_type_ids"))
    config = expected.build().config
    frames = frames_of(config, expected.spans, *given, processor_inputs(expected.inputs))
    assert not frames[0].any(), "a row without a video"
    videos = [frames[2][expected.spans[2] == number].tolist() for number in (1, 2)]
    assert videos == WANTED[family]
