"""A batch that is padded for a CUDA graph has rows without a request. They stay as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

import plphp
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
    return WorkerSide([layer], BLOCK, lambda tensor: tensor, torch.device("cpu"))


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
