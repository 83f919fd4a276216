"""A later turn that repeats pixels, or that does not continue the conversation, is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
import tiny

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SOME = plphp.PLPHP(r=0.3, delta_r=0)
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
REPEATED = "holds images of earlier turns"
OTHER = "does not continue the conversation"


def turn(family: str, model: Any, images: int, salt: int = 0) -> dict[str, Tensor]:
    spec = tiny.RowSpec(images=images, text=20, salt=salt)
    inputs: dict[str, Tensor] = tiny.FAMILIES[family].make_inputs(model, [spec], salt)[0]
    return inputs


def conversation(said: Tensor, new: dict[str, Tensor], *, pixels: Any) -> dict[str, Tensor]:
    """The ids of a conversation and a new turn, with given pixels."""
    ids = torch.cat([said, new["input_ids"]], 1)
    types = {"mm_token_type_ids": (ids == tiny.IMAGE).int()} if "mm_token_type_ids" in new else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types, **pixels}


def only_pixels(*turns: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in turns[0] if name not in TEXT]
    return {name: torch.cat([one[name] for one in turns]) for name in names}


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
@pytest.mark.parametrize("images", [0, 1])
def test_pixels_of_earlier_turns_are_refused_with_what_to_do(family: str, images: int) -> None:
    """As `processor.apply_chat_template` gives them for a whole conversation."""
    model = tiny.FAMILIES[family].build(0)
    first, second = turn(family, model, 1), turn(family, model, images, salt=1)
    own = only_pixels(second) if images else {}
    repeated = only_pixels(first, second) if images else only_pixels(first)
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        said = model.generate(**first, **GREEDY, cache=cache)
        with pytest.raises(plphp.InputError, match=REPEATED) as refused:
            model.generate(**conversation(said, second, pixels=repeated), **GREEDY, cache=cache)
        assert "pixel_values" in str(refused.value)
        assert "docs/your-model.md#a-second-question" in str(refused.value)
        right = conversation(said, second, pixels=own)
        answer = model.generate(**right, **GREEDY, cache=cache)
        assert cache.get_seq_length() == answer.shape[1] - 1, "the refused call left no trace"


def test_another_history_is_refused() -> None:
    model = tiny.FAMILIES["llava"].build(0)
    first, second = turn("llava", model, 1), turn("llava", model, 0, salt=1)
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        said = model.generate(**first, **GREEDY, cache=cache)
        length = first["input_ids"].shape[1]
        for column in (0, length - 1, length, said.shape[1] - 2):
            other = said.clone()
            other[0, column] += 1 if other[0, column] != tiny.IMAGE - 1 else 2
            with pytest.raises(plphp.InputError, match=f"{OTHER}.* column {column} of"):
                model.generate(**conversation(other, second, pixels={}), **GREEDY, cache=cache)
        with pytest.raises(ValueError, match=r"adds no token.* start a new plphp\.PrunedCache"):
            model.generate(**first, **GREEDY, cache=cache)
        model.generate(**conversation(said, second, pixels={}), **GREEDY, cache=cache)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "glm4v", "llava"])
def test_a_longer_prompt_about_other_images_is_refused(family: str) -> None:
    """Before the model computes positions of its pixels, of which some are in no new column."""
    model = tiny.FAMILIES[family].build(0)
    first = turn(family, model, 1)
    other = tiny.FAMILIES[family].make_inputs(model, [tiny.RowSpec(images=2, text=60, salt=1)], 1)
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        said = model.generate(**first, **GREEDY, cache=cache)
        with pytest.raises(plphp.InputError, match=OTHER):
            model.generate(**other[0], **GREEDY, cache=cache)
        second = conversation(said, turn(family, model, 0, salt=1), pixels={})
        model.generate(**second, **GREEDY, cache=cache)


def test_what_is_not_known_is_not_refused() -> None:
    """Padding, cropped and repeated rows, reset caches, and tokens that the caller decoded."""
    model = tiny.FAMILIES["llava"].build(0)
    first, second = turn("llava", model, 1), turn("llava", model, 0, salt=1)
    with plphp.prune(model, SOME), torch.no_grad():
        cache = plphp.PrunedCache(model)
        said = model.generate(**first, **GREEDY, cache=cache)
        own = torch.full((1, 1), 7)
        model(own, cache=cache)  # in place of the last token of the answer, which was not read
        ids = torch.cat([said[:, :-1], own], 1)
        said = model.generate(**conversation(ids, second, pixels={}), **GREEDY, cache=cache)

        cache.crop(-3)
        changed = said.clone()
        changed[:, cache.get_seq_length() :] = 9
        said = model.generate(**conversation(changed, second, pixels={}), **GREEDY, cache=cache)

        masked = conversation(said, second, pixels={})
        masked["attention_mask"][:, 0] = 0
        masked["input_ids"][:, 0] = 3
        copied = copy.deepcopy(cache)
        model.generate(**masked, **GREEDY, cache=copied)

        cache.batch_repeat_interleave(2)
        twice = conversation(said, second, pixels={})
        twice = {name: tensor.repeat(2, 1) for name, tensor in twice.items()}
        twice["input_ids"][1, 1] = 3  # whose rows they are is not known any more
        model.generate(**twice, **GREEDY, cache=cache)

        cache.reset()
        model.generate(**turn("llava", model, 1, salt=5), **GREEDY, cache=cache)
