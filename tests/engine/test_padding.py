"""A batch that is padded for a CUDA graph has rows without a request. They stay as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

import plphp
from plphp.paged.fixed import FixedTensors, query_buffers
from plphp.paged.prompts import PromptEnd
from plphp.paged.tables import PrunedRequest
from plphp.vllm.messages import Step
from plphp.vllm.worker import WorkerSide

BLOCK = 16
ROWS = (["a", "b"], {"a": 1, "b": 1})


def padded_batch() -> CommonAttentionMetadata:
    """Request a computes its token 40, b its token 90, and two rows are padding."""
    starts = torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32)
    table = torch.zeros(4, 8, dtype=torch.int32)
    table[0, :3] = torch.arange(10, 13)
    table[1, :6] = torch.arange(20, 26)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([40, 90, 0, 0], dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=4,
        max_query_len=1,
        max_seq_len=90,
        block_table_tensor=table,
        slot_mapping=torch.tensor([12 * BLOCK + 7, 25 * BLOCK + 9, -1, -1]),
        seq_lens_cpu_upper_bound=torch.tensor([40, 90, 0, 0], dtype=torch.int32),
    )


@pytest.fixture
def side() -> Any:
    layer: Any = SimpleNamespace(name="layer", group=0)
    return WorkerSide([layer], 1, BLOCK, lambda tensor: tensor, torch.device("cpu"))


def test_only_the_rows_of_requests_are_shifted(side: Any) -> None:
    side.pruned_requests = {"b": PrunedRequest((3,), ((),))}
    side.begin(Step())
    side.place(*ROWS)
    found = side.shift(0, padded_batch())
    assert found.seq_lens.tolist() == [40, 90 - 3 * BLOCK, 0, 0]
    assert found.seq_lens_cpu_upper_bound.tolist() == [40, 90 - 3 * BLOCK, 0, 0]
    assert found.block_table_tensor[1, :3].tolist() == [23, 24, 25]
    assert found.block_table_tensor[2:].tolist() == padded_batch().block_table_tensor[2:].tolist()
    assert found.max_seq_len == 42


def test_the_end_of_a_prompt_is_found_in_the_row_of_its_request(side: Any) -> None:
    end = PromptEnd(89, 90, 90, ((1, 0, 31),), plphp.PLPHP(), None, None)
    side.begin(Step(ends={"b": end}))
    side.place(*ROWS)
    assert side.endings["b"].row == 1
    assert side.endings["b"].last == 1


FIXED_ROWS, HEADS, WIDTH = 6, 2, 4


@pytest.fixture
def fixed_side() -> Any:
    """A worker side for full CUDA graphs of up to six rows."""
    layer: Any = SimpleNamespace(name="layer", group=0)
    shapes, cpu = {"layer": (HEADS, WIDTH)}, torch.device("cpu")
    fixed = FixedTensors(FIXED_ROWS, query_buffers(shapes, FIXED_ROWS, torch.float32, cpu))
    return WorkerSide([layer], 1, BLOCK, lambda tensor: tensor, cpu, fixed)


def test_a_graph_finds_lengths_and_tables_where_it_was_recorded(fixed_side: Any) -> None:
    """Recorded outside a step, replayed without and with a pruned request, and recorded again."""
    places = []
    for pruned in (None, {}, {"b": PrunedRequest((3,), ((),))}, None):
        if pruned is not None:
            fixed_side.pruned_requests = pruned
            fixed_side.begin(Step())
            fixed_side.place(*ROWS)
        common = padded_batch()
        found = fixed_side.shift(0, common)
        places.append((found.seq_lens.data_ptr(), found.block_table_tensor.data_ptr()))
        gone = 3 if pruned else 0
        assert found.seq_lens.tolist() == [40, 90 - gone * BLOCK, 0, 0]
        assert found.block_table_tensor[1, :3].tolist() == [20 + gone, 21 + gone, 22 + gone]
        assert common.seq_lens.tolist() == [40, 90, 0, 0], "the engine's tensors are not changed"
        fixed_side.step = None
    assert len(set(places)) == 1


def test_batches_of_all_sizes_begin_at_one_address(fixed_side: Any) -> None:
    full = fixed_side.shift(0, padded_batch())
    half = padded_batch().replace(
        seq_lens=torch.tensor([7, 8], dtype=torch.int32),
        block_table_tensor=torch.ones(2, 8, dtype=torch.int32),
    )
    part = fixed_side.shift(0, half)
    assert part.seq_lens.data_ptr() == full.seq_lens.data_ptr()
    assert full.seq_lens.tolist() == [7, 8, 0, 0], "and use the same memory"
    other = fixed_side.shift(1, padded_batch())
    assert other.seq_lens.data_ptr() != full.seq_lens.data_ptr(), "a group has its own"
    large = padded_batch().replace(seq_lens=torch.ones(FIXED_ROWS + 1, dtype=torch.int32))
    assert fixed_side.shift(0, large).seq_lens is large.seq_lens, "no graph has so many rows"


def test_a_prompt_that_ends_in_a_graph_finds_its_query(
    fixed_side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph copies the queries; the plugin's Python code does not run."""
    address = fixed_side.fixed.queries["layer"].data_ptr()
    query = torch.randn(4, HEADS, WIDTH)
    end = PromptEnd(89, 90, 90, ((1, 0, 31),), plphp.PLPHP(), None, None)
    fixed_side.begin(Step(ends={"b": end}))
    fixed_side.place(*ROWS)
    fixed_side.fixed.keep("layer", query)
    ending, seen = fixed_side.endings["b"], []
    monkeypatch.setattr(
        "plphp.vllm.worker.draft", lambda *args: seen.append(ending.queries["layer"].clone())
    )
    monkeypatch.setattr("plphp.vllm.worker.settle", lambda *args: [])
    with pytest.raises(ValueError, match="zip"):  # there are no plans to go on with
        fixed_side.finish()
    assert seen[0].equal(query[1:2])
    assert fixed_side.fixed.queries["layer"].data_ptr() == address


def test_a_prompt_that_ends_outside_a_graph_has_its_own_query(fixed_side: Any) -> None:
    end = PromptEnd(89, 90, 90, ((1, 0, 31),), plphp.PLPHP(), None, None)
    fixed_side.begin(Step(ends={"b": end}))
    fixed_side.place(*ROWS)
    query = torch.randn(2, HEADS, WIDTH)
    fixed_side.after_attention("layer", query, query)
    assert fixed_side.seen == {"layer"}
    assert fixed_side.queries["b"]["layer"].equal(query[1:2])
