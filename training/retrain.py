"""Make the embedded model from nothing.

python -m training.retrain --out DIR        # from the root of the repository
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from training import build, joint_stage, schedule, vision_stage
from training.easy_vqa import EasyVQA


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    plan = schedule.read().scaled(options.scale)
    easy = EasyVQA("train")
    began = time.monotonic()
    tokenizer = build.make_tokenizer(easy)
    model = build.make_model(tokenizer).train()
    vision_stage.train(model, tokenizer, easy, plan.vision)
    for number, leg in enumerate(plan.joint, 1):
        print(f"leg {number} of {len(plan.joint)}", flush=True)
        joint_stage.train(model, tokenizer, easy, leg)
    build.export(model, tokenizer, options.out)
    print(f"{options.out} after {(time.monotonic() - began) / 60:.1f} minutes")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the model directory to write")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies all step counts; 0.01 is a smoke test"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
