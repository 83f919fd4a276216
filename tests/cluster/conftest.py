"""Work that is shared on Ray; these tests run where Ray is: `make test-ray`.

One Ray with two cores and a small object store serves all tests of the process. What needs no Ray,
such as the planning and the resuming of a batch, is tested in tests/cli/test_batches.py.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]

TESTS = Path(__file__).parents[1]
# Workers import what the tests send them.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS.parent / "src"), str(TESTS / "cluster"), os.environ.get("PYTHONPATH", "")]
)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def two_cores() -> Iterator[None]:
    from plphp.cluster.connection import import_ray

    ray = import_ray()
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, object_store_memory=200_000_000, **options)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    yield
    ray.shutdown()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line in this process; returns the exit code."""

    def call(*arguments: object) -> int:
        import plphp.cli

        monkeypatch.setattr(sys, "argv", ["plphp", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as end:
                plphp.cli.main()
        finally:
            logging.disable(logging.NOTSET)
        return int(end.value.code or 0)

    return call
