"""The training pipeline: a run cut and continued, its parts against those of transformers."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training.batches import regime_batch
from training.easy_vqa import EasyVQA
from training.grow import grow, sources
from training.joint_stage import Learner
from training.optim import orthogonal
from training.packing import answer
from training.vision_stage import Words

from plphp.demo.model import WEIGHTS, load
from plphp.demo.painting import Look
from plphp.demo.regimes import Regime, draw, draw_frame
from training import build, checkpoint, evaluate, retrain, schedule

TINY = 0.0005  # one step of the first stages, 6 of the last
TASKS = ["what", "describe", "refcolor"]
TALKATIVE = Regime(Look(), scales=(2,), pictures=(2, 3), tokens=(80, 140), reworded=1.0, chatty=1.0)
needs_photographs = pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def options(folder: Path, minutes: float) -> object:
    arguments = ["--out", str(folder), "--warm", str(WEIGHTS), "--scale", str(TINY)]
    return retrain.parse([*arguments, "--minutes", str(minutes)])


@needs_photographs
@pytest.mark.slow
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = retrain.Run(options(tmp_path / "whole", 1e9))
    assert whole.train(1e9, 1e9)
    done = False
    while not done:  # a leg of no time is one step
        leg = retrain.Run(options(tmp_path / "cut", 0))
        done = leg.train(0, 1e9)
    for one, other in zip(whole.average.mean, leg.average.mean, strict=True):
        assert torch.equal(one, other)
    leg.export(tmp_path / "model")
    embedded = load(path=tmp_path / "model")
    inputs = embedded.inputs([Image.new("RGB", (280, 560))], "describe picture 1.")
    assert int(inputs["mm_token_type_ids"].sum()) == 200
    assert embedded.model.generate(**inputs, max_new_tokens=3).shape[1] > 200
    last = json.loads((tmp_path / "cut" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["of"] and last["loss"] > 0


def test_the_towers_are_those_of_transformers() -> None:
    """A packed question behind another one gets the logits that the chat gets."""
    easy = EasyVQA("test")
    tokenizer = build.make_tokenizer(easy)
    model = build.make_model(tokenizer).eval()
    batch = regime_batch(np.random.default_rng(0), TALKATIVE, TASKS, 1)
    learner = Learner(model, tokenizer, Words(tokenizer, model.lm_head.weight))
    with torch.no_grad():
        packed = learner.packer.pack(batch.frame, batch.questions, second=True)
        features = learner.see(batch, learn=False)
        packed_logits = answer(model, packed, features, learner.packer.image).logits
    before, asked = batch.questions[0][:2]
    messages = batch.frame.preamble.messages(len(batch.frame.sizes), before.text)
    messages += [{"role": "assistant", "content": before.answer}]
    messages += [{"role": "user", "content": asked.text}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    rng = np.random.default_rng(0)
    drawn = draw(rng, TALKATIVE, draw_frame(rng, TALKATIVE), TASKS)
    embedded = load()
    embedded = type(embedded)(model, tokenizer, embedded.image_processor)
    embedded.image_processor.size = build.PROCESSOR["size"]
    pictures = [Image.fromarray(image) for image in drawn.images]
    inputs = embedded.inputs_of(pictures, chat + asked.answer + build.END_OF_TURN)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    (_, first, end), (_, start, stop) = packed.answers[0][:2]
    wanted = logits[-(stop - start) - 1 : -1]
    got = packed_logits[end - first : end - first + stop - start]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_packed_and_generated_answers_are_right_alike() -> None:
    """The quick measure of the shipped weights: not good at long answers about photographs yet."""
    embedded = load()
    level = evaluate.packed(embedded, "level-3", 6, seed=5)
    assert level["what"] > 0.8 and level["refcolor"] > 0.8
    assert evaluate.packed(embedded, "dense", 4, seed=5)["read"] < 0.9


def test_a_grown_model_answers_as_the_old_one() -> None:
    """More layers and other token numbers change nothing before training."""
    embedded = load()
    tokenizer = build.make_tokenizer(EasyVQA("test"))
    model = build.make_model(tokenizer).eval()
    grow(model, tokenizer, WEIGHTS)
    grown = type(embedded)(model, tokenizer, embedded.image_processor)
    picture = Image.open(WEIGHTS.parent / "pictures" / "b1.png").convert("RGB")
    said = []
    for one in (embedded, grown):
        inputs = one.inputs([picture, picture], "describe picture 2.")
        ids = one.model.generate(
            **inputs,
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=one.tokenizer.convert_tokens_to_ids(build.END_OF_TURN),
        )
        said.append(one.decode(ids[0, inputs["input_ids"].shape[1] :]))
    assert said[0] == said[1] and said[0].startswith("picture 2: ")


def test_added_layers_are_spread() -> None:
    assert sources(3, 3) == [(0, False), (1, False), (2, False)]
    assert sources(8, 6)[5:] == [(4, True), (5, False), (5, True)]
    assert [layer for layer, added in sources(8, 6) if not added] == list(range(6))


def test_muon_sets_singular_values_to_about_one() -> None:
    for shape in ((2, 8, 32), (3, 32, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_the_average_swaps_and_forgets() -> None:
    weight = torch.zeros(3)
    average = checkpoint.Average([weight])
    for _ in range(5000):
        weight.fill_(1.0)
        average.update()
    average.swap()
    assert 0.99 < float(weight[0]) < 1.0 and float(average.mean[0][0]) == 1.0


def test_seeds_of_stages_differ_and_phases_inherit() -> None:
    stages = schedule.read(warm=False)
    assert len({stage.seed for stage in stages}) == len(stages)
    assert len(schedule.read(warm=True)) < len(stages)
    last = stages[-1]
    assert last.phase(last.steps).long.tokens[1] == 4000
    assert last.factor(last.steps) == 0
    assert all(stage.phase(0) is stage.phases[0] for stage in stages)


@needs_photographs
@pytest.mark.slow
def test_a_leg_may_begin_with_questions_and_ends_at_no_rate(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--warm", str(WEIGHTS), "--skip-vision"]
    run = retrain.Run(retrain.parse([*arguments, "--dtype", "bfloat16"]))
    stage = run.stages[run.stage]
    assert stage.kind == "joint" and not any(s.kind == "joint" for s in run.stages[: run.stage])
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.step = 100  # where the schedule's rate is not zero
    run._learn(stage, most=0.0)
    assert stage.factor(100) == 1
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.equal(old, new)
    run._learn(stage, most=0.5)
    changed = [
        not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2


@needs_photographs
@pytest.mark.slow
def test_a_leg_may_begin_where_an_earlier_one_ended(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--warm", str(WEIGHTS), "--skip-vision"]
    for begins in (0, 3480):
        run = retrain.Run(retrain.parse([*arguments, "--begin-step", str(begins)]))
        stage = run.stages[run.stage]
        assert run.step == begins
        run.step = begins + 14
        assert run.factor(stage) == 0.5
        run.save()
        assert retrain.Run(retrain.parse(arguments)).factor(stage) == 0.5, "it is continued"
        run.step = begins + 100
        assert run.factor(stage) == 1
        run.file.unlink()
