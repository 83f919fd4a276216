"""The bytes that a run with a prompt takes, from the config of its model alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from plphp.bench.machine import resident_bytes
from plphp.cli import options as o
from plphp.cli.bits import Bits
from plphp.cli.diagnosis import Examined, look_at, on_meta
from plphp.errors import InputError
from plphp.hf import compat
from plphp.inputs import load_config, make_inputs
from plphp.inputs.formats import number_format
from plphp.inputs.models import without_weights
from plphp.inputs.shell import shell
from plphp.models import vision_spans
from plphp.policy import Policy, cache_stage
from plphp.recall import KeptBits
from plphp.weights import BITS, round_weights, weight_bytes

SPARE = 1.05  # what allocators and libraries add
SLACK = 17 / 16  # free slots after those in use
# While a layer is pruned it exists in full, beside what it keeps of it. What exceeds this in blocks
# and in scores of one query is less than the rest.
WHOLE = 2
NOTES = 12  # bytes for each kept token of a KV head, in the plan and in the report
INDEX = 0.07  # bytes of the index of recall's home "host", over numbers of keys and values
COPIES = 64 << 20  # bytes of the copies in float32 with which weights and attention are computed


@dataclass(frozen=True)
class Needed:
    """Bytes of a run.

    process: of the process before the model is loaded
    weights: of the weights
    loading: of the largest weight in full, which exists besides the rounded ones for a moment
    cache: of keys and values at the end of the answer
    reading: of the prompt while it is read, besides the cache; an estimate
    """

    process: int
    weights: int
    loading: int
    cache: int
    reading: int

    @property
    def peak(self) -> int:
        """The most bytes at a time."""
        return int(
            self.process + SPARE * (self.weights + max(self.loading, self.cache + self.reading))
        )

    def __str__(self) -> str:
        return (
            f"about {shown(self.peak)}: {shown(self.weights)} of weights, {shown(self.cache)} of "
            f"keys and values, {shown(self.reading)} while the prompt is read, "
            f"{shown(self.process)} of the process"
        )


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model and of one prompt.

    seen: the bytes of the cache for the prompt and its answer
    text, vision: tokens, those of the answer count as text
    weights: bytes for each word of `--weights`, and for None
    largest: bytes of the largest weight in full
    reading: bytes of the hidden states while the prompt is read
    heads: query heads of a layer
    dim, itemsize: D of a head, and bytes of a number
    """

    seen: Examined
    text: int
    vision: int
    weights: dict[str | None, int]
    largest: int
    reading: int
    heads: int
    dim: int
    itemsize: int

    @classmethod
    def of(
        cls,
        source: o.Source,
        images: Sequence[str],
        videos: Sequence[str],
        prompt: str,
        new_tokens: int,
    ) -> Sizes:
        """Read the images with the model's processor, and build the model on the meta device.

        Raises InputError for a file, a config or a model that cannot be used.
        """
        name, trust = source.model, source.trust_remote_code
        config = load_config(name, trust)
        text_config = config.get_text_config(decoder=True)
        kind, _ = number_format(name, config, source.dtype)
        inputs = make_inputs(without_weights(name, kind, trust, config), images, prompt, videos)
        length = inputs["input_ids"].shape[1] + new_tokens
        vision = int((vision_spans(config, **inputs) > 0).sum()) if images or videos else 0
        full = on_meta(name, lambda: shell(copy.deepcopy(config), trust, kind))
        seen = on_meta(name, lambda: look_at(full, length))
        if seen.bytes is None or seen.reason:
            raise InputError(f"--memory: {seen.reason or seen.unmeasured}")

        weights: dict[str | None, int] = {None: weight_bytes(full)}
        for word, bits in BITS.items():
            model = copy.deepcopy(full)
            round_weights(model, bits)
            weights[word] = weight_bytes(model)
        return cls(
            seen,
            length - vision,
            vision,
            weights,
            max(tensor.nbytes for tensor in full.parameters()),
            _reading(full, length, inputs, config),
            _heads(text_config),
            compat.head_dim(text_config),
            kind.itemsize,
        )

    def needed(self, method: o.Method, bits: Bits, weights: str | None) -> Needed | None:
        """The bytes of a run with these options; None for codes that the budget does not allow."""
        recall, policy = method.parked(), method.chosen()
        if recall is not None:
            share = most = recall.budget
            if share < recall.least_share(self.dim, self.itemsize):
                return None
            if recall.bits is None:  # the home is in main memory too, where all tokens are
                share += 1 + INDEX / self.itemsize
        else:
            most = most_kept(policy)
            share = most * SLACK
            if bits.kv_bits is not None:
                codes = KeptBits(bits.kv_bits, bits.kv_text)
                share = most * codes.share(self.dim, self.itemsize)
        assert self.seen.bytes is not None
        pruned = set(self.seen.pruned_at(self.text + self.vision))
        cache = whole = 0.0
        for index, layer in enumerate(self.seen.bytes):
            kept = layer.token * (self.text * SLACK + self.vision * share)
            cache += layer.other + (kept if index in pruned else layer.kv * SLACK)
            whole += layer.kv
        stage = cache_stage(policy)
        waits = recall is None and stage is not None and stage.kind == "layers"
        if not waits:
            whole = WHOLE * max(layer.kv for layer in self.seen.bytes)
        tokens = sum(self.seen.bytes[i].token for i in pruned) / (2 * self.dim * self.itemsize)
        notes = NOTES * tokens * self.vision * most
        # The scores of the last queries, and once more while they are computed.
        columns = self.text + self.vision
        scores = 2 * 4 * self.heads * min(policy.window, columns) * columns
        return Needed(
            resident_bytes("cpu") or 0,
            self.weights[weights],
            self.largest if weights else 0,
            int(cache),
            self.reading + int(whole + notes + scores),
        )


