"""Tests of the vLLM plugin; they run where vLLM is: `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from variables import ENGINE

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# The groups that take longest, so that no process ends long after the other.
LONGEST = ("modes of triton", "modes of plain", "test_blocks", "test_families", "test_server")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(ENGINE)


@pytest.fixture(scope="session")
def reference() -> Any:
    """The embedded model in transformers, float32."""
    import torch

    from plphp.demo.model import load

    return load(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def end_of_the_shared_engine() -> Iterator[None]:
    yield
    from serving import close_shared

    close_shared()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one engine stay in one process, and the longest groups are first."""
    places = {item: group_of(item) for item in items}
    for item, group in places.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: (*LONGEST, places[item]).index(places[item]))


def group_of(item: pytest.Item) -> str:
    """The name of the tests that share an engine: a file, or the modes of one kind."""
    import elsewhere

    if item.path.name != "test_processes.py":
        return item.path.stem
    assert isinstance(item, pytest.Function)
    return f"modes of {elsewhere.MODES[item.callspec.params['mode']].kind}"
