"""Blocks: a running request holds the number of the formula, and none are left at the end."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import answers
import elsewhere
import pytest
import serving
from soak import SMALL, Soak, preempt, soak
from vllm import LLM

import plphp


def held_blocks(llm: LLM, requests: list[serving.Request]) -> list[list[tuple[int, list[int]]]]:
    """Per request and step of its answer: tokens computed, and blocks held per group."""
    scheduler = serving.scheduler_of(llm)
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    seen: dict[int, list[tuple[int, list[int]]]] = {}
    update = scheduler.update_from_output

    def spy(*args: Any) -> Any:
        out = update(*args)
        for request in scheduler.running:
            if request.num_output_tokens:
                held = [
                    sum(not block.is_null for block in manager.req_to_blocks[request.request_id])
                    for manager in managers
                ]
                number = int(request.request_id.split("-")[0])
                seen.setdefault(number, []).append((request.num_computed_tokens, held))
        return out

    scheduler.update_from_output = spy
    outputs = serving.generate(llm, requests)
    scheduler.update_from_output = update
    return [seen[int(output.request_id)] for output in outputs]


@pytest.mark.parametrize("share", [True, False])
def test_blocks_in_use_equal_the_formula(share: bool, reference: Any) -> None:
    requests = serving.random_requests(24, seed=20)
    with serving.engine(share_prefix=share) as llm:
        held = held_blocks(llm, requests)
    freed = 0
    for request, steps in zip(requests, held, strict=True):
        report = answers.answer(reference, request, ()).report
        dead = [
            (layer.vision[0] - int((layer.kept[0, 0] >= 0).sum())) // serving.BLOCK
            for layer in report.layers
        ]
        freed += sum(dead)
        for computed, blocks in steps:
            assert blocks == [-(-computed // serving.BLOCK) - gone for gone in dead]
    assert freed > 50


ALSO = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("chunk", "share"),
    [(48, True), (4096, False), pytest.param(48, False, **ALSO), pytest.param(4096, True, **ALSO)],
)
def test_a_resumed_request_goes_on_as_if_nothing_had_happened(
    chunk: int, share: bool, reference: Any
) -> None:
    requests = [replace(r, tokens=20) for r in serving.random_requests(16, seed=78)]
    with serving.engine(share_prefix=share, max_num_batched_tokens=chunk, max_num_seqs=4) as llm:
        before, scheduler = serving.free_blocks(llm), serving.scheduler_of(llm)
        schedule, turns, due, thrown = scheduler.schedule, 0, 7, []

        def sometimes(*args: Any) -> Any:
            nonlocal turns, due, thrown
            turns += 1
            # The intervals grow: otherwise short chunks would never reach the end of a prompt.
            if turns == due:
                due += turns // 2
                thrown += preempt(llm)
            return schedule(*args)

        scheduler.schedule = sometimes
        outputs = serving.generate(llm, requests)
        assert len(thrown) > 12
        assert any(thrown) or chunk == 4096, "none was thrown out in mid-prompt"
        assert serving.free_blocks(llm) == before
    for request, output in zip(requests, outputs, strict=True):
        assert answers.agree(output, reference, request) is not False


def test_a_request_that_is_preempted_late_in_its_answer_does_not_wait_for_ever(
    reference: Any,
) -> None:
    """Its prompt, its answer so far and fresh blocks would not fit into the pool together."""
    policy = plphp.PLPHP(delta_r=0.0)
    images = tuple(serving.picture(seed, 10, least=9) for seed in (1, 2, 3))
    request = serving.Request(images, "describe picture 1.", policy, 190)
    with serving.engine(
        policy, num_gpu_blocks_override=serving.LAYERS * 16 + 1, max_model_len=512
    ) as llm:
        engine, plan = llm.llm_engine, serving.scheduler_of(llm).connector.scheduler.blocks
        before = serving.free_blocks(llm)
        engine.add_request("late", serving.prompt(llm, request), request.sampling)
        fresh, outputs = [], []
        for turn in range(280):
            if turn == 150:
                fresh += [blocks.fresh for blocks in plan.values()]
                assert preempt(llm) == [False]
            outputs = engine.step() or outputs
            if not engine.has_unfinished_requests():
                break
        assert fresh[0], "the prompt and its fresh blocks fit at first"
        assert not engine.has_unfinished_requests(), "the request waits with the whole pool free"
        assert serving.free_blocks(llm) == before
    assert answers.agree(outputs[0], reference, request) is not False


@pytest.mark.parametrize("share", [True, False])
def test_an_outcome_that_comes_after_a_preemption(share: bool, reference: Any) -> None:
    requests = [r for r in serving.random_requests(12, seed=45) if r.policy and r.images]
    with serving.engine(share_prefix=share, disable_log_stats=False) as llm:
        before, side = serving.free_blocks(llm), serving.scheduler_of(llm).connector.scheduler
        pruned, late, freed = side.pruned, [], []

        def after_preemption(outcome: Any) -> None:
            if len(late) < 2:
                late.extend(preempt(llm))
            pruned(outcome)
            freed.append(side.counts.data.get("prompts", 0))

        side.pruned = after_preemption
        outputs = serving.generate(llm, requests)
        assert late and len(freed) > 1
        assert serving.free_blocks(llm) == before
        llm.llm_engine.step()
        assert serving.state(llm) == 0
    for request, output in zip(requests, outputs, strict=True):
        assert output.kv_transfer_params["plphp"]["freed_blocks"] >= 0
        assert answers.agree(output, reference, request) is not False


def test_a_shortage_of_blocks_changes_no_token(reference: Any) -> None:
    """The first requests are too large for the pool together, whatever the weights answer."""
    short = elsewhere.hard()
    requests = short.requests(10, seed=40)
    with serving.engine(**short.engine(Path())) as llm:
        scheduler, thrown = serving.scheduler_of(llm), []
        original = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **k: (thrown.append(1), original(*a, **k))
        before = serving.free_blocks(llm)
        outputs = serving.generate(llm, requests)
        assert thrown
        assert serving.free_blocks(llm) == before
    for request, output in zip(requests, outputs, strict=True):
        assert answers.agree(output, reference, request) is not False


@pytest.mark.slow  # the hard modes of test_processes.py have arrivals and aborts too
def test_requests_that_come_and_go_change_no_other(reference: Any) -> None:
    """Requests arrive one by one while others run; every third is aborted at a random step."""
    rng = random.Random(90)
    requests = serving.random_requests(30, seed=90)
    with serving.engine(max_num_batched_tokens=64, max_num_seqs=6) as llm:
        engine, before = llm.llm_engine, serving.free_blocks(llm)
        left = {str(n): rng.randrange(1, 25) for n in range(0, len(requests), 3)}
        added, ended, aborted = 0, {}, 0
        while added < len(requests) or engine.has_unfinished_requests():
            if added < len(requests) and rng.random() < 0.4:
                new = requests[added]
                engine.add_request(str(added), serving.prompt(llm, new), new.sampling)
                added += 1
            ended |= {output.request_id: output for output in engine.step() if output.finished}
            for name in [name for name in left if int(name) < added and name not in ended]:
                left[name] -= 1
                if left[name] == 0:
                    engine.abort_request([name])
                    aborted += 1
        assert serving.free_blocks(llm) == before
    assert aborted > 5 and len(ended) + aborted == len(requests)
    for name, output in ended.items():
        assert answers.agree(output, reference, requests[int(name)]) is not False


@pytest.mark.parametrize("share", [True, False])
def test_random_aborts_and_preemptions_leave_nothing_behind(share: bool) -> None:
    """A short run of `make soak-vllm`."""
    found = soak(150, share)
    assert found["blocks left in use"] == 0
    assert found["entries left in the scheduler's and the worker's side"] == 0
    happened = ("aborted", "aborted in mid-step", "preempted by force in mid-prompt")
    assert all(found[name] for name in (*happened, "plugin: prompts", "plugin: unpruned"))


def test_the_soak_notices_requests_that_wait_for_ever() -> None:
    with serving.engine(**SMALL) as llm:
        run = Soak(llm, seed=5)
        run._add("waits")
        run.engine.step = lambda: []  # an engine that no longer schedules
        run.rng.random = lambda: 1.0  # and nobody aborts
        with pytest.raises(RuntimeError, match="1 requests wait for 50 steps"):
            run.run(0)
