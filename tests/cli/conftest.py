"""The command line, run in this process as a shell would run it."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import plphp.cli
import plphp.demo

PICTURES = Path(plphp.demo.__file__).parent / "pictures"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def picture() -> str:
    return str(PICTURES / "a1.png")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["plphp", *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as end:
                plphp.cli.main()
        finally:
            logging.disable(logging.NOTSET)  # a command silences what libraries log
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return call
