"""The invariants of every policy on every family (design, section 2), through the public API.

`truth` is what the oracle and the untouched model compute for the prompts of a family; it is
computed once. Every `check_...` compares a pruned run with it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import oracle
import tiny
from along import LOGITS, alike, check_greedy, check_logits, kept_of, led
from oracle import Numbers

# Tokens of an answer. The run that writes the page of results takes more of them.
STEPS = 16 if os.environ.get("PLPHP_WRITE_DOCS") else 5
KV_HEADS = tiny.TEXT["num_key_value_heads"]
EVERY = {**tiny.FAMILIES, **tiny.VARIANTS, **tiny.DECODERS}
ROWS = {
    **tiny.ROWS,
    "five": (tiny.RowSpec(images=5, text=60),),
    "crossing": tiny.CROSSING,
    "videos": tiny.VIDEOS,
    "touching": tiny.TOUCHING,
}
EXEMPT = 0.02


# --- results of the oracle and the untouched model ------------------------------------------------


@dataclass(frozen=True)
class Truth:
    name: str
    seed: int
    rows: tuple[tiny.RowSpec, ...]
    inputs: dict[str, Tensor]
    spans: Tensor
    probabilities: list[Tensor]
    numbers: Numbers  # the numbers of PLPHP, with thresholds between this model's own gammas
    tokens: Tensor  # of the untouched model
    logits: Tensor

    def build(self) -> PreTrainedModel:
        return EVERY[self.name].build(self.seed)

    @property
    def whole(self) -> set[int]:  # layers that pruning leaves alone
        return EVERY[self.name].whole_layers(self.spans.shape[1])

    @property
    def mask(self) -> Tensor | None:
        """The spans as `vision_mask`, if only the caller knows the frames of a video."""
        told = EVERY[self.name].videos_told or not any(row.videos for row in self.rows)
        return None if told else self.spans

    def select(self, **options: object) -> oracle.Selection:
        numbers = replace(self.numbers, **options)
        return selection(self.name, self.probabilities, self.spans, numbers)


def selection(
    name: str, probabilities: list[Tensor], spans: Tensor, numbers: Numbers
) -> oracle.Selection:
    whole = EVERY[name].whole_layers(spans.shape[1])
    keyless = EVERY[name].keyless
    return oracle.select(probabilities, spans, numbers, KV_HEADS, whole, keyless)


@cache
def truth(name: str, seed: int, rows: str) -> Truth:
    model = EVERY[name].build(seed)
    return observe(model, name, rows, EVERY[name].make_inputs(model, ROWS[rows], seed), seed)


def observe(
    model: Any, name: str, rows: str, prompts: tuple[dict[str, Tensor], Tensor], seed: int = 0
) -> Truth:
    """The truth for other weights or prompts than those of `truth`."""
    (inputs, spans), probabilities = prompts, oracle.prefill(model, prompts[0])
    tokens, logits = generate(model, inputs)
    numbers = thresholds(selection(name, probabilities, spans, Numbers()))
    return Truth(name, seed, ROWS[rows], inputs, spans, probabilities, numbers, tokens, logits)


def thresholds(selection: oracle.Selection) -> Numbers:
    """alpha and beta between the model's own gammas, so that layers of all three classes occur."""
    gammas = sorted(g for layer in selection.choices for row in layer if (g := row.gamma) >= 0)
    if len(gammas) == 1:  # balanced
        return Numbers(r=0.4, delta_r=0.3, alpha=2 * gammas[0], beta=gammas[0] / 2)
    third = max(1, len(gammas) // 3)
    return Numbers(
        r=0.4,
        delta_r=0.3,
        alpha=(gammas[-third - 1] + gammas[-third]) / 2,
        beta=(gammas[third - 1] + gammas[third]) / 2,
    )


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = STEPS, **kwargs: object
) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


# --- results of the package -----------------------------------------------------------------------


def plphp_policy(numbers: Numbers) -> Any:
    """PLPHP with these numbers. Options that have their default value are not passed."""
    import plphp

    always = ("r", "delta_r", "alpha", "beta")
    given = {
        key: value
        for key, value in asdict(numbers).items()
        if key in always or value != getattr(Numbers(), key)
    }
    return plphp.PLPHP(**given)


def attach(model: PreTrainedModel, numbers: Numbers) -> Any:
    """Attach the package to a model."""
    import plphp

    return plphp.prune(model, plphp_policy(numbers))


def cache_for(model: PreTrainedModel) -> Any:
    import plphp

    return plphp.PrunedCache(model)


def run_policy(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    policy: Any,
    mask: Tensor | None = None,
    recall: Any = None,
) -> tuple[Tensor, Tensor, Any]:
    """(tokens, logits, report) of a generate() while the model is attached."""
    import plphp

    with plphp.prune(model, policy, vision_mask=mask, recall=recall) as pruning:
        tokens, logits = generate(model, inputs)
        return tokens, logits, pruning.report


def run_pruned(
    model: PreTrainedModel, inputs: dict[str, Tensor], numbers: Numbers
) -> tuple[Tensor, Tensor, Any]:
    return run_policy(model, inputs, plphp_policy(numbers))


def per_row(values: Any) -> list[float]:
    """The numbers of a report for each row. None becomes NaN."""
    return [math.nan if value is None else float(value) for value in values]


def class_name(value: Any) -> str | None:
    value = getattr(value, "value", value)  # "attentive", "vision-attentive" or an enum of them
    return None if value is None else str(value).lower().removeprefix("vision-")


