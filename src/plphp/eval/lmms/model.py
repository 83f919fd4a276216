"""The model classes of the lmms-eval plugin: any vision-language model of transformers, pruned."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from plphp.errors import InputError, UnsupportedModeError
from plphp.eval.lmms import chats, kept
from plphp.eval.shrink import shrinker
from plphp.hf import compat, prune
from plphp.inputs import load
from plphp.policy import policy

Prompt = tuple[Callable[[], chats.Chat], Mapping[str, Any]]  # opens its images; its options


class Pruned(lmms):
    """The parameters are the --model_args of `--model plphp`.

    pretrained: a hub id, a local directory, or "embedded"
    method: a name of `plphp.policy`, or "none" for the model without plphp
    dtype: auto, float32, bfloat16, float16
    device: cpu, cuda, ..., or auto to distribute the layers; by default accelerate's device
    attn: sdpa, eager, flash_attention_2, ...
    max_pixels: larger images are made smaller first
    num_frames: number of frames that are read of a video
    trust_remote_code: whether to run Python code that comes with the model
    options: options of the method: r=0.4, budget=0.2, ...
    Raises the errors of `plphp.policy`, of `plphp.prune` and of loading a model.
    """

    def __init__(
        self,
        pretrained: str,
        method: str = "plphp",
        dtype: str = "auto",
        device: str | None = None,
        attn: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: Any = None,
        max_pixels: int | None = None,
        num_frames: int = 32,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = _policy(method, options)
        if not str(batch_size).isdigit():
            raise InputError(f"batch_size must be a number, got {batch_size!r}")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if device is None or self._world_size > 1:
            device = str(self.accelerator.device)
        self.method, self.batch_size, self.frames = method, int(batch_size), num_frames
        self.loaded = load(pretrained, dtype, device, attn, trust_remote_code)
        self.device = self.loaded.model.device  # lmms-eval counts requests of processes on it
        if self.loaded.tokenizer.pad_token is None:
            self.loaded.tokenizer.pad_token = self.loaded.tokenizer.eos_token
        self.shrink, self.pruning = chats.at_most(max_pixels), None
        if chosen is not None and chosen.kind == "images":
            self._make_pictures_smaller(chosen)
        elif chosen is not None:
            self.pruning = prune(self.loaded.model, chosen)
        self.kept: list[kept.Kept] = []

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        self.kept.clear()
        start = time.perf_counter()
        prompts = [self._prompt(request.args) for request in requests]
        answers: dict[int, GenerationResult] = {}
        batches = _batches([options for _, options in prompts], self.batch_size)
        for batch in tqdm(batches, disable=self.rank != 0, desc="Answering"):
            # Images are opened per batch, because those of a whole task would not fit in memory.
            opened = [prompts[i][0]() for i in batch]
            answers |= zip(batch, self._answer(opened, prompts[batch[0]][1]), strict=True)
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        self._say(time.perf_counter() - start, tokens)
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise UnsupportedModeError("plphp answers one round; tasks of several rounds are not run")

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise UnsupportedModeError("tasks that score given answers need --force_simple")

    def clean(self) -> None:
        """Detach the pruning and free the model. lmms-eval calls this at its end."""
        if self.pruning is not None:
            self.pruning.remove()
        self.pruning = None
        del self.loaded
        super().clean()

    def _make_pictures_smaller(self, policy: Any) -> None:
        """Use smaller images without pruning, with as many tokens as the policy would keep."""
        small, first = shrinker(self.loaded), self.shrink
        self.loaded = small.loaded
        self.shrink = lambda image: small.smaller(first(image), policy)

    def _prompt(self, args: tuple[Any, ...]) -> Prompt:
        raise NotImplementedError

    def _answer(
        self, batch: Sequence[chats.Chat], task: Mapping[str, Any]
    ) -> list[GenerationResult]:
        tokenizer = self.loaded.tokenizer
        inputs = chats.encode(self.loaded, batch, self.shrink, self.frames)
        options, stops = chats.generation(task), chats.stops(task)
        if stops:
            options |= {"stop_strings": stops, "tokenizer": tokenizer}
        out = self.loaded.model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        self._note()
        new = out[:, inputs["input_ids"].shape[1] :]
        return [
            GenerationResult(
                chats.cut(self.loaded.decode(row), stops),
                TokenCounts(output_tokens=int((row != tokenizer.pad_token_id).sum())),
            )
            for row in new
        ]

    def _note(self) -> None:
        if self.pruning is not None and self.pruning.report is not None:
            self.kept.append(kept.Kept.of(self.pruning.report))

    def _say(self, seconds: float, tokens: int) -> None:
        """Write the kept share to the log and to `throughput` in the results file.

        A warning in the log says so if nothing was pruned.
        """
        line, warn = kept.in_words(self.method, self.kept)
        logger.log("WARNING" if warn else "INFO", line)
        found = kept.numbers(self.kept) if self.pruning is not None else {}
        log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), found)


class Chat(Pruned):
    """The class for tasks that are given as chats, lmms-eval's default."""

    is_simple = False

    def _prompt(self, args: tuple[Any, ...]) -> Prompt:
        _, to_messages, options, document, task, split = args
        return lambda: to_messages(self.task_dict[task][split][document]), options


