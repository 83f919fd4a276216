"""Recall on the command line: `plphp generate --recall`, methods of `plphp eval`."""

from collections.abc import Callable

import pytest

from plphp.errors import InputError
from plphp.eval.methods import Setting, parse
from plphp.policy import policy

QUESTION = ("--prompt", "describe picture 1.")


def test_generate_reports_what_was_parked(run: Callable, picture: str) -> None:
    options = ("generate", "--image", picture, *QUESTION)
    result = run(*options, "--recall", "host", "--recall-budget", ".3")
    assert result.code == 0
    assert result.out.startswith("picture 1: ")
    assert "parked in main memory" in result.err
    found = run(*options, "--recall", "int4", "--json").json["report"]["recall"]
    assert found["home"] == "int4" and found["share"] <= 0.4


def test_compare_with_recall_shows_full_and_pruned(run: Callable, picture: str) -> None:
    options = ("generate", "--image", picture, *QUESTION, "--compare", "--rounds", 1)
    recall = ("--recall", "host", "--recall-budget", ".3")
    shown = run(*options, *recall)
    assert shown.code == 0 and "of the vision K/V on the device" in shown.out
    assert "parked in main memory" in shown.err
    found = run(*options, *recall, "--json").json
    assert found["report"]["recall"]["share"] <= 0.3
    assert found["pruned"]["answer"] == found["full"]["answer"]
    assert found["pruned"]["kv_bytes"] < found["full"]["kv_bytes"]


def test_recall_is_refused_in_one_line(run: Callable, picture: str) -> None:
    for options, said in (
        (("--recall", "disk"), "plphp: --recall disk: give host, int4, int2"),
        (("--recall", "host", "--recall-budget", "2"), "--recall-budget 2: budget must be a share"),
        (("--recall", "host", "--recall-budget", "0"), "--recall-budget 0: budget must be above"),
        (("--recall-budget", ".3"), "--recall-budget needs --recall"),
        (("--recall", "host", "--policy", "vtw"), "VTW"),
    ):
        result = run("generate", "--image", picture, *QUESTION, *options)
        assert result.code == 2
        assert said in result.err


@pytest.mark.parametrize("given", ["plhp", "plhp:paper", "plhp+int4"])
def test_an_unknown_method_comes_with_the_nearest(given: str) -> None:
    with pytest.raises(InputError, match=r"unknown method '.*' \(did you mean 'plphp'\?\); known"):
        parse(given, ".4")


def test_what_a_method_is_tells_of_recall_and_codes() -> None:
    made = policy("novelty")
    assert Setting("novelty", 0.4).described(made) == repr(made)
    said = Setting("novelty+int4", 0.2).described(made)
    assert said.startswith(
        f"{made!r}, which only ranks tokens, with Recall(home='int4', budget=0.2"
    )
    assert Setting("novelty+kv4", 0.2).described(made) == f"{made!r} with kv_bits=4"


def test_methods_with_a_home() -> None:
    settings, _ = parse("novelty+host,full+int4", ".4")
    host, everything = settings[1:3]
    assert host == Setting("novelty+host", 0.4)
    assert host.recall is not None and host.recall.budget == 0.4
    assert everything.recall is not None and everything.recall.budget == 0
    for wrong in ("novelty+", "novelty+disk", "none+host"):
        with pytest.raises(InputError, match="unknown method"):
            parse(wrong, ".4")
    with pytest.raises(InputError, match=r"full\+host parks all .*: budget must be above 0"):
        parse("full+host", ".4")


@pytest.mark.parametrize("option", ["--budget", "--r", "--delta-r", "--min-tokens", "--round-to"])
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_options_that_recall_ignores_are_refused(
    run: Callable, picture: str, command: str, option: str
) -> None:
    given = (command, "--image", picture, *QUESTION, "--recall", "int4", option, "0")
    refused = run(*given)
    assert refused.code == 2
    assert refused.err.startswith(f"plphp: {option} cannot be used with --recall: the policy ranks")
