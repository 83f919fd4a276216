"""One loaded model for all evaluation tests."""

import pytest

from plphp.demo.model import Embedded, load


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    return load()
