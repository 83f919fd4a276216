"""The table of a report and its lines on bytes: rows, shares of what entered, codes and slots."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import plphp
import plphp.demo
import tiny
from plphp.cli.generate import Job, answer
from plphp.inputs import told_apart
from plphp.inspector import result_of
from plphp.models.spans import FRAMES
from plphp.report import RECENT

GREEDY = {"max_new_tokens": 2, "do_sample": False}
PICTURE = str(Path(plphp.demo.__file__).parent / "pictures" / "a1.png")
ONE = [tiny.RowSpec(images=1, text=20)]
TWO = [*ONE, tiny.RowSpec(images=1, text=31, salt=1)]


def read(
    rows: list[tiny.RowSpec], policy: Any = "plphp", family: str = "qwen2_vl", **options: Any
) -> plphp.Report:
    model = tiny.FAMILIES[family].build(0)
    inputs = tiny.FAMILIES[family].make_inputs(model, rows, 0)[0]
    with plphp.prune(model, policy, **options) as pruning:
        model.generate(**inputs, **GREEDY)
    assert pruning.report is not None
    return pruning.report


def table(report: plphp.Report) -> tuple[list[str], list[list[str]]]:
    """The heading and the lines of the layers, each cut into its cells."""
    head, *lines = str(report).splitlines()
    count = len(report.layers) * len(report.prompt)
    return re.split(r"  +", head), [line.split() for line in lines[:count]]


def test_a_batch_has_a_column_of_rows() -> None:
    report = read(TWO)
    head, lines = table(report)
    assert head[:3] == ["layer", "row", "gamma"]
    numbers = [(int(line[0]), int(line[1])) for line in lines]
    assert numbers == [(layer.layer, row) for layer in report.layers for row in (0, 1)]
    assert "row" not in table(read(ONE))[0]


def test_kept_tokens_are_counted_of_those_that_entered() -> None:
    report = read(ONE, "divprune,plphp")
    head, lines = table(report)
    assert head[-1] == "kept / entered, of all vision tokens"
    entered, every = int((report.entered(0)[0] >= 0).sum()), report.layers[0].vision[0]
    assert 0 < entered < every
    for line in lines:
        kept, of = map(int, line[-3].split("/"))
        assert (of, line[-1]) == (entered, str(every))
        assert kept == pytest.approx(float(line[3]) * of, abs=1)
    assert f"DivPrune left {entered / every:.1%} of the vision tokens: from layer 0 on" in str(
        report
    )


@pytest.mark.parametrize("home", ["host", "int4"])
def test_with_recall_a_layer_has_no_class(home: str) -> None:
    report = read(ONE, recall=plphp.Recall(home, 0.5))
    assert {line[2] for line in table(report)[1]} == {"-"}
    assert {layer.layer_class for layer in result_of(report, home, None).layers} == {None}
    without = read(ONE)
    assert all(line[2].startswith("vision-") for line in table(without)[1])
    assert None not in {layer.layer_class for layer in result_of(without, "", None).layers}
    assert "% of vision K/V is in full on the device, and" in report.summary


def test_a_cache_without_vision_tokens_says_so() -> None:
    note = "no vision token was kept: nothing after the prompt can read the images"
    assert note in read(ONE, plphp.PLPHP(budget=0)).remarks
    for other in (read(ONE), read(ONE, recall=plphp.Recall("int4", 0))):
        assert note not in other.remarks


def test_text_in_codes_is_told_without_the_text_that_stays() -> None:
    said = str(read(ONE, kv_bits=4, kv_text=True))
    assert f"vision tokens, and text but for the last {RECENT} tokens of a prompt, in 4-bit" in said
    assert "\nvision tokens in 4-bit codes: " in str(read(ONE, kv_bits=4))


@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_above_the_full_prompt_are_slots_only_where_a_slot_fits(rows: int) -> None:
    text = [tiny.RowSpec(images=0, text=20 + row, salt=row) for row in range(rows)]
    lines = [line for line in str(read(text)).splitlines() if "above the full prompt" in line]
    assert all(line.endswith("above the full prompt: numbers about the slots") for line in lines)
    report = read(ONE, plphp.PLPHP(r=1, delta_r=0))
    slot = 4 * report.kv_bytes_full // sum(report.prompt)
    more = replace(
        report,
        kv_bytes=report.kv_bytes_full + slot,
        layers=tuple(
            replace(layer, kv_bytes=layer.kv_bytes_full * 5 // 4) for layer in report.layers
        ),
    )
    assert "bytes above the full prompt: slots for the next tokens" in str(more)


def test_images_that_were_named_leave_no_doubt_about_frames() -> None:
    """Three pictures for a family that marks the frames of a video as it marks images."""
    family = tiny.FAMILIES["internvl"]
    model = family.build(0)
    inputs = family.make_inputs(model, [tiny.RowSpec(images=3, text=40)], 0)[0]
    shell = SimpleNamespace(
        model=model,
        tokenizer=SimpleNamespace(),
        inputs=lambda images, question: inputs,
        decode=lambda ids: "",
    )
    report = read([tiny.RowSpec(images=3, text=40)], family="internvl")
    assert report.notes.count(FRAMES) == 1
    job = Job(shell, plphp.PLPHP(), "plphp", GREEDY)
    assert not any("frames" in note for note in answer(job, [PICTURE] * 3, "x")[1].notes)
    (note,) = [n for n in told_apart(report, videos=True).notes if "frames of a video" in n]
    assert note.endswith("counts as an image of its own") and note in FRAMES
    other = read(ONE)
    assert told_apart(other, videos=False) is other
