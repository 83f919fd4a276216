"""`plphp bench`: numbers that add up, files, and refusals before anything is allocated."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import cache_utils

from plphp import weights
from plphp.bench import layer, machine
from plphp.bench.caches import TEXT, Schedule, Setting, dynamic, pruned, quantized
from plphp.bench.capacity import fits
from plphp.bench.shapes import SHAPES, build, shape_of
from plphp.bench.steps import Measured, bound_seconds
from plphp.bench.ways import cache_bytes
from plphp.hf import prune

SMALL = ["--context", "128", "--rounds", "2", "--new-tokens", "2", "--layers", "2"]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(shape_of("tiny", 2), 200, 2, 3, torch.float32, "cpu")


def test_a_run_gives_numbers_and_files(run: Any, tmp_path: Path) -> None:
    done = run("bench", *SMALL, "--prefill", "--out", str(tmp_path), "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    stock, own, _ = found["steps"]
    assert [row["name"] for row in found["steps"]] == ["stock", "pruned", "short"]
    assert stock["over_stock"] == [1, 1, 1]
    assert own["kv_bytes"] < stock["kv_bytes"]
    for row in found["steps"]:
        assert row["bound_ms"] == pytest.approx(row["of_bound"] * row["ms"], rel=0.05)
    assert len(found["attention"]) == 3 and len(found["prefill"]) == 2
    assert 0 < found["pruning_ms"]["least"] <= found["pruning_ms"]["median"]
    assert found["prefill"][1]["peak_bytes"] < found["prefill"][0]["peak_bytes"] + 2**22
    assert "| pruned |" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.png").stat().st_size > 1000


@pytest.mark.slow  # a minute: it compiles two steps, as tests/integration/test_static.py does
def test_other_caches_are_timed_too(run: Any) -> None:
    names = ["short", "static", "pruned-static", "vl-cache", "snapkv"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    done = run("bench", *SMALL, "--against", ",".join(names), "--keep", ".25", "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.json["steps"]}
    assert list(rows) == ["stock", "pruned", *names]
    for name in ("pruned", "pruned-static", "vl-cache", "snapkv"):
        assert rows[name]["kv_bytes"] < 0.6 * rows["stock"]["kv_bytes"], name
    assert rows["static"]["kv_bytes"] >= rows["stock"]["kv_bytes"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2, "a step or a round is compiled again, and counted steps with it"


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers has no fp8 cache"
)
def test_bytes_of_a_quantized_cache_are_counted(setting: Setting) -> None:
    model = build(setting.shape, setting.dtype, "cpu")
    whole = cache_bytes(dynamic(model, setting, 200))
    assert whole / 4 <= cache_bytes(quantized(model, setting, "fp8")) < whole / 4 + 100


def test_a_model_of_ones_own(run: Any) -> None:
    done = run("bench", "--model", "embedded", *SMALL[:-2], "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["setting"]["shape"]["name"] == "embedded"
    size = 2 * 8 * 4 * 32 * 4  # keys and values, layers, KV heads, head size, bytes
    assert found["steps"][0]["kv_bytes"] == 128 * size


def test_the_table_names_the_machine_and_what_is_absent(run: Any) -> None:
    done = run("bench", *SMALL)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    for word in ("ratio to stock", "bound", "GB/s", "The weights are random", "2 layers"):
        assert word in said
    assert "stock: transformers' DynamicCache of the whole prompt. pruned: " in said
    assert "in each round the time over stock's time in the same round" in said
    assert "a model reads no more tokens than it has positions" in said


def test_numbers_of_one_and_their_legends_are_in_the_file(run: Any, tmp_path: Path) -> None:
    one = ["--context", "128", "--rounds", "1", "--new-tokens", "2", "--layers", "1"]
    done = run("bench", *one, "--out", str(tmp_path))
    assert done.code == 0, done.err
    text = (tmp_path / "result.md").read_text()
    assert "tiny, 1 layer, " in text and "1 round of 2 tokens, A B A B." in text
    assert "short: transformers' DynamicCache of a prompt that is as short as the pruned" in text


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--shape", "gpt"], "unknown shape 'gpt'"),
        (["--layers", "7"], "1 to 6"),
        (["--keep", "half"], "--keep half"),
        (["--keep", "1.5"], "from 0 to 1"),
        (["--against", "magic"], "unknown 'magic'"),
        (["--memory", "much"], "--memory much"),
        (["--model", "embedded", "--layers", "2"], "all layers of a --model are measured"),
        (["--shape", "llava-1.5-7b", "--context", "900000"], "GiB and"),
    ],
)
def test_what_cannot_run_says_so_first(run: Any, options: list[str], word: str) -> None:
    done = run("bench", *options)
    assert done.code == 2
    assert word in done.err and done.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(run: Any) -> None:
    assert "no CUDA device" in run("bench", "--gpu").err


def test_forced_shares_are_kept_layer_by_layer(setting: Setting) -> None:
    model = build(setting.shape, setting.dtype, "cpu")
    policy = Schedule((0.5, 0.25))
    with prune(model, policy, vision_mask=setting.spans()):
        cache = pruned(model, setting, policy)
    ends = [layer.store.end for _, layer in cache.pruned_layers()]
    vision = 200 - TEXT
    assert ends[0] == pytest.approx(TEXT + 0.5 * vision, abs=3)
    assert ends[1] == pytest.approx(TEXT + 0.25 * vision, abs=3)
    assert cache.get_seq_length() == 200
    whole = 2 * 2 * 2 * 2 * 200 * 64 * 4  # layers, k and v, rows, heads, columns, size, bytes
    assert cache_bytes(dynamic(model, setting, 200)) == whole == setting.shape.kv_bytes(400, 4)


def test_both_kernels_are_timed_if_there_is_a_choice(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(layer, "has_kernel", lambda device: True)
    found = layer.attention_seconds(setting, 0.4, steps=1, rounds=1)
    kinds = [f"{rows}, {kernel}" for rows in ("plain", "masked") for kernel in ("SDPA", "Triton")]
    assert list(found) == ["stock", "pruned", "short", *kinds]


def test_images_share_the_columns(setting: Setting) -> None:
    spans = setting.spans()
    assert spans.shape == (2, 200)
    assert int((spans == 0).sum(-1)[0]) == TEXT
    assert spans.unique().tolist() == [0, 1, 2, 3]
    assert spans[0].diff().clamp(max=0).sum() == -3  # text, three images in order, text


def test_shapes_have_the_sizes_of_their_models() -> None:
    billions = {name: shape.parameters / 1e9 for name, shape in SHAPES.items()}
    assert billions["qwen2-vl-2b"] == pytest.approx(1.54, abs=0.02)
    assert billions["qwen2-vl-7b"] == pytest.approx(7.07, abs=0.05)
    assert billions["llava-1.5-7b"] == pytest.approx(6.6, abs=0.05)
    built = build(SHAPES["tiny"], torch.float32, "cpu")
    counted = sum(p.numel() for p in built.parameters() if p.dim() > 1)
    table = SHAPES["tiny"].vocabulary * SHAPES["tiny"].hidden
    assert counted == SHAPES["tiny"].parameters + table


def test_what_fits_follows_from_the_bytes() -> None:
    shape = SHAPES["llava-1.5-7b"]
    found = fits(shape, 24 << 30, 0.4, 2, 256, 2)
    left = (24 << 30) - 2 * (shape.parameters + shape.vocabulary * shape.hidden)
    token = 2 * 32 * 4096 * 2
    assert found["context"]["full"] == left // (2 * token)
    assert found["batch"]["full"] == left // (256 * token)
    peak = 0.425 + 0.575 * 2 / 32  # kept with its slack, and two layers whole
    for what in ("context", "batch"):
        full, less = found[what]["full"], found[what]["pruned"]
        assert less / full == pytest.approx(1 / peak, rel=0.02)
    assert fits(shape, 1 << 30, 0.4, 2, 4096, 2)["context"] == {"full": 0, "pruned": 0}
    assert fits(shape, 24 << 30, 1.0, 2, 4096, 2)["context"]["pruned"] == left // (2 * token)


def test_ratios_are_taken_round_by_round(setting: Setting) -> None:
    slow = Measured("slow", [[2.0, 4.0, 3.0], [9.0, 8.0, 7.0]])
    fast = Measured("fast", [[1.0, 2.0, 1.5], [2.0, 2.0, 2.0]])
    assert slow.ratio(fast) == (3.0, 2.0, 4.0)
    assert slow.seconds == 5.5
    assert bound_seconds(setting, 1000, 1e6) == pytest.approx(
        (setting.shape.parameters * 4 + 1000) / 1e6
    )


def test_a_gpu_that_hides_its_energy_is_measured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def refuse(*args: Any) -> float:
        raise Refused("Not Supported")

    fake = ModuleType("pynvml")
    fake.__spec__ = ModuleSpec("pynvml", None)
    fake.NVMLError, fake.nvmlInit = Refused, lambda: None  # type: ignore[attr-defined]
    fake.nvmlDeviceGetHandleByIndex = lambda index: index  # type: ignore[attr-defined]
    fake.nvmlDeviceGetTotalEnergyConsumption = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert machine.energy_meter("cuda") == (None, "NVML does not tell: Not Supported")
    fake.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 2500  # type: ignore[attr-defined]
    meter, name = machine.energy_meter("cuda")
    assert name == "NVML" and meter is not None and meter() == 2.5


def test_energy_is_that_of_all_packages_and_survives_the_end_of_a_counter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    assert machine.energy_meter("cpu")[0] is None
    for name, joules in (("intel-rapl:0", 90), ("intel-rapl:1", 5), ("intel-rapl:0:0", 50)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules}000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("99999999\n")
    meter, name = machine.energy_meter("cpu")
    assert name == "RAPL, 2 packages" and meter is not None and meter() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("10000000\n")  # past its end
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("7000000\n")
    assert meter() == 22


def test_the_first_token_is_timed_with_the_tower(run: Any) -> None:
    words = ["bench", "--context", "128", "--rounds", "1", "--layers", "1", "--images", "2"]
    done = run(*words, "--first-token", "divprune:.5,divprune:.5/plphp", "--json")
    assert done.code == 0, done.err
    stock, *others = done.json["first_token"]
    assert [row["name"] for row in others] == ["divprune:.5", "divprune:.5/plphp"]
    assert stock["over_stock"] == stock["decoder_over_stock"] == [1, 1, 1]
    for row in (stock, *others):
        assert 0 < row["tower_ms"] < row["ms"]
        assert row["tower_share"] == pytest.approx(row["tower_ms"] / row["ms"], abs=0.01)
    first, both = others
    assert stock["kept"] == 1 and not stock["stages"]
    assert first["kept"] == pytest.approx(0.5, abs=0.02) and len(first["stages"]) == 1
    one, two = both["stages"]
    assert both["kept"] == pytest.approx(one["kept"] * two["kept"], abs=1e-3)
    assert both["kept"] < first["kept"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--first-token", "best"], "--first-token best: unknown policy"),
        (["--first-token", "divprune:2"], "budget must be a share from 0 to 1"),
        (["--first-token", "downsample:.5"], "makes the images smaller instead"),
        (["--first-token", " "], "--first-token is empty"),
        (["--first-token", "divprune", "--out", "x"], "leave out --model and --out"),
        (["--first-token", "divprune", "--shape", "mantis-8b"], "has no vision tower for mantis"),
        (["--first-token", "divprune", "--images", "40"], "at least three columns"),
    ],
)
def test_a_first_token_that_cannot_be_timed_is_refused(
    run: Any, options: list[str], says: str
) -> None:
    done = run("bench", "--context", "128", "--layers", "1", *options)
    assert done.code == 2
    assert says in done.err


def test_rounded_weights_and_kept_codes(run: Any) -> None:
    """Both have their bytes in the table, and a token has its CPU-seconds."""
    against = ["--against", "pruned-kv4,pruned-kv2", "--weights", "int4"]
    against += ["--dtype", "bfloat16"]
    done = run("bench", *SMALL[2:], "--context", "600", *against, "--json")
    assert done.code == 0, done.err
    found = done.json
    rows = {row["name"]: row for row in found["steps"]}
    full = shape_of("tiny", 2).parameters * 2
    assert found["setting"]["weights"] == "int4"
    assert found["setting"]["weight_bytes"] < 0.9 * full
    assert rows["pruned-kv2"]["kv_bytes"] < rows["pruned-kv4"]["kv_bytes"]
    assert rows["pruned-kv4"]["kv_bytes"] < 0.7 * rows["pruned"]["kv_bytes"]
    for row in found["steps"]:
        read = row["bound_ms"] / 1e3 * found["copy_gb_s"] * 1e9 - row["kv_bytes"]
        assert read < found["setting"]["weight_bytes"]
        assert row["cpu_seconds_per_token"] > 0
    assert "needs --dtype bfloat16" in run("bench", *SMALL, "--weights", "int4").err
    refused = run("bench", *SMALL, "--weights", "int4", "--first-token", "full")
    assert "--weights cannot be used with --first-token" in refused.err


@pytest.mark.parametrize("units", [True, False])
def test_tables_say_how_weights_are_rounded(
    run: Any, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    for module in (weights, weights.linear):
        monkeypatch.setattr(module, "HAS_BFLOAT16", units)
    bits = "int8" if units else "int4"
    done = run("bench", *SMALL, "--weights", bits, "--dtype", "bfloat16")
    assert ("no bfloat16 units" in done.err) == (not units)
    assert done.code == 0, done.err
    assert f"{bits} weights" in done.out
    assert "CPU s a" in done.out or "J a token" in done.out
