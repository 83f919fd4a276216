"""The modes of the matrix: the prompts, the families and the checks of each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from methods import Method
from torch import Tensor
from transformers import PreTrainedModel

import oracle
import plphp
import tiny
from along import check_logits, kept_of, led
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
    run_policy,
    state_of,
    truth,
)
from oracle import Numbers
from versions import cache_of


class NotApplicable(Exception):
    """The unpruned model of this family cannot run in this mode."""


def always(family: tiny.Family) -> bool:
    return True


def has_videos(family: tiny.Family) -> bool:
    return family.draw_video is not None


@dataclass(frozen=True)
class Mode:
    """One mode.

    rows: a name in `invariants.ROWS`; prompts of three rows are also compared with each row alone
    attention: the attention implementation of the prefill
    call: options of generate()
    """

    name: str
    check: Callable[["Mode", str, Method], None]
    rows: str = ""
    applies: Callable[[tiny.Family], bool] = always
    attention: str = ""
    call: dict[str, object] = field(default_factory=dict, hash=False)


def check_images(mode: Mode, family: str, method: Method) -> None:
    """All invariants: spans, selection, decoding, keeping all, rows alone, model unchanged."""
    expected = truth(family, 0, mode.rows)
    check_spans(expected)
    model = built(mode, expected)
    untouched, _ = generate(
        model, expected.inputs, steps=1
    )  # transformers sets some attributes lazily
    before = state_of(model)
    policy = method.make(expected.numbers)
    run = run_policy(model, expected.inputs, policy, expected.mask, method.recall)
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
    keeps_all(mode, family)
    if len(expected.rows) > 2:
        check_rows_alone(expected, model, policy, run, tie(expected, method), method.recall)


@cache
def keeps_all(mode: Mode, family: str) -> None:
    """Check a policy that drops nothing. It is the same for all methods, so it runs once."""
    expected = truth(family, 0, mode.rows)
    check_keeping_all(expected, built(mode, expected))


def built(mode: Mode, expected: Truth) -> Any:
    """The model with the attention of a mode."""
    model = expected.build()
    if mode.attention:
        model.set_attn_implementation(mode.attention)
    return model


def tie(expected: Truth, method: Method) -> Callable[[Any], bool]:
    """Whether the oracle accepts the selection of a report."""

    def excuse(report: Any) -> bool:
        if method.options is None:
            return False
        selection = expected.select(**method.options)
        return not oracle.compare(selection, kept_of(report)).wrong

    return excuse


def check_text(mode: Mode, family: str, method: Method) -> None:
    """A text-only prompt is no error: nothing is pruned, and the report says so."""
    model = EVERY[family].build(0)
    inputs, _ = EVERY[family].make_inputs(model, [tiny.NONE], seed=0)
    tokens, logits = generate(model, inputs)
    policy = method.make(Numbers())
    pruned, pruned_logits, report = run_policy(model, inputs, policy, recall=method.recall)
    assert report.recall is None
    assert torch.equal(pruned, tokens)
    assert (pruned_logits - logits).abs().max() < LOGITS
    assert all((layer == -1).all() for layer in kept_of(report))
    assert any("no vision tokens" in note for note in report.notes)


def check_call(mode: Mode, family: str, method: Method) -> None:
    """Another way to call generate(): keeping all changes no token; the selection is right.

    The oracle is not used for rows whose unpruned logits differ in this mode: chunked prefill
    breaks bidirectional attention within an image, and repeated rows with several images mix up
    the images of GLM-4V.
    """
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    try:
        untouched = call(mode, model, expected)
    except Exception as error:
        reason = f"the unpruned model fails in this mode with {type(error).__name__}"
        raise NotApplicable(reason) from error
    with plphp.prune(model, plphp.PLPHP(r=1.0, delta_r=0.0), vision_mask=expected.mask):
        assert torch.equal(call(mode, model, expected).sequences, untouched.sequences)
    with method.attach(model, expected.numbers, expected.mask) as pruning:
        with last_reads(pruning.model) as reads:
            out = call(mode, model, expected)
        report = pruning.report
    copies = len(report.prompt) // len(expected.rows)
    first = expected.logits[:, 0].repeat_interleave(copies, 0)
    alike = (untouched.logits[0] - first).abs().amax(1) < LOGITS
    if not any(row.images and alike[i * copies] for i, row in enumerate(expected.rows)):
        raise NotApplicable("the unpruned model computes other logits in this mode")
    for copy in range(copies):
        own = slice(copy, None, copies)
        if method.options is not None:
            check_selection(expected, rows_of(report, own), alike[own].tolist(), **method.options)
    if method.recall is not None:
        check_reads(expected, out, report, reads, alike)


def call(mode: Mode, model: PreTrainedModel, expected: Truth) -> Any:
    """The result of generate(). Samples are drawn with the same seed."""
    torch.manual_seed(0)
    return model.generate(
        **expected.inputs,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
        **mode.call,
    )


@contextmanager
def last_reads(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """The tokens read after the last forward, before beams are reordered once more."""
    reads: list[list[Tensor]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        reads[:] = [list(layer) for layer in cache_of(output).recalled()]

    with model.register_forward_hook(note):
        yield reads


def check_reads(
    expected: Truth, out: Any, report: Any, reads: list[list[Tensor]], alike: Tensor
) -> None:
    """Along every answer, with beams that change rows, the logits are the oracle's."""
    tokens = out.sequences[:, expected.spans.shape[1] :]
    answers, steps = tokens.shape
    slots = torch.arange(answers)[:, None].expand(-1, steps)
    if getattr(out, "beam_indices", None) is not None:
        slots = out.beam_indices[:, :steps]
    logits = torch.stack(out.logits, 1)[slots, torch.arange(steps)]
    copies = answers // len(expected.rows)
    for copy in range(copies):
        own = slice(copy, None, copies)
        rows = slots[own, -1]
        layers = tuple(replace(layer, kept=layer.kept[rows]) for layer in report.layers)
        read = tuple([positions[rows] for positions in layer] for layer in reads)
        its = replace(report, layers=layers, recall=replace(report.recall, read=read))
        wanted = led(expected.build(), expected.inputs, expected.spans, its, tokens[own])
        check_logits(logits[own][alike[rows]], wanted[alike[rows]], report)


def rows_of(report: Any, rows: slice) -> Any:
    """The report of some rows: beams and samples repeat each prompt."""
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