# --- checks ---------------------------------------------------------------------------------------


def check_spans(truth: Truth) -> None:
    """Images are counted as a person would count them."""
    import plphp

    if truth.mask is None:
        config = truth.build().config
        assert torch.equal(plphp.vision_spans(config, **truth.inputs), truth.spans)


def check_selection(
    truth: Truth, report: Any, rows: Sequence[bool] | None = None, **options: object
) -> None:
    """The selection is that of the oracle. `rows`: the rows to compare, all by default."""
    selection = truth.select(**options)
    looked = [row for row in range(len(truth.rows)) if rows is None or rows[row]]
    for layer, (choices, reported) in enumerate(zip(selection.choices, report.layers, strict=True)):
        gammas, rates = per_row(reported.gamma), per_row(reported.rate)
        for row in looked:
            where, choice = f"layer {layer}, row {row}", choices[row]
            assert gammas[row] == pytest.approx(choice.gamma, abs=1e-5, nan_ok=True), where
            if not choice.near_threshold:
                assert class_name(reported.layer_class[row]) == choice.layer_class, where
                rate = math.nan if choice.rate is None else choice.rate
                assert rates[row] == pytest.approx(rate, abs=1e-6, nan_ok=True), where
    verdict = oracle.compare(oracle.only(selection, looked), [k[looked] for k in kept_of(report)])
    assert not verdict.wrong, "\n".join(verdict.wrong)
    assert verdict.share <= EXEMPT


def check_whole_layers(truth: Truth, report: Any) -> None:
    """Layers left alone are reported; the others are pruned wherever there is an image."""
    alone = {index for index, layer in enumerate(report.layers) if not layer.pruned}
    assert alone == truth.whole
    said = [note for note in report.notes if "left alone" in note]
    assert len(said) == bool(truth.whole)
    assert all(str(layer) in note for note in said for layer in truth.whole)


def check_retention(truth: Truth, report: Any) -> None:
    """Retention is the share of vision entries that is kept. Padding is never kept."""
    kept = sum(int((layer >= 0).sum()) for layer in kept_of(report))
    heads = sum(layer.shape[1] for layer in kept_of(report))
    vision = int((truth.spans > 0).sum()) * heads
    assert report.retention == pytest.approx(kept / vision)
    assert report.images == tuple(truth.spans.amax(1).clamp(min=0).tolist())
    assert report.prompt == tuple((truth.spans >= 0).sum(1).tolist())


def check_decoding(
    model: PreTrainedModel, truth: Truth, tokens: Tensor, logits: Tensor, report: Any
) -> None:
    """The logits are those of the oracle, given the reported selection.

    The oracle decodes the same tokens, so that every step can be compared.
    """
    expected = led(model, truth.inputs, truth.spans, report, tokens)
    check_logits(logits, expected, report)
    check_greedy(tokens, expected, report)


def check_keeping_all(truth: Truth, model: PreTrainedModel) -> None:
    """A policy that drops nothing gives the tokens of the untouched model."""
    everything = plphp_policy(Numbers(r=1.0, delta_r=0.0))
    tokens, logits, report = run_policy(model, truth.inputs, everything, truth.mask)
    assert torch.equal(tokens, truth.tokens)
    assert (logits - truth.logits).abs().max() < LOGITS
    for layer in kept_of(report):
        assert (layer >= 0).sum(-1).eq((truth.spans > 0).sum(1, keepdim=True)).all()


def check_rows_alone(
    truth: Truth,
    model: PreTrainedModel,
    policy: Any,
    run: tuple[Tensor, Tensor, Any],
    excuse: Callable[[Any], bool],
    recall: Any = None,
) -> None:
    """A row of a padded batch equals the row alone, except where the oracle sees a tie."""
    tokens, logits, report = run
    compared = 0.0
    for row, spec in enumerate(truth.rows):
        alone, spans = EVERY[truth.name].make_inputs(model, [spec], truth.seed)
        mask = None if truth.mask is None else spans
        its_tokens, its_logits, its_report = run_policy(model, alone, policy, mask, recall)
        if differing_positions(kept_of(report), row, kept_of(its_report)):
            assert excuse(report)  # the two rows decode with different caches then
            continue
        steps = alike(report, row, its_report, tokens.shape[1])
        compared += steps / tokens.shape[1]
        assert torch.equal(its_tokens[0, :steps], tokens[row, :steps])
        check_logits(its_logits[0, :steps], logits[row, :steps], report)
    assert compared >= 2


def differing_positions(batch: Sequence[Tensor], row: int, alone: Sequence[Tensor]) -> int:
    def sets(layer: Tensor, index: int) -> list[set[int]]:
        return [set(head.tolist()) - {-1} for head in layer[index]]

    return sum(
        len(mine ^ other)
        for together, single in zip(batch, alone, strict=True)
        for mine, other in zip(sets(together, row), sets(single, 0), strict=True)
    )


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """All state of a module that attaching could leave changed."""
    hooks = [attribute for attribute in vars(model) if attribute.endswith("_hooks")]
    assert hooks, "this is how torch stores hooks"
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name} attributes"] = set(vars(module))
        state[f"{name} class"] = type(module)
        state[f"{name} hooks"] = [len(getattr(module, hook) or ()) for hook in hooks]
        if hasattr(module, "config"):
            state[f"{name} config"] = id(module.config)
            state[f"{name} attention"] = module.config._attn_implementation
    return state
