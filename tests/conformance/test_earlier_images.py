"""The entries for images of earlier turns in a later turn's report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import IMAGE_TURN, start

import plphp
import tiny

SOME = plphp.PLPHP(r=0.3, delta_r=0)


def two_turns(recall: plphp.Recall | str | None, between: Any = None) -> tuple[Any, Any]:
    """Reports of a question about two images, and of one about two more. between: cache -> cache"""
    talk = start("qwen2_vl", IMAGE_TURN)
    with plphp.prune(talk.model, SOME, recall=recall):
        cache = plphp.PrunedCache(talk.model)
        talk.ask(cache)
        talk.ask(cache if between is None else between(talk.model, cache))
    first, second = talk.reports
    return first, second


def test_a_later_turns_report_says_what_earlier_images_lost(tmp_path: Path) -> None:
    def stored(model: Any, cache: Any) -> Any:
        cache.save(tmp_path / "talk")
        return plphp.PrunedCache.load(model, tmp_path / "talk")

    first, second = two_turns(None)
    assert first.earlier == () and "earlier" not in str(first)
    spans, positions = first.seen.spans[0], first.seen.positions[0]
    kept, every = 0, 0
    for number, image in enumerate(second.earlier, start=1):
        own = set(positions[spans == number].tolist())
        heads = [head for layer in first.layers for head in layer.kept[0]]
        there = sum(len(own & set(head.tolist())) for head in heads)
        assert (image.row, image.image, image.tokens) == (0, number, len(own))
        assert image.kept == pytest.approx(there / (len(own) * len(heads))) and image.kept < 1
        kept, every = kept + there, every + len(own) * len(heads)
    assert len(second.earlier) == 2
    said = f"images 1 to 2 of earlier turns: {1 - kept / every:.1%} of their K/V is gone"
    assert said in str(second) and any(said in note for note in second.notes)
    assert [image["kept"] for image in second.to_dict()["earlier"]] == [
        image.kept for image in second.earlier
    ]
    assert two_turns(None, stored)[1].earlier == second.earlier


@pytest.mark.parametrize("home", ["host", "int4"])
def test_with_recall_it_says_that_all_of_them_were_there(home: str) -> None:
    first, second = two_turns(home)
    sizes = [int((first.seen.spans == number).sum()) for number in (1, 2)]
    assert [(image.tokens, image.kept) for image in second.earlier] == [(n, 1.0) for n in sizes]
    said = f"images 1 to 2 of earlier turns: all {sum(sizes)} vision tokens were there"
    assert said in str(second)
    assert ("int4 numbers" in str(second)) == (home == "int4")


def test_reordered_rows_take_their_lost_images_along() -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    inputs, spans = family.make_inputs(model, [tiny.ONE, tiny.THREE], 0)
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        out = model.generate(**inputs, max_new_tokens=2, cache=cache)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        ids = torch.cat([out, torch.full((2, 4), tiny.SPECIAL)], 1)[[1, 0, 0, 1]]
        mask = torch.nn.functional.pad(spans >= 0, (0, 6), value=True)[[1, 0, 0, 1]].long()
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, cache=cache)
    found = [(image.row, image.image) for image in cache.report.earlier]
    assert found == [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3)]
