"""Images are counted as a person would count them, in the layouts of all families."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import plphp
import tiny
from plphp.models import find_spans
from tiny import RowSpec

TOUCHING = RowSpec(images=3, text=30, touching=True)
LAYOUTS = {
    **tiny.ROWS,
    "touching": (TOUCHING, tiny.NONE, replace(TOUCHING, images=2)),
    "videos": tiny.VIDEOS,
    "touching videos": tuple(replace(row, touching=True) for row in tiny.VIDEOS),
    "both": (
        RowSpec(images=2, videos=1, text=40),
        tiny.NONE,
        RowSpec(images=1, videos=2, text=40, touching=True),
    ),
}
EVERY = {
    name: family for name, family in {**tiny.FAMILIES, **tiny.VARIANTS}.items() if family.available
}
CASES = [
    (name, layout)
    for name, family in EVERY.items()
    for layout, rows in LAYOUTS.items()
    if (family.draw_video and family.videos_told) or not any(row.videos for row in rows)
]
BY_ID = [name for name, family in EVERY.items() if family.types is tiny.no_types]


def prompt(name: str, layout: str) -> tuple[object, dict[str, Tensor], Tensor]:
    config = EVERY[name].config()
    inputs, spans = EVERY[name].make_inputs(config, LAYOUTS[layout], seed=0)
    return config, inputs, spans


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_spans_are_what_a_person_counts(name: str, layout: str) -> None:
    config, inputs, spans = prompt(name, layout)
    assert torch.equal(plphp.vision_spans(config, **inputs), spans)


@pytest.mark.parametrize("name", BY_ID)
def test_token_types_that_also_mark_other_tokens_change_nothing(name: str) -> None:
    """With return_mm_token_type_ids=True, processors mark start, end, break and tile tokens too."""
    config, inputs, spans = prompt(name, "batch")
    special = (inputs["input_ids"] < tiny.SPECIAL) & (spans >= 0)
    for types in (special.long(), torch.zeros_like(spans)):
        assert torch.equal(plphp.vision_spans(config, **inputs, mm_token_type_ids=types), spans)


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next", "llava_onevision", "mistral3"])
def test_sizes_of_earlier_turns_are_passed_over(name: str) -> None:
    """The processor may return the sizes of all images so far; a turn uses the last ones."""
    config, inputs, spans = prompt(name, "touching")
    first, row = int((spans[0] == 2).nonzero()[0, 0]), 0
    later = {
        key: value[:1, first:] if value.shape == spans.shape else value
        for key, value in inputs.items()
    }
    for key in ("image_grid_thw", "image_sizes"):
        if key in later:
            later[key] = later[key][:3]
    if "batch_num_images" in later:
        later["batch_num_images"] = later["batch_num_images"][:1]
    assert torch.equal(
        plphp.vision_spans(config, **later)[0], spans[row, first:] - 1 * (spans[row, first:] > 0)
    )


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_that_look_like_images_count_as_images_and_a_note_says_so(name: str) -> None:
    if name not in EVERY:
        pytest.skip(f"no {name} in this transformers")
    config, inputs, spans = prompt(name, "videos")
    found, notes = find_spans(config, inputs["input_ids"], inputs["attention_mask"], None, {})
    assert found.amax(1).tolist() == [0, 3, 6]
    assert torch.equal(found > 0, spans > 0)
    assert len(notes) == 1 and "vision_mask" in notes[0]
    _, images, _ = prompt(name, "one")
    assert find_spans(config, images["input_ids"], None, None, {})[1] == ()
