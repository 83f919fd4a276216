"""Stage J: the vision tower and the language model learn together to answer questions."""

from __future__ import annotations

from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional

from plphp.demo.questions import LEVELS
from plphp.demo.regimes import LONGEST_SIDE, Frame
from training.batches import Batch, Views, easy_batch, level_batch, regime_batch
from training.build import NUMBERS
from training.easy_vqa import EasyVQA
from training.packing import Packer
from training.packing import answer as run_packed
from training.schedule import Phase
from training.towers import encode_pictures
from training.vision_stage import Words, crowd_loss, nan_free

PROBED = 2000  # the largest number of vision tokens that the probe reads in a step
CROWD_TOKENS = 1000


class PositionProbe(nn.Module):
    """An extra loss of training: it reads a token's picture, row and column after two text layers.

    The classes of pictures are the embeddings of the numbers. All tasks need a token's position,
    but few answers teach it. With this loss the model learns it within 100 steps, and the tasks
    soon after.
    """

    def __init__(self, tokenizer: Any, embeddings: nn.Parameter) -> None:
        super().__init__()
        self.embeddings = [embeddings]  # in a list, so that it is not a parameter of the probe
        self.number_ids = [tokenizer.encode(f" {number}")[0] for number in NUMBERS]
        self.lines = nn.Parameter(torch.randn(2 * LONGEST_SIDE, embeddings.shape[1]) * 0.06)

    def forward(self, hidden: Tensor, frame: Frame) -> Tensor:
        """The loss for hidden states of vision tokens [samples * tokens, d]."""
        places = torch.cat([_places(i, *size) for i, size in enumerate(frame.sizes)])
        targets = places.repeat(len(hidden) // len(places), 1)
        if len(hidden) > PROBED:
            chosen = torch.randperm(len(hidden))[:PROBED]
            hidden, targets = hidden[chosen], targets[chosen]
        classes = torch.cat([self.embeddings[0][self.number_ids], self.lines]).to(hidden.dtype)
        logits = (functional.rms_norm(hidden, (hidden.shape[-1],)) @ classes.T).float()
        by_axis = logits.split([len(self.number_ids), LONGEST_SIDE, LONGEST_SIDE], -1)
        pairs = zip(by_axis, targets.unbind(1), strict=True)
        return torch.stack([functional.cross_entropy(*pair) for pair in pairs]).sum()


class Learner:
    """A model in training, with its packer, its word classes and its position probe."""

    def __init__(self, model: Any, tokenizer: Any, words: Words) -> None:
        self.model, self.words, self.packer = model, words, Packer(tokenizer, model)
        self.probe = PositionProbe(tokenizer, model.model.language_model.embed_tokens.weight)

    def learn(self, easy: EasyVQA, phase: Phase, rng: Generator) -> tuple[float, dict[str, float]]:
        """Compute the gradients of one step.

        Returns the loss of the answers, and the shares of right answers by name.
        """
        torch.manual_seed(int(rng.integers(2**31)))  # the probe chooses tokens with this seed
        if rng.random() < phase.old_share:
            number = int(rng.choice(len(LEVELS), p=phase.level_shares))
            batch = level_batch(rng, number, phase.tasks, phase.budget)
        else:
            regime = phase.long if rng.random() < phase.long_share else phase.regime
            batch = regime_batch(rng, regime, phase.tasks, phase.budget)
        loss, seen = self._learn_pictures(batch, phase, rng)
        if rng.random() < phase.easy_share:
            joined = easy_batch(rng, easy)
            features = self.see(joined, rng.random() < phase.vision_share)
            easy_loss, right, _ = self.answer(joined, features, second=False)
            (phase.easy_weight * easy_loss).backward()
            seen |= right
        if rng.random() < phase.crowd_share:
            visual = self.model.model.visual
            crowd, right = crowd_loss(visual, self.words, phase, CROWD_TOKENS, rng)
            (phase.words_weight * crowd).backward()
            seen |= {f"crowd {name}": value for name, value in right.items()}
        return loss, seen

    def _learn_pictures(
        self, batch: Batch, phase: Phase, rng: Generator
    ) -> tuple[float, dict[str, float]]:
        """Compute the gradients of the answers about drawn pictures, and of the extra losses."""
        see = rng.random() < phase.vision_share
        features = self.see(batch, see)
        second = rng.random() < phase.second_share
        answer_loss, seen, early = self.answer(batch, features, second)
        loss = answer_loss
        if phase.probe_weight:
            misplaced = self.probe(early, batch.frame)
            seen["probe loss"] = misplaced.item()
            loss = loss + phase.probe_weight * misplaced
        if see and phase.words_weight and batch.maps is not None:
            words_loss, right = self.words.loss(features.flatten(0, 1), batch.maps)
            loss = loss + phase.words_weight * words_loss
            seen |= {f"{name}{batch.name}": value for name, value in nan_free(right).items()}
        loss.backward()
        return answer_loss.item(), seen

    def see(self, batch: Batch, learn: bool) -> Tensor:
        """The vision features [samples, vision tokens of a sample, d]."""
        samples = len(batch.questions)
        with torch.set_grad_enabled(learn):
            parts = [_encode(self.model.model.visual, view, samples) for view in batch.views]
            return torch.cat(parts, 1)

    def answer(
        self, batch: Batch, features: Tensor, second: bool
    ) -> tuple[Tensor, dict[str, float], Tensor]:
        """The loss of the answers, exact match by task, and early states of the vision tokens."""
        packed = self.packer.pack(batch.frame, batch.questions, second)
        answered = run_packed(self.model, packed, features, self.packer.image)
        right = torch.zeros(answered.where.shape, dtype=torch.bool)
        right[answered.where] = answered.logits.argmax(-1) == answered.labels
        found: dict[str, list[float]] = {}
        for row, answers in zip(right, packed.answers, strict=True):
            for task, first, end in answers:
                first, end = first - packed.prefix - 1, end - packed.prefix - 1
                found.setdefault(task + batch.name, []).append(float(row[first:end].all()))
        seen = {name: sum(values) / len(values) for name, values in found.items()}
        early = answered.early[packed.ids == self.packer.image]
        return functional.cross_entropy(answered.logits, answered.labels), seen, early


def _encode(visual: Any, view: Views, samples: int) -> Tensor:
    features = encode_pictures(visual, view.patches, view.high, view.wide)
    return features.reshape(samples, -1, features.shape[-1])


def _places(picture: int, high: int, wide: int) -> Tensor:
    """The picture, row and column of each token of a picture, [high wide, 3]."""
    axes = (torch.tensor([picture]), torch.arange(high), torch.arange(wide))
    return torch.cartesian_prod(*axes)
