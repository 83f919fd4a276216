"""The run: what it compares is what users get, and an interruption costs and doubles nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import plphp
from plphp.demo.model import Embedded
from plphp.errors import InputError, UnsupportedModelError
from plphp.eval.answers import answer, refer
from plphp.eval.batches import in_batches, make_batch
from plphp.eval.feature_cache import remembered
from plphp.eval.methods import FULL, Setting, make, parse
from plphp.eval.run import Plan, run
from plphp.eval.shrink import shrinker
from plphp.eval.store import read_lines
from plphp.eval.summary import missing, summarize
from plphp.eval.tasks import SUITES, TASKS
from plphp.hf.attached import attached
from plphp.hf.shared_prefill import read
from plphp.inputs import Loaded
from plphp.policy import policy
from plphp.recall import Recall

SEED, FEW = 7, 6
ABOUT = {"model": "embedded"}


def silent(name: str, total: int, done: int) -> Callable[[int], None]:
    return lambda lines: None


@pytest.fixture(scope="module")
def plan() -> Plan:
    settings, _ = parse("plphp,random,uniform", ".4")
    tasks = (TASKS["easyvqa"], TASKS["difference"])
    return Plan(tasks, tuple(settings), Path(), FEW, SEED, batch=4, longest=64)


@pytest.fixture(scope="module")
def finished(embedded: Embedded, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out: Path = tmp_path_factory.mktemp("run")
    run(embedded, replace(plan, out=out), ABOUT, silent)
    return out


def lines(out: Path) -> list[str]:
    """Every line of every file, doubled ones too."""
    files = (out / "samples").iterdir()
    return sorted(row for path in files for row in path.read_text().splitlines())


# --- what is compared -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["difference", "second"])
def test_full_is_stock_generate_and_keeping_all_is_full(embedded: Embedded, name: str) -> None:
    model = embedded.model
    samples = in_batches(TASKS[name].draw(4, SEED), 4, embedded.tokenizer)[0]
    batch = make_batch(embedded, samples, 64)
    with torch.inference_mode():
        reference = refer(model, batch)
        keep_all = plphp.policy("full")
        found = answer(
            model, keep_all, batch, reference, read(model, batch.prompt, keep_all.window)
        )
        for row, sample in enumerate(samples):
            inputs = embedded.inputs(sample.images, sample.question)
            alone = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            said = embedded.decode(alone[0, inputs["input_ids"].shape[1] :])
            assert embedded.decode(reference.tokens[row]) == said
            assert embedded.decode(found.tokens[row]) == said
    assert all(all(row) for row in found.agree)
    assert max(value for row in found.kl for value in row) < 1e-4
    assert [len(row) for row in found.kl] == list(reference.lengths)
    assert found.kept == (1.0,) * len(samples)
    assert attached(model) is None


@pytest.mark.parametrize("bits", [None, 4])
def test_a_pruned_answer_is_that_of_a_run_of_its_own(embedded: Embedded, bits: int | None) -> None:
    model, policy = embedded.model, plphp.policy("random", budget=0.4)
    samples = TASKS["difference"].draw(3, SEED)
    batch = make_batch(embedded, samples, 64)
    with torch.inference_mode():
        reference = refer(model, batch)
        prompt = read(model, batch.prompt)
        found = answer(model, policy, batch, reference, prompt, kv_bits=bits)
        for row, sample in enumerate(samples):
            inputs = embedded.inputs(sample.images, sample.question)
            with plphp.prune(model, policy, kv_bits=bits) as pruning:
                alone = model.generate(**inputs, max_new_tokens=batch.limit, do_sample=False)
            said = embedded.decode(alone[0, inputs["input_ids"].shape[1] :])
            assert embedded.decode(found.tokens[row]) == said
            assert pruning.report is not None
            codes, kept = pruning.report.codes, pruning.report.retention
            assert found.kept[row] == pytest.approx(kept if codes is None else codes.share, rel=0.1)
    assert max(value for row in found.kl for value in row) > 0.01
    assert all(row[0] < 1e-6 for row in found.kl), "the first token comes from the full prompt"


def test_the_tower_reads_a_batch_once(embedded: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = embedded.model.model.visual, []
    handle = inner.register_forward_hook(lambda *args: calls.append(1))
    inputs = embedded.batch([(s.images, s.question) for s in TASKS["easyvqa"].draw(2, SEED)])
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    with torch.inference_mode():
        fresh = embedded.model.generate(**inputs, **options)
        with remembered(embedded.model):
            twice = [embedded.model.generate(**inputs, **options) for _ in range(2)]
    handle.remove()
    assert len(calls) == 2
    assert torch.equal(twice[0], fresh) and torch.equal(twice[1], fresh)
    assert "get_image_features" not in vars(embedded.model.model)


@pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")
def test_a_clip_is_a_video_whose_frames_have_the_features_of_images(embedded: Embedded) -> None:
    clip = SUITES["video"]["once@video"].draw(1, SEED)[0].images[0]
    assert isinstance(clip, tuple)
    config, inner = embedded.model.config, embedded.model.model
    video, images = embedded.inputs([clip], "x"), embedded.inputs(clip, "x")
    tokens = (video["input_ids"] == config.video_token_id).sum()
    assert tokens == (images["input_ids"] == config.image_token_id).sum() > 0
    assert (video["mm_token_type_ids"] == 2).sum() == tokens
    assert video["video_grid_thw"][0, 0] == len(clip)
    with torch.inference_mode(), remembered(embedded.model):
        one = inner.get_video_features(video["pixel_values_videos"], video["video_grid_thw"])
        other = inner.get_image_features(images["pixel_values"], images["image_grid_thw"])
        again = inner.get_video_features(video["pixel_values_videos"], video["video_grid_thw"])
    together = torch.cat(list(one.pooler_output))
    torch.testing.assert_close(together, torch.cat(list(other.pooler_output)))
    assert again is one, "the features of videos are remembered too"
    assert "get_video_features" not in vars(inner)


@pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")
def test_clips_are_asked_about_in_batches_and_by_every_kind_of_method(embedded: Embedded) -> None:
    samples = SUITES["video"]["once@video"].draw(3, SEED)
    batch = make_batch(embedded, samples, 64)
    clips = sum(len(sample.images) for sample in samples)
    assert len(batch.inputs["video_grid_thw"]) == clips and max(batch.vision) > min(batch.vision)
    by, policy = shrinker(embedded), plphp.policy("downsample", budget=0.2)
    small = make_batch(by.loaded, by.shrink(samples, policy), 64)
    for kept, tokens in zip(small.vision, batch.vision, strict=True):
        assert 0.1 * tokens < kept <= 0.22 * tokens
    with torch.inference_mode():
        reference = refer(embedded.model, batch)
        said = [embedded.decode(row) for row in reference.tokens]
        assert said == [sample.answers[0] for sample in samples]
        prompt = read(embedded.model, batch.prompt, 1)
        found = answer(
            embedded.model, plphp.policy("vidcom2,novelty", budget=0.4), batch, reference, prompt
        )
    assert found.kept == pytest.approx([0.4] * 3, abs=0.02)


def test_only_the_embedded_model_takes_clips(embedded: Embedded) -> None:
    clip = (Image.new("RGB", (112, 112)),) * 2
    with pytest.raises(InputError, match="only the embedded model"):
        Loaded(embedded.model, None).batch([([clip], "x")])


def test_a_method_in_the_tower_is_given_no_remembered_features(embedded: Embedded) -> None:
    inputs = embedded.batch([(s.images, s.question) for s in TASKS["easyvqa"].draw(2, SEED)])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}

    def both() -> list[torch.Tensor]:
        with plphp.prune(embedded.model, plphp.policy("visionzip", budget=0.3)) as pruning:
            pruned = embedded.model.generate(**inputs, **options)
        assert pruning.report is not None and pruning.report.retention < 0.5
        return [pruned, embedded.model.generate(**inputs, **options)]

    with torch.inference_mode():
        fresh = both()
        with remembered(embedded.model):
            embedded.model.generate(**inputs, **options)
            again = both()
    assert all(torch.equal(a, b) for a, b in zip(fresh, again, strict=True))


def test_smaller_pictures_take_the_tokens_that_the_budget_allows(embedded: Embedded) -> None:
    samples = TASKS["difference"].draw(2, SEED)
    by, policy = shrinker(embedded), plphp.policy("downsample", budget=0.2)
    small = make_batch(by.loaded, by.shrink(samples, policy), 64)
    whole = make_batch(embedded, samples, 64)
    for kept, tokens in zip(small.vision, whole.vision, strict=True):
        assert 0.1 * tokens < kept <= 0.2 * tokens + 2
    with pytest.raises(UnsupportedModelError, match="sizes of its own"):
        shrinker(replace(embedded, image_processor=None))


# --- what is left on the disk ---------------------------------------------------------------------


def test_every_sample_and_setting_has_its_line(finished: Path, plan: Plan) -> None:
    found = [json.loads(row) for row in lines(finished)]
    assert len(found) == 2 * FEW * len(plan.settings)
    assert missing(finished, plan.settings, ["easyvqa", "difference"]) == 0
    pruned = next(line for line in found if line["method"] == "plphp")
    assert len(pruned["kl"]) == len(pruned["agree"]) > 2
    assert 0 < pruned["kept"] < 1 and pruned["kv_bytes"] < pruned["kv_bytes_full"]


class Stop(Exception):
    """As a kill would come: in the middle of a batch."""


def test_an_interrupted_run_loses_and_doubles_nothing(
    embedded: Embedded, plan: Plan, finished: Path, tmp_path: Path
) -> None:
    plan = replace(plan, out=tmp_path)
    for allowed in (3, 2):
        left = [allowed]

        def watch(name: str, total: int, done: int, left: list[int] = left) -> Any:
            def advance(rows: int) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise Stop

            return advance

        with pytest.raises(Stop):
            run(embedded, plan, ABOUT, watch)
        (path,) = (tmp_path / "samples").iterdir()
        whole = path.read_text()
        # A torn last line, and before it one that a torn batch lost.
        path.write_text(whole[: whole.rindex("\n", 0, -1) + 20])
    run(embedded, plan, ABOUT, silent)
    assert lines(tmp_path) == lines(finished)


def test_two_shards_are_one_run(
    embedded: Embedded, plan: Plan, finished: Path, tmp_path: Path
) -> None:
    for i in range(2):
        assert i == 0 or missing(tmp_path, plan.settings, ["easyvqa"]) > 0
        run(embedded, replace(plan, out=tmp_path, shard=(i, 2)), ABOUT, silent)
    assert lines(tmp_path) == lines(finished)
    assert summarize(tmp_path)["tasks"] == summarize(finished)["tasks"]


def test_a_run_gets_more_samples(embedded: Embedded, plan: Plan, tmp_path: Path) -> None:
    small = replace(plan, tasks=plan.tasks[:1], out=tmp_path, limit=2)
    run(embedded, small, ABOUT, silent)
    before = lines(tmp_path)
    assert len(before) == 2 * len(plan.settings)
    run(embedded, replace(small, limit=3), ABOUT, silent)
    assert set(before) < set(lines(tmp_path))
    assert len(lines(tmp_path)) == 3 * len(plan.settings)
    assert summarize(tmp_path)["about"]["limit"] == 3
    with pytest.raises(InputError, match="has a run with limit 3, not 2"):
        run(embedded, small, ABOUT, silent)


@pytest.mark.parametrize("name", ["what", "second"])
def test_more_samples_do_not_change_earlier_batches(embedded: Embedded, name: str) -> None:
    samples = TASKS[name].draw(18, SEED)
    few, more = (in_batches(samples[:count], 2, embedded.tokenizer) for count in (12, 18))
    assert more[: len(few)] == few and sum(map(len, more)) == 18


def test_a_run_of_other_settings_is_refused(embedded: Embedded, plan: Plan, finished: Path) -> None:
    with pytest.raises(InputError, match="has a run with seed 7, not 8"):
        run(embedded, replace(plan, out=finished, seed=8), ABOUT, silent)


def test_a_method_that_cannot_reach_a_budget_is_an_empty_cell(
    embedded: Embedded, plan: Plan, tmp_path: Path
) -> None:
    fastv = Setting("fastv", 0.1)
    tasks, settings = (TASKS["easyvqa"],), (FULL, fastv)
    run(embedded, replace(plan, out=tmp_path, tasks=tasks, settings=settings), ABOUT, silent)
    assert any(
        "budget must be at least" in line.get("skipped", "")
        for line in read_lines(tmp_path, "easyvqa")
    )
    assert missing(tmp_path, settings, ["easyvqa"]) == 0
    rows = summarize(tmp_path)["tasks"]["easyvqa"]["settings"]
    assert [("skipped" in row) for row in rows] == [False, True]


# --- what it is told ------------------------------------------------------------------------------


def test_controls_are_added() -> None:
    settings, added = parse("plphp,plphp:paper", ".4,1")
    assert added == ["random", "uniform"]
    assert settings == [
        FULL, Setting("plphp", 0.4), Setting("plphp:paper", None), Setting("random", 0.4),
        Setting("uniform", 0.4),
    ]  # fmt: skip


def test_two_stages_share_the_budget_with_and_without_recall() -> None:
    settings, _ = parse("divprune/plphp,divprune:.8/novelty+host", ".2")
    made, parked = settings[1:3]
    assert make(made, None).second.budget == 0.4, "of the half that divprune leaves"
    assert parked.recall == Recall("host", 0.25)
    assert make(parked, None).second == policy("novelty")


@pytest.mark.parametrize(
    ("methods", "budgets", "says"),
    [
        ("best", ".4", "unknown method 'best'"),
        ("plphp/divprune", ".4", "a sequence method such as divprune, then a cache method"),
        ("divprune:9/plphp", ".4", "'divprune:9': budget must be a share"),
        ("plphp", "much", "'much' is not a number"),
        ("plphp", "0", "must be above 0"),
        ("plphp", "1.5", "must be above 0"),
        (" ,", ".4", "--methods is empty"),
    ],
)
def test_bad_settings_are_named(methods: str, budgets: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse(methods, budgets)
