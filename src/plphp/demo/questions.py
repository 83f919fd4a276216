"""Draws prompts: a few pictures, and questions about them with their answers.

A ``Level`` says which pictures a prompt may have. A task is a function that makes one kind of
question. It returns None if it has no unambiguous question about the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from numpy.random import Generator

from plphp.demo.boards import (
    COLOUR_NAMES,
    GLYPHS,
    Picture,
    Thing,
    draw_page,
    draw_scene,
)
from plphp.demo.wording import WORDINGS

Range = tuple[int, int]  # both ends included
Item = TypeVar("Item")

PAGE_SHARE = 0.3
# The tasks of a packed sample. A task that is listed twice gives two questions.
MIX = [
    *("color", "color", "refcolor", "refcolor"),
    *("what", "what", "which", "all"),
    *("describe", "describe", "read", "read", "describe_all"),
]


class Question(NamedTuple):
    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Level:
    """How difficult the pictures of a prompt are: ranges of their numbers and sizes."""

    pictures: Range
    side: Range
    things: Range  # in a scene
    page_rows: Range
    page_columns: Range
    max_vision_tokens: int
    question_tokens: int  # approximate number of tokens in the questions and answers of a sample


LEVELS = (
    Level((2, 2), (4, 4), (2, 3), (1, 1), (2, 3), 32, 130),
    Level((2, 3), (4, 5), (2, 4), (1, 1), (3, 4), 75, 170),
    Level((2, 4), (4, 6), (3, 4), (1, 2), (3, 5), 150, 200),
    Level((2, 6), (4, 8), (3, 5), (1, 2), (3, 6), 390, 240),
)


def draw_size(rng: Generator, level: Level) -> tuple[int, int]:
    """The number of pictures, and of cells per side. All samples of a batch have the same."""
    while True:
        count, side = _within(rng, level.pictures), _within(rng, level.side)
        if count * side * side <= level.max_vision_tokens:
            return count, side


def draw_pictures(rng: Generator, level: Level, count: int, side: int) -> list[Picture]:
    """Scenes and pages of ``side`` x ``side`` cells; see ``draw_boards``."""
    return draw_boards(rng, level, [(side, None)] * count)


def draw_boards(
    rng: Generator, level: Level, grids: Sequence[tuple[int, int | None]]
) -> list[Picture]:
    """A picture for each grid: scenes and pages, at least one of them a scene.

    grids: (rows, columns) of each picture, with None for as many columns as rows. A grid needs at
        least three cells. A grid that is smaller than the level wants gets fewer things

    Two glyphs occur in several scenes, all others in one.
    """
    count = len(grids)
    kinds = ["page" if rng.random() < PAGE_SHARE else "scene" for _ in range(count)]
    if "scene" not in kinds:
        kinds[int(rng.integers(count))] = "scene"
    scenes = [i for i, kind in enumerate(kinds) if kind == "scene"]
    glyphs, unused = _share_glyphs(rng, scenes)
    pictures = []
    for i, kind in enumerate(kinds):
        side, wide = grids[i]
        columns_there = side if wide is None else wide
        if kind == "page":
            rows = min(_within(rng, level.page_rows), side)
            narrowest, widest = (min(edge, columns_there) for edge in level.page_columns)
            columns = _within(rng, (narrowest, widest))
            pictures.append(draw_page(rng, side, rows, columns, wide))
            continue
        wanted = min(_within(rng, level.things), side * columns_there)
        while len(glyphs[i]) < wanted and unused:
            glyphs[i].append(unused.pop())
        # Within a scene no colour occurs twice, so that a colour names one thing.
        colours = rng.permutation(len(COLOUR_NAMES))[: len(glyphs[i])]
        pictures.append(draw_scene(rng, side, glyphs[i], colours, wide))
    return pictures


def draw_prompt(
    rng: Generator, level: Level, count: int, side: int, tasks: Sequence[str] = MIX
) -> tuple[list[Picture], list[Question]]:
    """Pictures, and a question for each task that they allow. No question occurs twice."""
    pictures = draw_pictures(rng, level, count, side)
    return pictures, ask_all(rng, pictures, tasks)


def ask_all(
    rng: Generator, pictures: Sequence[Picture], tasks: Sequence[str], reworded: float = 0.0
) -> list[Question]:
    """A question for each task that the pictures allow.

    reworded: the share of questions in other words than the first wording
    """
    facts = Facts(pictures)
    asked = (ask(facts, task, rng, reworded) for task in tasks)
    # A dict drops repeats and keeps the order.
    return list(dict.fromkeys(question for question in asked if question))


class Facts:
    """The places of all things in the pictures of a prompt, in the form that the tasks need."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self.pictures = pictures
        self.scenes = [i for i, picture in enumerate(pictures) if picture.kind == "scene"]
        self.pages = [i for i, picture in enumerate(pictures) if picture.kind == "page"]
        self.on_pages = {thing for i in self.pages for thing in pictures[i].things.values()}
        self.places: dict[int, list[tuple[int, int]]] = {}  # glyph -> (scene, colour) of each
        for i in self.scenes:
            for thing in in_raster_order(pictures[i]):
                self.places.setdefault(thing.glyph, []).append((i, thing.colour))

    def single_glyphs(self) -> list[int]:
        """The glyphs that occur once in the prompt and its pages, so that "the K" is one thing."""
        letters = {thing.glyph for thing in self.on_pages}
        return [g for g, where in self.places.items() if len(where) == 1 and g not in letters]

    def repeated_glyphs(self) -> list[int]:
        """The glyphs that occur in several scenes, or all glyphs if there are none."""
        repeated = [g for g, where in self.places.items() if len(where) > 1]
        return repeated or sorted(self.places)


