"""Trains the embedded model from nothing, or from the weights of an older model.

    python -m training.retrain --out DIR [--warm MODEL]      # from the root of the repository

The state is saved in DIR/state.pt every few minutes, and when the process is terminated. The same
command continues the run, with the schedule that is in the file by then. DIR/log.jsonl gets a line
every few steps. At the end the model is in DIR/model. ``--snapshot`` writes the present model
without training.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from training import build, checkpoint, machine, schedule, vision_stage
from training.easy_vqa import EasyVQA
from training.grow import grow
from training.joint_stage import Learner
from training.optim import MuonAdamW
from training.schedule import Stage
from training.vision_stage import Words

LOG_EVERY = 20
RISE = 30  # steps over which the learning rate rises in a run that begins within a stage


class Run:
    """A training run: a model, its optimizer, and its place in the stages."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder: Path = options.out
        self.dtype = getattr(torch, options.dtype) if options.dtype else machine.fastest_dtype()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "state.pt"
        state = checkpoint.read(self.file)
        warm = state["warm"] if state else options.warm is not None
        self.warm, self.stages = warm, [s.scaled(options.scale) for s in schedule.read(warm)]
        self.easy = EasyVQA("train")
        self.tokenizer = self._tokenizer()
        self.model = build.make_model(self.tokenizer).train()
        if warm and not state:
            grow(self.model, self.tokenizer, options.warm)
        self.embeddings = self.model.model.language_model.embed_tokens.weight
        self.words = Words(self.tokenizer, self.embeddings)
        self.learner = Learner(self.model, self.tokenizer, self.words)
        self.parts = torch.nn.ModuleList([self.model, self.words, self.learner.probe])
        self.average = checkpoint.Average(self.model.parameters())
        self.scores, self.losses = checkpoint.Scores(), checkpoint.Scores()
        self.stage = _first_stage(self.stages, options.skip_vision)
        self.step, self.seconds = options.begin_step, 0.0
        self.began = self.step  # the optimizer has no history before this step
        self.optimizer = self._optimizer()
        self.told_to_stop = False
        if state:
            self._load(state)

    def stop(self, *_: object) -> None:
        """Save the state and end the run after this step."""
        self.told_to_stop = True

    def train(self, minutes: float, save_minutes: float, anneal_minutes: float = 0) -> bool:
        """Train. Returns True if all steps are done, False if time is over or `stop` was called.

        In the last ``anneal_minutes`` the learning rate falls to zero, in place of the schedule.
        """
        began = saved = last = time.monotonic()
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            if self.step >= stage.steps:
                self._next_stage()
                continue
            left = minutes - (last - began) / 60
            self._learn(stage, most=left / anneal_minutes if anneal_minutes else 1.0)
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if self.step % LOG_EVERY == 0 or self.step == stage.steps:
                self._log(stage)
            over = self.told_to_stop or now - began > 60 * minutes
            if over or now - saved > 60 * save_minutes:
                self.save()
                saved = now
            if over:
                return False
        self.save()
        return True

    def export(self, folder: Path) -> None:
        """Write the moving average as a model directory. The run cannot continue afterwards."""
        self.average.swap()
        build.export(self.model, self.tokenizer, folder)

    def save(self) -> None:
        state = {
            "warm": self.warm,
            "stage": self.stage,
            "step": self.step,
            "began": self.began,
            "seconds": self.seconds,
            "parts": self.parts.state_dict(),
            "average": self.average.state(),
            "optimizer": self.optimizer.state(),
            "scores": dict(self.scores),
            "losses": dict(self.losses),
        }
        checkpoint.save(self.file, state)

    def _load(self, state: dict[str, Any]) -> None:
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.began = state.get("began", 0)
        self.parts.load_state_dict(state["parts"])
        self.average.load(state["average"])
        self.optimizer = self._optimizer()
        self.optimizer.load(state["optimizer"])
        self.scores.update(state["scores"])
        self.losses.update(state["losses"])

    def _learn(self, stage: Stage, most: float = 1.0) -> None:
        """One step, with a learning rate of at most ``most`` times the full rate."""
        # Each step has its own random numbers, so that a continued run draws the same samples.
        rng = np.random.default_rng([stage.seed, self.step])
        phase = stage.phase(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if stage.kind == "vision":
                visual = self.model.model.visual
                loss, seen = vision_stage.learn(visual, self.words, self.easy, phase, rng)
            else:
                loss, seen = self.learner.learn(self.easy, phase, rng)
        self.optimizer.step(min(self.factor(stage), max(0.0, most)))
        self.average.update()
        self.scores.add(seen)
        self.losses.add({"loss": loss})
        self.step += 1

    def factor(self, stage: Stage) -> float:
        """The share of the full learning rate for the next step.

        A run that begins within a stage takes RISE steps to reach the rate of the schedule.
        """
        risen = (self.step - self.began + 1) / RISE if self.began else 1.0
        return min(stage.factor(self.step), risen)

    def _next_stage(self) -> None:
        self.stage, self.step, self.began = self.stage + 1, 0, 0
        self.scores.clear()
        self.losses.clear()
        self.average = checkpoint.Average(self.model.parameters())
        self.optimizer = self._optimizer()

    def _optimizer(self) -> MuonAdamW:
        stage = self.stages[min(self.stage, len(self.stages) - 1)]
        text, visual = self.model.model.language_model, self.model.model.visual
        weights, tables = list(visual.parameters()), [self.words.nothing]
        if stage.kind == "joint":
            weights += [*text.layers.parameters(), *text.norm.parameters()]
            tables.append(self.learner.probe.lines)
        frozen = stage.kind == "vision" and self.warm  # the word embeddings are trained already
        self.embeddings.requires_grad_(not frozen)
        tables = tables if frozen else [*tables, self.embeddings]
        return MuonAdamW(weights, tables, stage.rate, self.dtype)

    def _log(self, stage: Stage) -> None:
        line = {
            "stage": self.stage,
            "kind": stage.kind,
            "step": self.step,
            "of": stage.steps,
            "minutes": round(self.seconds / 60, 1),
            **self.losses.means(),
            "right": self.scores.means(),
        }
        print(json.dumps(line), flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _tokenizer(self) -> Any:
        """The tokenizer that was made when the run began."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            build.make_tokenizer(self.easy).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def _first_stage(stages: Sequence[Stage], skip_vision: bool) -> int:
    """The index of the stage with which a new run begins."""
    kinds = [stage.kind for stage in stages]
    return kinds.index("joint") if skip_vision else 0


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    machine.keep_memory()
    run = Run(options)
    if options.snapshot:
        run.export(options.snapshot)
        return
    signal.signal(signal.SIGTERM, run.stop)
    if run.train(options.minutes, options.save_minutes, options.anneal_minutes):
        run.export(options.out / "model")
        print(f"{options.out / 'model'} after {run.seconds / 60:.1f} minutes of training")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the directory of the run")
    parser.add_argument(
        "--warm", type=Path, help="an older model whose weights the run begins with"
    )
    parser.add_argument(
        "--skip-vision",
        action="store_true",
        help="begin with the questions, because the model of --warm has learned stage V already",
    )
    parser.add_argument(
        "--begin-step",
        type=int,
        default=0,
        help="the step of the first stage at which a new run begins, if --warm is a model that has "
        "been trained so far; its steps draw other samples than those before",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="a factor of all step counts; 0.01 is a smoke test"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="the time after which this call ends"
    )
    parser.add_argument(
        "--anneal-minutes",
        type=float,
        default=0.0,
        help="the number of last minutes in which the learning rate falls to zero, so that a "
        "snapshot answers well; the next call continues with the schedule's rate",
    )
    parser.add_argument(
        "--save-minutes", type=float, default=4.0, help="the time between two saved states"
    )
    parser.add_argument(
        "--snapshot", type=Path, help="write the present model to this directory, and end"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="the dtype of matrix products, by default the faster one; the weights are float32",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
