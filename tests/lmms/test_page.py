"""docs/reproduce.md names tasks and models that the installed lmms-eval has."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is missing: make test-lmms"
)
def test_tasks_of_the_page_exist() -> None:
    code = (
        "from lmms_eval.tasks import TaskManager\n"
        "from lmms_eval.models import list_available_models\n"
        "assert 'plphp' in list_available_models()\n"
        "print('TASKS', *TaskManager().all_tasks)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = set(out.stdout.split("TASKS", 1)[1].split())
    page = PAGE.read_text()
    table = page.split("## Tasks", 1)[1].split("## What was run", 1)[0]
    named = set(re.findall(r"^\| [^|]+ \| `([\w,]+)` \|", table, re.MULTILINE))
    named |= {name for line in re.findall(r"--tasks ([\w,]+)", page) for name in line.split(",")}
    assert len(named) > 15
    assert not named - known - {"plphp_boards"}
