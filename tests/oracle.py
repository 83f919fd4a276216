"""What pruning must compute, told the slow way: the oracle that the package is judged against.

Written from the definition of the method alone; it shares no code with the package and never
imports it. Attention is one plain float64 function that is put into a deep copy of the model, so
that the model under test is never touched. Nothing is ever removed from the copy's cache: a dropped
token is hidden by -inf in its layer, row and KV head, from the first decoding step on.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "plphp_test_oracle"
TOLERANCE = 1e-5  # of scores and gammas: nearer than this to a boundary, both sides are right

# --- 1. The model: probabilities of the last prompt token, and decoding with hidden tokens --------


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
        past_key_values=whole_cache(model),
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
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
        return ((x - low) / step).round() * step + low

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


def padding(row: Tensor) -> int:
    return int((row < 0).sum())


# --- 2. The selection -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Numbers:
    """The numbers of a policy and its options, under the names of the definition."""

    r: float = 0.4
    delta_r: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    budget: str = "image"  # or "global": one top-k over all images of a row
    gqa: str = "mean"  # or "max", over the query heads of a KV head
    min_tokens: int = 0  # the least that is kept of each image
    round_to: int = 1  # the number of dropped tokens becomes a multiple of it


@dataclass(frozen=True)
class RowChoice:
    """What one layer keeps of one row. A row without vision tokens: gamma NaN, class and rate None.

    `kept` and `near` are row-logical positions, a set for each KV head; `near` are those that
    another rounding of the scores could put on the other side.
    """

    gamma: float
    layer_class: str | None
    rate: float | None
    kept: tuple[frozenset[int], ...]
    near: tuple[frozenset[int], ...]
    near_threshold: bool = False  # gamma could be on the other side of alpha or beta


@dataclass(frozen=True)
class Selection:
    choices: tuple[tuple[RowChoice, ...], ...]  # [layer][row]
    vision: tuple[frozenset[int], ...]  # each row's vision tokens, row-logical

    def tensors(self) -> list[Tensor]:
        """In the format that `decode` takes and a report has."""
        return [pad_positions([row.kept for row in layer]) for layer in self.choices]


def select(
    probabilities: list[Tensor],
    spans: Tensor,
    numbers: Numbers,
    num_kv_heads: int,
    whole: Collection[int] = (),
    keyless: Collection[int] = (),
) -> Selection:
    """`probabilities` and `spans` in columns of the padded batch.

    `whole` layers keep all, of which `keyless` ones have no keys of their own and so no KV heads.
    """
    rows = range(spans.shape[0])
    unpadded = [spans[row, padding(spans[row]) :].tolist() for row in rows]
    choices = tuple(
        tuple(
            keep_all(unpadded[row], 0 if index in keyless else num_kv_heads)
            if index in whole
            else choose(layer[row, :, padding(spans[row]) :], unpadded[row], numbers, num_kv_heads)
            for row in rows
        )
        for index, layer in enumerate(probabilities)
    )
    vision = tuple(frozenset(j for j, span in enumerate(row) if span > 0) for row in unpadded)
    return Selection(choices, vision)


def only(selection: Selection, rows: list[int]) -> Selection:
    """Some rows of a selection."""
    choices = tuple(tuple(layer[row] for row in rows) for layer in selection.choices)
    return Selection(choices, tuple(selection.vision[row] for row in rows))


def keep_all(spans: list[int], num_kv_heads: int) -> RowChoice:
    """A layer that is left alone."""
    vision = frozenset(j for j, span in enumerate(spans) if span > 0)
    return RowChoice(math.nan, None, None, (vision,) * num_kv_heads, (frozenset(),) * num_kv_heads)


def choose(
    probabilities: Tensor, spans: list[int], numbers: Numbers, num_kv_heads: int
) -> RowChoice:
    """One layer and row, without padding: probabilities [H, N]."""
    p = probabilities.double().tolist()
    vision = [j for j, span in enumerate(spans) if span > 0]
    if not vision:
        nothing = (frozenset(),) * num_kv_heads
        return RowChoice(math.nan, None, None, nothing, nothing)
    gamma = sum(sum(head[j] for j in vision) for head in p) / len(p)
    layer_class, rate = classify(gamma, numbers)
    group = len(p) // num_kv_heads
    kept, near = [], []
    for g in range(num_kv_heads):
        heads = p[g * group : (g + 1) * group]
        score = {j: pool([head[j] for head in heads], numbers.gqa) for j in vision}
        taken, unsure = keep(score, spans, rate, numbers)
        kept.append(frozenset(taken))
        near.append(frozenset(unsure))
    near_threshold = min(abs(gamma - numbers.alpha), abs(gamma - numbers.beta)) <= TOLERANCE
    return RowChoice(gamma, layer_class, rate, tuple(kept), tuple(near), near_threshold)


def classify(gamma: float, numbers: Numbers) -> tuple[str, float]:
    if gamma >= numbers.alpha:
        return "attentive", numbers.r + numbers.delta_r
    if gamma < numbers.beta:
        return "indifferent", numbers.r - numbers.delta_r
    return "balanced", numbers.r


def pool(values: list[float], gqa: str) -> float:
    return max(values) if gqa == "max" else sum(values) / len(values)


def budget(rate: float, size: int) -> int:
    return min(size, math.ceil(rate * size - 1e-6))


def keep(
    score: dict[int, float], spans: list[int], rate: float, numbers: Numbers
) -> tuple[set[int], set[int]]:
    """(kept, near a boundary) of one KV head. Each stage takes the best of what is left."""
    images: dict[int, list[int]] = {}
    for j in score:
        images.setdefault(spans[j], []).append(j)
    kept: set[int] = set()
    near: set[int] = set()

    def take(candidates: Iterable[int], count: int) -> None:
        best, unsure = top(score, set(candidates) - kept, count)
        kept.update(best)
        near.update(unsure)

    if numbers.budget == "global":
        # the floor of each image comes out of the one budget, and beyond it where floors need more
        for image in images.values():
            take(image, min(numbers.min_tokens, len(image)))
        take(score, budget(rate, len(score)) - len(kept))
    else:
        for image in images.values():
            take(image, min(len(image), max(budget(rate, len(image)), numbers.min_tokens)))
    take(score, (len(score) - len(kept)) % numbers.round_to)
    return kept, near


def top(score: dict[int, float], candidates: set[int], count: int) -> tuple[list[int], list[int]]:
    """The `count` best candidates, ties to the lower position, and those near the boundary."""
    order = sorted(candidates, key=lambda j: (-score[j], j))
    taken, left = order[: max(count, 0)], order[max(count, 0) :]
    if not taken or not left:
        return taken, []
    lowest, highest = score[taken[-1]], score[left[0]]
    near = [j for j in taken if score[j] - highest <= TOLERANCE]
    return taken, near + [j for j in left if lowest - score[j] <= TOLERANCE]


def pad_positions(rows: list[tuple[frozenset[int], ...]]) -> Tensor:
    """[B, Hkv, K], each head's positions ascending, then -1."""
    width = max((len(head) for row in rows for head in row), default=0)
    return torch.tensor(
        [[sorted(head) + [-1] * (width - len(head)) for head in row] for row in rows],
        dtype=torch.long,
    ).reshape(len(rows), len(rows[0]), width)


