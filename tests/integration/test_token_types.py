"""Token types that a call leaves out: derived in a later turn, noted in a first one."""

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

import plphp
import tiny

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
GREEDY |= {"return_dict_in_generate": True}
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
MASKS = Version(transformers.__version__) >= Version("5.23")  # whether Gemma 3's are right
WITH_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", *["gemma3"] * MASKS)


class Talk:
    """A conversation: images of its own in each of its turns.

    images: the number of images of each turn; videos: that of the last turn
    """

    def __init__(self, family: str, images: tuple[int, ...], videos: int = 0) -> None:
        self.family = tiny.FAMILIES[family]
        self.model: Any = self.family.build(0)
        self.turns = [
            self.family.draw_row(self.model, tiny.RowSpec(images=n, text=14, salt=i), i)
            for i, n in enumerate(images)
        ]
        if videos:
            spec = tiny.RowSpec(images=0, videos=videos, text=14, salt=9)
            self.turns[-1] = self.family.draw_row(self.model, spec, 9)

    def inputs(self, number: int, said: Tensor) -> dict[str, Tensor]:
        """The turn after what was said: all ids, and the pixels of the turn alone."""
        new = self.family.inputs([self.turns[number]])[0]
        ids = torch.cat([said, new["input_ids"]], 1)
        pixels = {name: tensor for name, tensor in new.items() if name not in TEXT}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}

    def types(self, kinds: Tensor) -> dict[str, Tensor]:
        types: dict[str, Tensor] = self.family.types(kinds)
        return types

    def hold(self, cache: Any, typed: bool = False) -> tuple[list[Tensor], list[int]]:
        """The logits of each turn's first token; typed: whether later turns have their types too.

        Also returns the kinds of all columns.
        """
        said, kinds, logits = torch.empty(1, 0, dtype=torch.long), [], []
        for number, row in enumerate(self.turns):
            inputs = self.inputs(number, said)
            kinds += row.kinds
            if typed or not number:
                inputs |= self.types(torch.tensor([kinds]).int())
            out = self.model.generate(**inputs, **GREEDY, cache=cache)
            logits.append(out.logits[0])
            kinds += [0] * (out.sequences.shape[1] - len(kinds))
            said = out.sequences
        return logits, kinds


@pytest.mark.parametrize("images", [(1, 1), (0, 2), (1, 0, 1)])
@pytest.mark.parametrize("family", WITH_TYPES)
def test_a_later_turn_without_types_is_the_one_with_them(
    family: str, images: tuple[int, ...]
) -> None:
    talk, found = Talk(family, images), {}
    for typed in (True, False):
        with plphp.prune(talk.model, plphp.PLPHP(r=0.3, delta_r=0)):
            found[typed], _ = talk.hold(plphp.PrunedCache(talk.model), typed)
    for with_types, without in zip(found[True], found[False], strict=True):
        assert torch.equal(with_types, without)


@pytest.mark.parametrize("bare", [False, True], ids=["generate", "forward"])
@pytest.mark.parametrize("family", WITH_TYPES)
def test_so_is_one_that_gives_its_new_columns_only(family: str, bare: bool) -> None:
    talk = Talk(family, (1, 1))
    with plphp.prune(talk.model, plphp.PLPHP(r=0.3, delta_r=0)):
        expected, _ = talk.hold(plphp.PrunedCache(talk.model), typed=True)
        first = talk.inputs(0, torch.empty(1, 0, dtype=torch.long))
        cache = plphp.PrunedCache(talk.model)
        types = talk.types(torch.tensor([talk.turns[0].kinds]).int())
        said = talk.model.generate(**first, **types, **GREEDY, cache=cache).sequences
        inputs, past = talk.inputs(1, said), int(cache.get_seq_length())
        inputs["input_ids"] = inputs["input_ids"][:, past:]
        if bare:
            with torch.inference_mode():
                logits = talk.model(**inputs, cache=cache).logits[:, -1]
        else:
            logits = talk.model.generate(**inputs, **GREEDY, cache=cache).logits[0]
    assert (logits - expected[1]).abs().max() < 2e-5


