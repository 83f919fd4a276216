"""Edge cases found in use: options, wrappers, copies, caches that are given to another model.

Each kind of fault that was found in one place is also tested in similar places.
"""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import plphp
import tiny
from plphp.hf import compat
from plphp.hf.attach import prune
from plphp.models import refusal
from versions import cache_of

QWEN = tiny.FAMILIES["qwen2_vl"]
ONE = [tiny.RowSpec(images=1, text=20)]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
SOME = plphp.PLPHP(r=0.3, delta_r=0)


@pytest.fixture
def model() -> Any:
    return QWEN.build(0)


def prompt(model: Any, rows: list[tiny.RowSpec] = ONE) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = QWEN.make_inputs(model, rows, 0)[0]
    return inputs


def later(model: Any, cache: Any) -> dict[str, Tensor]:
    """A first turn with a cache, and a text-only prompt after it."""
    inputs = prompt(model)
    said = model.generate(**inputs, **GREEDY, cache=cache)
    ids = torch.cat([said, torch.full((1, 3), tiny.SPECIAL)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- options of a checkpoint's generation config --------------------------------------------------

DEFAULTS = {
    "hybrid": {"cache_implementation": "hybrid"},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "both": {"cache_implementation": "hybrid", "use_cache": False},
}


@pytest.mark.parametrize("how", ["default", "passed copy", "passed other"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_a_checkpoint_give_way_to_the_pruned_cache(
    model: Any, name: str, how: str
) -> None:
    inputs = prompt(model)
    with plphp.prune(model, SOME) as pruning:
        wanted = model.generate(**inputs, **GREEDY)
        retention = pruning.report.retention
    for option, value in DEFAULTS[name].items():
        setattr(model.generation_config, option, value)
    before = model.generation_config.to_dict()
    options: dict[str, Any] = GREEDY
    if how == "passed copy":  # as pipelines do
        passed = copy.deepcopy(model.generation_config)
        passed.update(**GREEDY)
        options = {"generation_config": passed}
    elif how == "passed other":
        options = {"generation_config": GenerationConfig(pad_token_id=0, **GREEDY)}
    with plphp.prune(model, SOME) as pruning:
        assert torch.equal(model.generate(**inputs, **options), wanted)
        assert pruning.report.retention == retention < 1
    assert model.generation_config.to_dict() == before
    assert "_prepare_generation_config" not in vars(model)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"output_attentions": True}],
    ids=str,
)
def test_a_passed_config_counts_like_keywords(model: Any, options: dict[str, Any]) -> None:
    config = GenerationConfig(**options, max_new_tokens=2, pad_token_id=0)
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match=next(iter(options))):
        model.generate(**prompt(model), generation_config=config)


def test_a_config_without_cache_does_not_stop_a_bare_forward(model: Any) -> None:
    model.config.get_text_config().use_cache = False
    with plphp.prune(model) as pruning, torch.no_grad():
        assert isinstance(cache_of(model(**prompt(model))), plphp.PrunedCache)
    assert pruning.report.images == (1,)


@pytest.mark.parametrize("where", ["keyword", "passed", "default"])
def test_an_answer_that_a_static_cache_cannot_hold_is_refused(model: Any, where: str) -> None:
    inputs = prompt(model)
    options: dict[str, Any] = {"max_new_tokens": 50}
    if where == "passed":
        options = {"generation_config": GenerationConfig(max_new_tokens=50, pad_token_id=0)}
    if where == "default":
        model.generation_config.max_new_tokens = 50
        options = {}
    with plphp.prune(model):
        cache = plphp.PrunedCache(model, inputs["input_ids"].shape[1] + 10, static=True)
        with pytest.raises(ValueError, match="max_len"):
            model.generate(**inputs, **options, cache=cache)


def test_what_rewrites_the_prompt_or_runs_other_code_is_refused(model: Any) -> None:
    with plphp.prune(model):
        for options in ({"token_healing": True}, {"penalty_alpha": 0.6, "top_k": 4}):
            with pytest.raises(plphp.UnsupportedModeError, match=next(iter(options))):
                model.generate(**prompt(model), **GREEDY, **options)
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(plphp.UnsupportedModeError, match="output_attentions"):
            model(**prompt(model))


# --- assisted decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["keyword", "passed"])
def test_prompt_lookup_in_a_later_turn_is_refused(model: Any, where: str) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if where == "passed":
        options = {"generation_config": GenerationConfig(**options, **GREEDY, pad_token_id=0)}
    else:
        options |= GREEDY
    with plphp.prune(model, SOME):
        cache = plphp.PrunedCache(model)
        more = later(model, cache)
        with pytest.raises(plphp.UnsupportedModeError, match="prompt_lookup_num_tokens"):
            model.generate(**more, **options, cache=cache)
        model.generate(**more, **GREEDY, cache=cache)  # the cache can still be used


