"""Other ways to ask for greedy tokens: each gives the untouched model's, or else the oracle's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from methods import Method
from modes import Mode, NotApplicable
from torch import Tensor
from transformers import (
    BatchFeature,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    ProcessorMixin,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import plphp
from along import check_greedy, check_logits, led
from invariants import (
    EVERY,
    LOGITS,
    STEPS,
    Truth,
    check_selection,
    generate,
    observe,
    truth,
)
from plphp.hf import compat

KEEP_ALL = plphp.PLPHP(r=1.0, delta_r=0.0)
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
MAX_LEN = 320  # of static caches: the longest prompt and its answer

# (model, inputs) -> the new tokens (rows, at most STEPS)
Ask = Callable[[Any, dict[str, Tensor]], Tensor]


def new_tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    out: Tensor = model.generate(**{**inputs, **GREEDY, **options})
    return out[:, inputs["input_ids"].shape[1] :]


@contextmanager
def stock_fails_as_not_applicable() -> Iterator[None]:
    """Around what an untouched model does."""
    try:
        yield
    except NotApplicable:
        raise
    except Exception as error:
        reason = f"the unpruned model fails in this mode with {type(error).__name__}"
        raise NotApplicable(reason) from error


def check_answers(ask: Ask, mode: Mode, family: str, method: Method) -> None:
    check_truth(ask, truth(family, 0, mode.rows), method)


def check_truth(ask: Ask, expected: Truth, method: Method) -> None:
    """Keeping all gives the untouched model's tokens, a policy those of the oracle."""
    model = expected.build()
    with stock_fails_as_not_applicable():
        untouched = ask(model, expected.inputs)
    assert torch.equal(untouched, expected.tokens[:, : untouched.shape[1]])
    with plphp.prune(model, KEEP_ALL):
        assert torch.equal(ask(model, expected.inputs), untouched)
    with method.attach(model, expected.numbers) as pruning:
        tokens, report = ask(model, expected.inputs), pruning.report
    check_tokens(expected, tokens, report, method)


def check_tokens(expected: Truth, tokens: Tensor, report: Any, method: Method) -> None:
    """The selection is the oracle's, and so are the greedy tokens that follow from it."""
    if method.options is not None:
        check_selection(expected, report, **method.options)
    assert report.retention < 1 or method.name == "full"
    assert tokens.shape[1] > 1
    wanted = led(expected.build(), expected.inputs, expected.spans, report, tokens)
    check_greedy(tokens, wanted, report)


# --- streams, stopping, logits processors ---------------------------------------------------------


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def stream(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    heard = Heard()
    new_tokens(model, inputs, streamer=heard)
    assert heard.ended
    return torch.tensor([heard.tokens[inputs["input_ids"].shape[1] :]])


def stop(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    length = inputs["input_ids"].shape[1] + STEPS // 2
    return new_tokens(
        model, inputs, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(length)])
    )


class Banned(LogitsProcessor):
    """Forbids the token that greedy decoding takes at every third step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 3:
            return scores
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


def check_processor(mode: Mode, family: str, method: Method) -> None:
    """The oracle's logits through the same processor."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()

    def ask() -> Tensor:
        return new_tokens(model, expected.inputs, logits_processor=LogitsProcessorList([Banned()]))

    untouched = ask()
    assert not torch.equal(untouched, expected.tokens)
    with plphp.prune(model, KEEP_ALL):
        assert torch.equal(ask(), untouched)
    with method.attach(model, expected.numbers) as pruning:
        tokens, report = ask(), pruning.report
    logits = led(expected.build(), expected.inputs, expected.spans, report, tokens)
    ids = expected.inputs["input_ids"]
    for step in range(STEPS):
        said = torch.cat([ids, tokens[:, :step]], 1)
        assert torch.equal(Banned()(said, logits[:, step]).argmax(-1), tokens[:, step])


# --- pipelines ------------------------------------------------------------------------------------


