"""transformers' own generation tests, with pruning attached to every model in them.

PLPHP_TRANSFORMERS_CHECKOUT=/path/to/transformers names a checkout; its sources and tests are used
in place of the installed package, so its version has to be one that plphp supports. The environment
also needs `parameterized`, `httpx` and `pytest-xdist`, which the checkout's tests import. Nothing
of a checkout belongs into this repository.
"""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

HERE = Path(__file__).parent
CHECKOUT = os.environ.get("PLPHP_TRANSFORMERS_CHECKOUT")
TESTS = (
    "qwen2_vl/test_modeling_qwen2_vl.py::Qwen2VLModelTest",
    "llava/test_modeling_llava.py::LlavaForConditionalGenerationModelTest",
    "idefics2/test_modeling_idefics2.py::Idefics2ForConditionalGenerationModelTest",
)
NEEDED = ("parameterized", "httpx", "xdist")

NO_CACHE = "asks for use_cache=False"
STATIC = "asks for cache_implementation='static'; plphp has a static cache of its own"
EMBEDS = "passes embeddings without ids: nothing says which are vision, a vision_mask would"
# Tests that plphp refuses for at least one of the three models, or that assert something else
EXCEPTIONS: dict[str, str] = {
    "test_beam_sample_generate_dict_output": NO_CACHE,
    "test_beam_search_generate_dict_output": NO_CACHE,
    "test_greedy_generate_dict_outputs": NO_CACHE,
    "test_sample_generate_dict_output": NO_CACHE,
    "test_eager_padding_matches_padding_free_with_position_ids": NO_CACHE,
    "test_sdpa_padding_matches_padding_free_with_position_ids": NO_CACHE,
    "test_generate_from_random_inputs_embeds": NO_CACHE,
    "test_generate_without_input_ids": f"Idefics2's {NO_CACHE}",
    "test_custom_4d_attention_mask": "brings a DynamicCache of its own",
    "test_generate_compilation_all_outputs": STATIC,
    "test_generate_from_inputs_embeds_with_static_cache": STATIC,
    "test_generate_with_static_cache": STATIC,
    "test_static_cache_no_recompile_with_smaller_length": STATIC,
    "test_generate_compile_model_forward_fullgraph": "asserts that the cache is a DynamicCache",
    "test_generate_from_inputs_embeds_0_greedy": EMBEDS,
    "test_generate_from_inputs_embeds_1_beam_search": EMBEDS,
    "test_assisted_decoding_matches_greedy_search_0_random": "Idefics2's prompt ends in an image: "
    "the assistant, attached as well, takes back a column of it",
    "test_assisted_decoding_matches_greedy_search_1_same": "the same",
}
# It fails without being refused, because its assertion does not hold for a pruned model.
CLAIMS = ("test_generate_compile_model_forward_fullgraph",)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHECKOUT is None,
        reason="PLPHP_TRANSFORMERS_CHECKOUT names no checkout of transformers: its own generation "
        "tests were not run",
    ),
]


@cache
def outcomes(policy: str) -> dict[tuple[str, str], str]:
    """(class, test) -> passed, skipped, "refused: ..." or "failed: ..."."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    assert not missing, f"the checkout's tests need {missing}"
    checkout = Path(str(CHECKOUT)).resolve()
    path = [HERE, HERE.parents[1] / "src", checkout / "src"]
    with TemporaryDirectory() as home:
        out = Path(home) / "out.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
        done = subprocess.run(
            [*command, "-p", "mixin_plugin", *(f"tests/models/{test}" for test in TESTS)],
            cwd=checkout,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*map(str, path), *sys.path]),
                "PLPHP_MIXIN_POLICY": policy,
                "PLPHP_MIXIN_OUT": str(out),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert out.exists(), done.stdout[-3000:] + done.stderr[-1000:]
        found = json.loads(out.read_text())
    return {tuple(name.split("::")[1:]): what for name, what in found.items()}


def test_the_unpruned_models_pass() -> None:
    passed = [name for name, what in outcomes("untouched").items() if what == "passed"]
    assert len({model for model, _ in passed}) == len(TESTS)
    assert len(passed) > 80, "a checkout whose tests do not run here says nothing"


@pytest.mark.parametrize("policy", ["keep all", "default"])
def test_what_passes_without_pruning_passes_with_it(policy: str) -> None:
    """This holds at the default rates too: no test of the mixin asserts logits that change."""
    untouched, pruned = outcomes("untouched"), outcomes(policy)
    wrong = {
        key: pruned.get(key)
        for key, what in untouched.items()
        if what == "passed" and pruned.get(key) != "passed" and not excused(key[1], pruned[key])
    }
    assert not wrong


def excused(test: str, what: str) -> bool:
    """Exceptions by name. Some tests skip themselves now and then, since they draw their inputs."""
    return test in EXCEPTIONS and (
        what == "skipped" or what.startswith("refused") or test in CLAIMS
    )


@pytest.mark.parametrize("test", EXCEPTIONS)
def test_every_exception_is_one(test: str) -> None:
    """A test that no model refuses any more must be removed from the list."""
    found = [what for (_, name), what in outcomes("keep all").items() if name == test]
    assert any(excused(test, what) for what in found), EXCEPTIONS[test]
