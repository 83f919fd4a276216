"""How much attention decoding pays to chosen slots of the cache, seen beside the model's own.

Set as `cache.shared.watch` once the prompt is read, for conversations of one row.
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
    """Sums up, layer by layer, what every new token reads from groups of slots.

    groups: layer -> (n, Hkv, S) bool, which of the first S slots belong to each group; with recall
        the one group is the vision tokens that were read, of a single token with `home="host"`
    seen: layer -> (n, T) float32, mean over heads of the attention to each group, 0 to 1
    """

    groups: Mapping[int, Tensor]
    seen: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, module: nn.Module, query: Tensor, layer: PrunedLayer, kwargs: dict[str, Any]
    ) -> None:
        """query (1, H, T, D) of T new columns, whose keys the layer holds already."""
        index, store = int(module.layer_idx), layer.store  # type: ignore[arg-type]
        if index not in self.groups or store is None:
            return
        if layer.parked is None:
            held, visible, own = store.held()[0], store.visible(query.shape[2]), self.groups[index]
        else:
            assert isinstance(store, KVStore)
            held, visible, own = layer.parked.looked_at(store, query.shape[2])
        keys = held[0]  # (Hkv, S, D): KV heads take the place of rows
        grouped = query[0].reshape(keys.shape[0], -1, *query.shape[2:])
        if visible is None:
            visible = torch.ones(1, device=keys.device, dtype=torch.bool)
        shape = keys.shape[0], query.shape[2], keys.shape[1]
        scale, softcap = compat.scale(query, kwargs), compat.softcap(module.config, kwargs)
        seen = visible.expand(1, *shape)[0]
        probs = window_probabilities(grouped, keys[:, None], seen, scale, softcap)
        probs, groups = probs[..., : own.shape[-1]], own.to(probs)
        found = torch.einsum("hgts,nhs->nt", probs, groups) / query.shape[1]
        before = self.seen.get(index)
        self.seen[index] = found.cpu() if before is None else torch.cat([before, found.cpu()], -1)


def kept_slots(layer: LayerReport, seen: Seen) -> Tensor:
    """(1, Hkv, S) bool: which slots of a pruned layer hold vision tokens. One row, no padding."""
    kept, _ = _masks(layer, seen)
    text = (seen.spans[0] == 0).expand_as(kept)
    held = kept | text
    return torch.stack([k[h] for k, h in zip(kept, held, strict=True)])[None]


def kept_and_dropped(layer: LayerReport, seen: Seen) -> Tensor:
    """(2, Hkv, N) bool: the columns of a full cache that a layer kept, and that it dropped."""
    return torch.stack(_masks(layer, seen))


def _masks(layer: LayerReport, seen: Seen) -> tuple[Tensor, Tensor]:
    vision = seen.spans[0] > 0
    kept = torch.stack([torch.isin(seen.positions[0], head) & vision for head in layer.kept[0]])
    return kept, vision & ~kept
