"""Minor versions of vLLM: which are refused, and what the plugin uses of the installed one."""

from __future__ import annotations

import pytest
import vllm

from plphp.errors import UnsupportedVllmError
from plphp.vllm import versions
from plphp.vllm.versions import TESTED, Use, changed, check_version


@pytest.mark.parametrize("found", ["0.32.4", "0.33.0", "0.33.1+cpu"])
def test_tested_minor_versions_are_accepted(found: str) -> None:
    check_version(found)


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.3.2", "1.32.0"])
def test_other_minor_versions_are_refused(found: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=rf"vLLM 0\.32 and 0\.33, found {found}"):
        check_version(found)


def test_the_installed_version_has_all_that_the_plugin_uses() -> None:
    assert vllm.__version__.rsplit(".", 1)[0] in TESTED
    assert changed() == []


@pytest.mark.parametrize(
    ("use", "line"),
    [
        (Use("v1.nowhere", "Thing"), "v1.nowhere has no Thing"),
        (Use("v1.request", "Request.nothing"), "v1.request has no Request.nothing"),
        (
            Use("v1.core.sched.output", "SchedulerOutput", ("num_scheduled_tokens", "gone")),
            "v1.core.sched.output: SchedulerOutput has no gone",
        ),
        (
            Use("v1.request", "Request.__init__", ("mm_features", "pixels")),
            "v1.request: Request.__init__ has no pixels",
        ),
    ],
)
def test_what_has_changed_is_named(use: Use, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "USES", (use,))
    assert changed() == [line]
