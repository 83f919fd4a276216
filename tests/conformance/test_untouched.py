"""Invariant 5: the model is as it was before, however pruning ends."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

import tiny
from invariants import (
    EVERY,
    LOGITS,
    Truth,
    attach,
    check_selection,
    generate,
    run_pruned,
    state_of,
    truth,
)

every_family = pytest.mark.parametrize("name", tiny.CORE)


class Interruption(Exception):
    pass


class Interrupt(StoppingCriteria):
    """Raises in the middle of generation."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise Interruption
        return torch.zeros(len(input_ids), dtype=torch.bool)


class InterruptLogits(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise Interruption
        return scores


def leave_the_with(model: PreTrainedModel, truth: Truth) -> None:
    run_pruned(model, truth.inputs, truth.numbers)


def remove(model: PreTrainedModel, truth: Truth) -> None:
    pruning = attach(model, truth.numbers)
    generate(model, truth.inputs)
    pruning.remove()


def never_used(model: PreTrainedModel, truth: Truth) -> None:
    with attach(model, truth.numbers):
        pass


def raise_in_a_stopping_criterion(model: PreTrainedModel, truth: Truth) -> None:
    interrupted(model, truth, stopping_criteria=[Interrupt(truth.spans.shape[1] + 3)])


def raise_in_a_logits_processor(model: PreTrainedModel, truth: Truth) -> None:
    interrupted(model, truth, logits_processor=[InterruptLogits(truth.spans.shape[1] + 3)])


def interrupted(model: PreTrainedModel, truth: Truth, **kwargs: object) -> None:
    with pytest.raises(Interruption), attach(model, truth.numbers):
        generate(model, truth.inputs, **kwargs)


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_with,
        remove,
        never_used,
        raise_in_a_stopping_criterion,
        raise_in_a_logits_processor,
    ],
)
@every_family
def test_the_model_is_restored(name: str, leave: Callable[[PreTrainedModel, Truth], None]) -> None:
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    tokens, logits = generate(
        model, expected.inputs
    )  # transformers itself sets some attributes lazily
    before = state_of(model)
    leave(model, expected)
    assert "generate" not in vars(model)
    after = state_of(model)
    assert {key: after.get(key) for key in before} == before
    assert after.keys() == before.keys()
    again, logits_again = generate(model, expected.inputs)
    assert torch.equal(again, tokens)
    assert torch.equal(logits_again, logits)


@every_family
def test_the_next_call_after_an_interruption_is_unaffected(name: str) -> None:
    """An interrupted call has no effect on the next one."""
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    clean, clean_logits, _ = run_pruned(model, expected.inputs, expected.numbers)
    stop = [Interrupt(expected.spans.shape[1] + 5)]
    with attach(model, expected.numbers) as pruning:
        with pytest.raises(Interruption):
            generate(model, expected.inputs, stopping_criteria=stop)
        tokens, logits = generate(model, expected.inputs)
        check_selection(expected, pruning.report)
    assert torch.equal(tokens, clean)
    assert (logits - clean_logits).abs().max() < LOGITS


@every_family
def test_a_second_model_with_the_same_config_object_is_not_affected(name: str) -> None:
    family, expected = EVERY[name], truth(name, 0, "batch")
    config = family.config()
    attached, bystander = family.build(0, config), family.build(1, config)
    assert attached.config is bystander.config
    tokens, logits = generate(bystander, expected.inputs)
    before = state_of(bystander)
    with attach(attached, expected.numbers) as pruning:
        assert state_of(bystander) == before
        for model in (bystander, attached, bystander):  # before the first pruned call, and after
            own, own_logits = generate(model, expected.inputs)
            if model is bystander:
                assert torch.equal(own, tokens)
                assert torch.equal(own_logits, logits)
        check_selection(expected, pruning.report)
        third = family.build(1, config)
        assert torch.equal(generate(third, expected.inputs)[0], tokens)
