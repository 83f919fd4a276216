"""Bad inputs: each prints one line on stderr that says what to do, and exits with code 2.

The table in docs/bad-inputs.md is made from these cases: PLPHP_WRITE_DOCS=1 rewrites it.
"""

import json
import os
import shlex
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import plphp
from plphp import inputs
from plphp.demo.model import WEIGHTS

PAGE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
PAGE_TEXT = """# Bad inputs

After this page you know what a command prints when it cannot use an input: one line on stderr that
says which input and what to do, and the exit code 2. No half-written file is left behind.
`tests/cli/test_bad_inputs.py` tries {count} bad inputs and makes this page.

DIR is a folder of broken files, `{{many}}` 260 images, `{{long}}` a name of 300 bytes, `{{escape}}`
and `{{surrogate}}` characters that no terminal shows.

<details markdown="1">
<summary>All {count} of them</summary>

| what is wrong | arguments | printed on stderr | exit code |
|---|---|---|---|
{rows}
</details>
"""


@dataclass(frozen=True)
class Case:
    """`arguments` of `plphp`; {tmp} is a folder with the files of `folder`, {png} a good image."""

    what: str
    arguments: str
    says: str
    code: int = 2


CASES = [
    Case("a URL", "generate --image https://x.org/a.png --prompt x", "a URL is not read"),
    Case("a URL of a video", "generate --model m --video s3://x/a.mp4 --prompt x", "a URL is not"),
    Case("missing file", "generate --image {tmp}/none.png --prompt x", "no such file"),
    Case("wildcard", "generate --image {tmp}/*.png --prompt x", "wildcards are not read, so name"),
    Case("wildcard as batch", "generate --batch {tmp}/* --out {tmp}/o", "so name the directory"),
    Case("empty file", "generate --image {tmp}/empty.png --prompt x", "the file is empty"),
    Case("truncated image", "generate --image {tmp}/half.png --prompt x", "broken or truncated"),
    Case("text named .png", "generate --image {tmp}/text.png --prompt x", "not an image"),
    Case("directory as image", "generate --image {tmp} --prompt x", "--batch takes directories"),
    Case("grey of 32 bits", "generate --image {tmp}/depth.tif --prompt x", "have 32 bits, from"),
    Case("decompression bomb", "generate --image {tmp}/bomb.png --prompt x", "decompression bomb"),
    Case("aspect 1 : 300", "generate --image {tmp}/wide.png --prompt x", "aspect ratio"),
    Case("no prompt text", "generate --image {png} --prompt ' '", "the prompt is empty"),
    Case("a policy in capitals", "generate --policy PLPHP --prompt x", "did you mean 'plphp'?"),
    Case("a percentage", "generate --budget 40% --prompt x", "1, got '40%': write 0.4 for 40 %"),
    Case("a percentage of snapkv", "generate --policy snapkv --budget 40 --prompt x", "write 0.4"),
    Case("percentages of a run", "eval --out {tmp}/e --budgets 40,20", "1: write 0.4 for 40 %"),
    Case("shares in percent", "bench --keep 60 --layers 1", "0 to 1: write 0.6 for 60 %"),
    Case("a format", "generate --dtype fp16 --prompt x", "'--dtype': 'fp16' is not one of"),
    Case("unknown policy", "generate --policy best --prompt x", "unknown policy 'best'"),
    Case("rate above 1", "generate --r 1.2 --prompt x", "--r + --delta-r must be at most 1"),
    Case("rate below 0", "generate --r .1 --prompt x", "--r - --delta-r must be at least 0"),
    Case("thresholds crossed", "generate --beta .5 --prompt x", "--beta must be at most --alpha"),
    Case("bits", "generate --kv-bits 3 --prompt x", "--kv-bits must be 4 or 2, got 3"),
    Case("unknown budget", "generate --budget all --prompt x", "from 0 to 1, 'image' or 'global'"),
    Case("rate that is no number", "generate --r high --prompt x", "should be a valid number"),
    Case("unknown option", "generate --rate .4 --prompt x", "No such option: --rate"),
    Case("unknown command", "prune", "No such command 'prune'"),
    Case("temperature of 0", "generate --temperature 0 --prompt x", "--temperature must be above"),
    Case("sampled comparison", "generate --compare --top-k 5 --prompt x", "needs greedy answers"),
    Case("not a vision model", "generate --model {tmp}/llama --prompt x", "not a vision-language"),
    Case("not a model", "generate --model {tmp} --prompt x", "without a config.json"),
    Case("no such directory", "generate --model {tmp}/none --prompt x", "no such directory"),
    Case("file as model", "generate --model {png} --prompt x", "is a file"),
    Case("hub out of reach", "generate --model someone/some-vlm --prompt x", "is not asked"),
    Case("too many images", "generate {many} --prompt x", "use fewer or smaller images"),
    Case("video, embedded model", "generate --video {png} --prompt x", "choose a --model"),
    Case("no such device", "generate --device cuda:9 --image {png} --prompt x", "--device cuda:9"),
    Case("no memory left", "generate --image {png} --prompt x --top-k 99", "no memory left"),
    Case("batch without out", "generate --batch {tmp}/lines.jsonl", "--batch needs --out"),
    Case("batch without prompt", "generate --batch {tmp} --out {tmp}/o", "needs --prompt"),
    Case("batch of nothing", "generate --batch {tmp}/llama --out {tmp}/o --prompt x", "no image"),
    Case("batch over a file", "generate --batch {tmp}/lines.jsonl --out {png}", "exists already"),
    Case("eval, unknown task", "eval --out {tmp}/e --tasks ocr", "unknown task 'ocr'"),
    Case("eval, unknown method", "eval --out {tmp}/e --methods best", "unknown method 'best'"),
    Case("eval, a slip", "eval --out {tmp}/e --methods plhp", "(did you mean 'plphp'?)"),
    Case("eval, a slip of a task", "eval --out {tmp}/e --tasks easyvq", "did you mean 'easyvqa'?"),
    Case("bench, a slip", "bench --against snapk", "unknown 'snapk' (did you mean 'snapkv'?)"),
    Case("eval, no share", "eval --out {tmp}/e --budgets 1.5", "must be above 0 and at most 1"),
    Case("eval, no such shard", "eval --out {tmp}/e --shard 2/2", "i from 0 to n - 1"),
    Case("eval, images without prompt", "eval --out {tmp}/e --images {tmp}", "is the question"),
    Case("eval, no images", "eval --out {tmp}/e --images {tmp}/llama --prompt x", "no image files"),
    Case("eval without out", "eval", "Missing option '--out'"),
    Case("eval over a file", "eval --out {png} --limit 1 --tasks easyvqa", "is a file: give a dir"),
    Case("inspect without prompt", "inspect --image {png}", "give --prompt TEXT"),
    Case("inspect, no such method", "inspect --policies plphp,best", "unknown policy 'best'"),
    Case("inspect, options of one", "inspect --policies plphp --r .3", "takes only --budget"),
    Case("inspect into nowhere", "inspect --out {tmp}/none/page.html", "no such directory"),
    Case("doctor, not a model", "doctor {tmp}", "without a config.json"),
    Case("doctor, no vision", "doctor {tmp}/llama", "", code=1),
    Case("name over 255 bytes", "generate --image {tmp}/{long} --prompt x", "File name too long"),
    Case("name of an error", "generate --image '{tmp}/out of memory.png' --prompt x", "not an im"),
    Case("name with controls", "generate --image {tmp}/{escape} --prompt x", "\\x1b[31m.png"),
    Case("broken AVIF", "generate --image {tmp}/half.avif --prompt x", "not an image"),
    Case("broken JPEG 2000", "generate --image {tmp}/half.jp2 --prompt x", "broken or truncated"),
    Case("broken BLP", "generate --image {tmp}/half.blp --prompt x", "broken or truncated"),
    Case("PDF as image", "generate --image {tmp}/llama/scan.pdf --prompt x", "not an image"),
    Case("device as image", "generate --image /dev/null --prompt x", "not a regular file"),
    Case("placeholder", "generate --prompt 'what is <|image_pad|>?'", "contains <|image_pad|>"),
    Case("prompt of no text", "generate --prompt {surrogate}", "the prompt is not text"),
    Case("prompt as an option", "generate --prompt --debug --policy best", "unknown policy 'best'"),
    Case("given twice", "generate --prompt x --prompt y", "--prompt is given twice"),
    Case("out without batch", "generate --prompt x --out {tmp}/o", "--out needs --batch"),
    Case("rounds without compare", "generate --prompt x --rounds 3", "--rounds needs --compare"),
    Case("seed of a greedy answer", "generate --prompt x --seed 1", "--seed needs --temperature"),
    Case("report as JSON", "generate --prompt x --report --json", "cannot be used with --json"),
    Case("batch of one image", "generate --batch {tmp} --out {tmp}/o --image {png}",
         "--image cannot be used with --batch"),
    Case("code of the embedded model", "generate --prompt x --trust-remote-code", "needs --model"),
    Case("temperature of no number", "generate --temperature nan --prompt x", "above 0, got nan"),
    Case("device without numbers", "generate --device meta --prompt x", "stores no numbers"),
    Case("100,000 layers", "generate --model {tmp}/deep --prompt x", "100,000"),
    Case("config that is no JSON", "generate --model {tmp}/broken --prompt x", "cannot load"),
    Case("batch in UTF-16", "generate --batch {tmp}/utf16.jsonl --out {tmp}/o", "save it as UTF-8"),
    Case("batch, foreign part", "generate --batch {tmp}/lines.jsonl --out {tmp}/taken",
         "is not from a batch"),
    Case("batch, part of another", "generate --batch {tmp}/lines.jsonl --out {tmp}/other",
         "belongs to another batch"),
    Case("inspect over a file", "inspect --image {png} --prompt x --out {tmp}/text.png",
         "is not a page of plphp"),
    Case("inspect, two ways to name a method", "inspect --policy plphp --policies plphp,random",
         "--policy cannot be used with --policies"),
    Case("bench, shape and model", "bench --shape tiny --model embedded", "used with --model"),
    Case("bench, images without columns", "bench --images 300 --context 128", "at most 96 images"),
    Case("bench, memory of no number", "bench --memory nan", "numbers must be 0 or more"),
    Case("bench, shares without layers", "bench --layers 1 --keep .5,.4", "2 shares for 1 layer;"),
    Case("bench over a file", "bench --out {png}", "give a directory"),
    Case("eval, tasks and images", "eval --out {tmp}/e --tasks all --images {tmp} --prompt x",
         "--tasks cannot be used with --images"),
    Case("eval among other files", "eval --out {tmp}/mine --tasks easyvqa --limit 1", "not a run"),
    Case("weights that files lack", "generate --model {tmp}/lacking --prompt x", "lack 12 weights"),
    Case("no chat template", "generate --model {tmp}/mute --prompt x", "has no chat template"),
    Case("images beyond counting", "doctor embedded --images 1000000000000", "'--images'"),
    Case("no images (fine)", "generate --prompt hello --max-new-tokens 2", "nothing was", code=0),
    Case("1 x 1 image (fine)", "generate --image {tmp}/dot.png --prompt 'what color is the A?'",
         "of vision K/V kept", code=0),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("bad")
    (root / "empty.png").touch()
    (root / "text.png").write_text("not a picture")
    Image.effect_noise((200, 200), 50).save(root / "whole.png")
    (root / "half.png").write_bytes((root / "whole.png").read_bytes()[:9000])
    Image.new("RGB", (3000, 10)).save(root / "wide.png")
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    (root / "bomb.png").write_bytes(bomb(20_000))
    (root / "lines.jsonl").write_text(json.dumps({"images": [], "prompt": "hello"}) + "\n")
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "llama")
    more_files(root)
    return root


