"""Measures how much attention each decoded token pays to chosen slots of the cache.

The probe is set as `cache.shared.watch` after the prefill. It computes the attention
probabilities a second time, next to the model's own attention, for conversations of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plphp.attention import window_probabilities
from plphp.cache import KVStore
from plphp.hf import compat
from plphp.hf.layer import PrunedLayer
from plphp.report import LayerReport, Seen


@dataclass
class AttentionProbe:
    """Measures, in every layer, the attention of each new token to groups of slots.

    groups: layer -> (n, Hkv, S) bool, which of the first S slots belong to each of n groups. With
        recall or kept codes these masks are not used: the one group is the vision tokens that the
        step reads, and with `home="host"` only steps of a single token can be measured
    seen: layer -> (n, T) float32 on the CPU, mean over the query heads of the attention to each
        group, 0 to 1, for all T tokens since the probe was set
    """

    groups: Mapping[int, Tensor]
    seen: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, query: Tensor, layer: PrunedLayer, kwargs: dict[str, Any]
    ) -> None:
        """Add the attention of query (1, H, T, D), T new columns whose keys the layer holds."""
        index, store = int(module.layer_idx), layer.store  # type: ignore[arg-type]
        if index not in self.groups or store is None:
            return
        coded = layer.codes if layer.parked is None else layer.parked
        if coded is None:
            stored, visible = store.held()[0], store.visible(query.shape[2])
            groups = self.groups[index]
        else:
            assert isinstance(store, KVStore)
            stored, visible, groups = coded.looked_at(store, query.shape[2])
        keys = stored[0]  # (Hkv, S, D): `window_probabilities` takes the KV heads as rows
        grouped = query[0].reshape(keys.shape[0], -1, *query.shape[2:])
        if visible is None:
            visible = torch.ones(1, device=keys.device, dtype=torch.bool)
        shape = keys.shape[0], query.shape[2], keys.shape[1]
        scale, softcap = compat.scale(query, kwargs), compat.softcap(module.config, kwargs)
        visible = visible.expand(1, *shape)[0]
        probs = window_probabilities(grouped, keys[:, None], visible, scale, softcap)
        probs, groups = probs[..., : groups.shape[-1]], groups.to(probs)
        new = (torch.einsum("hgts,nhs->nt", probs, groups) / query.shape[1]).cpu()
        before = self.seen.get(index)
        self.seen[index] = new if before is None else torch.cat([before, new], -1)


def kept_slots(layer: LayerReport, seen: Seen) -> Tensor:
    """(1, Hkv, S) bool: which slots of a pruned layer hold vision tokens.

    layer, seen: of a report of one row without padding
    """
    kept, _ = _masks(layer, seen)
    text = (seen.spans[0] == 0).expand_as(kept)
    stays = kept | text
    # Slots hold the columns that stay, in ascending order.
    return torch.stack([head[mask] for head, mask in zip(kept, stays, strict=True)])[None]


def kept_and_dropped(layer: LayerReport, seen: Seen, entered: Tensor | None = None) -> Tensor:
    """(3, Hkv, N) bool: the columns of a full cache that a layer kept, those that it has not, and
    of the latter those that never entered it.

    entered: (B, K) int64, as `Report.entered` returns it
    """
    kept, dropped = _masks(layer, seen)
    gone = torch.zeros_like(dropped)
    if entered is not None:
        gone = dropped & ~torch.isin(seen.positions[0], entered[0])
    return torch.stack([kept, dropped, gone])


def _masks(layer: LayerReport, seen: Seen) -> tuple[Tensor, Tensor]:
    """Two masks (Hkv, N) bool: the vision tokens that each KV head kept, and that it dropped."""
    vision = seen.spans[0] > 0
    kept = torch.stack([torch.isin(seen.positions[0], head) & vision for head in layer.kept[0]])
    return kept, vision & ~kept
