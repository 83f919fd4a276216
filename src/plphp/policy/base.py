"""What all methods share: the base owns the invariants, a method says what tokens are worth.

Kinds of methods, and when they decide:
    layer     each layer when its attention has run; its keys and values are compacted at once
    layers    all layers after the last one, because they share a budget; the peak is the full cache
    sequence  tokens leave the hidden states before some layer: the layers after it never see them
    images    before the model, by making the pictures smaller; nothing for `plphp.prune` to do
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.view import KeepPlan, LayerView, pack

Kind = Literal["layer", "layers", "sequence", "images"]
Scope = Literal["image", "global"]


class Policy:
    """A frozen dataclass whose fields are its options; bad ones are a ValueError naming the field.

    A method of a user's own may derive from it and give `plan`, or from `CachePolicy` and give
    `look`.
    """

    @property
    def kind(self) -> Kind:
        """When the method decides."""
        return "layer"

    @property
    def window(self) -> int:
        """Last prompt tokens whose attention the method wants to see."""
        return 1

    @property
    def prunes_cache(self) -> bool:
        """Whether the method leaves the prompt's own forward pass as it is."""
        return self.kind in ("layer", "layers")

    def scores_layer(self, layer: int, layers: int) -> bool:
        """Whether the method looks at the layer with this index, of `layers`."""
        return True

    def check(self, layers: int) -> None:
        """Raise ValueError for options that a decoder of so many layers cannot serve."""

    def plan(self, view: LayerView) -> KeepPlan:
        """What every row and KV head keeps of one layer, equally much for all heads of a row.

        Tensors stay on the device of `view.probs`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Look:
    """What a method makes of one layer: small enough to wait for the other layers.

    scores: (B, Hkv, N) float32, what each column is worth to each KV head, the higher the better
    spans: (B, N) int64, as in `LayerView`
    rate: (B,) float64, the share of its vision tokens that the layer asks for, at least 0
    gamma: (B,) float32 vision attention
    classes: (B,) int64 index into LAYER_CLASSES, -1 for a method without classes
    """

    scores: Tensor
    spans: Tensor
    rate: Tensor
    gamma: Tensor
    classes: Tensor


class CachePolicy(Policy):
    """A method that scores vision tokens: it gives `look`, the rest is the same for all of them."""

    scope: Scope = "image"  # a share of every image, or one ranking over all images of a row
    min_tokens: int = 0
    round_to: int = 1

    def look(self, view: LayerView) -> Look:
        """What every column of a layer is worth, and which share the layer asks for."""
        raise NotImplementedError

    def plan(self, view: LayerView) -> KeepPlan:
        """What to keep of one layer. One host read: the kept length."""
        look = self.look(view)
        return self.choose(look, look.rate)

    def plan_all(self, looks: Sequence[Look]) -> list[KeepPlan]:
        """What to keep of every layer, rates scaled so that their mean is `budget` in each row."""
        budget: float = self.budget  # type: ignore[attr-defined]  # an option of such methods
        rates = steps.meet_budget(torch.stack([look.rate.cpu() for look in looks]), budget)
        return [
            self.choose(look, rate.to(look.scores.device))
            for look, rate in zip(looks, rates, strict=True)
        ]

    def choose(self, look: Look, rate: Tensor) -> KeepPlan:
        """All text and the best-scored vision tokens at a rate (B,) float64."""
        return keep_best(look, rate, *self.counts(rate, look.spans))

    def counts(self, rate: Tensor, spans: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vision tokens to keep, int64: per image (B, m), and in all (B,) where that is more.

        rate (B,) float64, spans (B, N).
        """
        sizes = steps.image_sizes(spans)
        quota = sizes.clamp(max=self.min_tokens)
        if self.scope == "image":
            quota = torch.maximum(quota, steps.share(rate, sizes))
            if self.round_to == 1:
                return quota, None
        whole = steps.share(rate, sizes.sum(-1, keepdim=True))[:, 0]
        total = quota.sum(-1) if self.scope == "image" else torch.maximum(whole, quota.sum(-1))
        return quota, steps.round_up(total, spans, self.round_to)


class SequencePolicy(Policy):
    """A method whose dropped tokens leave the hidden states, for all later layers.

    It scores the tokens of one layer, the last one that sees them all, as a layer of one KV head.
    """

    @property
    def kind(self) -> Kind:
        """Tokens leave the hidden states."""
        return "sequence"

    def look(self, view: LayerView) -> Look:
        """What every column is worth, and which share of the vision tokens stays."""
        raise NotImplementedError

    def plan(self, view: LayerView) -> KeepPlan:
        """The columns that stay: all text and the best vision tokens of all images together."""
        look = self.look(view)
        sizes = steps.image_sizes(look.spans)
        total = steps.share(look.rate, sizes.sum(-1, keepdim=True))[:, 0]
        return keep_best(look, look.rate, torch.zeros_like(sizes), total)

    def leave_at(self, layers: int) -> int:
        """Index of the first layer that does without them, 1 to `layers`. Raises ValueError."""
        raise NotImplementedError

    def scores_layer(self, layer: int, layers: int) -> bool:
        """The last layer that sees all tokens."""
        return layer == self.leave_at(layers) - 1

    def check(self, layers: int) -> None:
        """Raise ValueError where `leave_at` does."""
        self.leave_at(layers)


def keep_best(look: Look, rate: Tensor, quota: Tensor, total: Tensor | None) -> KeepPlan:
    """All text, the best `quota` (B, m) of each image, and the best others up to `total` (B,).

    rate (B,) is what was asked for, for the report.
    """
    keep = steps.select(look.scores, look.spans, quota, total)
    return pack(keep, look.gamma, rate, look.classes)


def plan_views(policy: Policy, views: Mapping[int, LayerView]) -> dict[int, KeepPlan]:
    """What a policy that prunes the cache keeps of every layer. views: by the layer's index."""
    if isinstance(policy, CachePolicy) and policy.kind == "layers":
        plans = policy.plan_all([policy.look(view) for view in views.values()])
        return dict(zip(views, plans, strict=True))
    return {index: policy.plan(view) for index, view in views.items()}


def flat_look(view: LayerView, scores: Tensor, rate: float) -> Look:
    """A look that asks for one rate whatever the layer does. scores (B, Hkv, N)."""
    gamma = view.over_ranks(steps.vision_attention(view.probs, view.spans))
    asked = torch.full_like(gamma, rate, dtype=torch.float64).masked_fill(gamma.isnan(), torch.nan)
    classes = torch.full_like(gamma, -1, dtype=torch.int64)
    return Look(scores, view.spans, asked, gamma, classes)


def check_share(name: str, value: object) -> None:
    """Raise ValueError, naming the option, unless it is a number from 0 to 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:  # type: ignore[operator, arg-type]
        raise ValueError(f"{name} must be a share from 0 to 1, got {value!r}")


def check_count(name: str, value: object, least: int) -> None:
    """Raise ValueError, naming the option, unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the option, unless it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
