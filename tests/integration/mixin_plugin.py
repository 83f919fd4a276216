"""A pytest plugin for transformers' own tests, which prunes every model of three classes in them.

PLPHP_MIXIN_POLICY: "untouched", "keep all" or "default"
PLPHP_MIXIN_OUT: the file to which the outcome of each test is written, as JSON

Only the tests of `GenerationTesterMixin` itself are run. The checkout's modules import `datasets`
and `requests` for other tests; empty modules replace them if they are missing.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from packaging.version import Version

import plphp
from plphp.hf import compat

for name in ("datasets", "requests"):
    if find_spec(name) is None:
        sys.modules[name] = mock.MagicMock()

POLICIES = {"keep all": plphp.PLPHP(r=1.0, delta_r=0.0), "default": plphp.PLPHP()}
CLASSES = (
    "Qwen2VLForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Idefics2ForConditionalGeneration",
)
BESIDES = (
    "test_assisted_decoding",
    "test_beam_sample_generate",
    "test_beam_search_generate",
    "test_greedy_generate",
    "test_prompt_lookup",
    "test_sample_generate",
)
found: dict[str, str] = {}


def pytest_configure(config: pytest.Config) -> None:
    compat.OLDEST = Version(f"{compat.OLDEST}.dev0")  # checkouts are of development versions
    policy = POLICIES.get(os.environ["PLPHP_MIXIN_POLICY"])
    for name in CLASSES:
        if policy is not None:
            attach_always(getattr(transformers, name), policy)


def attach_always(model_class: type, policy: Any) -> None:
    original = model_class.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plphp.prune(self, policy)

    model_class.__init__ = init  # type: ignore[misc]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.generation.test_utils import GenerationTesterMixin

    check_shapes = GenerationTesterMixin._check_past_key_values_for_generate

    def check(
        self: Any, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        """Check the lengths that a pruned cache returns, and not its content."""
        cache = past_key_values
        if not isinstance(cache, plphp.PrunedCache):
            return check_shapes(self, batch_size, cache, seq_length, config)
        for index, layer in cache.pruned_layers():
            assert cache.get_seq_length(index) == seq_length
            assert layer.keys.shape[0] == batch_size and layer.keys.shape[2] <= seq_length

    GenerationTesterMixin._check_past_key_values_for_generate = check
    items[:] = [item for item in items if item.name in vars(GenerationTesterMixin)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """If a test also asks for attention weights, it asks only for the rest."""
    item.cls.has_attentions = not item.name.startswith(BESIDES)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    result = yield
    report = result.get_result()
    if report.when == "call" or report.skipped:
        what = report.outcome
        if report.failed and call.excinfo is not None:
            error = call.excinfo.value
            refused = isinstance(error, plphp.UnsupportedModeError | plphp.UnsupportedModelError)
            what = f"{'refused' if refused else 'failed'}: {type(error).__name__}: {error}"
        found[item.nodeid] = what


def pytest_sessionfinish() -> None:
    Path(os.environ["PLPHP_MIXIN_OUT"]).write_text(json.dumps(found, indent=1))
