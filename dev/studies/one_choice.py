"""Why one selection for all heads of a layer can lose less than one for each head.

    python dev/studies/one_choice.py --suite redundant-4 --task refer --limit 24

PLPHP lets each KV head keep the tokens to which its own query heads attend at the last prompt
token. A head that works later, at a word of the answer, need not attend to its tokens then; with
one selection for all heads it gets those of the others. The query that predicts the last word of
the full model's answer is read, and in each layer the KV head that attends to the images most:

attention   the share of this head's attention that goes to vision tokens
each head   the share of that attention on tokens which the head keeps by its own attention
all heads   the same, if all heads of the layer keep those of their mean attention
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.eval.sample import Sample
from plphp.eval.tasks import SUITES
from plphp.inputs import Runnable, load

SEED = 8  # not that of the accuracy pages
POLICIES = {"each head": "plphp-flat", "all heads": "uniform"}


def last_word(model: Any, inputs: dict[str, Tensor], vision: Tensor) -> Tensor:
    """(L, Hkv, N) float32: the attention to the prompt's vision tokens at the answer's last word.

    vision: (N,) bool
    """
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    prompt, heads = len(vision), model.config.get_text_config().num_key_value_heads
    answer = tokens[:, prompt:-2]  # the last word is one token, and the end another
    whole = dict(inputs)
    for name, value in (("input_ids", answer), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        added = value if isinstance(value, Tensor) else torch.full_like(answer, value)
        whole[name] = torch.cat([inputs[name], added.to(inputs[name].dtype)], 1)
    seen = torch.stack(model(**whole, output_attentions=True).attentions)[:, 0, :, -1].float()
    return seen.unflatten(1, (heads, -1)).mean(2)[..., :prompt] * vision


def kept_of(model: Any, inputs: dict[str, Tensor], name: str, budget: float) -> Tensor:
    """(L, Hkv, N) bool: the vision tokens that a policy keeps of a prompt."""
    with plphp.prune(model, plphp.policy(name, budget=budget)) as pruning:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    columns = torch.arange(inputs["input_ids"].shape[1])
    kept = [layer.kept[0] for layer in pruning.report.layers]
    return torch.stack([torch.stack([torch.isin(columns, head) for head in x]) for x in kept])


def look(loaded: Runnable, sample: Sample, budget: float) -> dict[str, Tensor]:
    """The numbers of one sample, each (L,) float32."""
    inputs = loaded.inputs(list(sample.images), sample.question)
    vision = plphp.vision_spans(loaded.model.config, **inputs)[0] > 0
    seen = last_word(loaded.model, inputs, vision)
    attention, head = seen.sum(-1).max(1)
    found = {"attention": attention}
    for label, name in POLICIES.items():
        kept = (seen * kept_of(loaded.model, inputs, name, budget)).sum(-1)
        found[label] = kept.gather(1, head[:, None])[:, 0] / attention
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", default="redundant-4")
    parser.add_argument("--task", default="refer")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--budget", type=float, default=0.4)
    given = parser.parse_args()
    loaded = load("embedded", "float32", "cpu", "eager")
    samples = SUITES[given.suite][f"{given.task}@{given.suite}"].draw(given.limit, SEED)
    with torch.inference_mode():
        rows = [look(loaded, sample, given.budget) for sample in samples]
    print("layer     ", *(f"{layer:4}" for layer in range(len(rows[0]["attention"]))))
    for name in rows[0]:
        means = torch.stack([row[name] for row in rows]).mean(0)
        print(f"{name:10}", *(f"{value:.2f}" for value in means.tolist()))


if __name__ == "__main__":
    main()
