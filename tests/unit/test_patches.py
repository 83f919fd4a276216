"""A marked spot of an image lies in the rectangle of the token that sees it.

The token is found without the geometry of plphp: the processor of the family reads a black image,
and the same one with a white spot, and the difference shows the patch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from patch_cases import CASES, Case
from PIL import Image

from plphp.models import Patch, Shown, places
from plphp.models.boxes import TILES, WHOLE

SPOT = 3  # pixels of a side
SIZES = [(120, 120), (200, 90), (90, 210), (331, 247), (64, 300)]


def spots(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Corners, sides and the inside, not close to the borders of cells."""
    for x in (0.04, 0.31, 0.55, 0.81, 0.97):
        for y in (0.04, 0.29, 0.59, 0.96):
            yield int(x * (size[0] - SPOT)), int(y * (size[1] - SPOT))


def read(case: Case, size: tuple[int, int], spot: tuple[int, int] | None) -> Any:
    if case.processor is None:
        pytest.skip("this transformers wants torchvision for the processor")
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    if spot is not None:
        pixels[spot[1] : spot[1] + SPOT, spot[0] : spot[0] + SPOT] = 255
    return case.processor(images=[Image.fromarray(pixels)], return_tensors="pt", **case.options)


def shown(case: Case, out: Any, size: tuple[int, int]) -> Shown:
    runs, column = [], 7
    for length in case.runs(out, size):
        runs.append((column, column + length))
        column += length + 2
    return Shown(
        case.config, size, tuple(runs), 0, case.inputs(out), case.processor, case.after(out)
    )


def holds(patch: Patch | None, spot: tuple[int, int], near: float) -> bool:
    if patch is None:
        return False
    x, y = (place + SPOT / 2 for place in spot)
    box = patch.box
    return box.left - near <= x <= box.right + near and box.top - near <= y <= box.bottom + near


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("name", CASES)
def test_a_marked_spot_lies_in_the_token_that_sees_it(name: str, size: tuple[int, int]) -> None:
    case = CASES[name]
    before = read(case, size, None)
    found = places(shown(case, before, size))
    assert found, "the family says where its tokens lie"
    near = case.near + max(size) / 112  # a pixel of a reduced image
    unseen = 0
    for spot in spots(size):
        change = read(case, size, spot)["pixel_values"] - before["pixel_values"]
        if float(change.abs().max()) < 0.05:  # cropped away, so no rectangle may contain it
            unseen += 1
            assert not any(holds(patch, spot, -near) for patch in found), spot
            continue
        for view, token in case.seen(before, change, size).items():
            patch = found[token]
            assert patch is not None and patch.view == view
            assert holds(patch, spot, near), (spot, token, patch)
    assert unseen == 0 or name.startswith("llava")


@pytest.mark.parametrize("name", CASES)
def test_boxes_stay_in_the_picture_and_each_view_covers_it_once(name: str) -> None:
    case, size = CASES[name], (331, 247)
    found = places(shown(case, read(case, size, None), size))
    areas = {WHOLE: 0.0, TILES: 0.0}
    for patch in {patch for patch in found if patch is not None}:
        box = patch.box
        inside = -1e-6 <= box.left < box.right <= size[0] + 1e-6
        assert inside and -1e-6 <= box.top < box.bottom <= size[1] + 1e-6
        areas[patch.view] += box.width * box.height
    for area in areas.values():
        assert area <= size[0] * size[1] * 1.0001
    assert areas[WHOLE] > 0
