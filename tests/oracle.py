"""What pruning must compute, told the slow way: the oracle that the package is judged against.

Written from the definition of the method alone; it shares no code with the package and never
imports it. Attention is one plain float64 function that is put into a deep copy of the model, so
that the model under test is never touched. Nothing is ever removed from the copy's cache: a dropped
token is hidden by -inf in its layer, row and KV head, from the first decoding step on. Here are
probabilities of the last prompt token and decoding with hidden tokens; which, says `oracle_choice`.
"""

import copy
import math
from collections.abc import Callable, Iterable
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
    """What hangs on one attention module of a copied model."""

    hidden: Tensor | None = (
        None  # [B, Hkv, N] bool: columns of the prompt that decoding must not see
    )
    probabilities: Tensor | None = None  # [B, H, N] of the prompt's last token
    capped: bool = True  # up to transformers 5.19, "sdpa" leaves soft caps out
    # of earlier turns: from which column on, and [B, Hkv, n] bool like `hidden`
    earlier: list[tuple[int, Tensor]] = field(default_factory=list)
    # with recall: (column, [B, Hkv, n]) of what single columns must not see, and what becomes of
    # keys and values once the prompt has been read
    single: list[tuple[int, Tensor]] = field(default_factory=list)
    rounding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


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
    if probe.rounding is not None and probe.probabilities is not None:
        key, value = probe.rounding(key, value)
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query.double() @ key.transpose(2, 3)
    logits = logits * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None and probe.capped:
        logits = softcap * torch.tanh(logits / softcap)
    # a padding query sees nothing: the mask's finite minimum keeps its (unused) output finite
    logits = logits + attention_mask.double()
    if probe.probabilities is not None and probe.hidden is not None:
        hidden = probe.hidden.repeat_interleave(groups, dim=1).unsqueeze(2)
        logits[..., : hidden.shape[-1]].masked_fill_(hidden, -math.inf)
    asking = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
    for begin, hidden in probe.earlier:
        block = hidden.repeat_interleave(groups, dim=1).unsqueeze(2) & (asking >= begin)[:, None]
        logits[..., : hidden.shape[-1]].masked_fill_(block, -math.inf)
    for column, hidden in probe.single:
        block = hidden.repeat_interleave(groups, dim=1).unsqueeze(2) & (asking == column)[:, None]
        logits[..., : hidden.shape[-1]].masked_fill_(block, -math.inf)
    probabilities = logits.softmax(-1)
    if probe.probabilities is None:
        probe.probabilities = probabilities[:, :, -1]  # prompts are padded on the left
    return (probabilities @ value).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def instrumented(model: PreTrainedModel) -> tuple[PreTrainedModel, list[Probe]]:
    """A deep copy whose decoder attends through `attend`, and its probes, layer by layer.

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
    """A cache that keeps every token of every layer, sliding ones too: one made without a config.

    Layers with a state in place of a cache need the config.
    """
    decoder = model.get_decoder()
    every = all(attends(layer) for layer in decoder.layers)
    return DynamicCache() if every else DynamicCache(config=decoder.config)


class Forced(LogitsProcessor):
    """Makes generate() take the given tokens, one column a step."""

    def __init__(self, tokens: Tensor) -> None:
        self.columns = iter(tokens.unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = next(self.columns).unsqueeze(1)
        return torch.full_like(scores, -math.inf).scatter(1, column, 0.0)


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens [B, steps], logits [B, steps, V]) of the model's own greedy generate().

    generate() and not a loop of ours: positions, M-RoPE deltas included, are then the model's.
    """
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        past_key_values=whole_cache(model),
        logits_processor=[] if tokens is None else [Forced(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


# (column, spans, kept) of an earlier turn: from that column on, what it dropped is not seen
Earlier = tuple[int, Tensor, list[Tensor]]


def remember(probes: list[Probe], earlier: Iterable[Earlier]) -> None:
    for begin, spans, kept in earlier:
        for probe, layer in zip(probes, kept, strict=True):
            if layer.shape[1]:
                probe.earlier.append((begin, hidden_columns(spans, layer)))


def prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], earlier: Iterable[Earlier] = ()
) -> list[Tensor]:
    """Each layer's attention of the last prompt token: float64 [B, H, N], N with the padding.

    Empty for a layer without attention.
    """
    model, probes = instrumented(model)
    remember(probes, earlier)
    generate(model, inputs, steps=1)
    return [
        torch.empty(0) if probe.probabilities is None else probe.probabilities for probe in probes
    ]


def decode(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    spans: Tensor,
    kept: list[Tensor],
    steps: int,
    tokens: Tensor | None = None,
    earlier: Iterable[Earlier] = (),
) -> tuple[Tensor, Tensor]:
    """Greedy decoding, or along `tokens`, in which vision tokens that are not kept are hidden.

    `kept`: a LongTensor [B, Hkv, K] a layer, row-logical positions (padding not counted) of the
    kept vision tokens, filled up with -1.
    """
    model, probes = instrumented(model)
    for probe, layer in zip(probes, kept, strict=True):
        probe.hidden = hidden_columns(spans, layer) if layer.shape[1] else None
    remember(probes, earlier)
    return generate(model, inputs, steps, tokens)


def hidden_columns(spans: Tensor, kept: Tensor) -> Tensor:
    """[B, Hkv, N]: True at each vision token that a KV head has not kept."""
    hidden = (spans > 0).unsqueeze(1).repeat(1, kept.shape[1], 1)
    for row in range(kept.shape[0]):
        for head in range(kept.shape[1]):
            for position in kept[row, head].tolist():
                if position >= 0:
                    column = position + padding(spans[row])
                    assert spans[row, column] > 0, f"not a vision token: {row=} {position=}"
                    hidden[row, head, column] = False
    return hidden
