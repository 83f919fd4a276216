"""Conversations in files: those of earlier versions go on, and damaged ones are refused."""

import atexit
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import plphp
import saved
from saved import FOLDER, KINDS
from saved.damage import damaged


def continued(kind: saved.Kind, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of what follows a conversation that a file holds."""
    with saved.attached(kind) as model:
        _, said = saved.held(kind, model)
        return saved.goes_on(model, plphp.PrunedCache.load(model, file), said)


def stayed(kind: saved.Kind) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a conversation that never was in a file."""
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
    """What was said, logits and tokens of what follows, and damaged files of a kind."""
    file = folder() / f"{name}.safetensors"
    with saved.attached(KINDS[name]) as model:
        _, said = saved.held(KINDS[name], model)
        logits, tokens = saved.goes_on(model, plphp.PrunedCache.load(model, file), said)
    return said, logits, tokens, damaged(file)


def check_damaged(name: str, data: st.DataObject) -> None:
    """InputError or equal answers, nothing else; answers under a foreign checksum at least come."""
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


FEW = settings(max_examples=300, deadline=None, derandomize=True, database=None)
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
