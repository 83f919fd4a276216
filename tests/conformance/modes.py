"""The modes of the matrix: which prompts, on which families, and what must hold of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from methods import Method
from torch import Tensor
from transformers import PreTrainedModel

import oracle
import plphp
import tiny
from invariants import (
    EVERY,
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


class NotApplicable(Exception):
    """transformers itself cannot do it with this family."""


def always(family: tiny.Family) -> bool:
    return True


def has_videos(family: tiny.Family) -> bool:
    return family.draw_video is not None


@dataclass(frozen=True)
class Mode:
    """rows: a name in `invariants.ROWS`, prompts of three rows are compared with each row alone
    attention: the attention implementation while the prompt is read
    call: options of generate()
    """

    name: str
    check: Callable[["Mode", str, Method], None]
    rows: str = ""
    applies: Callable[[tiny.Family], bool] = always
    attention: str = ""
    call: dict[str, object] = field(default_factory=dict, hash=False)


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
    model = EVERY[family].build(0)
    inputs, _ = EVERY[family].make_inputs(model, [tiny.NONE], seed=0)
    tokens, logits = generate(model, inputs)
    pruned, pruned_logits, report = run_policy(model, inputs, method.make(Numbers()))
    assert torch.equal(pruned, tokens)
    assert (pruned_logits - logits).abs().max() < LOGITS
    assert all((layer == -1).all() for layer in kept_of(report))
    assert any("no vision tokens" in note for note in report.notes)


def check_call(mode: Mode, family: str, method: Method) -> None:
    """Another way to call generate(): keeping all changes no token, and the selection is right.

    Rows that transformers itself reads differently in this mode have no oracle: chunks cut images
    apart that see themselves in both directions, and GLM-4V's images get mixed up when rows of
    several are repeated.
    """
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    try:
        untouched, first = call(mode, model, expected)
    except Exception as error:
        raise NotApplicable(f"transformers itself fails, {type(error).__name__}") from error
    with plphp.prune(model, plphp.PLPHP(r=1.0, delta_r=0.0), vision_mask=expected.mask):
        assert torch.equal(call(mode, model, expected)[0], untouched)
    with plphp.prune(model, method.make(expected.numbers), vision_mask=expected.mask) as pruning:
        call(mode, model, expected)
        report = pruning.report
    copies = len(report.prompt) // len(expected.rows)
    alike = (first - expected.logits[:, :1].repeat_interleave(copies, 0)).abs().amax(
        (1, 2)
    ) < LOGITS
    if not any(row.images and alike[i * copies] for i, row in enumerate(expected.rows)):
        raise NotApplicable("transformers itself reads the images differently so")
    for copy in range(copies):
        own = slice(copy, None, copies)
        if method.options is not None:
            check_selection(expected, rows_of(report, own), alike[own].tolist(), **method.options)


def call(mode: Mode, model: PreTrainedModel, expected: Truth) -> tuple[Tensor, Tensor]:
    """(sequences, logits (rows, 1, V) after the prompt), whatever is drawn by the same seed."""
    torch.manual_seed(0)
    out = model.generate(
        **expected.inputs,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
        **mode.call,
    )
    return out.sequences, out.logits[0][:, None]


def rows_of(report: Any, rows: slice) -> Any:
    """A report of some rows: beams and samples repeat each prompt."""
    layers = tuple(
        replace(
            layer,
            gamma=layer.gamma[rows],
            layer_class=layer.layer_class[rows],
            rate=layer.rate[rows],
            kept=layer.kept[rows],
        )
        for layer in report.layers
    )
    return replace(report, layers=layers)


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
        Mode("beam search", check_call, "batch", call={"num_beams": 2}),
        Mode(
            "sampling, two answers",
            check_call,
            "batch",
            call={"do_sample": True, "num_return_sequences": 2},
        ),
        Mode("chunked prefill", check_call, "batch", call={"prefill_chunk_size": 16}),
    )
}
