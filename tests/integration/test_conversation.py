"""Later turns with a cache that is kept: positions, masks and pruning, against the unpruned model.

The reference of a conversation that keeps everything is the untouched model, which reads all of it
from the start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import plphp
import tiny
from plphp.cache import allocated
from versions import CACHE, cache_of

KEEP_ALL = plphp.PLPHP(r=1, delta_r=0)
FAMILIES = ("qwen2_vl", "llava", "idefics2")
SOME = plphp.PLPHP(r=0.3, delta_r=0)
TURNS = {
    "text": [tiny.RowSpec(images=3, text=40), tiny.RowSpec(images=0, text=12)],
    "image": [tiny.RowSpec(images=1, text=30), tiny.RowSpec(images=1, text=20, salt=1)],
    "late": [tiny.RowSpec(images=0, text=20), tiny.RowSpec(images=3, text=40, salt=1)],
    "three": [
        tiny.RowSpec(images=1, text=20),
        tiny.RowSpec(images=0, text=9, salt=1),
        tiny.RowSpec(images=1, text=20, salt=2),
    ],
}


@dataclass
class Talk:
    """A conversation of one row: all its text so far, turn by turn."""

    model: Any
    family: tiny.Family
    specs: list[tiny.RowSpec]
    steps: int = 6

    def turns(self) -> Iterator[dict[str, Tensor]]:
        for number, spec in enumerate(self.specs):
            yield self.family.make_inputs(self.model, [spec], number)[0]

    def hold(self, cache: Any) -> list[Tensor]:
        """The tokens of every answer. Turns repeat the conversation, with their own pixels only."""
        said = torch.empty(1, 0, dtype=torch.long)
        kinds = torch.empty(1, 0, dtype=torch.int)
        answers = []
        for turn in self.turns():
            new = turn["input_ids"]
            said = torch.cat([said, new], 1)
            kinds = torch.cat([kinds, (new == tiny.IMAGE).int()], 1)
            answer = self.ask({**turn, "input_ids": said}, kinds, cache=cache)
            answers.append(answer)
            said = torch.cat([said, answer], 1)
            kinds = torch.cat([kinds, torch.zeros_like(answer, dtype=torch.int)], 1)
        return answers

    def from_scratch(self, answers: list[Tensor]) -> list[Tensor]:
        """The answers of the untouched model to each turn, if it reads the whole conversation."""
        found, said, pixels = [], torch.empty(1, 0, dtype=torch.long), {}
        for turn, answer in zip(self.turns(), answers, strict=True):
            said = torch.cat([said, turn["input_ids"]], 1)
            pixels = self.join(pixels, turn)
            found.append(self.ask({**pixels, "input_ids": said}, (said == tiny.IMAGE).int()))
            said = torch.cat([said, answer], 1)
        return found

    def join(self, pixels: dict[str, Tensor], turn: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pixels of all turns; Idefics2 stacks the images of a row along dimension 1."""
        text = ("input_ids", "attention_mask", "mm_token_type_ids")
        joined = dict(pixels)
        for name, tensor in turn.items():
            if name in text:
                continue
            dim = 1 if self.family.name == "idefics2" else 0
            joined[name] = torch.cat([pixels[name], tensor], dim) if name in pixels else tensor
        return joined

    def ask(self, inputs: dict[str, Tensor], kinds: Tensor, **options: Any) -> Tensor:
        ids = inputs["input_ids"]
        inputs = {**inputs, "attention_mask": torch.ones_like(ids)}
        if self.family.name == "qwen2_vl":
            inputs["mm_token_type_ids"] = kinds
        out = self.model.generate(**inputs, max_new_tokens=self.steps, do_sample=False, **options)
        return out[:, ids.shape[1] :]


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_keep_all_conversation_is_the_unpruned_one(name: str, turns: str) -> None:
    family = tiny.FAMILIES[name]
    talk = Talk(family.build(0), family, TURNS[turns])
    with plphp.prune(talk.model, KEEP_ALL):
        answers = talk.hold(plphp.PrunedCache(talk.model))
    for turn, (got, wanted) in enumerate(zip(answers, talk.from_scratch(answers), strict=True)):
        assert torch.equal(got, wanted), f"turn {turn}"


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_on_one_model_do_not_mix(name: str) -> None:
    """The turns of two conversations alternate; each is answered as if it were alone."""
    family = tiny.FAMILIES[name]
    model = family.build(0)
    talks = [Talk(model, family, TURNS[which]) for which in ("text", "image")]
    with plphp.prune(model, SOME):
        alone = [talk.hold(plphp.PrunedCache(model)) for talk in talks]
        caches = [plphp.PrunedCache(model) for _ in talks]
        halves = [iter(talk.turns()) for talk in talks]
        said = [torch.empty(1, 0, dtype=torch.long) for _ in talks]
        for turn in range(2):
            for i, talk in enumerate(talks):
                new = next(halves[i])
                said[i] = torch.cat([said[i], new["input_ids"]], 1)
                kinds = (said[i] == tiny.IMAGE).int()
                answer = talk.ask({**new, "input_ids": said[i]}, kinds, cache=caches[i])
                assert torch.equal(answer, alone[i][turn])
                said[i] = torch.cat([said[i], answer], 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_turn_prunes_its_own_images_only(name: str) -> None:
    family = tiny.FAMILIES[name]
    talk = Talk(family.build(0), family, TURNS["image"])
    with plphp.prune(talk.model, SOME) as pruning:
        cache = plphp.PrunedCache(talk.model)
        reports = []
        hold = talk.ask

        def asked(*args: Any, **options: Any) -> Tensor:
            out = hold(*args, **options)
            reports.append(pruning.report)
            return out

        talk.ask = asked  # type: ignore[method-assign]
        talk.hold(cache)
    first, second = reports
    turns = list(talk.turns())
    begin = turns[0]["input_ids"].shape[1] + talk.steps
    for layer, report in enumerate(second.layers):
        vision = (turns[1]["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0] + begin
        kept = report.kept[0, 0]
        assert set(kept.tolist()) <= set(vision.tolist())
        assert len(kept) == -(-3 * len(vision) // 10)
        # the tokens that the first turn kept, all text, and the tokens that this turn kept
        held = cache.layers[layer].store
        text = sum(int((t["input_ids"] != tiny.IMAGE).sum()) for t in turns)
        answers = 2 * talk.steps - 1  # the last token of an answer is read by the next turn
        assert held.end == first.layers[layer].kept.shape[-1] + len(kept) + text + answers


def test_a_text_turn_drops_nothing() -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    talk = Talk(family.build(0), family, TURNS["text"])
    with plphp.prune(talk.model, SOME) as pruning:
        cache = plphp.PrunedCache(talk.model)
        talk.hold(cache)
    assert pruning.report.notes[0] == (
        "nothing was pruned: this turn brings no image, and the vision tokens that earlier turns "
        "kept stay as they are"
    )
    assert pruning.report is cache.report


def test_the_cache_crops_text_and_refuses_to_crop_images() -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    inputs = family.make_inputs(model, [tiny.RowSpec(images=1, text=40)], 0)[0]
    options = {"max_new_tokens": 8, "do_sample": False}
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        first = model.generate(**inputs, **options, cache=cache)
        length = inputs["input_ids"].shape[1]
        cache.crop(-(cache.get_seq_length() - length + 1))
        again = {
            **{k: v for k, v in inputs.items() if "pixel" not in k and "grid" not in k},
            "attention_mask": torch.ones_like(inputs["input_ids"]),
        }
        assert torch.equal(model.generate(**again, **options, cache=cache), first)
        with pytest.raises(plphp.UnsupportedModeError, match="crop"):
            cache.crop(-(cache.get_seq_length() - 4))


def test_rows_can_be_repeated_reordered_and_selected() -> None:
    family = tiny.FAMILIES["llava"]
    model = family.build(0)
    inputs = family.make_inputs(model, tiny.ROWS["batch"], 0)[0]
    with plphp.prune(model, SOME), torch.no_grad():
        out = model(**inputs)
        cache = cache_of(out)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        positions = mask.sum(-1, keepdim=True) - 1
        cache.batch_repeat_interleave(2)
        order = torch.tensor([5, 0, 2, 4])
        cache.batch_select_indices(order)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        rows = order.flip(0) // 2
        got = model(
            token[rows], attention_mask=mask[rows], position_ids=positions[rows],
            cache=cache,
        ).logits  # fmt: skip
        fresh = cache_of(model(**inputs))
        wanted = model(token, attention_mask=mask, position_ids=positions, **{CACHE: fresh}).logits[
            rows
        ]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


WAYS = (None, plphp.Recall("host", 0.4), plphp.Recall("host", 0.4, every=2), plphp.Recall("int4"))


@pytest.mark.parametrize("recall", WAYS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_conversation_goes_on_as_if_it_had_stayed(
    name: str, recall: plphp.Recall | None, tmp_path: Path
) -> None:
    family = tiny.FAMILIES[name]
    talk = Talk(family.build(0), family, TURNS["image"])
    file = tmp_path / "talk.safetensors"
    with plphp.prune(talk.model, SOME, recall=recall):
        wanted = talk.hold(plphp.PrunedCache(talk.model))

        class Stored:
            """Passes on a cache that is saved and loaded before every turn after the first."""

            cache = plphp.PrunedCache(talk.model)

        ask = talk.ask

        def asked(*args: Any, **options: Any) -> Tensor:
            out = ask(*args, **{**options, "cache": Stored.cache})
            Stored.cache.save(file)
            Stored.cache = plphp.PrunedCache.load(talk.model, file)
            return out

        talk.ask = asked  # type: ignore[method-assign]
        got = talk.hold(None)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        parked = Stored.cache.kv_bytes()
        if recall is not None:
            parked += sum(
                allocated(layer.parked.parked()) for _, layer in Stored.cache.pruned_layers()
            )
        assert file.stat().st_size < 1.1 * parked + 20_000


@pytest.mark.parametrize("recall", WAYS[1::2], ids=str)
def test_damaged_and_foreign_parked_tokens_are_refused(
    recall: plphp.Recall, tmp_path: Path
) -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    inputs = family.make_inputs(model, [tiny.RowSpec(images=1, text=40)], 0)[0]
    file = tmp_path / "talk.safetensors"
    with plphp.prune(model, SOME, recall=recall):
        cache = plphp.PrunedCache(model)
        model.generate(**inputs, max_new_tokens=2, cache=cache)
        cache.save(file)
        with safe_open(file, framework="pt") as saved:
            metadata = saved.metadata()
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        held = tensors["1.parked.held"]
        key = next(n for n in tensors if n.startswith("1.parked.keys"))
        for damage, says in (
            ({"1.parked.held": held + 999}, "a number is out of range"),
            ({"1.parked.held": held[:, :1].contiguous()}, "do not fit"),
            ({key: torch.cat([tensors[key]] * 2)}, "do not fit"),
        ):
            save_file({**tensors, **damage}, file, metadata)
            with pytest.raises(plphp.InputError, match=says):
                plphp.PrunedCache.load(model, file)
        save_file({k: v for k, v in tensors.items() if k != key}, file, metadata)
        with pytest.raises(plphp.InputError, match="incomplete"):
            plphp.PrunedCache.load(model, file)
        cache.save(file)
    for other in (None, plphp.Recall("int2")):
        with (
            plphp.prune(model, SOME, recall=other),
            pytest.raises(plphp.InputError, match="in the same way"),
        ):
            plphp.PrunedCache.load(model, file)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    inputs = family.make_inputs(model, [tiny.RowSpec(images=1, text=40)], 0)[0]
    file = tmp_path / "talk.safetensors"
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        with pytest.raises(plphp.UnsupportedModeError, match="empty"):
            cache.save(file)
        model.generate(**inputs, max_new_tokens=2, cache=cache)
        cache.save(file)
        good = file.read_bytes()
        with safe_open(file, framework="pt") as saved:
            metadata = saved.metadata()
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        for damage, says in (
            ({"1.keys": tensors["1.keys"][:, :, :-1].contiguous()}, "which must be"),
            ({"1.keys": tensors["1.keys"][:, :1].contiguous()}, "which must be"),
            ({"1.start": tensors["1.start"] + 999}, "first slots of the rows"),
        ):
            save_file({**tensors, **damage}, file, metadata)
            with pytest.raises(plphp.InputError, match=says):
                plphp.PrunedCache.load(model, file)
        save_file({k: v for k, v in tensors.items() if k != "2.values"}, file, metadata)
        with pytest.raises(plphp.InputError, match="missing"):
            plphp.PrunedCache.load(model, file)
        file.write_bytes(good[:-9])
        with pytest.raises(plphp.InputError, match="not a saved plphp cache"):
            plphp.PrunedCache.load(model, file)
        save_file(tensors, file)
        with pytest.raises(plphp.InputError, match="format"):
            plphp.PrunedCache.load(model, file)
        file.write_bytes(good)
        assert not file.with_name("talk.safetensors.part").exists()
    llava = tiny.FAMILIES["llava"].build(0)
    with plphp.prune(llava), pytest.raises(plphp.InputError, match="belongs to"):
        plphp.PrunedCache.load(llava, file)
