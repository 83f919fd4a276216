"""Pruning in a paged cache, without an engine: a pool of blocks and a cache in plain torch."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
from plphp.paged.blocks import (
    Lockstep,
    PromptBlocks,
    fits,
    fresh_blocks,
    in_use,
    pruned_table,
)
from plphp.paged.choosing import choose_again, draft, settle
from plphp.paged.compaction import PagedLayer, with_fresh
from plphp.paged.prompts import PromptEnd, PromptPart, first_asked, spans_of
from plphp.paged.tables import BatchTables, PrunedRequest
from plphp.policy import LayerView
from plphp.policy.base import keep_best

BLOCK, LAYERS, HEADS, KV_HEADS, WIDTH = 8, 6, 4, 2, 16
POLICY = plphp.PLPHP(r=0.4, delta_r=0.3, alpha=0.55, beta=0.45)


def prompt(seed: int) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """The runs of one to three images with text around them, and the length."""
    rng, images, length = random.Random(seed), [], 3
    for image in range(1, rng.randint(1, 3) + 1):
        size = rng.randint(5, 40)
        images.append((image, length, length + size - 1))
        length += size + rng.randint(1, 4)
    return tuple(images), length


def attention(seed: int, images: Any, length: int) -> Tensor:
    """Random attention (L, H, N) whose share on vision tokens differs between the layers."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(LAYERS, HEADS, length, generator=draw)
    tilt = torch.linspace(-1.5, 1.0, LAYERS)[:, None, None]
    return (logits + tilt * (spans_of(images, length) > 0)).softmax(-1)