# --- 3. Comparing a reported selection ------------------------------------------------------------


@dataclass
class Verdict:
    """Vision tokens times layers times KV heads: how many, how many exempt, and what is wrong."""

    total: int = 0
    exempt: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.exempt / max(self.total, 1)


def compare(selection: Selection, reported: list[Tensor]) -> Verdict:
    """`reported` as in a report: [B, Hkv, K] a layer. Where both sides are right, all is exempt."""
    verdict = Verdict()
    assert len(reported) == len(selection.choices), "as many layers as the model has"
    for layer, (rows, tensor) in enumerate(zip(selection.choices, reported, strict=True)):
        for row, choice in enumerate(rows):
            vision = selection.vision[row]
            for head, (kept, near) in enumerate(zip(choice.kept, choice.near, strict=True)):
                got = [j for j in tensor[row, head].tolist() if j != -1]
                exempt = vision if choice.near_threshold else near
                verdict.total += len(vision)
                verdict.exempt += len(exempt)
                where = f"layer {layer}, row {row}, KV head {head}"
                if len(got) != len(set(got)) or not vision.issuperset(got):
                    verdict.wrong.append(f"{where}: not distinct vision tokens: {got}")
                elif len(got) != len(kept) and not choice.near_threshold:
                    verdict.wrong.append(f"{where}: {len(got)} kept, {len(kept)} wanted")
                elif differing := (kept ^ set(got)) - exempt:
                    verdict.wrong.append(f"{where}: {sorted(differing)} are on the wrong side")
    return verdict