class Prepared(ProcessorMixin):
    """A processor that has its inputs already: what a pipeline does with a real one's."""

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.ready = inputs

    def __call__(self, *_: Any, **__: Any) -> BatchFeature:
        return BatchFeature(dict(self.ready))

    def post_process_image_text_to_text(self, generated: Tensor, **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in generated.tolist()]


def pipe(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    made = pipeline("image-text-to-text", model=model, processor=Prepared(inputs))
    (out,) = made(text="whatever", generate_kwargs=dict(GREEDY), return_full_text=False)
    return torch.tensor([[int(token) for token in out["generated_text"].split()]])


# --- guesses --------------------------------------------------------------------------------------


def check_assisted(mode: Mode, family: str, method: Method) -> None:
    """By a model that often guesses wrong: what is wrong is taken back."""
    expected = truth(family, 0, mode.rows)
    check_guessing({"assistant_model": EVERY[family].build(1)}, expected, method)


def check_lookup(mode: Mode, family: str, method: Method) -> None:
    """The prompt's last two tokens are its second and third: its first forward holds guesses."""
    before = truth(family, 0, mode.rows)
    ids = before.inputs["input_ids"].clone()
    assert (before.spans[:, [1, 2, -2, -1]] == 0).all()
    ids[:, -2:] = ids[:, 1:3]
    prompts = ({**before.inputs, "input_ids": ids}, before.spans)
    expected = observe(before.build(), family, mode.rows, prompts)
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    check_guessing(options, expected, method)


def check_guessing(options: dict[str, Any], expected: Truth, method: Method) -> None:
    model = expected.build()
    with stock_fails_as_not_applicable():
        logits = generate(model, expected.inputs, **options)[1]
    off = (logits - expected.logits).abs().amax((0, 2)) > LOGITS
    if off[0]:
        raise NotApplicable("the unpruned model computes other logits in this mode")
    if off.any():
        raise NotApplicable("the unpruned model does not remove wrong guesses from its cache")
    if compat.is_recurrent(compat.text_config(model)):
        with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="recurrent"):
            generate(model, expected.inputs, **options)
        return
    check_truth(lambda model, inputs: new_tokens(model, inputs, **options), expected, method)


# --- static caches --------------------------------------------------------------------------------


def static(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """On an attached model; the untouched one has nothing to do with it."""
    if "generate" in vars(model):
        options["cache"] = plphp.PrunedCache(model, static=True, max_len=MAX_LEN)
    return new_tokens(model, inputs, **options)


def check_compiled(mode: Mode, family: str, method: Method) -> None:
    """One graph for every step, and the oracle's tokens."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only otherwise
    with method.attach(model, expected.numbers) as pruning:
        tokens = static(model, expected.inputs, compile_config=config)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "not compiled, or recompiled by a step"
    assert not counters["graph_break"]
    check_tokens(expected, tokens, pruning.report, method)


# --- what is refused ------------------------------------------------------------------------------


def check_refused(options: dict[str, Any], mode: Mode, family: str, method: Method) -> None:
    """Raises the refusal, which is what the page shows; a silent no-op would be a failure."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    with method.attach(model, expected.numbers) as pruning:
        try:
            new_tokens(model, expected.inputs, **options)
        finally:
            assert pruning.report is None
    raise AssertionError(f"{options} is neither refused nor tested")


def check_kept_codes(mode: Mode, family: str, method: Method) -> None:
    """What is kept is stored in codes of 4 bits; the oracle rounds the same tokens."""
    expected = truth(family, 0, mode.rows)
    model = expected.build()
    with replace(method, kv_bits=4).attach(model, expected.numbers) as pruning:
        tokens, logits = generate(model, expected.inputs)
    report = pruning.report
    if method.options is not None:
        check_selection(expected, report, **method.options)
    wanted = led(expected.build(), expected.inputs, expected.spans, report, tokens)
    check_logits(logits, wanted, report)
    check_greedy(tokens, wanted, report)
    assert report.codes.share < report.retention