@pytest.mark.parametrize("method", ["plphp", "vtw"])
def test_prompt_lookup_by_default_is_left_out_where_it_cannot_be(model: Any, method: str) -> None:
    """It only changes the speed. With a sequence method it is left out of a first turn too."""
    with plphp.prune(model, method):
        cache = plphp.PrunedCache(model)
        wanted = model.generate(**later(model, cache), **GREEDY, cache=cache)
    model.generation_config.prompt_lookup_num_tokens = 3
    with plphp.prune(model, method):
        cache = plphp.PrunedCache(model)
        assert torch.equal(model.generate(**later(model, cache), **GREEDY, cache=cache), wanted)


def test_assisted_decoding_of_recurrent_decoders_is_refused() -> None:
    family = tiny.FAMILIES["qwen3_5"]
    model = family.build(0)
    inputs = family.make_inputs(model, ONE, 0)[0]
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="recurrent"):
        model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)


def test_guidance_leaves_the_report_of_the_prompt(model: Any) -> None:
    negative = torch.full((1, 5), tiny.SPECIAL)
    seen = []
    with plphp.prune(model) as pruning:

        def note(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(pruning.report.images)
            return scores

        model.generate(
            **prompt(model), **GREEDY, guidance_scale=1.5, negative_prompt_ids=negative,
            logits_processor=[note],
        )  # fmt: skip
        assert pruning.report.images == (1,)
        model(input_ids=negative)  # a prompt of its own again
        assert pruning.report.images == (0,)
    assert set(seen) == {(1,)}


# --- a cache that meets another model -------------------------------------------------------------


def meet_forward(model: Any, cache: Any) -> None:
    model(input_ids=torch.full((1, 1), 9), cache=cache)


def meet_many(model: Any, cache: Any) -> None:
    model(input_ids=torch.full((1, 3), 9), cache=cache)


def meet_generate(model: Any, cache: Any) -> None:
    ids = torch.full((1, cache.get_seq_length() + 2), 9)
    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, cache=cache)


def meet_part(model: Any, cache: Any) -> None:
    model.model.language_model(torch.full((1, 2), 9), cache=cache)


def meet_cropped(model: Any, cache: Any) -> None:
    cache.crop(-1)
    meet_forward(model, cache)


MEETINGS = [meet_forward, meet_many, meet_generate, meet_part, meet_cropped]
MADE: dict[str, Callable[[Any, Any, Path], Any]] = {
    "used": lambda model, cache, path: cache,
    "copied": lambda model, cache, path: copy.deepcopy(cache),
    "loaded": lambda model, cache, path: (
        cache.save(path / "c"),
        plphp.PrunedCache.load(model, path / "c"),
    )[1],
    "empty": lambda model, cache, path: plphp.PrunedCache(model),
}


@pytest.mark.parametrize("meet", MEETINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("made", MADE)
def test_a_pruned_cache_does_not_serve_an_unattached_model(
    model: Any, made: str, meet: Callable[[Any, Any], None], tmp_path: Path
) -> None:
    if made == "empty" and meet is meet_cropped:
        return
    other = QWEN.build(0)
    with plphp.prune(model, SOME):
        used = cache_of(model.generate(**prompt(model), **GREEDY, return_dict_in_generate=True))
        cache = MADE[made](model, used, tmp_path)
    for one in (model, other):
        with torch.no_grad(), pytest.raises(plphp.UnsupportedModeError, match="not attached"):
            meet(one, cache)
    if made == "used" and meet is not meet_cropped:
        with plphp.prune(model, SOME), torch.no_grad():
            got = model(input_ids=torch.full((1, 1), 9), cache=cache).logits
            assert got.isfinite().all()


def test_a_part_of_an_attached_model_is_refused(model: Any) -> None:
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="part of a model"):
        meet_part(model, plphp.PrunedCache(model))


HOMES = (None, "host", "int4", plphp.Recall("host", budget=0.3))


@pytest.mark.parametrize("used", HOMES, ids=str)
@pytest.mark.parametrize("made", HOMES, ids=str)
def test_a_cache_is_used_under_the_recall_that_it_was_made_for(
    model: Any, made: Any, used: Any
) -> None:
    with plphp.prune(model, SOME, recall=made):
        cache = plphp.PrunedCache(model)
        more = later(model, cache)
        empty = plphp.PrunedCache(model)
    with plphp.prune(model, SOME, recall=used):
        for one, inputs in ((cache, more), (empty, prompt(model))):
            if made == used:
                model.generate(**inputs, **GREEDY, cache=one)
                continue
            with pytest.raises(plphp.UnsupportedModeError) as error:
                model.generate(**inputs, **GREEDY, cache=one)
            for home in (made, used):
                name = home.home if isinstance(home, plphp.Recall) else home
                assert (f"home='{name}'" if home else "without recall") in str(error.value)


