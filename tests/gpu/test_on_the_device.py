"""What only a device can show: its selections, who waits for whom, graphs, and freed memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_device import DEVICE, ON_GPU, allocated, error, no_waiting, real, replayed
from torch import Tensor

import plphp
from plphp.bench.caches import Schedule, Setting, pruned, pruned_static, view
from plphp.bench.shapes import Shape, build, shape_of
from plphp.hf import compat
from plphp.policy import POLICIES, CachePolicy, plan_views
from plphp.recall import host, lanes
from tiny import FAMILIES, ROWS

pytestmark = pytest.mark.gpu
METHODS = [name for name in POLICIES if plphp.policy(name).prunes_cache]
# Sums of these methods are exact, because attention is given in steps of 2**-20.
EXACT = ("plphp", "plphp-flat", "plphp-global", "plphp-shared", "uniform", "random", "full")


def setting(
    context: int, batch: int, dtype: torch.dtype = torch.float32, layers: int = 3
) -> Setting:
    return Setting(shape_of("tiny", layers), context, batch, 3, dtype, DEVICE)


def moved(value: Any, device: str) -> Any:
    """A view of a layer with its tensors on a device."""
    tensors = {k: v.to(device) for k, v in vars(value).items() if isinstance(v, Tensor)}
    return replace(value, **tensors)


@pytest.mark.parametrize("name", METHODS)
def test_selections_are_those_of_the_cpu(name: str) -> None:
    """From the same attention, with many ties, of which the earlier token wins."""
    policy = plphp.policy(name)
    assert isinstance(policy, CachePolicy)
    seen = {}
    torch.manual_seed(3)
    wide = real(Setting(shape_of("qwen2-vl-7b", 2), 16384, 4, 5, torch.bfloat16, DEVICE),
                setting(120, 2))  # fmt: skip
    for layer in range(2):
        found = view(wide, layer, policy.window)
        assert found.window is not None
        steps = (found.window * 2**20).round() / 2**20
        seen[layer] = replace(found, probs=steps[:, :, -1], window=steps)
    here = plan_views(policy, seen)
    there = plan_views(policy, {layer: moved(one, "cpu") for layer, one in seen.items()})
    for layer, plan in here.items():
        wanted = there[layer].columns
        assert torch.equal(plan.lengths.cpu(), there[layer].lengths)
        same = (plan.columns.cpu() == wanted).float().mean()
        assert same == 1 if name in EXACT else same > 0.99


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "idefics2"])
def test_a_model_keeps_and_says_what_it_does_on_a_cpu(family: str) -> None:
    """The whole way of a prompt: positions kept, bytes, and greedy tokens, in float32."""
    chosen, found = FAMILIES[family], []
    for device in dict.fromkeys(("cpu", DEVICE)):
        model = chosen.build(seed=0).to(device)
        made, _ = chosen.make_inputs(model, ROWS["batch"], seed=1)
        inputs = {k: v.to(device) for k, v in made.items()}
        with plphp.prune(model) as pruning:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert pruning.report is not None
        found.append((out.cpu(), pruning.report))
    (tokens, report), (there, other) = found[0], found[-1]
    assert report.kv_bytes == other.kv_bytes
    for mine, theirs in zip(report.layers, other.layers, strict=True):
        assert (mine.kept == theirs.kept).float().mean() > 0.98
    assert (tokens == there).float().mean() > 0.98


def step_of(model: Any, cache: Any, sizes: Setting, place: Tensor) -> Any:
    token = torch.full((sizes.batch, 1), 7, device=DEVICE)
    return model(
        input_ids=token, position_ids=place, use_cache=True, **{compat.CACHE: cache}
    ).logits


def test_a_host_that_waits_is_noticed() -> None:
    numbers = torch.ones(3, device=DEVICE)
    for wait in (lambda: numbers.sum().item(), lambda: numbers.nonzero()):
        with pytest.raises((AssertionError, RuntimeError)), no_waiting():
            wait()


@pytest.mark.parametrize("recall", [None, plphp.Recall("int4", 0.5)])
def test_no_decoding_step_waits_for_the_device(recall: plphp.Recall | None) -> None:
    sizes = setting(real(4096, 64), 2)
    model, policy = build(sizes.shape, sizes.dtype, DEVICE), Schedule((0.4,))
    with plphp.prune(model, policy, recall=recall, vision_mask=sizes.spans()), torch.no_grad():
        ids = torch.ones(2, sizes.context, dtype=torch.int64, device=DEVICE)
        cache = getattr(model(input_ids=ids, use_cache=True), compat.CACHE)
        for step in range(real(4, 3)):
            place = torch.full((2, 1), sizes.context + step, device=DEVICE)
            if step < 2:  # kernels are compiled, buffers grow
                step_of(model, cache, sizes, place)
                continue
            with no_waiting():
                step_of(model, cache, sizes, place)


def test_a_graph_is_replayed_for_prompt_after_prompt() -> None:
    """One captured step gives, for other prompts in the same buffers, what calling it gives."""
    sizes, policy, tokens = setting(real(2048, 64), 2), Schedule((0.4,)), real(3, 1)
    model = build(sizes.shape, sizes.dtype, DEVICE)
    make = pruned_static(model, sizes, policy, 16)
    place = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with plphp.prune(model, policy, vision_mask=sizes.spans()), torch.inference_mode():
        cache = make()
        logits = torch.zeros(2, 1, sizes.shape.vocabulary, device=DEVICE)
        replay = replayed(lambda: logits.copy_(step_of(model, cache, sizes, place)))
        first = []
        for seed in range(real(3, 2)):
            outs = []
            for step in (replay, lambda: logits.copy_(step_of(model, cache, sizes, place))):
                torch.manual_seed(seed)
                assert make() is cache
                for token in range(tokens):
                    place.fill_(sizes.context + token)
                    step()
                    outs.append(logits.clone())
            for mine, wanted in zip(outs[:tokens], outs[tokens:], strict=True):
                assert error(mine, wanted) < 1e-5
            first.append(outs[tokens - 1])
    assert error(first[0], first[1]) > 1e-3, "the prompts do not differ"


def test_a_prefill_frees_what_it_drops() -> None:
    """After a prompt the device holds what the cache counts, and after the cache nothing."""
    sizes = setting(real(8192, 320), 2, torch.bfloat16, layers=real(6, 3))
    model = build(sizes.shape, sizes.dtype, DEVICE)
    ids = torch.ones(2, sizes.context, dtype=torch.int64, device=DEVICE)
    with plphp.prune(model, Schedule((0.2,)), vision_mask=sizes.spans()), torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)  # a first call allocates more
        before = allocated()
        cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), compat.CACHE)
        held = allocated() - before
        bytes_of_all = sizes.shape.kv_bytes(2 * sizes.context, 2)
        assert cache.kv_bytes() < 0.4 * bytes_of_all
        # The spans, the shift and the report are the rest.
        assert cache.kv_bytes() <= held < cache.kv_bytes() + 0.05 * bytes_of_all
        del cache
    assert allocated() - before < 0.01 * bytes_of_all


def test_the_peak_of_a_prefill_is_no_whole_cache() -> None:
    if not ON_GPU:
        pytest.skip("a CPU does not tell the peak of its tensors")
    sizes = Setting(replace(shape_of("tiny", None), layers=24), 32768, 2, 3, torch.bfloat16, DEVICE)
    model = build(sizes.shape, sizes.dtype, DEVICE)
    ids = torch.ones(2, sizes.context, dtype=torch.int64, device=DEVICE)
    peaks = []
    for rate in (1.0, 0.2):
        with plphp.prune(model, Schedule((rate,)), vision_mask=sizes.spans()), torch.no_grad():
            before = allocated()
            torch.cuda.reset_peak_memory_stats()
            cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), compat.CACHE)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del cache
    saved = 0.7 * sizes.shape.kv_bytes(2 * sizes.context, 2)
    assert peaks[0] - peaks[1] > 0.8 * saved


def test_fetches_beside_the_scoring_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps with the device's lane and in one stream: the same tokens, the same outputs."""
    heads = real((3584, 28, 4), (896, 14, 2))
    shape = Shape("heads", None, 1, *heads, 1, 1)
    sizes = Setting(shape, real(16384, 150), 4, 2, torch.bfloat16, DEVICE)
    found = []
    for lane in (lanes.lane_of(torch.device(DEVICE)), lanes.InOrder()):
        monkeypatch.setattr(host, "lane_of", lambda device, lane=lane: lane)
        found.append(asked(sizes, real(60, 4)))
    assert found[0][1] == found[1][1] and sum(found[0][1]) > 0
    for mine, wanted in zip(found[0][0], found[1][0], strict=True):
        assert error(mine, wanted) < 1e-3


