"""What `plphp demo` asks: bundled questions, or the user's, and a batch of long prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from plphp.inputs import Runnable

MARGIN = 8  # tokens that an answer may be longer than the expected one, which makes it wrong
ROOM = 64  # columns of a long prompt that are left for its question and its answer
GROUPS = (("c1.jpg", "c2.jpg", "c3.jpg", "c4.jpg"), ("d1.jpg", "d2.jpg", "d3.jpg", "d4.jpg"))
PROMPTS = (
    "Describe every picture in one sentence.",
    "Which letters or shapes are drawn in the first picture, and in which colors?",
    "What lies behind the letters in the last picture?",
)


@dataclass(frozen=True)
class Item:
    """One question of the demo.

    images: names of the image files
    expected: the right answer; None if it is not known
    regime: how many vision tokens a thing of the pictures covers (`plphp.demo.regimes`), or "own"
    inputs: arguments of generate()
    limit: the most tokens of an answer
    """

    images: tuple[str, ...]
    question: str
    inputs: dict[str, Tensor]
    limit: int
    expected: str | None = None
    task: str = "prompt"
    regime: str = "own"


@dataclass(frozen=True)
class LongBatch:
    """Long prompts to measure times with.

    inputs: arguments of generate() for all rows, which have equal lengths
    one: arguments for the first row alone
    rows: number of rows
    vision: number of vision tokens of a row
    """

    inputs: dict[str, Tensor]
    one: dict[str, Tensor]
    rows: int
    vision: int


def bundled_questions(loaded: Runnable) -> list[Item]:
    """The questions with known answers, in the language of the embedded model."""
    from plphp.inputs import make_inputs

    found = []
    for q in json.loads((_root() / "questions.json").read_text(encoding="utf-8")):
        answer = loaded.tokenizer(q["expected"], add_special_tokens=False)["input_ids"]
        found.append(
            Item(
                images=tuple(q["images"]),
                question=q["question"],
                inputs=make_inputs(loaded, _paths(q["images"]), q["question"]),
                limit=len(answer) + MARGIN,
                expected=q["expected"],
                task=q["task"],
                regime=q["regime"],
            )
        )
    return found


def own_questions(
    loaded: Runnable, images: Sequence[str], prompts: Sequence[str], longest: int
) -> list[Item]:
    """Every prompt about all images; bundled ones stand for images or prompts that are missing."""
    from plphp.inputs import make_inputs

    asked = list(prompts) or list(PROMPTS)
    groups = [list(images)] if images else [_fitting(loaded, _paths(g), asked) for g in GROUPS]
    return [
        Item(
            tuple(_names(group)),
            prompt,
            make_inputs(loaded, group, prompt),
            longest,
            task=f"prompt {number}",
        )
        for group in groups
        for number, prompt in enumerate(asked, start=1)
    ]


def long_batch(
    loaded: Runnable, images: Sequence[str], question: str, rows: int, vision: int
) -> LongBatch:
    """A batch with at least so many vision tokens a row, or as many as the model can hold.

    The pictures are repeated as often as needed, and every row begins with another one. Raises
    InputError for a model whose prompts do not become longer with more pictures.
    """
    from plphp.inputs import open_image

    pictures = [open_image(path) for path in images or _paths(sum(GROUPS, ()))]
    row = _long_row(loaded, pictures, question, vision)
    turned = [row[k % len(row) :] + row[: k % len(row)] for k in range(rows)]
    batch = loaded.batch([(order, question) for order in turned])
    if not _whole(batch):  # a bare step cannot be told of padding by every model
        batch = loaded.batch([(row, question)] * rows)
    one = loaded.inputs(row, question)
    return LongBatch(batch, one, rows, _size(loaded, one)[0])


def _long_row(
    loaded: Runnable, pictures: Sequence[Image], question: str, vision: int
) -> list[Image]:
    config = loaded.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    count, before = 1, 0
    while True:
        row = [pictures[i % len(pictures)] for i in range(count)]
        tokens, columns = _size(loaded, loaded.inputs(row, question))
        if tokens <= before:
            raise InputError(
                f"{count} pictures make a prompt of {tokens} vision tokens, no more than fewer of "
                f"them: give --vision-tokens {max(tokens, before)}, or larger images"
            )
        more = max(count + 1, math.ceil(count * vision / tokens))
        while more > count and columns * more / count > limit - ROOM:
            more -= 1
        if tokens >= vision or more == count:
            return row
        count, before = more, tokens


def _size(loaded: Runnable, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """The numbers of vision tokens and of columns of a prompt."""
    from plphp.models import vision_spans

    spans = vision_spans(loaded.model.config, **inputs)
    return int((spans > 0).sum()), int(spans.shape[1])


def _whole(batch: dict[str, Tensor]) -> bool:
    """Whether a batch has no padding."""
    mask: Any = batch.get("attention_mask")
    return mask is None or bool(mask.all())


def _fitting(loaded: Runnable, paths: list[str], prompts: Sequence[str]) -> list[str]:
    """As many of the pictures as the model takes in one prompt: all, half of them, or one."""
    from plphp.inputs import make_inputs

    longest = max(prompts, key=len)
    for count in (len(paths), len(paths) // 2):
        try:
            make_inputs(loaded, paths[:count], longest)
        except InputError:
            continue
        return paths[:count]
    return paths[:1]


def _root() -> Path:
    return Path(str(files("plphp.demo")))


def _paths(names: Sequence[str]) -> list[str]:
    return [str(_root() / "pictures" / name) for name in names]


def _names(paths: Sequence[str]) -> list[str]:
    """The paths, of which bundled pictures have only their names."""
    folder = str(_root() / "pictures")
    return [Path(p).name if str(Path(p).parent) == folder else p for p in paths]
