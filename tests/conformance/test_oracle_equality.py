"""Thorough comparison with the oracle: invariants 1 to 3 on one family of each kind.

`test_matrix.py` runs the same checks on every family.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

import oracle
import tiny
from invariants import (
    EVERY,
    LOGITS,
    check_decoding,
    check_keeping_all,
    check_rows_alone,
    check_selection,
    generate,
    kept_of,
    plphp_policy,
    run_pruned,
    truth,
)
from oracle import Numbers

SEEDS = (0, 1, 2)
CASES = [
    *((name, rows, seed) for name in tiny.CORE for rows in tiny.ROWS for seed in SEEDS),
    *(("idefics2_split", rows, 0) for rows in tiny.ROWS),
    *(("idefics2_window", rows, 0) for rows in ("batch", "crossing")),
]


def marked(cases: list[tuple[Any, ...]]) -> list[Any]:
    """The first seed runs always, the others with the slow tests: the matrix has the rest."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case[-1] > 0)) for case in cases]


every_case = pytest.mark.parametrize(("name", "rows", "seed"), marked(CASES))
every_family = pytest.mark.parametrize("name", tiny.CORE)


# --- 2. Selection and decoding equal the oracle's -------------------------------------------------


@every_case
def test_equals_the_oracle(name: str, rows: str, seed: int) -> None:
    expected = truth(name, seed, rows)
    model = EVERY[name].build(seed)
    tokens, logits, report = run_pruned(model, expected.inputs, expected.numbers)
    classes = {row.layer_class for layer in expected.select().choices for row in layer}
    assert classes - {None} == {"attentive", "balanced", "indifferent"}, "nothing is told apart"
    check_selection(expected, report)
    check_decoding(model, expected, tokens, logits, report)
    assert (logits - expected.logits).abs().max() > LOGITS, "pruning had no effect at all"


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "global"},
        {"gqa": "max"},
        {"min_tokens": 9},
        {"round_to": 16},
        {"budget": "global", "gqa": "max", "min_tokens": 5, "round_to": 8},
    ],
    ids="+".join,
)
@every_family
def test_options_equal_the_oracle(name: str, options: dict[str, object]) -> None:
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    numbers = replace(expected.numbers, **options)
    tokens, logits, report = run_pruned(model, expected.inputs, numbers)
    check_selection(expected, report, **options)
    check_decoding(model, expected, tokens, logits, report)


@pytest.mark.parametrize("name", ["llava", "idefics2", "idefics2_split"])
def test_mantis_with_five_interleaved_images_is_really_pruned(name: str) -> None:
    """SigLIP + Llama 3 in the LLaVA class, and Idefics2, whose layers all slide by default."""
    expected = truth(name, 0, "five")
    model = EVERY[name].build(0)
    tokens, logits, report = run_pruned(model, expected.inputs, Numbers(r=0.2, delta_r=0.0))
    assert report.images == (5,)
    assert report.notes == ()
    for layer in report.layers:
        assert layer.pruned
        assert layer.retention == pytest.approx(0.2, abs=0.03)
    check_decoding(model, expected, tokens, logits, report)


# --- 1. Keeping all is the untouched model --------------------------------------------------------


@every_case
def test_keeping_all_is_the_untouched_model(name: str, rows: str, seed: int) -> None:
    check_keeping_all(truth(name, seed, rows), EVERY[name].build(seed))


# --- 3. A row of a padded batch is the row alone --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seed"), marked([(name, seed) for name, rows, seed in CASES if rows == "batch"])
)
def test_a_row_of_a_batch_is_the_row_alone(name: str, seed: int) -> None:
    expected = truth(name, seed, "batch")
    model = EVERY[name].build(seed)
    run = run_pruned(model, expected.inputs, expected.numbers)

    def excuse(report: Any) -> bool:
        return not oracle.compare(expected.select(), kept_of(report)).wrong

    check_rows_alone(expected, model, plphp_policy(expected.numbers), run, excuse)


@every_family
def test_a_text_only_prompt_is_not_pruned_and_a_note_says_so(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    inputs, _ = family.make_inputs(model, [tiny.NONE], seed=0)
    tokens, logits = generate(model, inputs)
    pruned, pruned_logits, report = run_pruned(model, inputs, Numbers())
    assert torch.equal(pruned, tokens)
    assert (pruned_logits - logits).abs().max() < LOGITS
    assert all((layer == -1).all() for layer in kept_of(report))
