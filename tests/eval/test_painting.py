"""Boards at native resolution: sizes, seeds, what the maps say, photographs that stay apart."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from plphp.demo.boards import CELL, Thing, draw_page, draw_scene
from plphp.demo.painting import EMPTY, UNCLEAR, Canvas, Look, paint
from plphp.demo.photographs import HELD_OUT, TRAINING, crop, photograph
from plphp.demo.questions import TASKS
from plphp.demo.regimes import (
    LEAST_CELLS,
    LEAST_TOKENS,
    LONGEST_SIDE,
    PLAIN,
    REGIMES,
    SILENCE,
    Regime,
    draw,
    draw_frame,
)
from plphp.demo.wording import WORDINGS

ANY = Regime(Look(shading_share=0.5, clutter_share=0.5, occlusion_share=0.5), tokens=(50, 900))
PACKAGES = ("skimage", "sklearn", "matplotlib")
needs_photographs = pytest.mark.skipif(
    not all(find_spec(package) for package in PACKAGES), reason="needs scikit-image"
)


def test_a_seed_fixes_a_prompt_and_sizes_are_the_frames() -> None:
    for seed in range(12):
        drawn = []
        for _ in range(2):
            rng = np.random.default_rng(seed)
            frame = draw_frame(rng, ANY)
            drawn.append(draw(rng, ANY, frame, list(TASKS)))
        first, again = drawn
        assert first.questions == again.questions and first.questions
        for image, other, size in zip(first.images, again.images, frame.sizes, strict=True):
            assert image.shape == (size[0] * CELL, size[1] * CELL, 3)
            assert image.dtype == np.uint8 and np.array_equal(image, other)
            assert max(size) <= LONGEST_SIDE and size[0] * size[1] >= LEAST_TOKENS


def test_frames_keep_their_regime() -> None:
    rng = np.random.default_rng(0)
    frames = [draw_frame(rng, ANY) for _ in range(300)]
    assert {len(frame.sizes) for frame in frames} == set(range(1, 9))
    assert {frame.scale for frame in frames} == {1, 2, 3, 4}
    assert all(40 < frame.tokens < 1000 for frame in frames)
    assert any(high > wide for frame in frames for high, wide in frame.sizes)
    assert any(high < wide for frame in frames for high, wide in frame.sizes)
    long = [draw_frame(rng, REGIMES["long"]).tokens for _ in range(20)]
    assert min(long) > 1800 and max(long) < 4200
    assert all(draw_frame(rng, REGIMES["dense"]).preamble == SILENCE for _ in range(20))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_map_says_which_tokens_show_a_thing(scale: int) -> None:
    """On paper, without noise of any kind, exactly the tokens with ink are not EMPTY."""
    rng = np.random.default_rng(scale)
    board = draw_scene(rng, 2, [3, 25], [0, 1], 3)
    canvas = Canvas(2 * scale + 1, 3 * scale + 1, scale, 11, 17)
    image, shown = paint(board, canvas, PLAIN, rng)
    assert {tuple(place) for place in shown.reshape(-1, 2)} >= {(3, 0), (25, 1), (EMPTY, EMPTY)}
    paper = np.median(image.reshape(-1, 3), 0)
    ink = (np.abs(image - paper).max(-1) > 60).reshape(canvas.high, CELL, canvas.wide, CELL)
    inked = ink.any((1, 3))
    assert not (inked & (shown[..., 0] == EMPTY)).any()
    assert (shown[..., 0] >= 0).sum() <= 2 * (scale + 1) ** 2


def test_a_board_may_be_wider_than_high() -> None:
    rng = np.random.default_rng(1)
    scene = draw_scene(rng, 2, range(10), [0] * 10, 5)
    assert sorted(scene.things) == [(row, column) for row in range(2) for column in range(5)]
    page = draw_page(rng, 2, 2, 5, 5)
    assert sorted(page.things) == sorted(scene.things) and page.columns == 5
    assert draw_page(rng, 3, 1, 2).columns == 3


def test_a_grid_is_what_fits_behind_the_corner() -> None:
    assert Canvas(8, 12, 4).grid == (2, 3)
    assert Canvas(8, 12, 4, 1, 0).grid == (1, 3)
    assert Canvas(9, 13, 4, CELL, CELL).grid == (2, 3)
    rng = np.random.default_rng(2)
    for _ in range(50):
        frame = draw_frame(rng, ANY)
        for high, wide in frame.sizes:
            assert (high // frame.scale) * (wide // frame.scale) >= LEAST_CELLS


def test_occlusion_and_clutter_change_pixels() -> None:
    board = draw_scene(np.random.default_rng(0), 3, [0, 1], [0, 1])
    plain = paint(board, Canvas(6, 6, 2), PLAIN, np.random.default_rng(5))[0]
    for change in ("shading_share", "clutter_share", "occlusion_share"):
        look = replace(PLAIN, **{change: 1.0})
        assert (paint(board, Canvas(6, 6, 2), look, np.random.default_rng(5))[0] != plain).any()


def test_training_and_held_out_photographs_are_apart() -> None:
    assert not set(TRAINING) & set(HELD_OUT)
    assert len(set(TRAINING)) == len(TRAINING) and len(set(HELD_OUT)) == len(HELD_OUT)
    for name, regime in REGIMES.items():
        assert regime.look.photographs == (() if name.endswith("-plain") else HELD_OUT)


@needs_photographs
def test_photographs_are_found_and_cropped() -> None:
    pixels = {photograph(name).resize((32, 32)).tobytes() for name in TRAINING + HELD_OUT}
    assert len(pixels) == len(TRAINING) + len(HELD_OUT)
    rng = np.random.default_rng(0)
    for high, wide in ((56, 560), (1120, 28), (700, 700)):
        part = crop(rng, TRAINING + HELD_OUT, high, wide)
        assert part.shape == (high, wide, 3) and part.min() >= 0 and part.max() <= 255


def test_first_wordings_are_the_old_ones() -> None:
    assert {task: wordings[0][0] for task, wordings in WORDINGS.items()} == {
        "color": "what color is the {glyph}?",
        "refcolor": "what color is the {glyph} in picture {n}?",
        "what": "what is {colour} in picture {n}?",
        "which": "which picture has the {colour} {glyph}?",
        "all": "list the {colour} objects.",
        "describe": "describe picture {n}.",
        "describe_all": "describe all pictures.",
        "read": "read picture {n}.",
    }
    begins = {wording[1].startswith(("{colour}", "{content}", "{glyph}")) for wording in
              sum(WORDINGS.values(), ())}  # fmt: skip
    assert begins == {True, False}
    questions = [wording[0] for wording in sum(WORDINGS.values(), ())]
    assert len(questions) == len(set(questions))


def test_an_unclear_token_is_no_thing() -> None:
    assert EMPTY < 0 and UNCLEAR < 0 and EMPTY != UNCLEAR
    assert str(Thing(0, 0)) == "red A"
