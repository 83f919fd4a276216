"""Stage J: both towers learn to answer questions, from easy pictures to hard ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from plphp.demo.questions import LEVELS
from training.batches import Batch, easy_batch, picture_batch
from training.easy_vqa import EasyVQA
from training.optim import MuonAdamW
from training.packing import Packed, Packer, answer
from training.schedule import Leg, Phase
from training.towers import encode_pictures

RATE = 2e-3
LOG_EVERY = 25
MEMORY = 0.98  # of the running scores
MOST_PICTURES, MOST_CELLS = 6, 8


class PositionProbe(nn.Module):
    """Training only: after two text layers a vision token must know its picture, row and column.

    Picture numbers are classified against the embeddings of the numbers themselves. All tasks need
    this binding, and few answers teach it; asked for directly it forms within 100 steps, and the
    tasks follow.
    """

    def __init__(self, tokenizer: Any, embeddings: nn.Parameter) -> None:
        super().__init__()
        self.embeddings = [embeddings]  # in a list: not a parameter of the probe
        self.number_ids = [tokenizer.encode(f" {i + 1}")[0] for i in range(MOST_PICTURES)]
        self.lines = nn.Parameter(torch.randn(2 * MOST_CELLS, embeddings.shape[1]) * 0.06)

    def forward(self, hidden: Tensor, samples: int, pictures: int, side: int) -> Tensor:
        """Loss of the vision tokens' hidden states [samples * pictures * side^2, d]."""
        classes = torch.cat([self.embeddings[0][self.number_ids], self.lines]).to(hidden.dtype)
        logits = (functional.rms_norm(hidden, (hidden.shape[-1],)) @ classes.T).float()
        by_axis = logits.split([MOST_PICTURES, MOST_CELLS, MOST_CELLS], -1)
        place = torch.cartesian_prod(*(torch.arange(n) for n in (samples, pictures, side, side)))
        targets = place[:, 1:].unbind(1)
        losses = [functional.cross_entropy(*pair) for pair in zip(by_axis, targets, strict=True)]
        return torch.stack(losses).sum()


def train(model: Any, tokenizer: Any, easy: EasyVQA, leg: Leg) -> None:
    """One leg."""
    torch.manual_seed(1)
    rng = np.random.default_rng(leg.seed)
    learner = _Learner(model, tokenizer)
    began = time.monotonic()
    for step in range(leg.steps):
        phase = leg.phase(step)
        joined = rng.random() < phase.easy_share
        level = int(rng.choice(len(LEVELS), p=phase.level_shares))
        drawn = picture_batch(rng, LEVELS[level], phase.tasks)
        learner.learn_pictures(drawn, phase, see=rng.random() < phase.vision_share, level=level)
        if joined:
            learner.learn_easy(easy_batch(rng, easy), phase, see=rng.random() < phase.vision_share)
        learner.optimizer.step(leg.factor(step))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == leg.steps:
            pace = (time.monotonic() - began) / (step + 1)
            print(f"joint {step + 1}/{leg.steps} {pace:.2f} s/step {learner.scores}", flush=True)


class _Learner:
    """A model in training, with what it needs for that."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.packer, self.scores = model, Packer(tokenizer, model), _Scores()
        text, visual = model.model.language_model, model.model.visual
        embeddings = text.embed_tokens.weight
        self.probe = PositionProbe(tokenizer, embeddings)
        weights = [*text.layers.parameters(), *text.norm.parameters(), *visual.parameters()]
        self.optimizer = MuonAdamW(weights, [embeddings, self.probe.lines], RATE)

    def learn_pictures(self, batch: Batch, phase: Phase, see: bool, level: int) -> None:
        """Gradients of the answers about drawn pictures, and of the probe."""
        with torch.autocast("cpu", torch.bfloat16):
            packed, loss, early = self._answer(batch, see, str(level))
            if phase.probe_weight:
                vision = early[packed.ids == self.packer.image]
                samples = len(batch.questions)
                where = self.probe(vision, samples, batch.pictures, batch.side)
                loss = loss + phase.probe_weight * where
        loss.backward()

    def learn_easy(self, batch: Batch, phase: Phase, see: bool) -> None:
        """Gradients of the answers about easy-VQA."""
        with torch.autocast("cpu", torch.bfloat16):
            _, loss, _ = self._answer(batch, see, "")
        (phase.easy_weight * loss).backward()

    def _answer(self, batch: Batch, see: bool, suffix: str) -> tuple[Packed, Tensor, Tensor]:
        """The packed batch, the loss of its answers, and early hidden states."""
        packed = self.packer.pack(batch.pictures, batch.side, batch.questions)
        with torch.set_grad_enabled(see):
            features = encode_pictures(self.model.model.visual, batch.patches, batch.side)
        answered = answer(self.model, packed, features, self.packer.image)
        right = torch.zeros(answered.where.shape, dtype=torch.bool)
        right[answered.where] = answered.logits.argmax(-1) == answered.labels
        self.scores.add(packed, right, suffix)
        return packed, functional.cross_entropy(answered.logits, answered.labels), answered.early


class _Scores(dict[str, float]):
    """Running exact match by task; held out, since pictures are drawn afresh (easy-VQA is not)."""

    def add(self, packed: Packed, right: Tensor, suffix: str) -> None:
        for row, answers in zip(right, packed.answers, strict=True):
            for task, first, end in answers:
                key, exact = task + suffix, float(row[first - 1 : end - 1].all())
                self[key] = MEMORY * self.get(key, 0.0) + (1 - MEMORY) * exact

    def __str__(self) -> str:
        return " ".join(f"{key}:{self[key]:.2f}" for key in sorted(self))
