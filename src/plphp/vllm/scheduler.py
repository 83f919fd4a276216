"""The scheduler side: it decides which prompts are pruned, informs the workers and frees blocks.

Changes in vLLM: the image features that are sent for a new request, and the flag of a request that
bypasses the prefix cache; a comment at each place gives the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger

from plphp.paged.blocks import PromptBlocks, fits, fresh_blocks
from plphp.paged.prompts import Choice, PromptEnd, PromptPart, first_asked
from plphp.policy import LAYER_CLASSES, CachePolicy
from plphp.vllm.blocks import LayerBlocks
from plphp.vllm.messages import Pruned, Step, vision_runs
from plphp.vllm.metrics import BAD_OPTIONS, BEAM_SEARCH, STREAMED_INPUT, Counts
from plphp.vllm.options import Options, request_policy

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers under its own name


WHY_NOT = {
    BEAM_SEARCH: "vLLM reads a prompt for every token",
    STREAMED_INPUT: "a prompt that grows has no last token to prune by",
}


def is_beam(params: Any) -> bool:
    """Whether vLLM's SamplingParams are those that its beam search makes for one token of a beam.

    Every token is a request of its own there, whose prompt holds the tokens before it. Pruning
    after the prompt would change no answer.
    """
    return bool(params and params.max_tokens == 1 and params.logprobs and not params.detokenize)


def kind_not_pruned(request: Any) -> str | None:
    """A kind of request that cannot be pruned, a key of `WHY_NOT`; None for vLLM's others."""
    if request.resumable:
        return STREAMED_INPUT
    return BEAM_SEARCH if is_beam(request.sampling_params) else None


@dataclass
class Prompt:
    """A request whose prompt will be pruned or has been pruned.

    request: vLLM's Request
    policy, images: as in `PromptEnd`
    choice: the numbers of its plans; None until the prompt has been pruned
    pending: for each step that computes the prompt's last token and whose outcome has not arrived,
        how often the request had been preempted when the step was scheduled
    told: the entry of a response that was sent off before the outcome; the outcome fills it
    """

    request: Any
    policy: CachePolicy
    images: tuple[tuple[int, int, int], ...]
    choice: Choice | None = None
    pending: list[int] = field(default_factory=list)
    told: dict[str, Any] | None = None

    @property
    def vision(self) -> int:
        """The number of vision tokens of the prompt."""
        return sum(last - first + 1 for _, first, last in self.images)

    def numbers(self, freed: int) -> dict[str, Any]:
        """The entry of a response. freed: number of blocks that pruning freed."""
        assert self.choice is not None
        return {
            "vision_tokens": self.vision,
            "retention": sum(self.choice.kept) / (self.vision * len(self.choice.kept)),
            "layer_classes": [
                None if code < 0 else LAYER_CLASSES[code] for code in self.choice.classes
            ],
            "freed_blocks": freed,
        }


