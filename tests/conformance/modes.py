"""The modes of the matrix: which prompts, on which families, and what must hold of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from methods import Method

import oracle
import tiny
from invariants import (
    LOGITS,
    Truth,
    check_decoding,
    check_keeping_all,
    check_retention,
    check_rows_alone,
    check_selection,
    check_spans,
    check_whole_layers,
    generate,
    kept_of,
    run_policy,
    state_of,
    truth,
)
from oracle import Numbers


def always(family: tiny.Family) -> bool:
    return True


def has_videos(family: tiny.Family) -> bool:
    return family.draw_video is not None


@dataclass(frozen=True)
class Mode:
    """rows: a name in `invariants.ROWS`, prompts of three rows are compared with each row alone
    attention: the attention implementation while the prompt is read
    """

    name: str
    check: Callable[["Mode", str, Method], None]
    rows: str = ""
    applies: Callable[[tiny.Family], bool] = always
    attention: str = ""


def check_images(mode: Mode, family: str, method: Method) -> None:
    """All invariants: spans, selection, decoding, keeping all, rows alone, nothing left behind."""
    expected = truth(family, 0, mode.rows)
    check_spans(expected)
    model = expected.build()
    if mode.attention:
        model.set_attn_implementation(mode.attention)
    untouched, _ = generate(model, expected.inputs, steps=1)  # transformers sets things lazily
    before = state_of(model)
    policy = method.make(expected.numbers)
    run = run_policy(model, expected.inputs, policy, expected.mask)
    tokens, logits, report = run
    check_retention(expected, report)
    check_whole_layers(expected, report)
    if method.options is not None:
        check_selection(expected, report, **method.options)
    assert state_of(model) == before
    assert torch.equal(untouched, generate(model, expected.inputs, steps=1)[0])
    check_decoding(model, expected, tokens, logits, report)
    if report.retention < 1:
        assert (logits - expected.logits).abs().max() > LOGITS, "pruning had no effect at all"
    check_keeping_all(expected, model)
    if len(expected.rows) > 2:
        check_rows_alone(expected, model, policy, run, tie(expected, method))


def tie(expected: Truth, method: Method) -> Callable[[Any], bool]:
    """Whether a report's selection is right as the oracle sees it."""

    def excuse(report: Any) -> bool:
        if method.options is None:
            return False
        selection = expected.select(**method.options)
        return not oracle.compare(selection, kept_of(report)).wrong

    return excuse


def check_text(mode: Mode, family: str, method: Method) -> None:
    """A text-only prompt is no error: nothing is pruned and the report says so."""
    model = tiny.FAMILIES[family].build(0)
    inputs, _ = tiny.FAMILIES[family].make_inputs(model, [tiny.NONE], seed=0)
    tokens, logits = generate(model, inputs)
    pruned, pruned_logits, report = run_policy(model, inputs, method.make(Numbers()))
    assert torch.equal(pruned, tokens)
    assert (pruned_logits - logits).abs().max() < LOGITS
    assert all((layer == -1).all() for layer in kept_of(report))
    assert any("no vision tokens" in note for note in report.notes)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("one image", check_images, "one"),
        Mode("several images", check_images, "three"),
        Mode("padded batch", check_images, "batch"),
        Mode("touching images", check_images, "touching"),
        Mode("video", check_images, "videos", has_videos),
        Mode("eager attention", check_images, "batch", attention="eager"),
        Mode("text only", check_text),
    )
}
