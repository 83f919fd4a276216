"""One rank of `test_parallel.py`, under torchrun: tensor_parallel.py DIRECTORY FAMILY OUT."""

import json
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

import plphp
import tiny


def main(directory: str, name: str, out: str) -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(
        directory, tp_plan="auto", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    family = tiny.FAMILIES[name]
    inputs, _ = family.make_inputs(model, tiny.ROWS["batch"], 0)
    with plphp.prune(model, plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5)) as pruning:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    report = pruning.report
    found = {
        "tokens": tokens.tolist(),
        "gamma": [layer.gamma for layer in report.layers],
        "classes": [layer.layer_class for layer in report.layers],
        "kept": [layer.kept.tolist() for layer in report.layers],
    }
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
