"""What lives while a layer is pruned: the layer in full, what it keeps, and small blocks.

Blocks are made small here, so that short prompts stand for long ones.
"""

from typing import Any

import pytest
import torch
from transformers import Qwen2Config

import plphp
from live import Live
from plphp import _blocks
from plphp.attention import scoring
from plphp.bench import caches
from plphp.bench.shapes import Shape, build
from plphp.cache import KVStore, allocated
from plphp.hf.layer import layer_tensors
from plphp.hf.shared_prefill import adopt_view
from plphp.policy.view import keep_in_every_head, pack

SHAPE = Shape("test", Qwen2Config, 3, 512, 4, 2, 64, 64)
COLUMNS = 8192


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "BLOCK", 2**14)
    monkeypatch.setattr(scoring, "BLOCK", 128)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SHAPE, torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("plphp", {}),
        ("novelty", {}),
        ("snapkv", {}),
        ("novelty", {"kv_bits": 4}),
        ("plphp", {"kv_bits": 2}),
        ("plphp", {"kv_bits": 4, "kv_text": True}),
        ("novelty", {"recall": "host"}),
        ("novelty", {"recall": "int4"}),
        ("plphp", {"recall": "int2"}),
    ],
    ids=str,
)
def test_pruning_a_layer_takes_little_more_than_what_it_keeps(
    model: Any, policy: str, options: dict[str, Any]
) -> None:
    setting = caches.Setting(SHAPE, COLUMNS, 1, 4, torch.bfloat16, "cpu")
    with plphp.prune(model, policy, vision_mask=setting.spans(), **options) as pruning:
        layer = plphp.PrunedCache(model).layers[1]
        view = caches.view(setting, 1, pruning.policy.window)
        assert view.keys is not None
        full = 2 * view.keys.nbytes
        with torch.inference_mode(), Live() as live:
            recalls = layer.shared.recall is not None
            adopt_view(layer, view, None if recalls else pruning.policy.plan(view))
    kept = allocated(layer_tensors(layer))
    kept += 0 if layer.parked is None else allocated(layer.parked.parked())
    index = 0.16 if options.get("recall") == "host" else 0.0  # the fit of every key, in float32
    assert live.peak - kept < (0.12 + index) * full, live.largest


@pytest.mark.parametrize("options", [{}, {"kv_bits": 4}], ids=str)
def test_one_layer_at_a_time_is_there_in_full(model: Any, options: dict[str, Any]) -> None:
    """The caches of `plphp bench` and of dev/studies/largest_context.py."""
    setting = caches.Setting(SHAPE, COLUMNS, 1, 4, torch.bfloat16, "cpu")
    with plphp.prune(model, vision_mask=setting.spans(), **options), torch.inference_mode():
        with Live() as live:
            cache = caches.pruned(model, setting, caches.Schedule((0.4,)))
        kept = allocated(x for layer in cache.layers for x in layer_tensors(layer))
    full = setting.shape.kv_bytes(COLUMNS, 2) // SHAPE.layers
    assert live.peak < kept + 1.3 * full, live.largest
    assert live.now < 1.1 * kept


@pytest.mark.parametrize("bits", [4, 2])
def test_a_later_turn_decodes_into_the_store(model: Any, bits: int) -> None:
    """Beside the decoded tokens of the layer, which have room for the prompt, are only blocks."""
    setting = caches.Setting(SHAPE, COLUMNS, 1, 4, torch.bfloat16, "cpu")
    with plphp.prune(model, vision_mask=setting.spans(), kv_bits=bits), torch.inference_mode():
        cache = caches.pruned(model, setting, caches.Schedule((0.4,)))
        layer = cache.layers[0]
        assert isinstance(layer.store, KVStore) and layer.codes is not None
        with Live() as live:
            store = layer.codes.decoded_before(layer.store, 100)
            held = allocated(store.tensors())
            store.append(*(torch.empty(1, 2, 100, 128, dtype=torch.bfloat16) for _ in "kv"))
            assert allocated(store.tensors()) == held, "it has grown"
    assert live.peak < 1.15 * held, live.largest


def test_scores_of_many_queries_exist_twice_at_most() -> None:
    q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 2048, 16)
    visible = torch.ones(1, 32, 2048, dtype=torch.bool)
    with torch.inference_mode(), Live() as live:
        scores = scoring.window_probabilities(q, k, visible, 0.25)
    assert live.peak < 2.3 * scores.nbytes, live.largest


def test_a_plan_holds_the_kept_columns_only() -> None:
    """All plans of a prompt wait for the last layer, where the report is made."""
    keep = (torch.arange(1000) % 4 == 0)[None]
    one = torch.zeros(1)
    for plan in (keep_in_every_head(keep, 2), pack(keep[:, None], one, one, one.long())):
        assert plan.columns.untyped_storage().nbytes() == plan.columns.nbytes
