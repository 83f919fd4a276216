"""One loaded model for all tests of the inspector, and a browser for each file that needs one."""

from collections.abc import Iterator
from typing import Any

import pytest
from browser import launched

from plphp.demo.model import Embedded, load


@pytest.fixture(scope="session")
def embedded() -> Embedded:
    return load()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found