def more_files(root: Path) -> None:
    """Broken pictures of other formats, names and directories that stand in the way."""
    (root / "out of memory.png").write_text("not a picture")
    for name, mode in (("avif", "RGB"), ("jp2", "RGB"), ("blp", "P")):
        Image.effect_noise((64, 64), 50).convert(mode).save(root / f"half.{name}")
        whole = (root / f"half.{name}").read_bytes()
        (root / f"half.{name}").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("RGB", (8, 8)).save(root / "llama" / "scan.pdf")
    Image.new("F", (8, 8), 0.5).save(root / "depth.tif")
    (root / "utf16.jsonl").write_text('{"prompt": "x"}\n', encoding="utf-16")
    (root / "taken.part").write_text("notes of mine")
    (root / "other.part").write_text('{"line": 0, "answer": "x", "request": "0123"}\n')
    for name, text in (
        ("deep", '{"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 100000}}'),
        ("broken", "{"),
    ):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    for name in ("lacking", "mute"):
        shutil.copytree(WEIGHTS, root / name)
    weights = load_file(WEIGHTS / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.2." not in name}
    save_file(kept, root / "lacking" / "model.safetensors", {"format": "pt"})
    (root / "mute" / "chat_template.jinja").unlink()
    (root / "mine").mkdir()
    (root / "mine" / "summary.json").write_text("mine")


def bomb(side: int) -> bytes:
    """A PNG of some kilobytes that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return len(data).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model runs out of memory when it samples from 99 tokens."""
    load = inputs.load

    def loading(*args: object, **kwargs: object) -> object:
        loaded = load(*args, **kwargs)
        generate = loaded.model.generate

        def starved(*args: object, **kwargs: object) -> object:
            if kwargs.get("top_k") == 99:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return generate(*args, **kwargs)

        loaded.model.generate = starved
        return loaded

    monkeypatch.setattr(inputs, "load", loading)


def split(text: str, folder: Path, picture: str) -> list[str]:
    named = {"tmp": folder, "png": picture, "long": "a" * 300, "escape": "\x1b[31m.png",
             "surrogate": "\udcff"}  # fmt: skip
    many = ["--image", picture] * 260
    words = shlex.split(text)
    return [made for w in words for made in (many if w == "{many}" else [w.format(**named)])]


def printed(err: str, folder: Path, picture: str) -> str:
    shown = err.strip().replace(str(folder), "DIR").replace(picture, "good.png")
    return shown.replace("a" * 300, "a" * 9 + "...")


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.what)
def test_bad_inputs_say_what_to_do(
    case: Case, run: Callable, folder: Path, picture: str, rows: dict[str, str]
) -> None:
    before = sorted(folder.rglob("*"))
    result = run(*split(case.arguments, folder, picture))
    line = printed(result.err, folder, picture)
    assert result.code == case.code, result.err
    assert case.says in line
    assert "Traceback" not in result.err
    if case.code == 2:
        assert result.err.startswith("plphp: ")
        assert result.err.count("\n") == 1
        assert result.out == ""
    assert sorted(folder.rglob("*")) == before, "a half-written file was left behind"
    shown = line.replace("\n", "<br>").replace("|", "\\|") or "(nothing; the answer is on stdout)"
    rows[case.what] = f"| {case.what} | `{case.arguments}` | {shown} | {result.code} |\n"


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    return {}


def test_the_page_says_what_is_printed(rows: dict[str, str]) -> None:
    if len(rows) != len(CASES):
        pytest.skip("only with all cases before it")
    page = PAGE_TEXT.format(count=len(CASES), rows="".join(rows[case.what] for case in CASES))
    if os.environ.get("PLPHP_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def test_debug_shows_the_traceback(run: Callable) -> None:
    with pytest.raises(ValueError, match="unknown policy"):
        run("generate", "--policy", "best", "--prompt", "x", "--debug")


def test_errors_are_the_documented_exceptions(folder: Path) -> None:
    for name in ("empty", "text", "half", "bomb", "none"):
        with pytest.raises(plphp.InputError, match=f"{name}.png"):
            inputs.open_image(folder / f"{name}.png")
