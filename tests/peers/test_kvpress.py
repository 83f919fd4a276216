"""SnapKV as kvpress has it, on the same models and prompts: scores within 1e-5, the same tokens.

kvpress needs a transformers of its own: `make test-peers` gives it an environment and names its
Python in KVPRESS_PYTHON.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import plphp
from plphp.policy import LayerView
from plphp.policy.snapkv import SnapKV

PYTHON = os.environ.get("KVPRESS_PYTHON")
SCRIPT = Path(__file__).parent / "kvpress_snapkv.py"
TOLERANCE = 1e-5
LENGTH, LAYERS = 150, 3

pytestmark = pytest.mark.skipif(PYTHON is None, reason="kvpress is missing: make test-peers")


@dataclass(frozen=True)
class Case:
    """A decoder of random weights, and SnapKV's two settings."""

    kind: str
    heads: int
    kv_heads: int
    window: int
    kernel: int
    attention: str = "sdpa"

    def __str__(self) -> str:
        heads = f"{self.heads}-{self.kv_heads}"
        return f"{self.kind}-{heads}-w{self.window}-k{self.kernel}-{self.attention}"


CASES = [
    Case("llama", 4, 4, 16, 5),
    Case("llama", 8, 2, 32, 5, "eager"),
    Case("qwen2", 4, 2, 64, 7),
    Case("qwen3", 8, 1, 8, 3),
    Case("mistral", 6, 2, 1, 1),
]
WATCHED: list[Tensor] = []


class Watched(SnapKV):
    """Our SnapKV, its scores written down: a layer a list entry."""

    def scores(self, view: LayerView) -> Tensor:
        WATCHED.append(super().scores(view))
        return WATCHED[-1]


def build(case: Case, folder: Path) -> Any:
    """Weights far from zero: attention that is all alike would have no top-k to speak of."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        case.kind,
        vocab_size=97,
        hidden_size=16 * case.heads,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=16,
        initializer_range=0.2,
        sliding_window=None,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = case.attention
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def theirs(case: Case, folder: Path, ids: Tensor, kept: int) -> dict[str, Tensor]:
    assert PYTHON is not None
    prompts, out = folder / "prompts.safetensors", folder / "kvpress.safetensors"
    save_file({"ids": ids}, prompts)
    command = [PYTHON, SCRIPT, folder, prompts, out, case.window, case.kernel, kept]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


@torch.no_grad()
def ours(model: Any, ids: Tensor, spans: Tensor, policy: SnapKV) -> tuple[list[Tensor], Any]:
    WATCHED.clear()
    with plphp.prune(model, policy, vision_mask=spans) as pruning:
        model(ids, use_cache=True)
    return list(WATCHED), pruning.report


def members(kept: Tensor, columns: int) -> Tensor:
    """Positions (B, Hkv, K), -1 for none, as a mask (B, Hkv, columns)."""
    mask = torch.zeros(*kept.shape[:2], columns + 1, dtype=torch.bool)
    return mask.scatter_(-1, kept.masked_fill(kept < 0, columns), True)[..., :columns]


def doubtful(scores: Tensor, mask: Tensor) -> Tensor:
    """Columns so near to the edge between kept and dropped that rounding may swap them."""
    kept = scores.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    dropped = scores.masked_fill(mask, -torch.inf).amax(-1, keepdim=True)
    return (scores - (kept + dropped) / 2).abs() <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_and_selection_are_those_of_kvpress(case: Case, tmp_path: Path) -> None:
    """First all that may be dropped counts as vision, then only two spans of the prompt."""
    model = build(case, tmp_path)
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(11))
    free = LENGTH - case.window
    kept = free // 3
    found = theirs(case, tmp_path, ids, kept + case.window)
    whole = torch.zeros_like(ids)
    whole[:, :free] = 1
    parts = torch.zeros_like(ids)
    parts[:, 5:40], parts[:, 50:80] = 1, 2
    worst, exempt, compared = 0.0, 0, 0
    for spans, share in ((whole, kept / free), (parts, 0.4)):
        policy = Watched(budget=share, window=case.window, kernel=case.kernel)
        scores, report = ours(model, ids, spans, policy)
        assert len(scores) == LAYERS
        vision = (spans > 0)[0]
        for layer in range(LAYERS):
            their = found[f"scores.{layer}"]
            off = (scores[layer] - their)[..., vision].abs().max()
            worst = max(worst, float(off))
            if share == 0.4:
                few = round(0.4 * int(vision.sum()))
                best = their.masked_fill(~vision, -1).topk(few).indices
            else:  # what kvpress really kept
                best = found[f"kept.{layer}"]
            expected = members(best, LENGTH)[..., vision]
            mask = members(report.layers[layer].kept, LENGTH)[..., vision]
            assert (mask.sum(-1) == expected.sum(-1)).all()
            unsure = doubtful(their[..., vision], expected)
            assert (mask == expected)[~unsure].all(), (case, layer)
            exempt, compared = exempt + int(unsure.sum()), compared + unsure.numel()
    print(f"\n{case}: scores differ by {worst:.1e} at most; {exempt} of {compared} near the edge")
    assert worst <= TOLERANCE
    assert exempt <= 0.02 * compared