def most_kept(policy: Policy) -> float:
    """The largest share of the vision tokens that a policy keeps in a layer; 1 if unknown."""
    budget = getattr(policy, "budget", None)
    if isinstance(budget, int | float):
        return float(budget)
    r, delta = getattr(policy, "r", None), getattr(policy, "delta_r", 0.0)
    return 1.0 if r is None else min(r + delta, 1.0)


def _reading(model: Any, length: int, inputs: dict[str, Tensor], config: Any) -> int:
    """Bytes of hidden states and of pixels while a prompt of this length is read.

    The decoder and the vision tower run one after the other. In each, the widest linear layer has
    its input, its output and two more tensors of that size, and beside it are hidden states in the
    model's dtype and in float32.
    """
    decoder, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    rows = {True: length, False: _patches(inputs, config)}
    most, itemsize = 0, model.dtype.itemsize
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            wide, narrow = sorted((module.in_features, module.out_features), reverse=True)
            each = itemsize * (4 * wide + 6 * narrow) + 2 * 4 * narrow
            most = max(most, rows[module in decoder] * each)
    pixels = sum(t.nbytes for t in inputs.values())
    return most + pixels + COPIES


def _heads(text_config: Any) -> int:
    """The query heads of a layer, the most if layers differ."""
    heads = compat.config_value(text_config, "num_attention_heads")
    return max(heads) if isinstance(heads, list) else int(heads or 0)


def _patches(inputs: dict[str, Tensor], config: Any) -> int:
    """Tokens of the vision tower: rows of patches, or pictures divided into patches."""
    side = getattr(getattr(config, "vision_config", None), "patch_size", None)
    area = 3 * (side if isinstance(side, int) else 14) ** 2
    pixels = [t for name, t in inputs.items() if name.startswith("pixel_values")]
    return sum(len(t) if t.dim() == 2 else t.numel() // area for t in pixels)


def shown(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
