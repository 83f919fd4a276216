"""What pruning must compute, told the slow way: the oracle that the package is judged against.

Written from the definition of the method alone; it shares no code with the package and never
imports it. Attention is one plain float64 function that is put into a deep copy of the model, so
that the model under test is never touched. Nothing is ever removed from the copy's cache: a dropped
token is hidden by -inf in its layer, row and KV head, from the first decoding step on. Here are
probabilities of the last prompt token and decoding with hidden tokens; which, says `oracle_choice`.
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
    """What hangs on one attention module of a copied model, told by the columns that ask."""

    probabilities: Tensor | None = None  # [B, H, N] of the prompt's last token
    capped: bool = True  # up to transformers 5.19, "sdpa" leaves soft caps out
    # columns from the first to before the second, and [B, Hkv, n] bool: what they must not see
    hidden: list[tuple[float, float, Tensor]] = field(default_factory=list)
    # from which column on keys and values are others, one after the other
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
        # a padding query sees nothing: the mask's finite minimum keeps its (unused) output finite
        logits = logits + attention_mask.double()
        for begin, end, hidden in probe.hidden:
            blind = ((asking >= begin) & (asking < end))[:, None]
            block = hidden.repeat_interleave(groups, dim=1).unsqueeze(2) & blind
            logits[..., : hidden.shape[-1]].masked_fill_(block, -math.inf)
        return logits.softmax(-1)

    def read(probabilities: Tensor, value: Tensor) -> Tensor:
        return probabilities @ value.double().repeat_interleave(groups, dim=1)

    probabilities = weigh(key)
    if probe.probabilities is None:
        probe.probabilities = probabilities[:, :, -1]  # prompts are padded on the left
    output = read(probabilities, value)
    for begin, change in probe.rounding:
        if asking[-1] >= begin:
            key, value = change(key, value)
            output = torch.where((asking >= begin)[:, None], read(weigh(key), value), output)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


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
        **{CACHE: whole_cache(model)},
        logits_processor=[] if tokens is None else [Forced(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


@dataclass(frozen=True)
class Dropped:
    """What the columns from `begin` on do without of a prompt's images, layer by layer.

    kept: a LongTensor [B, Hkv, K], row-logical positions (padding not counted) of the kept vision
        tokens, filled up with -1; the others are hidden
    read: with recall, in place of `kept`: such a tensor for each column from `begin` on, one after
        the other; columns after those see everything
    bits: those that are not kept are not hidden but rounded
    """

    begin: int
    spans: Tensor
    kept: list[Tensor]
    read: Sequence[Sequence[Tensor]] | None = None
    bits: int = 0


def leave_out(probes: list[Probe], dropped: Dropped) -> None:
    for layer, probe in enumerate(probes):
        kept = dropped.kept[layer]
        if not kept.shape[1]:
            continue
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
    """Each layer's attention of the last prompt token: float64 [B, H, N], N with the padding.

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
    """Greedy decoding, or along `tokens`, without what this turn and earlier ones have dropped."""
    model, probes = instrumented(model)
    for turn in dropped:
        leave_out(probes, turn)
    return generate(model, inputs, steps, tokens)


def rounding(hidden: Tensor, bits: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What codes make of the tokens hidden [B, Hkv, n], told the slow way: keys a channel in groups
    of 32 tokens, values a token."""

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
