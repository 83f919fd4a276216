"""Steps of a batch in several ways: each way's own tokens, whichever way had its turn before."""

import pytest
import torch

import plphp
import tiny
from invariants import truth
from plphp.bench.decode import WARM, decode_in_turn
from plphp.bench.ways import Way, cache_bytes, generate, timing
from plphp.policy import policy

STEPS, ROUNDS = 3, 3


def ways() -> list[Way]:
    novelty = policy("novelty", budget=0.4)
    return [
        Way("full"),
        Way("plphp", plphp.PLPHP()),
        Way("novelty", novelty),
        Way("host", novelty, plphp.Recall("host", 0.4)),
        Way("int4", novelty, plphp.Recall("int4", 0.5)),
        Way("stages", policy("divprune:.5/novelty", budget=0.4)),
    ]


@pytest.mark.parametrize("family", tiny.CORE)
def test_each_way_decodes_what_it_generates_alone(family: str) -> None:
    expected = truth(family, 0, "one")
    model, inputs = expected.build(), expected.inputs
    count = 1 + ROUNDS * (WARM + STEPS)
    options = {"max_new_tokens": count, "do_sample": False}
    turns: list[None] = []
    found = decode_in_turn(model, inputs, ways(), STEPS, ROUNDS, lambda: turns.append(None))
    assert len(turns) == 1 + ROUNDS * len(found)
    for one in found:
        with torch.inference_mode():
            alone = generate(model, inputs, one.way, options)
        assert torch.equal(torch.cat(one.tokens, 1), alone.tokens), one.way.name
        assert one.kv_bytes == timing([alone]).kv_bytes
        assert [len(steps) for steps in one.steps] == [STEPS] * ROUNDS
        share = 1.0 if alone.report is None else alone.report.on_device
        assert one.on_device == share


def test_what_is_in_main_memory_is_no_byte_of_the_device() -> None:
    expected = truth("llava", 0, "three")
    full, _, novelty, host, int4, _ = decode_in_turn(
        expected.build(), expected.inputs, ways(), 1, 1
    )
    assert full.on_device == 1 and host.on_device <= 0.4 < int4.on_device <= 0.5
    assert host.parked_bytes > 0 and not any(x.parked_bytes for x in (full, novelty, int4))
    assert host.kv_bytes < full.kv_bytes


def test_ratios_are_of_the_same_round() -> None:
    from plphp.bench.decode import Decoded

    def timed(*rounds: list[float]) -> Decoded:
        return Decoded(Way("x"), 1.0, 0, 0, [], [*rounds])

    slow, fast = timed([2.0, 2.0, 9.0], [20.0], [2.0]), timed([1.0], [10.0, 10.0], [4.0])
    assert slow.step_ms == 2000 and fast.step_ms == 4000
    assert slow.ratio(fast) == 2 and slow.ratio(slow) == 1


def test_report_says_what_is_on_the_device() -> None:
    expected = truth("llava", 0, "three")
    model = expected.build()
    with torch.inference_mode():
        for way in ways()[1:]:
            once = generate(model, expected.inputs, way, {"max_new_tokens": 1})
            report = once.report
            assert report is not None and once.clock.kv_bytes == cache_bytes(once.clock.cache)
            given = report.retention if report.recall is None else report.recall.share
            assert report.on_device == given < 1