class SchedulerSide:
    """The state of the plugin in the scheduler's process, for requests that have not finished.

    prompts: prompts to prune, by request id
    awaited: prompts whose `pending` is not empty, by request id; their requests may have finished
    blocks: how their blocks are handled, by request id; the managers of pruned groups share this
        dict
    refused: why a request is not pruned, by request id
    features: vLLM's image features of requests, by request id
    """

    def __init__(self, options: Options, block_size: int, share_prefix: bool) -> None:
        self.options = options
        self.block_size = block_size
        self.share_prefix = share_prefix
        self.prompts: dict[str, Prompt] = {}
        self.awaited: dict[str, Prompt] = {}
        self.blocks: dict[str, PromptBlocks] = {}
        self.refused: dict[str, str] = {}
        self.features: dict[str, Any] = {}
        self.managers: Sequence[LayerBlocks] = ()
        self.tables = 0  # block tables of a request, those of layers that are left alone included
        self.counts = Counts()

    def bind(self, managers: Sequence[Any]) -> None:
        """Share `blocks` with the managers of pruned groups. managers: of all groups"""
        self.tables = len(managers)
        self.managers = [manager for manager in managers if isinstance(manager, LayerBlocks)]
        for manager in self.managers:
            manager.prompts = self.blocks

    def add(self, request: Any) -> None:
        """Decide whether and how a new request is pruned."""
        if request.kv_transfer_params:
            logger.warning_once("kv_transfer_params are ignored: plphp transfers nothing")
        if request.mm_features:
            self.features[request.request_id] = request.mm_features
        params = request.sampling_params
        images = vision_runs(request.mm_features)
        try:
            policy = request_policy(self.options, params.extra_args if params else None)
        except ValueError as error:
            self.counts.refuse(BAD_OPTIONS)
            self.refused[request.request_id] = str(error)
            logger.warning("request %s is not pruned: %s", request.request_id, error)
            return
        kind = kind_not_pruned(request)
        if policy is not None and images and kind is not None:
            self.counts.refuse(kind)
            logger.warning_once(f"{kind} is not pruned: {WHY_NOT[kind]}")
            return
        if policy is None or not images:
            if images:
                self.counts.count("unpruned")
            return
        self.prompts[request.request_id] = Prompt(request, policy, images)
        self.plan_blocks(request.request_id)

    def plan_blocks(self, request_id: str) -> None:
        """Decide how the blocks of a prompt are handled, at its start and after each preemption.

        A request that was preempted computes its answer again too, so that its blocks and the fresh
        ones may not fit into the pool any more; it is then pruned in place.
        """
        prompt = self.prompts.get(request_id)
        if prompt is None:
            return
        fresh = self._fresh_blocks(prompt)
        self.blocks[request_id] = PromptBlocks(prompt.request.num_prompt_tokens, fresh)
        if fresh is None:
            # Pruning in place overwrites blocks, so no other request may share them.
            prompt.request.skip_reading_prefix_cache = True

    def step(self, output: Any) -> Step:
        """The message to the workers about a step that was just scheduled."""
        released = frozenset(output.finished_req_ids) | frozenset(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            # vLLM does not send pixels to the workers if the prefix cache holds the image. It then
            # stops with an error if the request is preempted and the image evicted, so all
            # features are sent. Model Runner V2 gets them again when such a request is resumed.
            new.mm_features = self.features.get(new.req_id, new.mm_features)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = Step(released=released)
        for request_id, scheduled in output.num_scheduled_tokens.items():
            start = computed[request_id]
            end = start + scheduled
            prompt = self.prompts.get(request_id)
            if prompt is None or start >= prompt.request.num_prompt_tokens:
                continue
            length = prompt.request.num_prompt_tokens
            first = first_asked(prompt.policy, length)
            if end >= length:
                step.ends[request_id] = self._prompt_end(prompt, start, end)
            elif end > first:
                step.parts[request_id] = PromptPart(start, end, length, first)
        return step

    def pruned(self, pruned: Pruned) -> None:
        """Free the blocks that hold no tokens after pruning, as the workers report them.

        A request may have finished, or may have been preempted, since its step was scheduled. Its
        blocks have then been freed already.
        """
        for request_id, choice in pruned.choices.items():
            prompt = self.awaited[request_id]
            preemptions = prompt.pending.pop(0)
            if not prompt.pending:
                del self.awaited[request_id]
            alive = request_id in self.prompts
            holds = alive and preemptions == prompt.request.num_preemptions
            if holds:
                for manager, freed in zip(self.managers, choice.freed, strict=True):
                    manager.drop(request_id, freed)
            if prompt.choice is None:  # a request that was preempted has been counted before
                self.counts.add(choice, prompt.vision, sum(choice.freed) if holds else 0)
            prompt.choice = choice
            if prompt.told is not None:
                prompt.told.update(prompt.numbers(freed=0))
            full = prompt.request.num_prompt_tokens // self.block_size * self.block_size
            if alive and full > first_asked(prompt.policy, prompt.request.num_prompt_tokens):
                # After a preemption the prefix cache could hold tokens whose queries are needed.
                # They would then not be computed.
                prompt.request.skip_reading_prefix_cache = True

    def finish(self, request_id: str) -> dict[str, Any] | None:
        """Delete the state of a request that finished or was aborted.

        Returns the entry of `kv_transfer_params` in its response, or None if it was not pruned. If
        the request ends with its first token, vLLM asks for the entry before it passes the outcome
        on, but sends it later: `pruned` fills it in between.
        """
        self.features.pop(request_id, None)
        if request_id in self.refused:
            return {"plphp": {"refused": self.refused.pop(request_id)}}
        self.blocks.pop(request_id, None)
        prompt = self.prompts.pop(request_id, None)
        if prompt is not None and prompt.choice is not None:
            return {"plphp": prompt.numbers(sum(prompt.choice.freed))}
        if request_id in self.awaited:
            told = self.awaited[request_id].told = {}
            return {"plphp": told}
        return None

    def _prompt_end(self, prompt: Prompt, start: int, end: int) -> PromptEnd:
        request = prompt.request
        prompt.pending.append(request.num_preemptions)
        self.awaited[request.request_id] = prompt
        fresh = None
        if self.blocks[request.request_id].fresh:
            fresh = tuple(
                tuple(block.block_id for block in manager.reserved[request.request_id])
                for manager in self.managers
            )
        length = request.num_prompt_tokens
        return PromptEnd(start, end, length, prompt.images, prompt.policy, fresh, prompt.choice)

    def _fresh_blocks(self, prompt: Prompt) -> int | None:
        """The most fresh blocks that a group can need for a prompt; None to prune in place.

        A prompt is pruned in place if prefixes are not shared, or if the whole pool is too small
        for its blocks, those of an answer computed before a preemption, and the fresh ones.
        """
        if not self.share_prefix:
            return None
        request, block = prompt.request, self.block_size
        fresh = fresh_blocks(prompt.policy, prompt.images, request.num_prompt_tokens, block)
        pool: int = self.managers[0].block_pool.num_gpu_blocks - 1
        reserved = fresh * len(self.managers)
        return fresh if fits(request.num_tokens, reserved, block, self.tables, pool) else None
