"""Base classes of the policies. A policy scores tokens; the base class keeps the invariants.

A policy is of one of four kinds, which say when it selects tokens:
    layer     after the attention of each layer; the layer's keys and values are compacted at once
    layers    for all layers after the last one, because the layers share a budget; until then the
              cache holds the whole prompt
    sequence  before one layer: dropped tokens leave the hidden states, and no later layer computes
              them
    images    before the model: the images are made smaller, and `plphp.prune` has nothing to do
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.policy import steps
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import KeepPlan, LayerView, pack

Kind = Literal["layer", "layers", "sequence", "images"]
Scope = Literal["image", "global"]


class Policy:
    """Base class of all policies: a frozen dataclass whose fields are the policy's options.

    An option out of range raises an InputError that names the field. A policy of your own derives
    from `Policy` and implements `plan`, or derives from `CachePolicy` and implements `look`.
    """

    @property
    def kind(self) -> Kind:
        """When the policy selects tokens; see the module docstring."""
        return "layer"

    @property
    def window(self) -> int:
        """The number of last prompt tokens whose attention the policy reads."""
        return 1

    @property
    def prunes_cache(self) -> bool:
        """Whether the policy prunes only the cache, so that the prompt's forward is unchanged."""
        return self.kind in ("layer", "layers")

    def scores_layer(self, layer: int, layers: int) -> bool:
        """Whether the method looks at the layer with this index, of `layers`."""
        return True

    def check(self, layers: int) -> None:
        """Raise InputError for options that do not fit a decoder with this number of layers."""

    def plan(self, view: LayerView) -> KeepPlan:
        """The columns of one layer that every row and KV head keeps.

        All KV heads of a row keep the same number of columns. Tensors stay on the device of
        `view.probs`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Look:
    """A policy's scores and retention rate for one layer.

    A look is small, so that a policy of kind "layers" can hold one per layer until the last layer.

    scores: (B, Hkv, N) float32, the score of each column for each KV head; the highest are kept
    spans: (B, N) int64, as in `LayerView`
    rate: (B,) float64, the share of its vision tokens that the layer asks for, at least 0; NaN
        where a row has no vision tokens
    gamma: (B,) float32, vision attention; NaN where a row has no vision tokens
    classes: (B,) int64, index into LAYER_CLASSES, -1 for a policy without layer classes
    places: (B, N) int64, the row-logical position of each column, where some columns of the prompt
        did not enter the layer; else None
    """

    scores: Tensor
    spans: Tensor
    rate: Tensor
    gamma: Tensor
    classes: Tensor
    places: Tensor | None = None


class CachePolicy(Policy):
    """Base class of policies that prune the cache. A subclass implements `look` only.

    min_tokens, round_to: options of the policies that declare them as fields, as `PLPHP` does
    """

    scope: Scope = "image"  # the rate counts for each image, or for all images of a row together
    min_tokens: int = 0
    round_to: int = 1

    def look(self, view: LayerView) -> Look:
        """Score every column of a layer, and say which share of vision tokens the layer keeps."""
        raise NotImplementedError

    def plan(self, view: LayerView) -> KeepPlan:
        """The columns to keep of one layer. The host reads from the device once: the kept length.

        The shapes are those of `KeepPlan`.
        """
        look = self.look(view)
        return self.choose(look, look.rate)

    def plan_all(self, looks: Sequence[Look]) -> list[KeepPlan]:
        """The columns to keep of every layer, for a policy of kind "layers".

        looks: one per layer. Their rates are scaled so that the mean over layers is `budget` in
        each row.
        """
        budget: float = self.budget  # type: ignore[attr-defined]  # such policies have this option
        rates = steps.meet_budget(torch.stack([look.rate.cpu() for look in looks]), budget)
        return [
            self.choose(look, rate.to(look.scores.device))
            for look, rate in zip(looks, rates, strict=True)
        ]

    def choose(self, look: Look, rate: Tensor) -> KeepPlan:
        """Keep all text and the vision tokens with the highest scores, at a rate (B,) float64."""
        return keep_best(look, rate, *self.rounded_counts(rate, look.spans, self.round_to))

    @property
    def highest_rate(self) -> float:
        """The highest retention rate that the policy asks for in any layer, 0 to 1.

        A paged cache reserves blocks for it before the rates are known.
        """
        highest: float = self.budget  # type: ignore[attr-defined]  # an option of most policies
        return highest

    def counts(self, rate: Tensor, spans: Tensor) -> tuple[Tensor, Tensor | None]:
        """The numbers of vision tokens to keep, int64: per image (B, m) and per row (B,).

        rate (B,) float64, spans (B, N) int64. The number per row is None where it is the sum of
        the numbers per image. `round_to` is not applied.
        """
        sizes = steps.image_sizes(spans)
        quota = sizes.clamp(max=self.min_tokens)
        if self.scope == "image":
            return torch.maximum(quota, steps.share(rate, sizes)), None
        whole = steps.share(rate, sizes.sum(-1, keepdim=True))[:, 0]
        return quota, torch.maximum(whole, quota.sum(-1))

    def rounded_counts(
        self, rate: Tensor, spans: Tensor, round_to: int
    ) -> tuple[Tensor, Tensor | None]:
        """As `counts`, with more tokens per row until a multiple of `round_to` is dropped."""
        quota, total = self.counts(rate, spans)
        if round_to == 1:
            return quota, total
        return quota, steps.round_up(quota.sum(-1) if total is None else total, spans, round_to)


class SequencePolicy(Policy):
    """Base class of policies that remove tokens from the hidden states, for all later layers.

    The policy scores tokens at the last layer that computes all of them. It sees that layer as a
    layer with one KV head, because all heads of a later layer lose the same tokens. A
    `HiddenPolicy` reads the hidden states before a layer instead.
    """

    @property
    def kind(self) -> Kind:
        """Always "sequence"."""
        return "sequence"

    def look(self, view: LayerView) -> Look:
        """Score every column, and say which share of the vision tokens stays."""
        raise NotImplementedError

    def plan(self, view: LayerView) -> KeepPlan:
        """The columns that stay: all text, and the best vision tokens in one ranking per row."""
        look = self.look(view)
        sizes = steps.image_sizes(look.spans)
        total = steps.share(look.rate, sizes.sum(-1, keepdim=True))[:, 0]
        return keep_best(look, look.rate, torch.zeros_like(sizes), total)

    def leave_at(self, layers: int) -> int:
        """The index of the first layer that does not compute the dropped tokens, 0 to `layers`.

        Raises InputError for options that do not fit a decoder with this number of layers.
        """
        raise NotImplementedError

    def scores_layer(self, layer: int, layers: int) -> bool:
        """The last layer that sees all tokens."""
        return layer == self.leave_at(layers) - 1

    def check(self, layers: int) -> None:
        """Raise the InputError of `leave_at`."""
        self.leave_at(layers)


def keep_best(
    look: Look,
    rate: Tensor,
    quota: Tensor,
    total: Tensor | None,
    extent: tuple[int, int] | None = None,
) -> KeepPlan:
    """Keep all text, the best `quota` tokens of each image, and the best others up to `total`.

    quota (B, m) int64 per image, total (B,) int64 per row or None. rate (B,) float64 is the rate
    that the plan reports. extent: as in `pack`.
    """
    keep = steps.select(look.scores, look.spans, quota, total)
    return pack(keep, look.gamma, rate, look.classes, extent)


def plan_views(policy: Policy, views: Mapping[int, LayerView]) -> dict[int, KeepPlan]:
    """The plans of a policy that prunes the cache. views, and the result: by layer index."""
    if isinstance(policy, CachePolicy) and policy.kind == "layers":
        plans = policy.plan_all([policy.look(view) for view in views.values()])
        return dict(zip(views, plans, strict=True))
    return {index: policy.plan(view) for index, view in views.items()}


def flat_look(view: LayerView, scores: Tensor, rate: float) -> Look:
    """A look whose rate does not depend on the layer's attention. scores (B, Hkv, N) float32."""
    gamma = view.over_ranks(steps.vision_attention(view.probs, view.spans))
    asked = torch.full_like(gamma, rate, dtype=torch.float64).masked_fill(gamma.isnan(), torch.nan)
    classes = torch.full_like(gamma, -1, dtype=torch.int64)
    return Look(scores, view.spans, asked, gamma, classes)


def check_early(layer: int, keep: float | None, budget: float | None) -> None:
    """Raise InputError, naming the option, for options that `layer_within` cannot take."""
    check_count("layer", layer, 1)
    for name, value in (("keep", keep), ("budget", budget)):
        if value is not None:
            check_share(name, value)
    if keep is not None and budget is not None:
        raise InputError("budget and keep say the same thing: give one of them")


def layer_within(layer: int, budget: float | None, layers: int) -> int:
    """`layer`, if it is in a decoder of `layers` layers and a budget can be met; else InputError.

    All layers before `layer` hold every token, which is the least budget.
    """
    if layer >= layers:
        raise InputError(f"layer must be below {layers}, the decoder's layers, got {layer}")
    if budget is not None and budget < layer / layers - 1e-9:
        raise InputError(
            f"budget must be at least layer / layers = {layer} / {layers}, got {budget}: earlier "
            "layers keep everything; take a smaller layer"
        )
    return layer


def share_after(layer: int, keep: float | None, budget: float | None, layers: int) -> float:
    """The share of the tokens from `layer` on: `keep`, or what makes `budget` over all layers."""
    if budget is None:
        return 0.5 if keep is None else keep
    return max(budget * layers - layer, 0.0) / (layers - layer)
