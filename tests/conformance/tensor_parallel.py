"""One rank of `company.Ranks`, under torchrun: tensor_parallel.py DIRECTORY PARENT.

It runs job.0, job.1, ... as they appear in the directory, until its parent ends it or is gone.
"""

import json
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import methods
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from invariants import EVERY, ROWS, generate, run_policy
from oracle import Numbers


def answer(
    model_path: Path, family: str, rows: str, method: str, numbers: dict[str, Any]
) -> dict[str, Any]:
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_path, tp_plan="auto", dtype=torch.float32
        ).eval()
        model.generation_config.eos_token_id = None
        inputs, _ = EVERY[family].make_inputs(model, ROWS[rows], 0)
        untouched, _ = generate(model, inputs)
    except Exception as error:
        return {"stock": type(error).__name__}
    keep_all = methods.method("plphp").make(Numbers(r=1.0, delta_r=0.0))
    whole, _, _ = run_policy(model, inputs, keep_all)
    chosen = methods.method(method)
    policy = chosen.make(Numbers(**numbers))
    tokens, _, report = run_policy(model, inputs, policy, recall=chosen.recall)
    return {
        "untouched": untouched.tolist(),
        "whole": whole.tolist(),
        "tokens": tokens.tolist(),
        "gamma": [layer.gamma for layer in report.layers],
        "classes": [layer.layer_class for layer in report.layers],
        "kept": [layer.kept.tolist() for layer in report.layers],
    }


def serve(home: Path, parent: str) -> None:
    for name in count():
        while not (home / f"job.{name}").exists():
            if not Path("/proc", parent).exists():
                return
            time.sleep(0.02)
        job = json.loads((home / f"job.{name}").read_text())
        found = answer(home / f"model.{name}", *job)
        part = home / f"part.{dist.get_rank()}"
        part.write_text(json.dumps(found))
        part.rename(home / f"rank.{name}.{dist.get_rank()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    serve(Path(sys.argv[1]), sys.argv[2])
    dist.destroy_process_group()
