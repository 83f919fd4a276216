"""The prefix cache: a pruned prompt leaves unpruned blocks in it, and all tokens stay correct."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import answers
import pytest
import serving
from soak import preempt

import plphp

POLICY = plphp.PLPHP(r=0.3, delta_r=0.3, alpha=0.55, beta=0.45)
IMAGES = tuple(serving.picture(seed) for seed in (3, 4, 5))


def ask(question: str, policy: plphp.PLPHP | None = POLICY) -> serving.Request:
    return serving.Request(IMAGES, question, policy, 12)


def test_text_prompts_hit_as_they_did() -> None:
    chat = [{"role": "user", "content": "list the red objects. " * 20}]
    cached = []
    for made in (serving.engine(stock=True), serving.shared()):
        with made as llm:
            for _ in range(2):
                output = llm.chat(chat, ask("").sampling, use_tqdm=False)[0]
            cached.append(output.num_cached_tokens)
    assert cached[0] == cached[1] > 0


def test_another_question_does_not_read_the_images_again(reference: Any) -> None:
    questions = [ask(q) for q in ("describe picture 1.", "what is red in picture 2?", "read it.")]
    with serving.shared() as llm:
        outputs = [serving.generate(llm, [question])[0] for question in questions]
    vision = outputs[0].kv_transfer_params["plphp"]["vision_tokens"]
    assert outputs[0].num_cached_tokens == 0
    assert all(output.num_cached_tokens > vision - serving.BLOCK for output in outputs[1:])
    for question, output in zip(questions, outputs, strict=True):
        assert output.kv_transfer_params["plphp"]["retention"] < 0.9
        assert answers.agree(output, reference, question)


@pytest.mark.parametrize("policy", [POLICY, None])
def test_images_that_were_evicted_from_the_cache_are_read_again(
    policy: Any, reference: Any
) -> None:
    """Without plphp, vLLM does not send the pixels to the workers, and its engine stops."""
    request = ask("describe picture 1.", policy)
    with serving.shared() as llm:
        serving.generate(llm, [request])
        engine = llm.llm_engine
        engine.add_request("hit", serving.prompt(llm, request), request.sampling)
        for _ in range(3):
            engine.step()
        assert preempt(llm) == [False]
        engine.reset_prefix_cache()
        engine.reset_encoder_cache()
        while engine.has_unfinished_requests():
            outputs = engine.step()
    assert answers.agree(outputs[0], reference, request)


def test_the_second_turn_of_a_chat_reads_the_first_from_the_cache() -> None:
    first, cached, tokens = ask("describe picture 1."), [], []
    for made in (serving.shared(), serving.engine(share_prefix=False)):
        with made as llm:
            answer = serving.generate(llm, [first])[0].outputs[0].text
            turns = [
                *first.chat,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "describe picture 2."},
            ]
            output = llm.chat([turns], first.sampling, use_tqdm=False)[0]
            cached.append(output.num_cached_tokens)
            tokens.append(output.outputs[0].token_ids)
    assert cached[0] > 0 == cached[1]
    assert tokens[0] == tokens[1], "a hit changes no token"


def test_requests_of_all_kinds_share_one_prefix_at_once(reference: Any) -> None:
    policies = [POLICY, None, replace(POLICY, r=0.5), replace(POLICY, min_tokens=9), None]
    requests = [ask("describe picture 1.", policy) for policy in policies * 3]
    with serving.engine(max_num_batched_tokens=160) as llm:
        before = serving.free_blocks(llm)
        for _ in range(2):
            outputs = serving.generate(llm, requests)
        assert serving.free_blocks(llm) == before
    assert all(output.num_cached_tokens for output in outputs)
    for request, output in zip(requests, outputs, strict=True):
        assert answers.agree(output, reference, request) is not False


@pytest.mark.parametrize("chunk", [96, pytest.param(4096, marks=pytest.mark.slow)])
def test_an_image_that_is_added_each_turn(chunk: int, reference: Any) -> None:
    """Every turn finds the images before in the prefix cache and prunes all of them anew."""
    images = tuple(serving.picture(seed, least=6) for seed in (3, 4, 5))
    turns = [serving.Request(images[: n + 1], "describe all.", POLICY, 12) for n in range(3)]
    with serving.engine(max_num_batched_tokens=chunk) as llm:
        before = serving.free_blocks(llm)
        outputs = [serving.generate(llm, [turn])[0] for turn in turns]
        assert serving.free_blocks(llm) == before
    cached = [output.num_cached_tokens for output in outputs]
    assert 0 == cached[0] < cached[1] < cached[2]
    for turn, output in zip(turns, outputs, strict=True):
        assert output.kv_transfer_params["plphp"]["retention"] < 1
        assert answers.agree(output, reference, turn) is not False


def test_nothing_is_shared_that_was_pruned_in_place() -> None:
    with serving.engine(share_prefix=False) as llm:
        for _ in range(2):
            pruned, unpruned = serving.generate(llm, [ask("x"), ask("x", None)])
    assert pruned.num_cached_tokens == 0
    assert unpruned.num_cached_tokens > 0
