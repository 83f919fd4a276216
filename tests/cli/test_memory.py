"""`plphp generate --memory`: the best that fits, what was typed, and a real limit."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from plphp import inputs
from plphp.cli import memory, needed
from plphp.cli.bits import Bits
from plphp.cli.options import Method, Source
from plphp.demo.model import WEIGHTS
from plphp.errors import InputError
from plphp.weights import weight_bytes

ASK = "describe picture 1."


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 2**32),
        ("1000B", 1000),
        ("900MB", 9 * 10**8),
        ("1.5gib", 3 * 2**29),
        ("2 KiB", 2048),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert memory.size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "4GiBs", "-1GiB", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="give a size such as 4GiB"):
        memory.size_of(text)


def test_a_number_alone_is_no_size() -> None:
    """`plphp bench --memory` counts GiB, so 4 is neither clearly 4 bytes nor 4 GiB."""
    with pytest.raises(InputError, match=r"--memory 4 has no unit: give a size such as 4GiB"):
        memory.size_of("4")


@pytest.fixture(scope="module")
def sizes() -> needed.Sizes:
    picture = str(WEIGHTS.parent / "pictures" / "a1.png")
    return needed.Sizes.of(Source(dtype="bfloat16"), [picture], [], ASK, 16)


def ways(
    sizes: needed.Sizes, method: Method | None = None, bits: Bits | None = None, **source: Any
) -> list[memory.Setup]:
    given = (method or Method(), bits or Bits(), Source(dtype="bfloat16", **source))
    return memory.setups(sizes, given)


def test_a_number_format_that_was_not_typed_is_said(sizes: needed.Sizes) -> None:
    for typed, said in (("auto", "--dtype bfloat16 --recall"), ("bfloat16", "--recall")):
        given = (Method(), Bits(), Source(dtype=typed))
        first = memory.setups(sizes, given)[0]
        assert str(first).startswith(said) and first.source.dtype == "bfloat16"


def test_less_memory_is_a_smaller_choice(
    sizes: needed.Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needed, "resident_bytes", lambda device: 0)
    every = ways(sizes)
    first, _ = memory.best(10**12, every)
    assert first is every[0]
    assert (first.source.weights, first.method.recall, first.bits.kv_bits) == (None, "int4", None)
    seen, limit = {first.source.weights}, first.needed.peak
    least = min(setup.needed.peak for setup in every)
    while limit > least:
        setup, why = memory.best(limit - 1, every)
        assert setup.needed.peak < limit and "does not fit" in why
        assert setup in every and all(x.needed.peak >= limit for x in every[: every.index(setup)])
        limit = setup.needed.peak
        seen.add(setup.source.weights)
    assert seen == {None, "int8", "int4"}
    assert (setup.bits.kv_bits, setup.method.budget) == (2, "0.1")
    with pytest.raises(InputError, match=r"nothing fits into .*; the least is .*--kv-bits 2"):
        memory.best(least - 1, every)


def test_what_was_typed_is_kept(sizes: needed.Sizes) -> None:
    own = ways(sizes, Method(policy="snapkv", budget="0.5"), weights="int8")
    assert {setup.method.policy for setup in own} == {"snapkv"}
    assert {setup.method.budget for setup in own} == {"0.5"}
    assert {setup.source.weights for setup in own} == {"int8"}
    codes, parked = {(None, 4), (None, 2)}, {("int4", None), ("int2", None)}
    assert {(setup.method.recall, setup.bits.kv_bits) for setup in own} == codes, "a budget counts"
    ranked = ways(sizes, Method(policy="snapkv"), weights="int8")
    assert {(setup.method.recall, setup.bits.kv_bits) for setup in ranked} == codes | parked
    own = ways(sizes, Method(recall="int4", recall_budget=0.9))
    assert {setup.method.recall_budget for setup in own} == {0.9}
    coded = ways(sizes, None, Bits(4))
    assert {setup.bits.kv_bits for setup in coded} == {4}
    assert {setup.method.policy for setup in coded} == {"recommended"}


def test_bytes_are_those_of_a_real_run(
    sizes: needed.Sizes, run: Callable[..., Any], picture: str
) -> None:
    """What is computed from the config is what the loaded model and its cache take."""
    for weights in (None, "int8", "int4"):
        loaded = inputs.load("embedded", "bfloat16", "cpu", weights=weights)
        assert sizes.weights[weights] == weight_bytes(loaded.model)
    asked = ("--image", picture, "--prompt", ASK, "--max-new-tokens", 16, "--json")
    asked += ("--dtype", "bfloat16")
    for options, method, bits in (
        (["--recall", "int4"], Method(recall="int4"), Bits()),
        (["--policy", "recommended", "--budget", ".4"], Method("recommended", budget=".4"), Bits()),
        (["--budget", ".4", "--kv-bits", "4"], Method(budget=".4"), Bits(4)),
    ):
        done = run("generate", *asked, *options)
        assert done.code == 0, done.err
        held, need = done.json["report"]["kv_bytes"], sizes.needed(method, bits, None)
        assert need is not None
        assert 0.6 * need.cache < held < 1.3 * need.cache, options  # slack of a short prompt


def test_all_that_is_there_is_counted(sizes: needed.Sizes) -> None:
    """On a CPU the home "host" is in the same memory; scores of many queries take their bytes."""

    def of(**options: Any) -> needed.Needed:
        found = sizes.needed(Method(**options), Bits(), None)
        assert found is not None
        return found

    assert of(recall="host", recall_budget=0.1).cache > of(policy="full").cache
    assert of(policy="snapkv").reading > of(policy="uniform").reading
    together = of(policy="plphp", budget="0.4").reading - of(policy="uniform").reading
    assert sizes.seen.bytes is not None
    layers = [layer.kv for layer in sizes.seen.bytes]
    assert together == sum(layers) - needed.WHOLE * max(layers)


def test_nothing_is_loaded_if_nothing_fits(
    run: Callable[..., Any], picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(inputs, "load", load)
    done = run("generate", "--image", picture, "--prompt", ASK, "--memory", "100MiB")
    assert done.code == 2 and done.err.count("\n") == 1
    assert done.err.startswith(
        "plphp: nothing fits into 100 MiB; the least is --dtype bfloat16 --policy"
    )


def test_refusals(run: Callable[..., Any], picture: str, tmp_path: Path) -> None:
    ask = ("generate", "--image", picture, "--prompt", ASK, "--memory")
    assert "--device cpu" in run(*ask, "4GiB", "--device", "meta").err
    assert "cannot be used with --compare" in run(*ask, "4GiB", "--compare").err
    assert "give a size" in run(*ask, "plenty").err


LIMITED = """
import re, resource, sys
import torch, transformers
import plphp.cli, plphp.cli.needed, plphp.cli.generate, plphp.demo.model, plphp.hf
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil
torch.ones(512, 512) @ torch.ones(512, 512)
status = open("/proc/self/status").read()
sizes = dict(re.findall(r"(Vm\\w+):\\s+(\\d+)", status))
data, resident = (int(sizes[name]) * 1024 for name in ("VmData", "VmRSS"))
room, file = int(sys.argv.pop(1)), int(sys.argv.pop(1))
# The checkpoint is mapped privately, which counts here although its pages can be dropped.
resource.setrlimit(resource.RLIMIT_DATA, (data + room + file,) * 2)
asked = sys.argv[1:]
for options in (["--memory", f"{resident + room}B"], ["--dtype", "float32"]):
    sys.argv[1:] = [*asked, *options]
    try:
        plphp.cli.main()
    except SystemExit as end:
        print("exit", end.code or 0, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the embedded one, with 260 MB of random weights."""
    folder: Path = tmp_path_factory.mktemp("models") / "large"
    shutil.copytree(WEIGHTS, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(WEIGHTS)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 4096, 8
    text.layer_types = ["full_attention"] * 8
    text.num_attention_heads = 32
    config.vision_config.hidden_size = 1024
    with torch.device("cpu"):
        model = Qwen2VLForConditionalGeneration(config).bfloat16()
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_process_with_this_limit_answers(large: Path, picture: str) -> None:
    """In the memory of which `--memory` is told, the choice runs and weights in float32 do not.

    Weights in the file's own format are no control: they stay file pages, which count as no data.
    """

    file = (large / "model.safetensors").stat().st_size
    asked = ["generate", "--model", str(large), "--image", picture, "--prompt", ASK]
    command = [sys.executable, "-c", LIMITED, str(180 * 2**20), str(file), *asked]
    command += ["--max-new-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    chosen, _, full = done.stderr.partition("exit 0\n")
    assert "--weights int4" in chosen and "--weights int8 (" in chosen, done.stderr
    assert "alloc" in full and "exit 2\n" in full, done.stderr
