"""Every bad input that we thought of: one line on stderr, what to do, exit code 2, no traceback.

The table in docs/bad-inputs.md is made from these cases: PLPHP_WRITE_DOCS=1 rewrites it.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import plphp
from plphp import inputs

PAGE = Path(__file__).parents[2] / "docs" / "bad-inputs.md"
HEAD = "| what is wrong | arguments | printed on stderr | exit code |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Case:
    """`arguments` of `plphp`; {tmp} is a folder with the files of `folder`, {png} a good image."""

    what: str
    arguments: str
    says: str
    code: int = 2


CASES = [
    Case("missing file", "generate --image {tmp}/none.png --prompt x", "no such file"),
    Case("empty file", "generate --image {tmp}/empty.png --prompt x", "the file is empty"),
    Case("truncated image", "generate --image {tmp}/half.png --prompt x", "broken or truncated"),
    Case("text named .png", "generate --image {tmp}/text.png --prompt x", "not an image"),
    Case("directory as image", "generate --image {tmp} --prompt x", "--batch takes directories"),
    Case("decompression bomb", "generate --image {tmp}/bomb.png --prompt x", "decompression bomb"),
    Case("aspect 1 : 300", "generate --image {tmp}/wide.png --prompt x", "aspect ratio"),
    Case("no prompt text", "generate --image {png} --prompt ' '", "the prompt is empty"),
    Case("unknown policy", "generate --policy best --prompt x", "unknown policy 'best'"),
    Case("rate above 1", "generate --r 1.2 --prompt x", "r + delta_r must be at most 1"),
    Case("rate below 0", "generate --r .1 --prompt x", "r - delta_r must be at least 0"),
    Case("thresholds crossed", "generate --beta .5 --prompt x", "beta must be at most alpha"),
    Case("unknown budget", "generate --budget all --prompt x", "budget must be one of"),
    Case("rate that is no number", "generate --r high --prompt x", "should be a valid number"),
    Case("unknown option", "generate --rate .4 --prompt x", "No such option: --rate"),
    Case("unknown command", "prune", "No such command 'prune'"),
    Case("temperature of 0", "generate --temperature 0 --prompt x", "--temperature must be above"),
    Case("sampled comparison", "generate --compare --top-k 5 --prompt x", "needs greedy answers"),
    Case("not a vision model", "generate --model {tmp}/llama --prompt x", "not a vision-language"),
    Case("not a model", "generate --model {tmp} --prompt x", "without a config.json"),
    Case("no such directory", "generate --model {tmp}/none --prompt x", "no such directory"),
    Case("file as model", "generate --model {png} --prompt x", "is a file"),
    Case("hub out of reach", "generate --model someone/some-vlm --prompt x", "cannot be reached"),
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
    Case("eval, no share", "eval --out {tmp}/e --budgets 1.5", "not a share above 0"),
    Case("eval, no such shard", "eval --out {tmp}/e --shard 2/2", "i from 0 to n - 1"),
    Case("eval, images without prompt", "eval --out {tmp}/e --images {tmp}", "go together"),
    Case("eval, no images", "eval --out {tmp}/e --images {tmp}/llama --prompt x", "no image files"),
    Case("eval without out", "eval", "Missing option '--out'"),
    Case("eval over a file", "eval --out {png} --limit 1 --tasks easyvqa", "Not a directory"),
    Case("inspect without prompt", "inspect --image {png}", "give --prompt TEXT"),
    Case("inspect, no such method", "inspect --policies plphp,best", "unknown policy 'best'"),
    Case("inspect, options of one", "inspect --policies plphp --r .3", "takes only --budget"),
    Case("inspect into nowhere", "inspect --out {tmp}/none/page.html", "no such directory"),
    Case("doctor, not a model", "doctor {tmp}", "without a config.json"),
    Case("doctor, no vision", "doctor {tmp}/llama", "", code=1),
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
    return root


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
    words = []
    for word in text.replace("' '", "{space}").replace("'", '"').split('"'):
        words += [word] if " " in word and words and words[-1] == "--prompt" else word.split()
    many = ["--image", picture] * 260
    named = {"tmp": str(folder), "png": picture, "space": " "}
    return [made for w in words for made in (many if w == "{many}" else [w.format(**named)])]


def printed(err: str, folder: Path, picture: str) -> str:
    return err.strip().replace(str(folder), "DIR").replace(picture, "good.png")


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
    page = (
        (
            "# Bad inputs\n\nEvery bad input that the tests try; `tests/cli/test_bad_inputs.py` "
            "makes this page. DIR is a folder of broken files, `{many}` 260 images.\n\n"
        )
        + HEAD
        + "".join(rows[case.what] for case in CASES)
    )
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
