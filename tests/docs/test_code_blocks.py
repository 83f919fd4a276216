"""What README, CONTRIBUTING and docs show is run: Python, command lines, and what they print.

Fences that count: ```python (all of a page, in order, in one namespace), ```console (`$ plphp ...`
and `$ cat FILE` lines, the lines below being their output), and any fence with title="FILE", a
file that the page's code finds beside it. `$ make demo` is checked as the command that it calls.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

import plphp.cli
import plphp.demo.model
import plphp.hf.attached
from plphp.inputs import open_image
from plphp.models import FAMILIES
from plphp.policy import POLICIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = Path(plphp.demo.__file__).parent / "pictures"
FENCE = re.compile(r"^```(?P<kind>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
HUB_ID = "Qwen/Qwen2-VL-7B-Instruct"
CELL = r"[\d,.]+ \(\d+\.\d\d\)\*?"  # a time of the demo's screen, over the full cache's, and a star
SEEN: dict[tuple[str, ...], tuple[int, str]] = {}  # commands that several pages show are run once


@dataclass(frozen=True)
class Block:
    kind: str
    title: str | None
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    line: str
    output: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["info"])
        line = text.count("\n", 0, match.start("text")) + 1
        yield Block(match["kind"], title and title[1], match["text"], line)


def commands(page: Path) -> Iterator[Command]:
    for block in blocks(page):
        if block.kind == "console":
            for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                line, _, output = part.partition("\n")
                yield Command(line.strip(), output)


def with_blocks(kind: str) -> pytest.MarkDecorator:
    pages = [page for page in PAGES if page.exists() and any(b.kind == kind for b in blocks(page))]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@cache
def embedded() -> plphp.demo.model.Embedded:
    return plphp.demo.model.load()


class Processor:
    """As much of Qwen2-VL's processor as the pages use, around the embedded model's parts."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        assert tokenize and return_dict and return_tensors == "pt"
        loaded = embedded()
        text = loaded.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        entries = [e for m in conversation if isinstance(m["content"], list) for e in m["content"]]
        pictures = [open_image(e["path"]) for e in entries if e["type"] == "image"]
        pixels = loaded.image_processor(images=pictures, return_tensors="pt")
        for grid in pixels["image_grid_thw"]:
            pads = "<|vision|>" * (int(grid.prod()) // loaded.image_processor.merge_size**2)
            text = text.replace("<|image_pad|>", pads, 1)
        text = text.replace("<|vision|>", "<|image_pad|>")
        ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        tokens = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == loaded.model.config.image_token_id).int(),
        }
        return BatchFeature({**tokens, **pixels})

    @property
    def tokenizer(self) -> Any:
        return embedded().tokenizer

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool = False) -> str:
        return str(embedded().tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


class Ask:
    """As much of transformers' pipeline("image-text-to-text") as the pages use.

    tests/integration/test_pipeline.py prunes in the real one.
    """

    def __init__(self, task: str, name: str, **options: Any) -> None:
        assert task == "image-text-to-text" and name == HUB_ID
        assert set(options) <= {"dtype", "device_map"}
        self.model = embedded().model

    def __call__(
        self, text: list[dict[str, Any]], max_new_tokens: int, return_full_text: bool
    ) -> list[dict[str, Any]]:
        assert not return_full_text, "the text would be the whole chat, as a list of messages"
        processor = Processor()
        inputs = processor.apply_chat_template(
            text,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens)
        out = out[:, inputs["input_ids"].shape[1] :]
        return [{"generated_text": processor.decode(out[0], skip_special_tokens=True)}]


def from_hub(what: Callable[[], Any]) -> Callable[..., Any]:
    def from_pretrained(name: str, **options: Any) -> Any:
        assert name == HUB_ID and set(options) <= {"dtype", "device_map"}
        return what()

    return from_pretrained


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: the bundled pictures, and a hub that has the embedded model only."""
    for picture in PICTURES.glob("*.png"):
        shutil.copy(picture, tmp_path)
    shutil.copy(PICTURES / "a1.png", tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", from_hub(lambda: embedded().model)
    )
    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_hub(Processor))
    for module in (transformers, transformers.pipelines):  # the first copies from the second
        monkeypatch.setattr(module, "pipeline", Ask)
    # What a page adds to the registries is gone after it.
    for registry in (POLICIES, FAMILIES):
        for name in registry:
            monkeypatch.setitem(registry, name, registry[name])
    return tmp_path


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text)


@with_blocks("python")
def test_python_blocks_run(page: Path, folder: Path) -> None:
    write_files(page, folder)
    policies, families = set(POLICIES), set(FAMILIES)
    space: dict[str, Any] = {"__name__": "page"}
    try:
        for block in blocks(page):
            if block.kind == "python":
                # Empty lines before it make a traceback name the page's own line.
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                exec(code, space)
    finally:
        for registry, known in ((POLICIES, policies), (FAMILIES, families)):
            for name in set(registry) - known:
                del registry[name]
        assert plphp.hf.attached.attached(embedded().model) is None, "a block left pruning attached"


@with_blocks("console")
def test_console_blocks_print_what_they_show(
    page: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_files(page, folder)
    monkeypatch.setenv("COLUMNS", "80")
    # A file that a page shows must be made in this page's folder.
    shows_files = any(command.line.startswith("cat ") for command in commands(page))
    for command in commands(page):
        line, _, after = command.line.partition(";")
        words = shlex.split(line.replace("make demo", "plphp demo --rounds 1"))
        if words[0] not in ("plphp", "cat"):
            continue
        assert after.strip() in ("", "echo $?"), f"{command.line}: only `; echo $?` is understood"
        if shows_files or tuple(words) not in SEEN:
            SEEN[tuple(words)] = run(words, monkeypatch, capfd)
        code, printed = SEEN[tuple(words)]
        if after:
            printed += f"{code}\n"
        else:
            assert code == 0, f"{page.name}: {command.line} ends with {code}\n{printed}"
        shown = command.output
        if shown.strip():
            assert pattern(shown).fullmatch(flat(printed)), (
                f"{page.name}: {command.line}\n--- shown\n{shown}\n--- printed\n{printed}"
            )


def run(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    if words[0] == "cat":
        return 0, Path(words[1]).read_text()
    monkeypatch.setattr(sys, "argv", words)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        plphp.cli.main()
    captured = capfd.readouterr()
    return int(end.value.code or 0), captured.out + captured.err


def flat(text: str) -> str:
    """The lines without what depends on the width of columns, which long times make wider."""
    lines = (re.sub(r" {2,}", "  ", line.strip()) for line in text.strip().splitlines())
    return re.sub(r"─{10,}", "─" * 10, "\n".join(lines))


def pattern(shown: str) -> re.Pattern[str]:
    """Output as a page shows it: `...` is anything, and a time is any number."""
    lines = []
    for line in flat(shown).splitlines():
        line = re.sub(f" +{CELL}", "\0", line)
        escaped = re.escape(line).replace(re.escape("..."), r"(?s:.*?)")
        escaped = escaped.replace(re.escape("\0"), f" +{CELL}")
        what = (
            r"\d+\\\.\d+"
            if re.search(r"\bms\b", line)
            else r"\d+\\\.\d+(?=\\ of\\ the\\ full\\ time)"
        )
        escaped = re.sub(what, r"\\d+\\.\\d+", escaped)
        lines.append(escaped)
    return re.compile("\n".join(lines))


def test_every_fence_is_understood() -> None:
    """A fence that is indented, or of another kind, would never be run."""
    known = {"python", "console", "json", "text", "bibtex", "bash", "py"}  # py: by tests/engine
    for page in filter(Path.exists, PAGES):
        starts = re.findall(r"^ *```+.*$", page.read_text(), re.MULTILINE)[::2]
        for start, block in zip(starts, list(blocks(page)), strict=True):
            assert start.startswith(f"```{block.kind}") and block.kind in known, (page.name, start)


def test_the_matcher_can_fail() -> None:
    assert pattern("a ... c\n3 ms").fullmatch("a b c\n3 ms")
    assert pattern("first token ms 1.5").fullmatch("first token ms 2.25")
    assert pattern("0.97 of the full time").fullmatch("1.03 of the full time")
    assert pattern("KV   ms a token").fullmatch(flat("KV    ms a token"))
    assert not pattern("bytes 1.5").fullmatch("bytes 2.25")
    assert pattern("full  9*  10.5 (1.00)").fullmatch("full  9* 1,210.5 (1.00)*")
    assert not pattern("full  9*  10.5 (1.00)").fullmatch("full  8*  10.5 (1.00)")
    assert not pattern("a\nb").fullmatch("a\nb\nc")
