"""Saved conversations: files of earlier versions can be continued, and damaged ones are refused."""

import atexit
import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save_file

import plphp
import saved
from saved import FOLDER, KINDS
from saved.crafted import CRAFTED
from saved.damage import damaged, packed, parts


def continued(kind: saved.Kind, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens that follow a conversation loaded from a file."""
    with saved.attached(kind) as model:
        _, said = saved.held(kind, model)
        return saved.goes_on(model, plphp.PrunedCache.load(model, file), said)


def stayed(kind: saved.Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `continued`, for a conversation that was never saved."""
    with saved.attached(kind) as model:
        return saved.goes_on(model, *saved.held(kind, model))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_conversation_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    saved.write(tmp_path, (name,))
    logits, tokens = continued(KINDS[name], tmp_path / f"{name}.safetensors")
    wanted, expected = stayed(KINDS[name])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted)


OLD = sorted((FOLDER / "0.1.0").glob("*.safetensors"))


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.stem)
def test_conversations_of_the_version_before_go_on(file: Path) -> None:
    logits, tokens = continued(KINDS[file.stem], file)
    wanted, expected = stayed(KINDS[file.stem])
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted)


# --- damaged files --------------------------------------------------------------------------------

FUZZED = tuple(KINDS)
RESULTS: Counter[str] = Counter()


@cache
def folder() -> Path:
    made = Path(mkdtemp())
    saved.write(made, FUZZED)
    atexit.register(shutil.rmtree, made)
    return made


@cache
def whole(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, SearchStrategy]:
    """The conversation, its next logits and tokens, and damaged files of one kind."""
    file = folder() / f"{name}.safetensors"
    with saved.attached(KINDS[name]) as model:
        _, said = saved.held(KINDS[name], model)
        logits, tokens = saved.goes_on(model, plphp.PrunedCache.load(model, file), said)
    return said, logits, tokens, damaged(file)


def check_damaged(name: str, data: st.DataObject) -> None:
    """Expect InputError or equal answers; other answers if the checksum fits the changed data."""
    said, logits, tokens, ways = whole(name)
    case = data.draw(ways)
    file = folder() / "damaged.safetensors"
    file.write_bytes(case.file)
    note(case.how)
    with saved.attached(KINDS[name]) as model:
        try:
            own = plphp.PrunedCache.load(model, file)
        except plphp.InputError:
            RESULTS["refused"] += 1
            return
        found, after = saved.goes_on(model, own, said)
    RESULTS["other data under its own checksum" if case.data else "equal"] += 1
    if not case.data:
        assert torch.equal(after, tokens)
        torch.testing.assert_close(found, logits)


FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)
MANY = settings(FEW, max_examples=10_000, suppress_health_check=list(HealthCheck))


@FEW
@given(st.sampled_from(FUZZED), st.data())
def test_a_damaged_file_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    check_damaged(name, data)


@pytest.mark.slow
@MANY
@given(st.sampled_from(FUZZED), st.data())
def test_ten_thousand_damaged_files_are_refused_or_harmless(name: str, data: st.DataObject) -> None:
    check_damaged(name, data)


def teardown_module() -> None:
    print(dict(RESULTS))


# --- crafted files --------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False], ids=["its own checksum", "the old checksum"])
@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_is_refused(name: str, sealed: bool) -> None:
    whole = parts(folder() / f"{name}.safetensors")
    file, believed = folder() / "crafted.safetensors", []
    with saved.attached(KINDS[name]) as model:
        for what, change in CRAFTED[name].items():
            header, tensors = copy.deepcopy(whole)
            change(header, tensors)
            file.write_bytes(packed(header, tensors, sealed))
            try:
                plphp.PrunedCache.load(model, file)
                believed.append(what)
            except plphp.InputError as error:
                if len(str(error)) > 600 or not str(error).startswith(str(file)):
                    believed.append(f"{what}: {error}")
    assert not believed


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '"x"', "{", "[" * 10**5, '{"a":' * 10**5, "9" * 5000, "NaN"]
)
def test_a_header_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    _, tensors = parts(folder() / "plain.safetensors")
    file = tmp_path / "talk"
    save_file(tensors, file, metadata={"plphp": text})
    with saved.attached(KINDS["plain"]) as model, pytest.raises(plphp.InputError, match="header"):
        plphp.PrunedCache.load(model, file)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    short = tmp_path / "short"
    short.write_bytes(b"\xff" * 7)
    promise = tmp_path / "promise"  # a header of more bytes than there are
    promise.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with saved.attached(KINDS["plain"]) as model:
        for path in (pipe, tmp_path, "/dev/zero", short, promise, "a\0b"):
            with pytest.raises(plphp.InputError, match="not a saved plphp cache"):
                plphp.PrunedCache.load(model, path)
        with pytest.raises(plphp.InputError, match="nothing: no such file"):
            plphp.PrunedCache.load(model, tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["plain", "host_record"])
def test_a_file_that_is_cut_later_does_not_matter(kind: str, tmp_path: Path) -> None:
    """Loaded tensors are not mapped from the file."""
    file = tmp_path / "talk"
    file.write_bytes((folder() / f"{kind}.safetensors").read_bytes())
    said, logits, *_ = whole(kind)
    with saved.attached(KINDS[kind]) as model:
        own = plphp.PrunedCache.load(model, file)
        file.write_bytes(b"")
        torch.testing.assert_close(saved.goes_on(model, own, said)[0], logits)


def other(**changes: Any) -> Any:
    """The tiny model of another config."""
    config = saved.model_of().config.__class__.from_dict(saved.model_of().config.to_dict())
    for name, value in changes.items():
        setattr(config.text_config, name, value)
    return saved.FAMILY.build(0, config)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: saved.model_of(seed=1), "weights"),
        (lambda: other(vocab_size=170), "vocab_size"),
        (lambda: other(num_key_value_heads=2), "num_key_value_heads"),
        (lambda: other(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), "rope"),
        (lambda: saved.model_of(window=40), "windows"),
        (lambda: copy.deepcopy(saved.model_of()).to(torch.bfloat16), "dtype"),
    ],
)
def test_another_model_is_named(make: Callable[[], Any], says: str) -> None:
    model = make()
    with plphp.prune(model, saved.POLICY), pytest.raises(plphp.InputError, match=says):
        plphp.PrunedCache.load(model, folder() / "plain.safetensors")


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    """A file named like the target plus .part is not overwritten, and long names work."""
    long = tmp_path / ("x" * 250)
    (tmp_path / "talk.part").write_text("mine")
    with saved.attached(KINDS["plain"]) as model:
        own, _ = saved.held(KINDS["plain"], model)
        own.save(tmp_path / "talk")
        own.save(long)
        with pytest.raises(plphp.InputError, match="written: there is no directory"):
            own.save(tmp_path / "nowhere" / "talk")
    assert (tmp_path / "talk.part").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"talk", "talk.part", long.name}
