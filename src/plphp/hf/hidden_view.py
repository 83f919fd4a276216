"""What a method that chooses from hidden states is shown of a prompt."""

from __future__ import annotations

from torch import Tensor

from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.prompt import Prefill, Prompt
from plphp.hf.tower import stays_of
from plphp.models import frames_of, processor_inputs
from plphp.policy import HiddenPolicy, HiddenView


def hidden_view(
    pruning: Pruning, policy: HiddenPolicy, cache: PrunedCache, prefill: Prefill, hidden: Tensor
) -> HiddenView:
    """The view of the hidden states (B, N, E) before a layer."""
    spans = prefill.where.spans[:, -prefill.prompt.length :].to(hidden.device)
    return HiddenView(
        hidden=hidden,
        spans=spans,
        frames=_frames(prefill.prompt, spans) if policy.reads_frames else None,
        layers=cache.shared.depth,
        key_sizes=prefill.key_sizes,
        stays=stays_of(pruning, spans, hidden) if policy.reads_tower else None,
    )


def _frames(prompt: Prompt, spans: Tensor) -> Tensor:
    """The frame (B, N) int64 of each vision token; beams repeat the rows of the prompt."""
    source = prompt.source
    ids, types = (
        None if tensor is None else tensor[:, -prompt.length :]
        for tensor in map(source.get, ("input_ids", "mm_token_type_ids"))
    )
    repeats = _repeats(prompt, spans)
    own = spans[::repeats]
    found = frames_of(prompt.config, own, ids, types, processor_inputs(source))
    return found.repeat_interleave(repeats, dim=0)


def _repeats(prompt: Prompt, spans: Tensor) -> int:
    """How many rows of the model's (B, N) spans each row of the prompt became."""
    names = ("input_ids", "mm_token_type_ids")
    given = next((prompt.source[n] for n in names if prompt.source.get(n) is not None), spans)
    return len(spans) // len(given)
