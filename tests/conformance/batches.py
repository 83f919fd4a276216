"""Later turns of a padded batch, and changes of the rows of its cache between turns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from answers import stock_fails_as_not_applicable
from conversations import stock_cache
from methods import Method
from modes import Mode, NotApplicable
from torch import Tensor

import plphp
import tiny
from invariants import EVERY, LOGITS, Truth, truth

STEPS = 8
LENGTHS = (7, 4, 5)  # lengths of the second turns of the rows


def ask(model: Any, inputs: dict[str, Tensor], cache: Any) -> tuple[Tensor, Tensor]:
    """(the whole conversation, logits (rows, steps, V) of the answer)."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, cache=cache,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def next_turn(
    family: tiny.Family, said: Tensor, spans: Tensor, lengths: tuple[int, ...]
) -> dict[str, Tensor]:
    """A text turn for each row, padded on the left, after the conversation so far."""
    most = max(lengths)
    place = torch.arange(most) - most + torch.tensor(lengths)[:, None]
    new = place >= 0
    ids = torch.cat([said, torch.where(new, tiny.SPECIAL + place, tiny.PAD)], 1)
    old = torch.nn.functional.pad(spans, (0, said.shape[1] - spans.shape[1]))
    mask = torch.cat([old >= 0, new], 1).long()
    vision = torch.nn.functional.pad(old > 0, (0, most)).long()
    return {"input_ids": ids, "attention_mask": mask, **family.types(vision)}


def talk(
    model: Any, expected: Truth, lengths: tuple[int, ...], make: Callable[[Any], Any]
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of the second answers."""
    cache = make(model)
    said, _ = ask(model, expected.inputs, cache)
    later = next_turn(EVERY[expected.name], said, expected.spans, lengths)
    said, logits = ask(model, later, cache)
    return said[:, -STEPS:], logits


def together_and_alone(
    model: Any, expected: Truth, make: Callable[[Any], Any]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    alone = []
    for row, spec in enumerate(expected.rows):
        inputs, spans = EVERY[expected.name].make_inputs(model, [spec], 0)
        part = replace(expected, rows=(spec,), inputs=inputs, spans=spans)
        alone.append(talk(model, part, LENGTHS[row : row + 1], make))
    tokens, logits = zip(*alone, strict=True)
    return talk(model, expected, LENGTHS, make), (torch.cat(tokens), torch.cat(logits))


def check_padded_turn(mode: Mode, family: str, method: Method) -> None:
    """In a batch, second turns of different lengths are answered as for each row alone."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    if EVERY[family].alone:  # windows and states count columns, padding included
        (_, batch), (_, rows) = together_and_alone(model, expected, stock_cache)
        if (batch - rows).abs().max() > LOGITS:
            raise NotApplicable("the unpruned model attends to the padding between turns")
    with method.attach(model, expected.numbers):
        batched, single = together_and_alone(model, expected, plphp.PrunedCache)
    assert torch.equal(batched[0], single[0])
    assert (batched[1] - single[1]).abs().max() < LOGITS


def check_rows(mode: Mode, family: str, method: Method) -> None:
    """Rows that are repeated, selected and reordered are answered as in their own places."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    with stock_fails_as_not_applicable():
        cache = stock_cache(model)
        ask(model, expected.inputs, cache)
        cache.batch_repeat_interleave(2)
    picked = torch.tensor([5, 0, 2, 4])
    rows = picked.flip(0) // 2
    with method.attach(model, expected.numbers):
        cache = plphp.PrunedCache(model)
        said, _ = ask(model, expected.inputs, cache)
        later = next_turn(EVERY[family], said, expected.spans, (7, 7, 7))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(picked)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
        got, _ = ask(model, {name: tensor[rows] for name, tensor in later.items()}, cache)
        cache = plphp.PrunedCache(model)
        ask(model, expected.inputs, cache)
        assert torch.equal(got, ask(model, later, cache)[0][rows])