@pytest.mark.parametrize("recall", [None, "host", "int4"])
def test_a_copied_conversation_is_independent(model: Any, recall: Any) -> None:
    with plphp.prune(model, SOME, recall=recall):
        alone = plphp.PrunedCache(model)
        more = later(model, alone)
        first = plphp.PrunedCache(model)
        later(model, first)
        copied = copy.deepcopy(first)
        assert copied.report.to_dict() == first.report.to_dict()
        wanted = model.generate(**more, **GREEDY, cache=alone)
        assert torch.equal(model.generate(**more, **GREEDY, cache=copied), wanted)
        assert first.get_seq_length() < copied.get_seq_length()
        assert torch.equal(model.generate(**more, **GREEDY, cache=first), wanted)
        with pytest.raises(plphp.UnsupportedModeError, match="deepcopy"):
            copy.copy(first)
        with pytest.raises(plphp.UnsupportedModeError, match="save"):
            pickle.dumps(first)


# --- wrappers, training, saving -------------------------------------------------------------------


def test_a_compiled_model_can_be_pruned(model: Any) -> None:
    inputs = prompt(model)
    compiled = torch.compile(model, backend="eager")
    with plphp.prune(model, SOME) as pruning:
        wanted, report = model.generate(**inputs, **GREEDY), pruning.report.to_dict()
    with plphp.prune(compiled, SOME) as pruning:
        assert pruning.model is model
        assert torch.equal(compiled.generate(**inputs, **GREEDY), wanted)
        assert pruning.report.to_dict() == report
        plphp.PrunedCache(compiled)
    assert "generate" not in vars(model)


def test_a_call_compiled_in_place_is_not_used_while_attached(model: Any) -> None:
    def compiled(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was compiled without the hooks")

    model._compiled_call_impl = compiled  # the attribute that model.compile() sets
    with plphp.prune(model, SOME) as pruning, torch.no_grad():
        model(**prompt(model))
        assert pruning.report.retention < 1
    assert model._compiled_call_impl is compiled


def test_configs_whose_layers_differ_are_read_layer_by_layer() -> None:
    layers = [SimpleNamespace(head_dim=d, num_key_value_heads=h) for d, h in ((16, 2), (32, 1))]

    class Differs:
        """Like transformers' own configs: an ambiguous attribute raises, but no AttributeError."""

        per_layer_config = layers

        def __getattr__(self, name: str) -> Any:
            if name in ("head_dim", "num_key_value_heads", "kv_lora_rank"):
                raise RuntimeError(f"{name} is a per-layer attribute")
            raise AttributeError(name)

    config = Differs()
    assert compat.head_dim(config) == 16
    assert compat.kv_heads(config) == [2, 1]
    assert compat.config_value(config, "num_key_value_heads") == [2, 1]
    assert refusal(config) == ""


def test_gradient_checkpointing_in_training_is_named(model: Any) -> None:
    model.train()
    # transformers 5.24 renamed it
    enable = "activation_checkpointing_enable"
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    with plphp.prune(model) as pruning:
        for call in (
            lambda: model.generate(**prompt(model), **GREEDY),
            lambda: model(**prompt(model)),
        ):
            with pytest.raises(plphp.UnsupportedModeError, match="checkpointing"):
                call()
        model.eval()
        model.generate(**prompt(model), **GREEDY)
        assert pruning.report.images == (1,)


SAVING: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": lambda model, path: model.save_pretrained(path),
    "push_to_hub": lambda model, path: model.push_to_hub("nobody/nothing"),
    "torch.save": lambda model, path: torch.save(model, io.BytesIO()),
    "pickle": lambda model, path: pickle.dumps(model),
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle a part": lambda model, path: pickle.dumps(model.model.language_model),
    "deepcopy a part": lambda model, path: copy.deepcopy(model.model.language_model.layers[0]),
}


@pytest.mark.parametrize("way", SAVING)
def test_saving_an_attached_model_says_what_to_do(model: Any, way: str, tmp_path: Path) -> None:
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match=r"remove\(\)"):
        SAVING[way](model, tmp_path)
    assert not list(tmp_path.iterdir())
    if way != "push_to_hub":
        SAVING[way](model, tmp_path)


# --- entering, and what prune() is given ----------------------------------------------------------