def views(probs: Tensor, spans: Tensor, seed: int = 0) -> list[LayerView]:
    """The inputs of a policy, one per layer, with random keys and values."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, LAYERS, 1, KV_HEADS, len(spans), WIDTH, generator=draw)
    return [
        LayerView(probs[i][None], spans[None], KV_HEADS, i, LAYERS, keys=keys[i], values=values[i])
        for i in range(LAYERS)
    ]


def whole(images: Any, length: int) -> PromptEnd:
    """A prompt that is computed in one step."""
    return PromptEnd(0, length, length, images, POLICY, None, None)


class TorchLayer(PagedLayer):
    """A layer whose cache is (blocks, block, Hkv, D) of keys and of values."""

    kv_heads, scale, softcap = KV_HEADS, 0.25, None

    def __init__(self, blocks: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.name, self.group, self.index = "layer", 0, 0
        self.cache = torch.randn(2, blocks, BLOCK, KV_HEADS, WIDTH, generator=draw)

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (part[blocks].flatten(0, 1).transpose(0, 1) for part in self.cache)
        return keys, values

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        for part, new in zip(self.cache, (keys, values), strict=True):
            part[slots // BLOCK, slots % BLOCK] = new


METHODS = {
    "plphp": POLICY,
    "plphp, per prompt": replace(POLICY, budget="global", min_tokens=2),
    "plphp-shared": replace(plphp.policy("plphp-shared"), alpha=0.55, beta=0.45),
    "plphp-flat": plphp.policy("plphp-flat"),
    "random": plphp.policy("random", budget=0.3),
    "uniform": plphp.policy("uniform"),
    "novelty": plphp.policy("novelty", budget=0.5),
    "full": plphp.policy("full"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_the_plan_of_all_layers_is_the_plan_of_each(seed: int, name: str) -> None:
    images, length = prompt(seed)
    probs, spans = attention(seed, images, length), spans_of(images, length)
    policy = METHODS[name]
    inputs = views(probs, spans, seed)
    together, end = draft(iter(inputs), policy, BLOCK, 1), whole(images, length)
    (choice,) = settle([together], [end], BLOCK, 1)
    columns = together.columns(choice, end.text)
    for layer, view in enumerate(inputs):
        look = policy.look(view)
        counts = policy.rounded_counts(look.rate, look.spans, BLOCK)
        alone = keep_best(look, look.rate, *counts)
        kept = int(alone.lengths[0])
        assert columns[layer].equal(alone.columns[0])
        assert choice.freed[layer] * BLOCK == length - kept
        assert choice.classes[layer] == int(alone.classes[0])
        again = choose_again(view, policy, choice.rates[layer], choice.kept[layer], end.text)
        assert again.equal(alone.columns[0]), "the same columns after a preemption"


def test_the_numbers_of_several_prompts_are_read_together() -> None:
    ends, drafts = [], []
    for seed in range(3):
        images, length = prompt(seed)
        probs, spans = attention(seed, images, length), spans_of(images, length)
        ends.append(whole(images, length))
        drafts.append(draft(views(probs, spans, seed), POLICY, BLOCK, 1))
    together = settle(drafts, ends, BLOCK, 1)
    alone = [settle([one], [end], BLOCK, 1)[0] for one, end in zip(drafts, ends, strict=True)]
    assert together == alone
    assert settle([], [], BLOCK, 1) == []


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_layers_of_a_group_keep_as_many_as_the_most(layers: int) -> None:
    images, length = prompt(1)
    probs, spans = attention(1, images, length), spans_of(images, length)
    inputs, end = views(probs, spans), whole(images, length)
    (single,) = settle([draft(inputs, POLICY, BLOCK, 1)], [end], BLOCK, 1)
    (grouped,) = settle([draft(inputs, POLICY, BLOCK, layers)], [end], BLOCK, layers)
    assert len(grouped.freed) == LAYERS // layers
    for layer, kept in enumerate(grouped.kept):
        first = layer // layers * layers
        assert kept == max(single.kept[first : first + layers])
    assert grouped.rates == single.rates and grouped.classes == single.classes


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_kept_tokens_are_found_through_the_table_after_pruning(seed: int, fresh: bool) -> None:
    """The pool ends as it was but for the blocks of the pruned table."""
    images, length = prompt(seed)
    full, needed = length // BLOCK, -(-length // BLOCK)
    pool = list(range(1, 60))
    random.Random(seed).shuffle(pool)
    held, pool = pool[:needed], pool[needed:]
    most = fresh_blocks(POLICY, images, length, BLOCK)
    reserved, pool = (pool[:most], pool[most:]) if fresh else ([], pool)
    layer, spans = TorchLayer(60, seed), spans_of(images, length)
    made = draft(views(attention(seed, images, length), spans), POLICY, BLOCK, 1)
    (choice,) = settle([made], [whole(images, length)], BLOCK, 1)
    columns, freed = made.columns(choice, whole(images, length).text)[0], choice.freed[0]
    source = torch.tensor(held)
    keys, values = layer.gather(source, columns)
    before = layer.cache.clone()
    if freed:
        target = with_fresh(source, torch.tensor(reserved), full) if fresh else source
        layer.move(columns, source, target, freed * BLOCK, BLOCK)
    table, gone = pruned_table(held, reserved, full, freed, 0)
    assert table[:freed] == [0] * freed and 0 not in table[freed:]
    assert sorted([*pool, *gone, *table[freed:]]) == list(range(1, 60)), "no block is lost"
    found = layer.read(torch.tensor(table[freed:]))
    count = length - freed * BLOCK
    for mine, theirs in zip(found, (keys, values), strict=True):
        assert mine[:, :count].equal(theirs)
    if fresh and freed:
        assert layer.cache[:, held[:full]].equal(before[:, held[:full]]), "unpruned blocks stay"
        assert [*in_use(reserved, full, freed)] == table[freed:full]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_scores_are_the_attention_of_the_last_tokens(window: int) -> None:
    layer, blocks, length = TorchLayer(9, 0), torch.tensor([3, 7, 2]), 20
    draw = torch.Generator().manual_seed(1)
    queries = torch.randn(window, HEADS, WIDTH, generator=draw)
    view = layer.view(queries, blocks, torch.zeros(length, dtype=torch.int64))
    assert view.window is not None and view.asked is not None
    keys, _ = layer.read(blocks)
    for place, column in enumerate(range(length - window, length)):
        seen = keys[:, : column + 1].repeat_interleave(HEADS // KV_HEADS, 0)
        expected = ((seen @ queries[place][..., None])[..., 0] * layer.scale).softmax(-1)
        found = view.window[0, :, place]
        torch.testing.assert_close(found[:, : column + 1], expected)
        assert not found[:, column + 1 :].any() and view.asked[0, place] == column
    assert view.probs.equal(view.window[:, :, -1])
    assert view.keys is not None and view.keys.shape == (1, KV_HEADS, length, WIDTH)


@pytest.mark.parametrize("ends", [[40], [5, 40], [33, 36, 39, 43], [31, 32, 33, 42]])
@pytest.mark.parametrize("window", [1, 8, 60])
def test_queries_of_the_last_tokens_come_together_from_several_steps(
    ends: list[int], window: int
) -> None:
    """The last step may go on into the answer."""
    length, before = 40, None
    queries = torch.randn(50, HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    policy = plphp.policy("snapkv", window=window)
    first = first_asked(policy, length)
    for start, end in zip([0, *ends], ends, strict=False):
        part = PromptPart(start, end, length, first)
        if end > first:
            before = part.join(before, queries[start:end])
    assert before is not None and before.equal(queries[first:length])
    again = PromptPart(first, length, length, first).join(before, queries[first:length])
    assert again.equal(before), "a preempted request computes them again"


def test_an_end_of_a_prompt_is_its_last_part() -> None:
    policy = plphp.policy("snapkv", window=8)
    end = PromptEnd(16, 44, 40, ((1, 0, 31),), policy, None, None)
    assert end.part == PromptPart(16, 44, 40, 32)
    assert replace(end, policy=POLICY).part.first == 39


def test_tables_of_a_batch_start_at_the_first_kept_token() -> None:
    """Two groups; a row that is not pruned, one in place, one in fresh blocks, and padding."""
    end = PromptEnd(0, 45, 45, ((1, 0, 39),), POLICY, ((91, 92, 93, 94), (81, 82, 83, 84)), None)
    fresh = PrunedRequest.of((3, 2), end, BLOCK)
    assert fresh.fresh == ((93, 94), (82, 83, 84))
    tables = BatchTables((None, PrunedRequest((2, 0), ((), ())), fresh), 2)
    table = torch.arange(1, 33, dtype=torch.int32).view(4, 8)
    lengths = torch.tensor([30, 40, 45, 0], dtype=torch.int32)
    first = tables.apply(0, table)
    assert tables.shorten(0, BLOCK, lengths).tolist() == [30, 40 - 2 * BLOCK, 45 - 3 * BLOCK, 0]
    assert first[0].tolist() == table[0].tolist() and first[3].tolist() == table[3].tolist()
    assert first[1, :6].tolist() == table[1, 2:].tolist()
    assert first[2, :5].tolist() == [93, 94, *table[2, 5:].tolist()]
    second = tables.apply(1, table)
    assert tables.shorten(1, BLOCK, lengths).tolist() == [30, 40, 45 - 2 * BLOCK, 0]
    assert second[1].tolist() == table[1].tolist()
    assert second[2, :6].tolist() == [82, 83, 84, *table[2, 5:].tolist()]
    assert BatchTables((None, None), 2).empty


def test_what_a_prompt_reserves_and_what_may_be_cached() -> None:
    shared, in_place = PromptBlocks(20, 2), PromptBlocks(20, None)
    assert [shared.to_reserve(n) for n in (19, 20, 33)] == [0, 2, 2]
    assert [shared.cacheable(n) for n in (8, 20, 33)] == [8, 20, 20]
    assert in_place.to_reserve(20) == in_place.cacheable(20) == 0


def test_lockstep_asks_the_first_group_for_all() -> None:
    lockstep = Lockstep({"a": [1, 2]}, BLOCK)
    assert lockstep.has_slots("a", 16) and not lockstep.has_slots("a", 17)
    assert not lockstep.has_slots("b", 1)


def test_a_long_answer_no_longer_fits_beside_fresh_blocks() -> None:
    assert fits(tokens=40, fresh=6, block=8, tables=3, pool=24)
    assert not fits(tokens=41, fresh=6, block=8, tables=3, pool=24)


def test_it_imports_no_engine() -> None:
    code = (
        "import sys, plphp.paged.blocks, plphp.paged.choosing, plphp.paged.compaction\n"
        "import plphp.paged.tables\n"
        "print([name for name in ('vllm', 'transformers', 'plphp.vllm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
