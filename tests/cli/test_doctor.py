"""`plphp doctor`: what it says of a config, and what it says where no model can be made of one."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoTokenizer

import plphp
import plphp._installed
import tiny
from plphp.cli.diagnosis import diagnose
from plphp.demo.model import WEIGHTS
from plphp.inputs.processors import local_processor
from plphp.models import image_tokens

REMOTE = """
import transformers


class OwnConfig(transformers.LlavaConfig):
    model_type = "own_vl"


class OwnModel(transformers.LlavaForConditionalGeneration):
    config_class = OwnConfig
"""


def write(folder: Path, config: Any, **changes: Any) -> Path:
    """A directory that holds the config of a model, and nothing else."""
    raw = config if isinstance(config, dict) else json.loads(config.to_json_string())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def asked(config: Any, images: int = 1, each: int | None = None, text: int = 64) -> Any:
    return diagnose("tiny", config, plphp.PLPHP(), "float32", images, each, text)


def test_the_model_may_be_an_option_as_in_other_commands(run: Callable, tmp_path: Path) -> None:
    model = write(tmp_path, tiny.FAMILIES["llava"].config())
    plain = run("doctor", model).out
    assert plain == run("doctor", "--model", model).out == run("doctor", f"--model={model}").out
    assert "sliding" not in plain


def test_layers_are_counted_at_the_prompt(run: Callable, tmp_path: Path) -> None:
    """A window that does not cover the prompt leaves its layer alone."""
    config = tiny.FAMILIES["gemma3"].config()
    model = write(tmp_path, config)
    short = run("doctor", model, "--tokens-per-image", 8, "--text-tokens", 8)
    assert "layers: 4 of 4 are pruned for this prompt\n" in short.out
    long = run("doctor", model, "--tokens-per-image", 80, "--text-tokens", 8)
    assert "layers: 3 of 4 are pruned for this prompt, 4 for shorter prompts" in long.out
    found = asked(config, 1, 80, 8)
    assert found.prunable_layers == (0, 2, 3)
    assert found.attachable_layers == (0, 1, 2, 3)
    assert asked(config, 1, 12, 8).prunable_bytes == asked(config, 1, 12, 8).token_bytes
    # the window of the sliding layer is 20, of which 19 stay for the next token
    assert found.full == found.prunable_bytes // 3 * (3 * 88 + 19)
    assert found.pruned[2] == found.prunable_bytes // 3 * (3 * (8 + 56) + 19)


def test_a_prompt_beyond_every_window_is_remarked() -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**tiny.TEXT, sliding_window=32),
        vision_config=tiny.FAMILIES["llava"].config().vision_config,
        image_token_index=tiny.IMAGE,
    )
    found = asked(config, 1, 100, 8)
    assert (found.prunable, found.prunable_layers) == (True, ())
    assert "no layer's attention window covers this prompt" in found.notes[-1]
    assert found.pruned[0] == found.full


def test_a_prompt_beyond_the_positions_is_remarked(run: Callable, tmp_path: Path) -> None:
    config = tiny.FAMILIES["llava"].config()
    most = config.text_config.max_position_embeddings
    assert asked(config, 1, most - 8, 8).notes == ()
    assert f"allows {most:,} positions" in asked(config, 1, most - 7, 8).notes[0]
    model = write(tmp_path, config)
    assert "note: the prompt has" in run("doctor", model, "--images", most).out


@pytest.mark.parametrize(
    ("kind", "tokens", "source"),
    [
        ("gemma3", 256, "from its config"),
        ("llava", 576, "from its config"),
        ("paligemma", 256, "from its config"),
        ("qwen2_vl", 37 * 37, "from its config, for a picture of 1024 x 1024 pixels"),
        ("qwen3_vl", 32 * 32, "from its config, for a picture of 1024 x 1024 pixels"),
        ("glm46v", 37 * 37, "from its config, for a picture of 1024 x 1024 pixels"),
        ("janus", 576, "from its config"),
        ("fuyu", 1024, "assumed"),
    ],
)
def test_tokens_an_image_come_from_the_model(kind: str, tokens: int, source: str) -> None:
    found = plphp.models.image_tokens(transformers.AutoConfig.for_model(kind))
    assert found[0] == tokens
    assert found[1].startswith(source)


def test_a_processor_knows_the_tokens_of_an_image() -> None:
    class Processor:
        def _get_num_multimodal_tokens(self, image_sizes: Any) -> Any:
            return transformers.BatchFeature({"num_image_tokens": [7 * len(image_sizes)]})

    config = tiny.FAMILIES["llava"].config()
    assert plphp.models.image_tokens(config, Processor())[0] == 7
    assert plphp.models.image_tokens(config, object()) == plphp.models.image_tokens(config)


def test_tokens_that_are_given_count(run: Callable, tmp_path: Path) -> None:
    model = write(tmp_path, tiny.FAMILIES["gemma3"].config())
    assert run("doctor", model, "--json").json["tokens_per_image"] == 9
    assert run("doctor", model, "--tokens-per-image", 5, "--json").json["tokens_per_image"] == 5


def test_classes_come_in_one_order(run: Callable) -> None:
    """In the sentence, in the bars and in JSON: the fewest bytes first."""
    sizes = run("doctor", "embedded", "--json").json["pruned"]
    out = run("doctor", "embedded").out
    sentence, (bars,) = out.split("with the pruned cache: ")[1], out.split("  full  ")[1:]
    names = ["indifferent", "balanced", "attentive"]
    for text in (sentence.splitlines()[0], bars):
        assert sorted(names, key=text.index) == names
        assert sorted(sizes) == sizes
        assert sorted((f"{size:,}" for size in sizes), key=text.index) == [f"{s:,}" for s in sizes]


def test_methods_before_the_cache_are_named_with_reasons(run: Callable, tmp_path: Path) -> None:
    every = ["cdpruner", "dart", "divprune", "fastv", "vidcom2", "visionzip", "vtw"]
    said = {}
    for family in ("qwen2_5_vl", "llava_onevision", "qwen3_5"):
        (tmp_path / family).mkdir()
        found = run("doctor", write(tmp_path / family, tiny.FAMILIES[family].config()))
        assert found.code == 0, found.err
        said[family] = found.out
    line = "methods that may drop vision tokens before the cache does: "
    for name in every:
        assert name in said["qwen2_5_vl"].split(line)[1].splitlines()[0]
    assert "not visionzip: visionzip chooses by the attention" in said["llava_onevision"]
    assert "not " not in said["qwen3_5"].split(line)[1].splitlines()[1]


def test_code_that_comes_with_a_model_is_trusted_on_request(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(REMOTE)
    names = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForImageTextToText": "own.OwnModel",
    }
    config = tiny.FAMILIES["llava"].config()
    model = write(tmp_path, config, model_type="own_vl", auto_map=names)
    refused = run("doctor", model)
    assert refused.code == 2
    assert "--trust-remote-code" in refused.err
    trusted = run("doctor", model, "--trust-remote-code", "--tokens-per-image", 36, "--json")
    assert trusted.code == 0, trusted.err
    assert trusted.json["prunable"]
    assert trusted.json["full"] == asked(config, 1, 36, 64).full // 2, "bfloat16"


@pytest.mark.parametrize("where", ["config", "text config", "weights", "nowhere"])
def test_bytes_are_those_of_the_format_in_which_the_model_is_loaded(
    where: str, run: Callable, tmp_path: Path
) -> None:
    raw = tiny.FAMILIES["llava"].config().to_dict() | {"dtype": None}
    raw["text_config"]["dtype"] = {"text config": "float32", "config": "bfloat16"}.get(where)
    if where == "config":
        raw["dtype"] = "float32"  # what transformers reads, whatever the language model's says
    if where == "weights":
        weights = {"codes": torch.zeros(1, dtype=torch.int8), "w": torch.zeros(1)}
        save_file(weights, tmp_path / "model-00001-of-00001.safetensors")
    model = write(tmp_path, raw)
    found = run("doctor", model, "--json").json
    given = run("doctor", model, "--dtype", "float32", "--json").json
    assert found["token_bytes"] == given["token_bytes"] // (2 if where == "nowhere" else 1)
    assert any("bfloat16 is assumed" in n for n in found["notes"]) == (where == "nowhere")
    assert not any("is assumed" in note for note in given["notes"])


def test_bytes_of_the_embedded_model_are_those_of_its_cache(run: Callable, picture: str) -> None:
    asked = ("--prompt", "describe picture 1.", "--image", picture, "--max-new-tokens", 1, "--json")
    report = run("generate", *asked).json["report"]
    told = ("--tokens-per-image", 36, "--text-tokens", report["prompt"][0] - 36)
    assert run("doctor", "embedded", *told, "--json").json["full"] == report["kv_bytes_full"]


def test_a_directory_without_a_processor_is_remarked(run: Callable, tmp_path: Path) -> None:
    """`generate` refuses it, so doctor says so: for a processor, and for a tokenizer alone."""
    for name, lacks in (("llava", "all"), ("embedded", "tokenizer"), ("embedded", "images")):
        folder = tmp_path / f"{name}-{lacks}"
        if name == "embedded":
            left_out = "tokenizer*" if lacks == "tokenizer" else "*processor*"
            shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns(left_out))
        else:
            folder.mkdir()
            write(folder, tiny.FAMILIES["llava"].config())
        result = run("doctor", folder)
        assert result.code == 0 and "can be pruned" in result.out
        assert "note: its processor cannot be loaded: " in result.out, lacks
        assert run("generate", "--model", folder, "--prompt", "x").code == 2


def test_a_model_of_text_alone_is_called_so(run: Callable, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**tiny.TEXT)
    result = run("doctor", write(tmp_path, config))
    assert result.code == 1
    because = result.out.splitlines()[1]
    assert "llama is not a vision-language model that transformers knows" in because
    assert "0 for text and i for image i" in because
    assert "per image" not in result.out and "bytes" not in result.out
    assert "bfloat16" not in result.out


def test_a_number_of_the_config_is_that_of_a_picture_in_one_tile() -> None:
    for kind in ("internvl", "idefics3", "aya_vision", "cohere2_vision", "ovis2", "lfm2_vl"):
        count, source = plphp.models.image_tokens(transformers.AutoConfig.for_model(kind))
        assert source.startswith("assumed") or "does not cut into tiles" in source, (kind, count)


# --- configs that no model can be made of ---------------------------------------------------------

MANY = 10**5
ODD = {
    "layers": ({"text_config": {"num_hidden_layers": MANY}}, "100,000"),
    "layers of the tower": ({"vision_config": {"num_hidden_layers": MANY}}, "100,000"),
    "depth of a tower": ({"vision_config": {"depth": 10**9}}, "1,000,000,000"),
    "kinds of layers": ({"text_config": {"layer_types": ["full_attention"] * MANY}}, "100,000"),
    "layers in a list": ({"vision_config": {"depths": [2, MANY]}}, "100,000"),
    "older names": ({"text_config": {"n_layer": MANY}}, "100,000"),
    "no heads": ({"text_config": {"num_attention_heads": 0}}, "config"),
    "negative width": ({"text_config": {"hidden_size": -4}}, "config"),
    "heads as words": ({"text_config": {"num_attention_heads": "four"}}, "num_attention_heads"),
    "no such text model": ({"text_config": {"model_type": "nothing"}}, "nothing"),
    "immense width": ({"text_config": {"hidden_size": 2**62}}, "config"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_configs_end_in_one_line(what: str, run: Callable, tmp_path: Path) -> None:
    changes, says = ODD[what]
    raw = json.loads(tiny.FAMILIES["llava"].config().to_json_string(use_diff=False))
    for part, change in changes.items():
        raw[part].update(change)
    result = run("doctor", write(tmp_path, raw))
    assert result.code == 2, result.out
    assert result.err.startswith("plphp: ")
    assert result.err.count("\n") == 1
    assert says in result.err
    assert str(tmp_path) in result.err or "config" in result.err


def test_a_config_without_end_ends_in_one_line(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * MANY + "1" + "}" * MANY)
    result = run("doctor", tmp_path)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "nested too deeply" in result.err


def test_building_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.cli.diagnosis.SECONDS", -1.0)
    with pytest.raises(plphp.InputError, match="takes more than"):
        asked(tiny.FAMILIES["llava"].config())


def test_a_prompt_that_no_tensor_holds_names_the_options(run: Callable) -> None:
    most = 2**31 - 1
    result = run("doctor", "embedded", "--images", most, "--tokens-per-image", most)
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"--images {most} of {most} vision tokens" in result.err
    assert f"give at most {most} in all" in result.err
    result = run("doctor", "embedded", "--images", most - 64, "--tokens-per-image", 1)
    assert result.code == 0 and "\u2593" in result.out


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "no template"])
def test_text_around_tiles_is_no_vision_token(template: str | None) -> None:
    """Idefics3's own number for a size counts the tokens that say where a tile is, too."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)]
    names = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    pictures = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 168}, max_image_size={"longest_edge": 56}
    )
    processor = transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=9, chat_template=template
    )
    config = tiny.FAMILIES["idefics3"].config()
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    told = processor._get_num_multimodal_tokens(image_sizes=[(1024, 1024)]).num_image_tokens[0]
    count, source = image_tokens(config, processor)
    assert count == 10 * 9 < told and source.startswith("from its processor")


