"""What the report of a prompt says where a table of shares would mislead."""

import re
from typing import Any

import pytest
import torch

import plphp
import tiny
from plphp.hf import shared_prefill
from plphp.hf.calibration import FEW

QWEN = tiny.FAMILIES["qwen2_vl"]
GREEDY = {"max_new_tokens": 2, "do_sample": False}
ONE_CLASS = plphp.PLPHP(alpha=1e-9, beta=0)  # every layer with vision tokens is attentive
OPTIONS = [{}, {"recall": plphp.Recall("int4")}, {"kv_bits": 4}]


@pytest.fixture(scope="module")
def model() -> Any:
    return QWEN.build(0)


def read(model: Any, rows: list[tiny.RowSpec], policy: Any = None, **options: Any) -> Any:
    inputs = QWEN.make_inputs(model, rows, 0)[0]
    with plphp.prune(model, policy or plphp.PLPHP(), **options) as pruning:
        model.generate(**inputs, **GREEDY)
    return pruning.report


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "padded rows"])
def test_a_prompt_without_vision_tokens_has_no_shares(model: Any, options: Any, rows: int) -> None:
    specs = [tiny.RowSpec(images=0, text=20 - 4 * row, salt=row) for row in range(rows)]
    lines = str(read(model, specs, **options)).splitlines()
    assert lines[0].startswith("cache ") and "%" not in "".join(lines)
    assert lines.count("nothing was pruned: the prompt has no vision tokens") == 1
    assert not any("gamma" in line or "nan" in line for line in lines)


def test_a_row_without_vision_tokens_is_in_the_table_of_the_others(model: Any) -> None:
    report = read(model, [tiny.RowSpec(images=0, text=20), tiny.RowSpec(images=1, text=20)])
    assert "no vision tokens" in str(report) and "of vision K/V kept" in report.summary


def test_a_turn_without_image_tells_what_is_left_of_earlier_ones(model: Any) -> None:
    inputs = QWEN.make_inputs(model, [tiny.RowSpec(images=1, text=20)], 0)[0]
    with plphp.prune(model, plphp.PLPHP(r=0.25, delta_r=0)) as pruning:
        cache = plphp.PrunedCache(model)
        said = model.generate(**inputs, **GREEDY, cache=cache)
        said = torch.cat([said, torch.full((1, 5), 7)], 1)
        model.generate(said, **GREEDY, cache=cache)
    lines = str(pruning.report).splitlines()
    assert lines[0].startswith("cache ") and "nan" not in "".join(lines)
    assert "image 1 of earlier turns: " in lines[-1] and "of its K/V is gone" in lines[-1]


def test_padding_on_the_right_is_noted(model: Any) -> None:
    specs = [tiny.RowSpec(images=1, text=20), tiny.RowSpec(images=1, text=31, salt=1)]
    left = QWEN.make_inputs(model, specs, 0)[0]
    padding = int((left["attention_mask"][0] == 0).sum())
    assert padding
    right = dict(left)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        right[name] = left[name].clone()
        right[name][0] = left[name][0].roll(-padding)
    said = {}
    with plphp.prune(model) as pruning:
        for side, inputs in (("left", left), ("right", right)):
            model.generate(**inputs, **GREEDY)
            said[side] = [note for note in pruning.report.notes if "padded" in note]
    assert said["left"] == []
    assert said["right"] == [
        "row 0 is padded on the right, so its answer follows padding: pad on the left "
        "(padding_side='left')"
    ]


def test_layers_of_one_class_are_noted(model: Any) -> None:
    rows = [tiny.RowSpec(images=1, text=20)]
    note = (
        "all pruned layers are vision-attentive: plphp.calibrate fits alpha and beta to a model; "
        "in the shell --alpha and --beta set them"
    )
    assert note in read(model, rows, ONE_CLASS).notes
    gammas = sorted(layer.gamma[0] for layer in read(model, rows).layers)
    apart = plphp.PLPHP(alpha=gammas[-1], beta=gammas[-1])
    for policy in (apart, "plphp-flat", plphp.PLPHP(r=0.4, delta_r=0, alpha=1e-9, beta=0)):
        assert "plphp.calibrate" not in str(read(model, rows, policy))
    assert "plphp.calibrate" not in str(read(model, rows, ONE_CLASS, recall=plphp.Recall("int4")))
    assert "plphp.calibrate" not in str(read(model, [tiny.RowSpec(images=0, text=9)], ONE_CLASS))


