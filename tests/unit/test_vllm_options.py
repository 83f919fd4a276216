"""Options of the vLLM plugin, which need no vLLM to be checked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

import plphp
from plphp.policy import POLICIES
from plphp.vllm.options import METHODS, Options, read_options, request_policy


def test_a_server_is_told_what_engine_args_says() -> None:
    policy = plphp.PLPHP(r=0.3, delta_r=0.2, gqa="max", min_tokens=4)
    args = plphp.vllm.engine_args(policy, layers_per_group=2, share_prefix=False, on=False)
    transfer = args["kv_transfer_config"]
    assert transfer["kv_connector"] == "PLPHPConnector"
    assert read_options(transfer["kv_connector_extra_config"]) == Options(policy, 2, False, False)
    assert read_options({}) == Options(plphp.PLPHP())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"r": 0.9}, r"r \+ delta_r"),
        ({"beta": 0.5}, "beta must be at most alpha"),
        ({"rate": 0.5}, "no option 'rate'"),
        ({"round_to": 16}, "no option 'round_to'"),
        ({"budget": 0.4}, "budget must be 'image' or 'global'"),
        ({"layers_per_group": 0}, "layers_per_group"),
        ({"share_prefix": 1}, "share_prefix must be true or false"),
    ],
)
def test_bad_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(given)


def test_a_request_may_differ_from_its_server() -> None:
    options = Options(plphp.PLPHP(r=0.3))
    assert request_policy(options, None) == options.policy
    assert request_policy(options, {"plphp": "off"}) is None
    assert request_policy(options, {"plphp": 0, "plphp.r": 0.4}) is None
    assert request_policy(options, {"plphp.r": 0.4, "other": 1, 5: 6}) == plphp.PLPHP(r=0.4)
    quiet = Options(on=False)
    assert request_policy(quiet, {}) is None
    assert request_policy(quiet, {"plphp": "on"}) == plphp.PLPHP()
    assert request_policy(quiet, {"plphp.r": 0.5}) == plphp.PLPHP(r=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plphp": "maybe"}, "plphp must be 'on' or 'off'"),
        ({"plphp": {"r": 0.2}}, "plphp must be 'on' or 'off'"),
        ({"plphp.rate": 0.2}, "no option 'plphp.rate'"),
        ({"plphp_r": 0.2}, "no option 'plphp_r'; the options are plphp, plphp.r, "),
        ({"plphp-r": 0.2}, "no option 'plphp-r'"),
        ({"PLPHP.r": 0.2}, "no option 'PLPHP.r'"),
        ({"plphp": "off", "plphp.rate": 0.2}, "no option 'plphp.rate'"),
        ({"plphp.policy": "plphp-shared"}, "no option 'plphp.policy'"),
        ({"plphp.r": 3}, r"r \+ delta_r"),
        ({"plphp": "off", "plphp.r": 3}, r"r \+ delta_r"),
        ({"plphp.r": 10**400}, "r must be finite"),
        ({"plphp.min_tokens": 2**31}, "min_tokens must be an integer of at most 2147483647"),
    ],
)
def test_a_requests_bad_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_policy(Options(), given)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [10**400, -(10**400), 2**64, float("inf"), float("nan"), 1j, ""])
def test_no_number_of_a_request_is_too_large_to_be_refused(name: str, value: object) -> None:
    """Another error than ValueError would stop the engine, with all other requests."""
    options = Options(plphp.policy(name))  # type: ignore[arg-type]
    for field in fields(options.policy):
        if field.name not in ("round_to", "window"):
            with pytest.raises(ValueError, match=field.name):
                request_policy(options, {f"plphp.{field.name}": value})


@pytest.mark.parametrize("name", METHODS)
def test_a_server_prunes_with_the_method_that_it_is_given(name: str) -> None:
    made: Any = plphp.policy(name)
    for given in (name, made):
        extra = plphp.vllm.engine_args(given)["kv_transfer_config"]["kv_connector_extra_config"]
        assert extra["method"] == name
        assert read_options(extra).policy == made
        assert read_options({"method": name}).policy == made


def test_the_methods_that_need_one_layer_are_served() -> None:
    own = {"plphp", "plphp-shared", "plphp-flat", "plphp-global"}
    assert {"full", "random", "uniform", "novelty", "snapkv", "pyramidkv", *own} == set(METHODS)
    assert read_options({"method": "recommended"}).policy == plphp.policy("recommended")


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in METHODS])
def test_other_methods_are_refused_by_name(name: str) -> None:
    other: Any = plphp.policy(name)
    with pytest.raises(ValueError, match=f"cannot prune with {type(other).__name__}"):
        plphp.vllm.engine_args(other)
    with pytest.raises(ValueError, match=f"method must be one of .*, got '{name}'; "):
        plphp.vllm.engine_args(name)
    with pytest.raises(ValueError, match=f"method must be one of .*, got '{name}'; "):
        read_options({"method": name})


def test_a_policy_without_a_name_is_refused() -> None:
    class Mine(plphp.PLPHP):
        pass

    with pytest.raises(ValueError, match=r"only the policies of plphp\.policy have a name"):
        plphp.vllm.engine_args(Mine())


@pytest.mark.parametrize("given", [{"r": 0.4}, 7])
def test_what_is_no_policy_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="vLLM cannot prune with"):
        plphp.vllm.engine_args(given)
    with pytest.raises(ValueError, match="method must be one of"):
        read_options({"method": given})


def test_options_are_those_of_the_method() -> None:
    options = read_options({"method": "novelty", "budget": 0.2})
    assert options.policy == plphp.policy("novelty", budget=0.2)
    with pytest.raises(ValueError, match="no option 'r'; the options are method, budget, floor"):
        read_options({"method": "novelty", "r": 0.4})
    asked = request_policy(options, {"plphp.budget": 0.5})
    assert asked == plphp.policy("novelty", budget=0.5)
    with pytest.raises(ValueError, match=r"no option 'plphp\.r'; the options are plphp, plphp\.b"):
        request_policy(options, {"plphp.r": 0.5})


def test_a_request_cannot_change_the_window_of_its_server() -> None:
    options = read_options({"method": "snapkv", "window": 8})
    assert options.policy == plphp.policy("snapkv", window=8)
    asked = request_policy(options, {"plphp.kernel": 3})
    assert asked == plphp.policy("snapkv", window=8, kernel=3)
    with pytest.raises(ValueError, match=r"no option 'plphp\.window'; the options are plphp, "):
        request_policy(options, {"plphp.window": 16})


def test_the_start_log_tells_the_real_rounding() -> None:
    told = Options(plphp.PLPHP(r=0.3), layers_per_group=2).served(32)
    assert "round_to=32" in told and "r=0.3" in told
    assert told.endswith("layers_per_group=2, share_prefix=True, on=True, full_graphs=False")


def test_options_do_not_import_vllm() -> None:
    code = "import plphp, sys; plphp.vllm.engine_args(); print('vllm' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
