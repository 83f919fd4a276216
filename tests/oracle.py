"""The oracle: a slow, independent computation of what pruning must compute, for the tests.

It is written from the definition of the method alone and imports nothing of the package. Attention
is one plain float64 function that is put into a deep copy of the model, so that the model under
test is never changed. Nothing is ever removed from the copy's cache: a dropped token is hidden by
-inf in its layer, row and KV head, from the first decoding step on. This file computes the
probabilities of the last prompt token, and decoding with hidden tokens. `oracle_choice` computes
which tokens are hidden.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from oracle_choice import (
    Numbers,
    Selection,
    Verdict,
    budget,
    choose,
    compare,
    only,
    padding,
    select,
)
from versions import CACHE

__all__ = [
    "Numbers",
    "Selection",
    "Verdict",
    "budget",
    "choose",
    "compare",
    "only",
    "padding",
    "select",
]

ATTENTION = "plphp_test_oracle"


@dataclass
class Probe:
    """The settings and records of one attention module in a copied model.

    A forward is recognised by the columns of its queries.
    """

    probabilities: Tensor | None = None  # [B, H, N], of the last prompt token
    capped: bool = True  # up to transformers 5.19, "sdpa" leaves soft caps out
    # (first column, end column, [B, Hkv, n] bool: the tokens hidden from these columns)
    hidden: list[tuple[float, float, Tensor]] = field(default_factory=list)
    # the columns from which on other keys and values are used, in order
    rounding: list[tuple[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]] = field(
        default_factory=list
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """softmax(q k' + mask) v in float64. The mask is the model's own: causal, padding, window."""
    if s_aux is not None:
        raise NotImplementedError("the oracle knows no attention sinks")
    probe: Probe = module.oracle_probe
    groups = query.shape[1] // key.shape[1]
    asking = torch.arange(key.shape[2] - query.shape[2], key.shape[2])

    def weigh(key: Tensor) -> Tensor:
        key = key.double().repeat_interleave(groups, dim=1)
        logits = query.double() @ key.transpose(2, 3)
        logits = logits * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        if softcap is not None and probe.capped:
            logits = softcap * torch.tanh(logits / softcap)
        # A padding query attends to nothing: the mask's finite minimum keeps its output finite.
        logits = logits + attention_mask.double()
        for begin, end, hidden in probe.hidden:
            blind = ((asking >= begin) & (asking < end))[:, None]
            block = hidden.repeat_interleave(groups, dim=1).unsqueeze(2) & blind
            logits[..., : hidden.shape[-1]].masked_fill_(block, -math.inf)
        return logits.softmax(-1)

    def read(probabilities: Tensor, value: Tensor) -> Tensor:
        return probabilities @ value.double().repeat_interleave(groups, dim=1)

    probabilities = weigh(key)
    output = read(probabilities, value)
    for begin, change in probe.rounding:
        if asking[-1] >= begin:
            key, value = change(key, value)
            probabilities = weigh(key)
            output = torch.where((asking >= begin)[:, None], read(probabilities, value), output)
    if probe.probabilities is None:
        probe.probabilities = probabilities[:, :, -1]  # prompts are padded on the left
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def instrumented(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Probe]]:
    """A deep copy of a model whose decoder attends with `attend`, and the probe of each layer.

    The probe of a layer without attention stays empty.
    """
    assert "generate" not in vars(model), "the oracle needs a model to which nothing is attached"
    model = copy.deepcopy(model)
    decoder = model.get_decoder()
    capped = decoder.config._attn_implementation != "sdpa"
    decoder.config._attn_implementation = ATTENTION
    probes = []
    for layer in decoder.layers:
        probes.append(Probe(capped=capped))
        if attends(layer):
            assert layer.self_attn.config._attn_implementation == ATTENTION
            layer.self_attn.oracle_probe = probes[-1]
    return model, probes


def attends(layer: torch.nn.Module) -> bool:
    return hasattr(layer, "self_attn")


def whole_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache that keeps every token of every layer, also of sliding ones.

    Such a cache is made without a config; layers that hold a state need the config.
    """
    decoder = model.get_decoder()
    every = all(attends(layer) for layer in decoder.layers)
    return DynamicCache() if every else DynamicCache(config=decoder.config)


class Forced(LogitsProcessor):
    """A logits processor that makes generate() produce given tokens, one column a step."""

    def __init__(self, tokens: Tensor) -> None:
        self.columns = iter(tokens.unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = next(self.columns).unsqueeze(1)
        return torch.full_like(scores, -math.inf).scatter(1, column, 0.0)


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens [B, steps], logits [B, steps, V]) of the model's own greedy generate().

    It is not a loop of this file, so that the positions are the model's, M-RoPE deltas included.
    """
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        **{CACHE: whole_cache(model)},
        logits_processor=[] if tokens is None else [Forced(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@dataclass(frozen=True)
class Dropped:
    """The vision tokens of a prompt that the columns from `begin` on do not attend to, by layer.

    kept: LongTensor [B, Hkv, K], row-logical positions of the kept vision tokens, filled up with
        -1; the others are hidden
    read: with recall, in place of `kept`: such a tensor for each column from `begin` on, in order;
        later columns attend to everything
    bits: if given, tokens that are not kept are not hidden but rounded to this many bits
    """

    begin: int
    spans: Tensor
    kept: list[Tensor]
    read: Sequence[Sequence[Tensor]] | None = None
    bits: int = 0
    kept_bits: int = 0  # if given, the kept tokens are rounded to this many bits
    text: bool = False  # and text too, but for the last 32 text tokens


def leave_out(probes: list[Probe], dropped: Dropped) -> None:
    for layer, probe in enumerate(probes):
        kept = dropped.kept[layer]
        if not kept.shape[1]:
            continue
        if dropped.kept_bits:
            hidden = hidden_columns(dropped.spans, kept)
            coded = (dropped.spans > 0).unsqueeze(1) & ~hidden
            if dropped.text:
                text = dropped.spans == 0
                early = text & (text.flip(1).cumsum(1).flip(1) > 32)
                coded = coded | early.unsqueeze(1)
            probe.rounding.append((dropped.begin, rounding(coded, dropped.kept_bits)))
        if dropped.read is not None:
            for column, positions in enumerate(dropped.read[layer], start=dropped.begin):
                hidden = hidden_columns(dropped.spans, positions)
                probe.hidden.append((column, column + 1, hidden))
        elif dropped.bits:
            hidden = hidden_columns(dropped.spans, kept)
            probe.rounding.append((dropped.begin, rounding(hidden, dropped.bits)))
        else:
            probe.hidden.append((dropped.begin, math.inf, hidden_columns(dropped.spans, kept)))


def prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], earlier: Iterable[Dropped] = ()
) -> list[Tensor]:
    """The attention of the last prompt token in each layer: float64 [B, H, N], padding included.

    Empty for a layer without attention.
    """
    model, probes = instrumented(model)
    for dropped in earlier:
        leave_out(probes, dropped)
    generate(model, inputs, steps=1)
    return [
        torch.empty(0) if probe.probabilities is None else probe.probabilities for probe in probes
    ]


def decode(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    dropped: Iterable[Dropped],
    steps: int,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy decoding, or decoding of given `tokens`, without the dropped tokens of all turns."""
    model, probes = instrumented(model)
    for turn in dropped:
        leave_out(probes, turn)
    return generate(model, inputs, steps, tokens)


def rounding(hidden: Tensor, bits: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The tokens hidden [B, Hkv, n], rounded as codes do: keys for each channel in groups of 32
    tokens, values for each token.
    """

    def rough(x: Tensor, dim: int) -> Tensor:
        low = x.amin(dim, keepdim=True).half().float()
        step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-6)
        step = step.half().float()
        return (((x - low) / step).round().clamp(min=0) * step + low).to(x.dtype)

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = keys.clone(), values.clone()
        for row in range(hidden.shape[0]):
            for head in range(hidden.shape[1]):
                gone = hidden[row, head].nonzero()[:, 0]
                for group in torch.split(gone, 32):
                    if len(group):
                        keys[row, head, group] = rough(keys[row, head, group], 0)
                values[row, head, gone] = rough(values[row, head, gone], 1)
        return keys, values

    return change


def hidden_columns(spans: Tensor, kept: Tensor) -> Tensor:
    """[B, Hkv, N] bool: True for each vision token that a KV head has not kept."""
    hidden = (spans > 0).unsqueeze(1).repeat(1, kept.shape[1], 1)
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            for position in kept[row, head].tolist():
                if position >= 0:
                    column = position + padding(spans[row])
                    assert spans[row, column] > 0, f"not a vision token: {row=} {position=}"
                    hidden[row, head, column] = False
    return hidden