def ask(facts: Facts, task: str, rng: Generator, reworded: float = 0.0) -> Question | None:
    """A question of the given task, or None. reworded: the probability of other words"""
    found = TASKS[task](facts, rng)
    if found is None:
        return None
    wordings = WORDINGS[task]
    other = reworded > 0 and rng.random() < reworded
    text, answer = _pick(rng, wordings[1:]) if other else wordings[0]
    return Question(task, text.format(**found), answer.format(**found))


def in_raster_order(picture: Picture) -> list[Thing]:
    return [thing for _, thing in sorted(picture.things.items())]


def listing(picture: Picture) -> str:
    """The things of a scene in the fixed order of the colours."""
    return ", ".join(str(t) for t in sorted(picture.things.values(), key=lambda t: t.colour))


def reading(picture: Picture) -> str:
    """The letters of a page, row by row."""
    rows: dict[int, list[str]] = {}
    for (row, _), thing in sorted(picture.things.items()):
        rows.setdefault(row, []).append(GLYPHS[thing.glyph])
    return " / ".join(" ".join(row) for row in rows.values())


Asked = dict[str, str] | None  # the values for the fields of a wording


def _color(facts: Facts, rng: Generator) -> Asked:
    glyphs = facts.single_glyphs()
    if not glyphs:
        return None
    glyph = _pick(rng, glyphs)
    return _named(glyph, *facts.places[glyph][0])


def _refcolor(facts: Facts, rng: Generator) -> Asked:
    glyph = _pick(rng, facts.repeated_glyphs())
    return _named(glyph, *_pick(rng, facts.places[glyph]))


def _what(facts: Facts, rng: Generator) -> Asked:
    scene = _pick(rng, facts.scenes)
    thing = _pick(rng, sorted(facts.pictures[scene].things.values()))
    return _named(thing.glyph, scene, thing.colour)


def _which(facts: Facts, rng: Generator) -> Asked:
    glyph = _pick(rng, facts.repeated_glyphs())
    scene, colour = _pick(rng, facts.places[glyph])
    alike = sum(other == colour for _, other in facts.places[glyph])
    if alike > 1 or Thing(glyph, colour) in facts.on_pages:
        return None
    return _named(glyph, scene, colour)


def _all(facts: Facts, rng: Generator) -> Asked:
    colour = int(rng.integers(len(COLOUR_NAMES)))
    found = [
        f"{GLYPHS[thing.glyph]} in picture {scene + 1}"
        for scene in facts.scenes
        for thing in in_raster_order(facts.pictures[scene])
        if thing.colour == colour
    ]
    if not found or any(thing.colour == colour for thing in facts.on_pages):
        return None
    return {"colour": COLOUR_NAMES[colour], "content": ", ".join(found)}


def _describe(facts: Facts, rng: Generator) -> Asked:
    scene = _pick(rng, facts.scenes)
    return {"n": str(scene + 1), "content": listing(facts.pictures[scene])}


def _describe_all(facts: Facts, rng: Generator) -> Asked:
    parts = [
        f"picture {i + 1}: {listing(picture) if picture.kind == 'scene' else 'text'}"
        for i, picture in enumerate(facts.pictures)
    ]
    return {"content": "; ".join(parts)}


def _read(facts: Facts, rng: Generator) -> Asked:
    if not facts.pages:
        return None
    page = _pick(rng, facts.pages)
    return {"n": str(page + 1), "content": reading(facts.pictures[page])}


TASKS: dict[str, Callable[[Facts, Generator], Asked]] = {
    "color": _color,
    "refcolor": _refcolor,
    "what": _what,
    "which": _which,
    "all": _all,
    "describe": _describe,
    "describe_all": _describe_all,
    "read": _read,
}


def _share_glyphs(rng: Generator, scenes: list[int]) -> tuple[dict[int, list[int]], list[int]]:
    """The repeated glyphs of each scene, and the glyphs that no scene has yet."""
    order = [int(glyph) for glyph in rng.permutation(len(GLYPHS))]
    recurring, unused = order[:2], order[2:]
    glyphs: dict[int, list[int]] = {scene: [] for scene in scenes}
    for glyph in recurring:
        shuffled = rng.permutation(scenes)
        for scene in shuffled[: int(rng.integers(2, 4))]:
            glyphs[int(scene)].append(glyph)
    return glyphs, unused


def _named(glyph: int, scene: int, colour: int) -> dict[str, str]:
    return {"glyph": GLYPHS[glyph], "n": str(scene + 1), "colour": COLOUR_NAMES[colour]}


def _pick(rng: Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _within(rng: Generator, span: Range) -> int:
    return int(rng.integers(span[0], span[1] + 1))