def asked(sizes: Setting, steps: int) -> tuple[list[Tensor], list[int]]:
    """The outputs of attention with the home host, and how many tokens each step fetched."""
    from plphp.cache import KVStore
    from plphp.recall import park

    torch.manual_seed(0)
    store = KVStore(*sizes.pair(sizes.context))
    spans = sizes.spans()
    scores = torch.rand(sizes.batch, sizes.shape.kv_heads, sizes.context, device=DEVICE)
    none = torch.zeros(sizes.batch, device=DEVICE)
    home = park(store, plphp.policy.Look(scores, spans, none.double(), none, none.long()),
                plphp.Recall("host", 0.2))  # fmt: skip
    assert home.plan is not None
    store.compact(home.plan)
    outs = []
    for _ in range(steps):
        store.append(*sizes.pair(1))
        size = (sizes.batch, sizes.shape.heads, 1, sizes.shape.head_dim)
        query = torch.randn(size, dtype=sizes.dtype, device=DEVICE)
        outs.append(home.attend(query, store, 0.09, None).clone())
    return outs, home.fetched


def test_the_home_host_is_that_of_the_cpu() -> None:
    """The parked tokens are read exactly: attention equals that of a CPU with the same home."""
    sizes = Setting(Shape("heads", None, 1, 896, 7, 1, 1, 1), real(6000, 150), 2, 2, torch.float32,
                    "cpu")  # fmt: skip
    from plphp.cache import KVStore
    from plphp.recall import park

    outs = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        store = KVStore(*sizes.pair(sizes.context))
        scores = torch.rand(2, 1, sizes.context)
        none = torch.zeros(2)
        look = plphp.policy.Look(scores, sizes.spans(), none.double(), none, none.long())
        home = park(store, look, plphp.Recall("host", 0.3))
        assert home.plan is not None
        store.compact(home.plan)
        store.to(torch.device(device))
        home.move(torch.device(device))
        for _ in range(3):
            query = torch.randn(2, 7, 1, 128)
            out = home.attend(query.to(device), store, 0.09, None)
        outs.append(out.cpu())
    # Scores that are equal within rounding may choose another token.
    assert error(outs[1], outs[0]) < 1e-2


def test_buffers_of_pruned_caches_are_on_the_device() -> None:
    sizes, policy = setting(real(1024, 96), 1), Schedule((0.4,))
    model = build(sizes.shape, sizes.dtype, DEVICE)
    with plphp.prune(model, policy, vision_mask=sizes.spans()):
        cache = pruned(model, sizes, policy)
    for _, layer in cache.pruned_layers():
        assert all(x.device.type == DEVICE for x in layer.store.tensors())