@pytest.mark.parametrize("home", ["host", "int4"])
def test_the_numbers_of_a_line_about_recall_make_its_share(model: Any, home: str) -> None:
    recall = read(model, [tiny.RowSpec(images=1, text=20)], recall=plphp.Recall(home, 0.5)).recall
    inside = [
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:bytes|of index)", str(recall))
    ]
    codes = 0 if home == "host" else recall.parked
    assert sum(inside) + codes == pytest.approx(recall.share * recall.full, rel=0.02)
    assert ("of index" in str(recall)) == (home == "host")


@pytest.fixture(scope="module")
def broken() -> Any:
    """A model whose layer 1 gives numbers that are none to the layers after it."""
    model = QWEN.build(0)
    model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    return model


NAN = "the attention of layers 2, 3 is not a number: the answer cannot be trusted"


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize(
    "policy", [ONE_CLASS, "recommended", "uniform", "random", "plphp-flat", "pyramidkv"], ids=str
)
def test_attention_that_is_not_a_number_is_noted(
    broken: Any, model: Any, policy: Any, options: Any
) -> None:
    rows = [tiny.RowSpec(images=1, text=20), tiny.RowSpec(images=1, text=31, salt=1)]
    report = read(broken, rows, policy, **options)
    assert report.notes[0] == NAN and report.undefined == (2, 3)
    assert NAN in report.remarks and NAN in report.to_dict()["notes"]
    assert "all pruned layers" not in str(report)
    assert "not a number" not in str(read(model, rows, policy, **options))


@pytest.mark.parametrize("policy", ["divprune", "fastv", "vtw", "divprune,plphp"])
def test_sequence_methods_note_it_too(broken: Any, model: Any, policy: str) -> None:
    rows = [tiny.RowSpec(images=1, text=20)]
    assert NAN in read(broken, rows, policy).notes
    assert "not a number" not in str(read(model, rows, policy))


@pytest.mark.parametrize("layer", [0, 3])
def test_a_key_that_is_not_a_number_is_noted_in_its_own_layer(layer: int) -> None:
    model = QWEN.build(0)
    model.get_decoder().layers[layer].self_attn.k_proj.weight.data[0, 0] = torch.nan
    report = read(model, [tiny.RowSpec(images=1, text=20)])
    which = "layer 3" if layer else "layers 0 to 3"
    assert report.notes[0].startswith(f"the attention of {which} is not a number")


def test_a_prompt_without_images_notes_it(broken: Any) -> None:
    assert NAN in read(broken, [tiny.RowSpec(images=0, text=20)]).notes


def test_a_cache_of_a_shared_prefill_notes_it(broken: Any) -> None:
    inputs = QWEN.make_inputs(broken, [tiny.RowSpec(images=1, text=20)], 0)[0]
    once = shared_prefill.read(broken, inputs)
    with plphp.prune(broken, "plphp") as pruning:
        report = once.pruned(pruning).report
    assert report is not None and NAN in report.notes


def test_a_step_of_rounding_that_keeps_everything_is_noted(model: Any) -> None:
    rows = [tiny.RowSpec(images=1, text=20)]
    note = "kept everything: they would drop fewer tokens of a row than round_to=1000"
    assert note in str(read(model, rows, plphp.PLPHP(round_to=1000)))
    for policy in (plphp.PLPHP(round_to=2), plphp.PLPHP(r=1, delta_r=0, round_to=1000)):
        assert "round_to" not in str(read(model, rows, policy))


def test_calibration_on_few_prompts_warns(model: Any) -> None:
    inputs = QWEN.make_inputs(model, [tiny.RowSpec(images=1, text=20)], 0)[0]
    plphp.calibrate(model, [inputs] * FEW)
    text = QWEN.make_inputs(model, [tiny.RowSpec(images=0, text=20)], 0)[0]
    with pytest.warns(UserWarning, match=f"calibration on {FEW - 1} prompts with images"):
        plphp.calibrate(model, [inputs] * (FEW - 1) + [text])
