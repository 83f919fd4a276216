"""Small conversations of every kind that a file can hold, and files that earlier versions wrote.

`python -m saved DIRECTORY`, run in `tests` with the source of that version first on the path,
writes one file a kind. The files in `saved/0.1.0` are from commit 730f82e, format 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import plphp
import tiny
from versions import CACHE

FOLDER = Path(__file__).parent
POLICY = plphp.PLPHP(r=0.4, delta_r=0.2)
STEPS = 3
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
ONE = tiny.RowSpec(images=1, text=12)
WINDOW = 46  # the prompt of two images is 44: decoding crosses it
TWO = (tiny.RowSpec(images=0, text=9), tiny.RowSpec(images=2, text=12))


@dataclass(frozen=True)
class Kind:
    """A conversation. rows: its prompt; more: the text of a second turn, before it is saved."""

    name: str
    recall: plphp.Recall | None = None
    window: int | None = None
    rows: tuple[tiny.RowSpec, ...] = (ONE,)
    more: int = 0


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain"),
        Kind("plain_batch", rows=TWO),
        Kind("plain_window", window=WINDOW, rows=TWO),
        Kind("host_record", plphp.Recall("host", 0.6, record=True)),
        Kind("host_batch", plphp.Recall("host", 0.7, every=2), rows=TWO),
        Kind("host_window", plphp.Recall("host", 0.7), window=WINDOW, rows=TWO),
        Kind("int4_batch", plphp.Recall("int4", 0.6), rows=TWO),
        Kind("int4_window", plphp.Recall("int4", 0.6), window=WINDOW, rows=TWO),
        Kind("int2", plphp.Recall("int2", 0.45)),
        Kind("plain_later", more=5),
        Kind("host_later", plphp.Recall("host", 0.7), more=5),
        Kind("int4_later", plphp.Recall("int4", 0.6), more=5),
    )
}


FAMILY = tiny.FAMILIES["llava"]


@cache
def model_of(window: int | None = None, seed: int = 0) -> Any:
    """A model of four layers of one KV head with eight numbers: files of a few KB."""
    config = FAMILY.config()
    text = {**tiny.base.TEXT, **SMALL, "num_key_value_heads": 1, "sliding_window": window}
    config.text_config = transformers.MistralConfig(**text)
    config.vision_config.image_size = 16  # 16 tokens an image
    return FAMILY.build(seed, config)


@contextmanager
def attached(kind: Kind) -> Iterator[Any]:
    """The kind's model, pruned as the kind says."""
    model = model_of(kind.window)
    with plphp.prune(model, POLICY, recall=kind.recall):
        yield model


def text(rows: int, count: int, salt: int) -> Tensor:
    drawn = torch.Generator().manual_seed(salt)
    return torch.randint(tiny.SPECIAL, tiny.VOCAB, (rows, count), generator=drawn)


def ask(model: Any, held: Any, said: dict[str, Tensor], new: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask of the whole conversation after an answer to `new` text."""
    ids = torch.cat([said["input_ids"], new], 1)
    mask = torch.cat([said["attention_mask"], torch.ones_like(new)], 1)
    options = {"max_new_tokens": STEPS, "do_sample": False, CACHE: held}
    whole = model.generate(**{**said, "input_ids": ids, "attention_mask": mask}, **options)
    return whole, torch.cat([mask, torch.ones_like(whole[:, ids.shape[1] :])], 1)


def held(kind: Kind, model: Any) -> tuple[Any, dict[str, Tensor]]:
    """A cache that holds the kind's conversation, and what was said."""
    own = plphp.PrunedCache(model)
    inputs, _ = FAMILY.make_inputs(model, kind.rows, 0)
    none = torch.empty(len(kind.rows), 0, dtype=torch.long)
    ids, mask = ask(model, own, inputs, none)
    if kind.more:
        new = text(len(ids), kind.more, 1)
        ids, mask = ask(model, own, {"input_ids": ids, "attention_mask": mask}, new)
    return own, {"input_ids": ids, "attention_mask": mask}


def goes_on(model: Any, own: Any, said: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (B, 3 + steps, V) and tokens of three more tokens, and then of one more question."""
    mask, logits, tokens = said["attention_mask"], [], []
    token = said["input_ids"][:, -1:]
    ids = said["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            positions = mask.sum(-1, keepdim=True) - 1
            out = model(token, attention_mask=mask, position_ids=positions, **{CACHE: own})
            logits.append(out.logits[:, -1])
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            mask = torch.cat([mask, torch.ones_like(token)], 1)
    new = text(len(ids), 4, 2)
    ids = torch.cat([ids, new], 1)
    mask = torch.cat([mask, torch.ones_like(new)], 1)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **{CACHE: own},
    )  # fmt: skip
    tokens = out.sequences[:, said["input_ids"].shape[1] :]
    return torch.stack([*logits, *out.logits], 1), tokens


def write(folder: Path, names: tuple[str, ...] = tuple(KINDS)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with attached(KINDS[name]) as model:
            held(KINDS[name], model)[0].save(folder / f"{name}.safetensors")


__all__ = ["FOLDER", "KINDS", "Kind", "attached", "goes_on", "held", "model_of", "replace", "write"]