class Simple(Pruned):
    """The class for tasks that are given as images and a text, or score given answers.

    lmms-eval uses it with --force_simple.
    """

    is_simple = True

    def _prompt(self, args: tuple[Any, ...]) -> Prompt:
        text, options, to_visuals, document, task, split = args
        return lambda: self._chat(text, to_visuals, document, task, split), options

    def _chat(
        self, text: str, to_visuals: Any = None, document: Any = None, *of: Any
    ) -> chats.Chat:
        if to_visuals is None:
            return [chats.user_message((), text)]
        task, split = of
        return [chats.user_message(to_visuals(self.task_dict[task][split][document]), text)]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """The score of each request's given answer, and whether greedy decoding would give it.

        The score is the mean negative log-likelihood; for lmms-eval the smallest is the best.
        """
        self.kept.clear()
        start = time.perf_counter()
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Scoring"):
            text, answer, *rest = request.args
            if callable(answer):
                _, document, task, split = rest
                answer = answer(self.task_dict[task][split][document])
            scored = self._score(self._chat(text, *rest), str(answer))
            # lmms-eval 0.7.3 turns a bare pair into a string, which its own metrics cannot read.
            found.append(GenerationResult(scored))
        self._say(time.perf_counter() - start, 0)
        return found

    @torch.no_grad()
    def _score(self, chat: chats.Chat, answer: str) -> tuple[float, bool]:
        """Score one answer: the prompt is computed and pruned, and then the answer is fed."""
        inputs = chats.encode(self.loaded, [chat], self.shrink, self.frames)
        ids = self.loaded.tokenizer(answer, return_tensors="pt", add_special_tokens=False)
        target = ids["input_ids"].to(self.loaded.model.device)
        logits = self._logits(inputs, target)
        chances = logits.float().log_softmax(-1)
        picked = chances.gather(-1, target[..., None])
        return -float(picked.mean()), bool((chances.argmax(-1) == target).all())

    def _logits(self, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """The logits (1, T, vocabulary) that predict the tokens of target (1, T)."""
        model, columns = self.loaded.model, inputs["input_ids"].shape[1]
        whole = _followed_by(inputs, target[:, :-1])
        if self.pruning is None:  # one forward: not every model can continue with several tokens
            logits: torch.Tensor = model(**whole).logits[:, columns - 1 :]
            return logits
        read = model(**inputs, use_cache=True)
        self._note()
        logits = read.logits[:, -1:]
        if target.shape[1] == 1:
            return logits
        rest = model(
            input_ids=target[:, :-1],
            attention_mask=whole["attention_mask"],
            cache=compat.given_cache(read),
        )
        return torch.cat([logits, rest.logits], 1)


def _policy(method: str, options: dict[str, Any]) -> Any:
    if method != "none":
        return policy(method, **options)
    if options:
        raise InputError(f"method=none has no options, got {', '.join(options)}")
    return None


def _batches(options: Sequence[Mapping[str, Any]], size: int) -> list[list[int]]:
    """Batches of indices of requests with equal options."""
    alike: dict[str, list[int]] = defaultdict(list)
    for i, chosen in enumerate(options):
        alike[repr(sorted(chosen.items()))].append(i)
    return [same[k : k + size] for same in alike.values() for k in range(0, len(same), size)]


def _followed_by(inputs: dict[str, torch.Tensor], text: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of a prompt (1, N) that continues with given tokens (1, T)."""
    after = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return {
        name: torch.cat([tensor, after.get(name, torch.zeros_like(text)).to(tensor)], 1)
        if tensor.shape == inputs["input_ids"].shape
        else tensor
        for name, tensor in inputs.items()
    }
