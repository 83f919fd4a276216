"""The scheduler side: it decides which prompts are pruned, informs the workers and frees blocks.

Changes in vLLM: the image features that are sent for a new request, and the flag of a request that
bypasses the prefix cache; a comment at each place gives the reason. Reads in vLLM: the block tables
of the managers, because workers identify requests by their blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.logger import init_logger

from plphp.policy import LAYER_CLASSES, PLPHP
from plphp.vllm.blocks import LayerBlocks, PromptBlocks
from plphp.vllm.messages import Choice, PromptEnd, Pruned, Step, spans_of, vision_runs
from plphp.vllm.metrics import Counts
from plphp.vllm.options import Options, request_policy

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers under its own name


@dataclass
class Prompt:
    """A request whose prompt will be pruned or has been pruned.

    request: vLLM's Request
    policy, images: as in `PromptEnd`
    choice: the numbers of its plans; None until the prompt has been pruned
    """

    request: Any
    policy: PLPHP
    images: tuple[tuple[int, int, int], ...]
    choice: Choice | None = None

    @property
    def vision(self) -> int:
        """The number of vision tokens of the prompt."""
        return sum(last - first + 1 for _, first, last in self.images)


class SchedulerSide:
    """The state of the plugin in the scheduler's process, for requests that have not finished.

    prompts: prompts to prune, by request id
    blocks: how their blocks are handled, by request id; the managers of all groups share this dict
    refused: why a request is not pruned, by request id
    features: vLLM's image features of requests that no worker has got yet, by request id
    """

    def __init__(self, options: Options, block_size: int, share_prefix: bool) -> None:
        self.options = options
        self.block_size = block_size
        self.share_prefix = share_prefix
        self.prompts: dict[str, Prompt] = {}
        self.blocks: dict[str, PromptBlocks] = {}
        self.refused: dict[str, str] = {}
        self.features: dict[str, Any] = {}
        self.managers: Sequence[LayerBlocks] = ()
        self.counts = Counts()

    def bind(self, managers: Sequence[LayerBlocks]) -> None:
        """Share `blocks` with the managers of all groups."""
        self.managers = managers
        for manager in managers:
            manager.prompts = self.blocks

    def add(self, request: Any) -> None:
        """Decide whether and how a new request is pruned."""
        if request.mm_features:
            self.features[request.request_id] = request.mm_features
        params = request.sampling_params
        images = vision_runs(request.mm_features)
        try:
            policy = request_policy(self.options, params.extra_args if params else None)
        except ValueError as error:
            self.counts.refuse("bad options")
            self.refused[request.request_id] = str(error)
            logger.warning("request %s is not pruned: %s", request.request_id, error)
            return
        if policy is None or not images:
            if images:
                self.counts.count("unpruned")
            return
        policy = replace(policy, round_to=self.block_size)
        prompt = Prompt(request, policy, images)
        self.prompts[request.request_id] = prompt
        fresh = self._fresh_blocks(prompt)
        self.blocks[request.request_id] = PromptBlocks(request.num_prompt_tokens, fresh)
        if fresh is None:
            # Pruning in place overwrites blocks, so no other request may share them.
            request.skip_reading_prefix_cache = True

    def step(self, output: Any) -> Step:
        """The message to the workers about a step that was just scheduled."""
        released = frozenset(output.finished_req_ids) | frozenset(output.preempted_req_ids or ())
        for new in output.scheduled_new_reqs:
            # vLLM does not send pixels to the workers if the prefix cache holds the image. It then
            # stops with an error if the request is preempted and the image evicted, so all
            # features are sent.
            new.mm_features = self.features.pop(new.req_id, new.mm_features)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = Step(released=released)
        held = self.managers[0].req_to_blocks
        for request_id, scheduled in output.num_scheduled_tokens.items():
            start = computed[request_id]
            end = start + scheduled
            step.rows[held[request_id][(end - 1) // self.block_size].block_id] = request_id
            prompt = self.prompts.get(request_id)
            if prompt is not None and start < prompt.request.num_prompt_tokens <= end:
                step.ends[request_id] = self._prompt_end(prompt, start, end)
        return step

    def pruned(self, pruned: Pruned) -> None:
        """Free the blocks that hold no tokens after pruning, as the workers report them."""
        for request_id, choice in pruned.choices.items():
            prompt = self.prompts.get(request_id)
            if prompt is None:
                continue
            for manager, freed in zip(self.managers, choice.freed, strict=True):
                manager.drop(request_id, freed)
            if prompt.choice is None:  # a request that was preempted has been counted before
                self.counts.add(choice, prompt.vision)
            prompt.choice = choice
            if prompt.request.num_prompt_tokens % self.block_size == 0:
                # After a preemption the prefix cache could hold the whole prompt. The last token
                # would then not be computed, and its query would be missing.
                prompt.request.skip_reading_prefix_cache = True

    def finish(self, request_id: str) -> dict[str, Any] | None:
        """Delete the state of a request that finished or was aborted.

        Returns the entry of `kv_transfer_params` in its response, or None if it was not pruned.
        """
        self.features.pop(request_id, None)
        if request_id in self.refused:
            return {"plphp": {"refused": self.refused.pop(request_id)}}
        self.blocks.pop(request_id, None)
        prompt = self.prompts.pop(request_id, None)
        if prompt is None or prompt.choice is None:
            return None
        choice = prompt.choice
        return {
            "plphp": {
                "vision_tokens": prompt.vision,
                "retention": sum(choice.kept) / (prompt.vision * len(choice.kept)),
                "layer_classes": [LAYER_CLASSES[c] for c in choice.classes],
                "freed_blocks": sum(choice.freed),
            }
        }

    def _prompt_end(self, prompt: Prompt, start: int, end: int) -> PromptEnd:
        request = prompt.request
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
        for its blocks and the fresh ones.
        """
        length = prompt.request.num_prompt_tokens
        full = length // self.block_size
        if not self.share_prefix:
            return None
        policy = prompt.policy
        most = torch.tensor([policy.r + policy.delta_r], dtype=torch.float64)
        quota, total = policy.counts(most, spans_of(prompt.images, length)[None])
        kept = int((quota.sum(-1) if total is None else total)[0])
        fresh = full - (prompt.vision - kept) // self.block_size
        pool: int = self.managers[0].block_pool.num_gpu_blocks - 1
        needed = -(-length // self.block_size) + 1 + fresh
        return fresh if needed * len(self.managers) <= pool else None
