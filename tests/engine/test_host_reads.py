"""When the host waits for the device: once in a step that ends a prompt, else never.

The tensors are on the meta device. They have no data, so that reading one fails.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
from plphp.paged.compaction import PagedLayer
from plphp.paged.prompts import Choice, PromptEnd
from plphp.paged.tables import PrunedRequest
from plphp.vllm import worker
from plphp.vllm.messages import Step

BLOCK, HEADS, KV_HEADS, WIDTH, LENGTH = 16, 4, 2, 8, 70
FRESH = ((11, 12, 13), (14, 15, 16))
END = PromptEnd(0, LENGTH, LENGTH, ((1, 3, 60),), plphp.PLPHP(), FRESH, None)
CHOICE = Choice((1, 2), (42, 26), (0.7, 0.4), (2, 1))


class FakeLayer(PagedLayer):
    kv_heads, scale, softcap = KV_HEADS, 0.3, None

    def __init__(self, group: int) -> None:
        self.name, self.group, self.index = f"layer {group}", group, group
        self.cache = torch.empty(20, KV_HEADS, BLOCK, 2 * WIDTH, device="meta")

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache[blocks].transpose(0, 1).flatten(1, 2).chunk(2, -1)
        return keys, values

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        both = torch.cat([keys, values], -1)
        self.cache.transpose(1, 2)[slots // BLOCK, slots % BLOCK] = both


class Metadata(SimpleNamespace):
    """In the place of vLLM's CommonAttentionMetadata."""

    def replace(self, **changes: Any) -> Metadata:
        return Metadata(**vars(self) | changes)


def metadata(rows: int) -> Metadata:
    return Metadata(
        seq_lens=torch.empty(rows, dtype=torch.int32, device="meta"),
        seq_lens_cpu_upper_bound=torch.tensor([60, 50], dtype=torch.int32),
        block_table_tensor=torch.empty(rows, 8, dtype=torch.int32, device="meta"),
    )


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker side with two layers."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    layers = [FakeLayer(0), FakeLayer(1)]
    return worker.WorkerSide(layers, 2, BLOCK, lambda tensor: tensor, torch.device("meta"))


def test_reading_such_a_tensor_fails() -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.zeros(3, device="meta").tolist()


def test_a_decoding_step_reads_nothing(side: Any) -> None:
    side.pruned_requests = {"a": PrunedRequest((1, 2), ((12, 13), (15, 16)))}
    for _ in range(2):
        side.begin(Step())
        side.place(["a", "b"], {"a": 1, "b": 1})
        for group in (0, 1):
            found = side.shift(group, metadata(2))
            assert found.block_table_tensor.device.type == found.seq_lens.device.type == "meta"
            assert found.max_seq_len == 50
        side.after_attention("layer 0", torch.empty(2, HEADS, WIDTH, device="meta"), None)
        side.finish()


@pytest.mark.parametrize("choice", [None, CHOICE])
def test_the_end_of_prompts_reads_once(
    choice: Choice | None, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts end in one step; a prompt that was preempted reads nothing."""
    reads = []

    def settled(drafts: Any, ends: Any, block: int, layers_per_group: int) -> list[Choice]:
        reads.append(len(drafts))
        return [CHOICE for _ in drafts]

    monkeypatch.setattr(worker, "settle", settled)
    end = replace(END, choice=choice)
    side.begin(Step(ends={"a": end, "b": end}))
    side.place(["a", "b"], {"a": LENGTH, "b": LENGTH})
    for group in (0, 1):
        side.shift(group, metadata(2))
        query = torch.empty(2 * LENGTH, HEADS, WIDTH, device="meta")
        side.after_attention(f"layer {group}", query, query)
    side.finish()
    assert reads == [0 if choice else 2]
    assert side.pruned_requests.keys() == {"a", "b"}