def test_entering_again_attaches_again(model: Any) -> None:
    pruning = plphp.prune(model, SOME)
    pruning.remove()
    for _ in range(2):
        pruning.report = None
        with pruning:
            model.generate(**prompt(model), **GREEDY)
            assert pruning.report.retention < 1
            with pytest.raises(plphp.UnsupportedModeError, match="outer"), pruning:
                pass
            assert "generate" in vars(model)
        assert "generate" not in vars(model)
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="already"), pruning:
        pass
    assert "generate" not in vars(model)


def test_a_policy_by_name_or_class_is_its_defaults(model: Any) -> None:
    for given, wanted in (
        ("snapkv", plphp.policy("snapkv")),
        (plphp.PLPHP, plphp.PLPHP()),
        (None, plphp.PLPHP()),
    ):
        with plphp.prune(model, given) as pruning:
            assert pruning.policy == wanted
    with plphp.prune(model, recall=plphp.Recall) as pruning:
        assert pruning.recall == plphp.Recall()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"policy": "snapvk"}, "known are"),
        ({"policy": 0.4}, "PLPHP"),
        ({"policy": {"r": 0.4}}, "PLPHP"),
        ({"recall": 0.4}, "home"),
        ({"recall": True}, "home"),
        ({"vision_mask": "x"}, r"\(B, N\)"),
        ({"vision_mask": 3}, r"\(B, N\)"),
        ({"vision_mask": {}}, r"\(B, N\)"),
        ({"vision_mask": [[0, 1], [1]]}, r"\(B, N\)"),
        ({"vision_mask": [0, 1, 1]}, r"\(B, N\)"),
        ({"vision_mask": np.zeros((1, 2, 3), int)}, r"\(B, N\)"),
        ({"vision_mask": torch.full((1, 9), 0.5)}, "float32"),
        ({"vision_mask": torch.full((1, 9), -3)}, "-3"),
    ],
    ids=str,
)
def test_wrong_arguments_of_prune_are_refused_at_once(
    model: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        prune(model, **options)
    assert "generate" not in vars(model)


def test_wrong_types_are_type_errors_too(model: Any) -> None:
    for options in ({"policy": 0.4}, {"recall": 3}, {"vision_mask": "x"}):
        with pytest.raises(TypeError):
            prune(model, **options)


def test_every_form_of_a_vision_mask_is_understood(model: Any) -> None:
    inputs = prompt(model)
    mask = (inputs["input_ids"] == tiny.IMAGE).long()
    with plphp.prune(model, SOME, vision_mask=mask) as pruning:
        wanted = model.generate(**inputs, **GREEDY)
        report = pruning.report.to_dict()
    forms: list[Any] = [mask.tolist(), mask.numpy(), mask.int(), mask.bool(), mask.to(torch.uint8)]
    forms += [lambda ids: mask.tolist(), lambda ids: mask.numpy().astype("int16")]
    for given in forms:
        with plphp.prune(model, SOME, vision_mask=given) as pruning:
            assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
            assert pruning.report.to_dict() == report


def test_a_vision_mask_that_does_not_fit_the_prompt_is_refused(model: Any) -> None:
    inputs = prompt(model)
    mask = (inputs["input_ids"] == tiny.IMAGE).long()
    wrong: list[tuple[Any, str]] = [
        (mask[:, 1:], "N = "),
        (torch.cat([mask, mask], 1), "N = "),  # the last columns are not silently used
        (mask.repeat(2, 1), "2 rows"),
        (lambda ids: None, "None"),
        (lambda ids: -3 * mask, "-3"),
        (lambda ids: mask.float(), "float32"),
        (lambda ids: mask[0], r"\(B, N\)"),
    ]
    for given, says in wrong:
        with plphp.prune(model, vision_mask=given), pytest.raises(ValueError, match=says):
            model.generate(**inputs, **GREEDY)


def test_a_cache_has_room_for_a_number_of_columns(model: Any) -> None:
    with plphp.prune(model):
        for wrong in (0, -3, "many", 2.5):
            with pytest.raises(ValueError, match="max_len"):
                plphp.PrunedCache(model, max_len=wrong)  # type: ignore[arg-type]
        assert not [n for n in ("open", "settle", "tell", "order", "found", "generating")
                    if hasattr(plphp.PrunedCache(model), n)]  # fmt: skip


def test_a_plain_cache_stays_what_it_was(model: Any) -> None:
    """The check is in PrunedCache, so an unattached model with its own cache is not affected."""
    inputs = prompt(model)
    with plphp.prune(model):
        pass
    cache = DynamicCache(config=model.config.get_text_config())
    assert model.generate(**inputs, **GREEDY, cache=cache) is not None