def test_a_config_is_left_as_it_was() -> None:
    config = tiny.FAMILIES["qwen2_vl"].config()
    before = config.to_json_string()
    asked(config)
    assert config.to_json_string() == before


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without torchvision, for plphp and for transformers."""
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("transformers has read this processor with the torchvision that is here")
    monkeypatch.setattr(plphp._installed, "version", {"torch": Version("2.13.0")}.get)


@pytest.mark.usefixtures("no_torchvision")
def test_a_processor_that_needs_torchvision_is_remarked(run: Callable, tmp_path: Path) -> None:
    """By trying, where its files are here: as if Qwen2-VL were none that plphp reads without it."""
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    result = run("doctor", tmp_path, "--images", 2)
    assert result.code == 0 and "can be pruned" in result.out
    assert (
        "note: plphp's commands read its images; AutoProcessor and videos need torchvision"
        in result.out
    )
    assert "pip install torch==2.13.0 torchvision==0.28.0" in result.out
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "qwen2_5_vl"}
    config["text_config"]["model_type"] = "qwen2_5_vl_text"
    config["vision_config"]["model_type"] = "qwen2_5_vl"
    (tmp_path / "config.json").write_text(json.dumps(config))
    note = "note: its processor cannot be loaded: Qwen2VLVideoProcessor requires the Torchvision"
    for extra in ([], ["--tokens-per-image", 36]):
        assert note in run("doctor", tmp_path, *extra).out
    assert "torchvision" not in run("doctor", "embedded").out


@pytest.mark.usefixtures("no_torchvision")
@pytest.mark.parametrize(
    ("family", "needs"),
    [("qwen2_5_vl", True), ("cohere2_vision", True), ("pixtral", True), ("llava", False),
     ("gemma3", False), ("own_vl", False)],
)  # fmt: skip
def test_a_processor_that_is_elsewhere_is_known_by_its_class(family: str, needs: bool) -> None:
    config = SimpleNamespace(model_type=family)
    processor, note = local_processor("some/model", config)
    assert processor is None and ("needs torchvision" in note) == needs


def test_versions_that_were_not_tested_are_remarked(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "note:" not in run("env").out + run("doctor", "embedded").out
    assert json.loads(run("env", "--json").out)["notes"] == []
    found = {"torch": Version("2.14.0"), "torchvision": Version("0.28.0")}
    monkeypatch.setattr(plphp._installed, "version", found.get)
    for command in (["env"], ["doctor", "embedded"]):
        out = run(*command).out
        assert "note: torch 2.14.0 is installed, and plphp was tested with 2.11 to 2.13" in out
        assert "note: torchvision 0.28.0 was not built for torch 2.14.0" in out
    assert len(json.loads(run("env", "--json").out)["notes"]) == 2


def test_commands_warn_of_versions_that_were_not_tested(
    run: Callable, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plphp._installed, "version", {"torch": Version("2.14.0")}.get)
    result = run("generate", "--image", picture, "--prompt", "describe picture 1.", "--json")
    assert result.code == 0 and json.loads(result.out)["answer"]
    assert result.err.startswith("warning: torch 2.14.0 is installed, and plphp was tested with")