@pytest.mark.parametrize("images", [(1, 1), (0, 2)])
@pytest.mark.parametrize("family", WITH_TYPES)
def test_such_a_conversation_is_that_of_the_untouched_model(
    family: str, images: tuple[int, ...]
) -> None:
    talk = Talk(family, images)
    with plphp.prune(talk.model, plphp.policy("full")):
        logits, kinds = talk.hold(cache := plphp.PrunedCache(talk.model))
    ids = cache._history.asked
    assert ids is not None
    whole = talk.family.inputs(talk.turns)[0]
    pixels = {name: tensor for name, tensor in whole.items() if name not in TEXT}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    inputs |= talk.types(torch.tensor([kinds[: ids.shape[1]]]).int())
    alone = talk.model.generate(**inputs, **GREEDY).logits[0]
    assert (alone - logits[-1]).abs().max() < 2e-5


@pytest.mark.parametrize("typed", [False, True])
def test_wrong_masks_of_an_old_transformers_are_refused(
    typed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plphp.hf.token_types.MASKS_FROM", Version("99"))
    talk = Talk("gemma3", (1, 1))
    with (
        plphp.prune(talk.model),
        pytest.raises(plphp.UnsupportedModeError, match="99 or newer"),
    ):
        talk.hold(plphp.PrunedCache(talk.model), typed)


def test_a_video_is_told_by_its_ids_or_refused() -> None:
    for family in ("qwen2_vl", "glm4v"):  # GLM-4V writes the frames of a video as images
        talk, found = Talk(family, (1, 0), videos=1), {}
        with plphp.prune(talk.model):
            found[True], _ = talk.hold(plphp.PrunedCache(talk.model), typed=True)
            if family == "glm4v":
                with pytest.raises(plphp.InputError, match="of the whole conversation, with 0"):
                    talk.hold(plphp.PrunedCache(talk.model))
                continue
            found[False], _ = talk.hold(plphp.PrunedCache(talk.model))
        assert torch.equal(found[True][-1], found[False][-1])


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava"])
def test_a_first_turn_without_them_is_noted(family: str) -> None:
    talk = Talk(family, (1,))
    inputs = talk.inputs(0, torch.empty(1, 0, dtype=torch.long))
    types = talk.types(torch.tensor([talk.turns[0].kinds]).int())
    for given in ({}, types):
        with plphp.prune(talk.model) as pruning:
            talk.model.generate(**inputs, **given, **GREEDY)
        assert pruning.report is not None
        noted = [note for note in pruning.report.notes if "was not given" in note]
        assert len(noted) == (bool(types) and not given)


@pytest.mark.parametrize("bare", [False, True], ids=["generate", "forward"])
def test_what_has_another_length_is_refused(bare: bool) -> None:
    talk = Talk("qwen2_vl", (1, 1))
    with plphp.prune(talk.model):
        cache = plphp.PrunedCache(talk.model)
        first = talk.inputs(0, torch.empty(1, 0, dtype=torch.long))
        said = talk.model.generate(**first, **GREEDY, cache=cache).sequences
        inputs = talk.inputs(1, said)
        new, past = inputs["input_ids"].shape[1] - said.shape[1], int(cache.get_seq_length())
        wrong = {
            "mm_token_type_ids": talk.types(torch.tensor([talk.turns[1].kinds]).int()),
            "attention_mask": {"attention_mask": torch.ones(1, new)},
        }
        answer = talk.model if bare else partial(talk.model.generate, **GREEDY)
        if bare:
            inputs["input_ids"] = inputs["input_ids"][:, past:]
        for name, given in wrong.items():
            with pytest.raises(plphp.InputError, match=f"{name} has {new} columns.* whole conv"):
                answer(**{**inputs, **given}, cache=cache)
        answer(**inputs, cache=cache)
