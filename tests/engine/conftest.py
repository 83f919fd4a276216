"""Tests of the vLLM plugin; they run where vLLM is: `make test-vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from variables import ENGINE

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# The files that take longest, so that no process ends long after the other.
LONGEST = ("test_processes.py", "test_blocks.py", "test_families.py", "test_server.py")

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
    """The longest files first; the others in their order."""
    places = {Path(__file__).with_name(name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
