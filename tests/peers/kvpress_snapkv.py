"""kvpress's side, in kvpress's own environment: what its SnapKV scores and keeps.

    python kvpress_snapkv.py MODEL PROMPTS.safetensors OUT.safetensors WINDOW KERNEL KEPT

PROMPTS: `ids` (B, N). KEPT: columns that its cache keeps of N, the window among them. OUT, of layer
l: `scores.l` (B, Hkv, N) float32 and `kept.l` (B, Hkv, KEPT), the columns found in its cache.
Only kvpress's public classes are used; no line of it is here.
"""

import sys
from dataclasses import dataclass, field

import torch
from kvpress import SnapKVPress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache


@dataclass
class Watched(SnapKVPress):
    """SnapKVPress that writes down what it is asked to score, and its answer."""

    seen: dict = field(default_factory=dict)  # layer -> (keys of the whole prompt, scores)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
        self.seen[module.layer_idx] = keys.clone(), scores.clone()
        return scores


@torch.no_grad()
def main(model: str, prompts: str, out: str, window: str, kernel: str, kept: str) -> None:
    ids = load_file(prompts)["ids"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    # Half a column more: a share of N columns must not lose one to rounding.
    ratio = 1 - (int(kept) + 0.5) / ids.shape[1]
    press = Watched(compression_ratio=ratio, window_size=int(window), kernel_size=int(kernel))
    cache = DynamicCache(config=loaded.config)
    with press(loaded):
        loaded(ids, past_key_values=cache)
    found = {}
    for layer, (keys, scores) in press.seen.items():
        left = cache.layers[layer].keys
        same = (left[:, :, :, None] == keys[:, :, None]).all(-1)
        assert (same.sum(-1) == 1).all(), "a kept key is not one of the prompt's"
        found[f"scores.{layer}"] = scores.float().contiguous()
        found[f"kept.{layer}"] = same.int().argmax(-1).contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
