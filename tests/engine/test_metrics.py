"""The counters on /metrics, and how a pruned prompt is counted."""

from __future__ import annotations

import pytest
import serving
from prometheus_client import REGISTRY

from plphp.paged.prompts import Choice
from plphp.policy import LAYER_CLASSES
from plphp.vllm.metrics import CLASSES, Counts


def test_every_metric_exists_before_its_first_event() -> None:
    with serving.engine(disable_log_stats=False):
        found = {
            (sample.name, sample.labels.get("layer_class") or sample.labels.get("reason"))
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name.startswith("vllm:plphp") and sample.name.endswith("_total")
        }
    tokens = {f"vllm:plphp_vision_tokens{kind}_total" for kind in ("", "_kept")}
    single = {f"vllm:plphp_{kind}_total" for kind in ("prompts_pruned", "blocks_freed")}
    reasons = ("bad options", "beam search", "streamed input")
    refused = {("vllm:plphp_prompts_refused_total", reason) for reason in reasons}
    expected = {(name, layer_class) for name in tokens for layer_class in CLASSES}
    expected |= {(name, None) for name in (*single, "vllm:plphp_prompts_unpruned_total")} | refused
    assert found == expected


@pytest.mark.parametrize(
    ("index", "name"), [*enumerate(LAYER_CLASSES), (-1, "no class")], ids=[*LAYER_CLASSES, "none"]
)
def test_layers_are_counted_under_their_class(index: int, name: str) -> None:
    """Methods without classes, such as SnapKV, count under none of PLPHP's."""
    counts = Counts()
    counts.add(Choice(freed=(3,), kept=(5, 7), rates=(0.5, 0.7), classes=(index,) * 2), 10, 3)
    assert counts.data == {"prompts": 1, "blocks": 3, f"seen {name}": 20, f"kept {name}": 12}
    assert counts.reduce()[f"{name} kept"] == 0.6
