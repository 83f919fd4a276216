"""Which tokens the oracle keeps: the method computed slowly, with Python's floats and sets.

It shares no code with the package and imports nothing of it.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = 1e-5  # Scores and gammas this near to a boundary may be on either side of it.


def padding(row: Tensor) -> int:
    return int((row < 0).sum())


@dataclass(frozen=True)
class Numbers:
    """The numbers of a policy and its options, under the names of the definition."""

    r: float = 0.4
    delta_r: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    budget: str = "image"  # or "global": one top-k over all images of a row
    gqa: str = "mean"  # or "max", over the query heads of a KV head
    min_tokens: int = 0  # the smallest number kept of each image
    round_to: int = 1  # the number of dropped tokens becomes a multiple of it


@dataclass(frozen=True)
class RowChoice:
    """What one layer keeps of one row. Without vision tokens gamma is NaN, class and rate are None.

    `kept` and `near` are row-logical positions, one set for each KV head. `near` are the positions
    that could be kept or dropped if the scores were rounded in another way.
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
    vision: tuple[frozenset[int], ...]  # row-logical positions of each row's vision tokens

    def tensors(self) -> list[Tensor]:
        """The kept positions, in the format that `decode` takes and a report has."""
        return [pad_positions([row.kept for row in layer]) for layer in self.choices]


def select(
    probabilities: list[Tensor],
    spans: Tensor,
    numbers: Numbers,
    num_kv_heads: int,
    whole: Collection[int] = (),
    keyless: Collection[int] = (),
) -> Selection:
    """The selection of all layers. `probabilities` and `spans` are by column of the padded batch.

    Layers in `whole` keep all tokens. Those of them in `keyless` have no keys, so no KV heads.
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
    """The selection of some rows."""
    choices = tuple(tuple(layer[row] for row in rows) for layer in selection.choices)
    return Selection(choices, tuple(selection.vision[row] for row in rows))


def keep_all(spans: list[int], num_kv_heads: int) -> RowChoice:
    """The choice of a layer that is left alone."""
    vision = frozenset(j for j, span in enumerate(spans) if span > 0)
    return RowChoice(math.nan, None, None, (vision,) * num_kv_heads, (frozenset(),) * num_kv_heads)


def choose(
    probabilities: Tensor, spans: list[int], numbers: Numbers, num_kv_heads: int
) -> RowChoice:
    """The choice of one layer for one row without padding: probabilities [H, N]."""
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
    """(kept, near a boundary) of one KV head. Each stage takes the best of the remaining tokens."""
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
        # The floors of the images are part of the one budget, and exceed it if they need more.
        for image in images.values():
            take(image, min(numbers.min_tokens, len(image)))
        take(score, budget(rate, len(score)) - len(kept))
    else:
        for image in images.values():
            take(image, min(len(image), max(budget(rate, len(image)), numbers.min_tokens)))
    take(score, (len(score) - len(kept)) % numbers.round_to)
    return kept, near


def top(score: dict[int, float], candidates: set[int], count: int) -> tuple[list[int], list[int]]:
    """The `count` candidates with the highest scores, ties to the lower position; the near ones."""
    order = sorted(candidates, key=lambda j: (-score[j], j))
    taken, left = order[: max(count, 0)], order[max(count, 0) :]
    if not taken or not left:
        return taken, []
    lowest, highest = score[taken[-1]], score[left[0]]
    near = [j for j in taken if score[j] - highest <= TOLERANCE]
    return taken, near + [j for j in left if lowest - score[j] <= TOLERANCE]


def pad_positions(rows: list[tuple[frozenset[int], ...]]) -> Tensor:
    """[B, Hkv, K]: the positions of each KV head, ascending, filled up with -1."""
    width = max((len(head) for row in rows for head in row), default=0)
    return torch.tensor(
        [[sorted(head) + [-1] * (width - len(head)) for head in row] for row in rows],
        dtype=torch.long,
    ).reshape(len(rows), len(rows[0]), width)


# --- 3. Comparing a reported selection ------------------------------------------------------------


@dataclass
class Verdict:
    """Counts of vision tokens times layers times KV heads: all and exempt ones; the errors."""

    total: int = 0
    exempt: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.exempt / max(self.total, 1)


def compare(selection: Selection, reported: list[Tensor]) -> Verdict:
    """Compare a selection with `reported`, [B, Hkv, K] for each layer, as in a report.

    If gamma is near a threshold, all tokens of the row in that layer are exempt.
    """
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
