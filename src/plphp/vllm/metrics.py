"""The plugin's counters for /metrics and for the statistics line in vLLM's log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from plphp.paged.prompts import Choice
from plphp.policy import LAYER_CLASSES

SEEN, KEPT, REFUSED = "seen ", "kept ", "refused "  # prefixes of counters that have a label
BAD_OPTIONS, BEAM_SEARCH, STREAMED_INPUT = "bad options", "beam search", "streamed input"
REASONS = (BAD_OPTIONS, BEAM_SEARCH, STREAMED_INPUT)  # not to prune a prompt
CLASSES = (*LAYER_CLASSES, "no class")  # the last for methods without classes, whose index is -1


@dataclass
class Counts(KVConnectorStats):
    """Counters since the last `take`. `data` maps names to numbers, which vLLM can serialize.

    prompts: prompts with images that were pruned
    unpruned: prompts with images whose request switched pruning off
    blocks: cache blocks that pruning freed
    "seen C": vision tokens of layers of class C, of `CLASSES`; "kept C": those that were kept
    "refused R": prompts that were not pruned for reason R
    """

    data: dict[str, Any] = field(default_factory=dict)

    def count(self, name: str, number: int = 1) -> None:
        self.data[name] = self.data.get(name, 0) + number

    def refuse(self, reason: str) -> None:
        """Count a prompt that cannot be pruned."""
        self.count(REFUSED + reason)

    def add(self, choice: Choice, vision: int, blocks: int) -> None:
        """Count a pruned prompt with its vision tokens and the blocks that pruning freed."""
        self.count("prompts")
        self.count("blocks", blocks)
        for kept, layer_class in zip(choice.kept, choice.classes, strict=True):
            self.count(SEEN + CLASSES[layer_class], vision)
            self.count(KEPT + CLASSES[layer_class], kept)

    def take(self) -> Counts | None:
        """Return the counters and reset them; None if all are zero."""
        if not self.data:
            return None
        taken, self.data = self.data, {}
        return Counts(taken)

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, number in other.data.items():
            self.count(name, number)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The entries of the log line "KV Transfer metrics: PLPHP prompts=12, ..."."""
        line: dict[str, int | float] = {
            "PLPHP prompts": self.data.get("prompts", 0),
            "unpruned": self.data.get("unpruned", 0),
            "blocks freed": self.data.get("blocks", 0),
        }
        for name in CLASSES:
            if seen := self.data.get(SEEN + name, 0):
                line[f"{name} kept"] = round(self.data[KEPT + name] / seen, 3)
        refused = {name: n for name, n in self.data.items() if name.startswith(REFUSED)}
        return line | refused


_SERIES = {
    "prompts": ("vllm:plphp_prompts_pruned", "Prompts whose images were pruned.", None),
    "unpruned": (
        "vllm:plphp_prompts_unpruned",
        "Prompts with images whose request switched pruning off.",
        None,
    ),
    "blocks": ("vllm:plphp_blocks_freed", "KV cache blocks that pruning freed.", None),
    SEEN: ("vllm:plphp_vision_tokens", "Vision tokens of layers, by class.", "layer_class"),
    KEPT: ("vllm:plphp_vision_tokens_kept", "Kept vision tokens, by class.", "layer_class"),
    REFUSED: ("vllm:plphp_prompts_refused", "Prompts that could not be pruned.", "reason"),
}
_LABELS = {
    SEEN: CLASSES,
    KEPT: CLASSES,
    REFUSED: REASONS,
}


class Prometheus(KVConnectorPromMetrics):
    """The counters on vLLM's /metrics. The retention of a class is its kept / its seen tokens."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.series = {
            prefix: metric_types[Counter](
                name=name,
                documentation=text,
                labelnames=labelnames + ([label] if label else []),
            )
            for prefix, (name, text, label) in _SERIES.items()
        }
        # A series that appears with its first event shows no increase for it: all start at 0.
        for engine in per_engine_labelvalues.values():
            for prefix, counter in self.series.items():
                for label in _LABELS.get(prefix, (None,)):
                    counter.labels(*engine, *([label] if label else []))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, number in transfer_stats_data.items():
            prefix = next((p for p in (SEEN, KEPT, REFUSED) if name.startswith(p)), name)
            label = name[len(prefix) :]
            self.series[prefix].labels(*engine, *([label] if label else [])).inc(number)
