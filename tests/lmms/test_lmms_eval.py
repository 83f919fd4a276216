"""lmms-eval's own command line on local tasks: it says and scores what a plain loop does."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import Question, lmms_eval, questions, write

import plphp
from plphp.inputs import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is missing: make test-lmms"
)

METHODS: dict[str, Any] = {
    "method=none": None,
    "method=full": plphp.policy("full"),
    "r=0.4,delta_r=0.3": plphp.PLPHP(),
    "method=snapkv,budget=0.5,window=8": plphp.policy("snapkv", budget=0.5, window=8),
    "method=fastv,budget=0.6": plphp.policy("fastv", budget=0.6),
}


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions()


@pytest.fixture(scope="module")
def folder(asked: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    write(asked, folder)
    return folder


@cache
def embedded() -> Any:
    return load("embedded", "auto", "cpu")


def plain(asked: list[Question], policy: Any) -> tuple[list[str], float]:
    """One prompt after the other through `model.generate`: texts, and vision K/V kept over all."""
    loaded, texts, kept, vision = embedded(), [], 0.0, 0
    for question in asked:
        inputs = loaded.inputs(question.images, question.text)
        pruning = plphp.prune(loaded.model, policy) if policy else None
        out = loaded.model.generate(**inputs, max_new_tokens=96, do_sample=False)
        if pruning:
            tokens = sum(pruning.report.layers[0].vision)
            kept, vision = kept + tokens * pruning.report.retention, vision + tokens
            pruning.remove()
        texts.append(loaded.decode(out[0, inputs["input_ids"].shape[1] :]))
    return texts, kept / max(vision, 1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_a_plain_loop(
    asked: list[Question], folder: Path, method: str, batch: int
) -> None:
    if batch > 1 and method not in ("method=none", "r=0.4,delta_r=0.3"):
        pytest.skip("padding is the matter of tests/conformance: two methods do here")
    run = lmms_eval(folder, f"pretrained=embedded,{method}", "--batch_size", str(batch))
    assert run.code == 0, run.printed
    texts, kept = plain(asked, METHODS[method])
    assert [line["filtered_resps"] for line in run.samples["plphp_boards"]] == texts
    right = [text.strip() == q.answer for text, q in zip(texts, asked, strict=True)]
    assert run.results["results"]["plphp_boards"]["exact,none"] == sum(right) / len(right)
    if METHODS[method] is None:
        assert "method=none, the model ran untouched" in run.printed
    else:
        assert f"kept {kept:.1%} of the vision K/V of {len(asked)} prompts" in run.printed
        assert run.results["throughput"]["avg_vision_kv_kept"] == pytest.approx(kept)


@torch.no_grad()
def loss(question: Question, answer: str, policy: Any) -> tuple[float, bool]:
    """Of a given answer, one token after the other on what the prompt left."""
    loaded = embedded()
    inputs = loaded.inputs(question.images, question.text)
    target = loaded.tokenizer(answer, add_special_tokens=False)["input_ids"]
    pruning = plphp.prune(loaded.model, policy) if policy else None
    out, mask, losses = loaded.model(**inputs, use_cache=True), inputs["attention_mask"], []
    greedy = True
    for token in target:
        chances = out.logits[0, -1].log_softmax(-1)
        losses.append(-float(chances[token]))
        greedy &= int(chances.argmax()) == token
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        # The stock Qwen2-VL takes a mask for positions here, and needs none.
        step = {"attention_mask": mask} if pruning else {}
        ids, cache = torch.tensor([[token]]), out.past_key_values
        out = loaded.model(input_ids=ids, past_key_values=cache, **step)
    if pruning:
        pruning.remove()
    return sum(losses) / len(losses), greedy


@pytest.mark.parametrize("method", ["method=none", "r=0.4,delta_r=0.3"])
def test_given_answers_are_scored(asked: list[Question], folder: Path, method: str) -> None:
    """--force_simple: the older kind of task, which also generates."""
    run = lmms_eval(
        folder,
        f"pretrained=embedded,{method}",
        "--force_simple",
        "--limit",
        "12",
        tasks="plphp_boards,plphp_choices",
    )
    assert run.code == 0, run.printed
    policy, some = METHODS[method], asked[:12]
    texts, _ = plain(some, policy)
    assert [line["filtered_resps"] for line in run.samples["plphp_boards"]] == texts
    right = []
    for k, line in enumerate(run.samples["plphp_choices"]):
        expected = [loss(some[k], text, policy) for text in (asked[k - 1].answer, some[k].answer)]
        said = line["filtered_resps"]  # written as strings
        assert [float(s) for s, _ in said] == pytest.approx([e for e, _ in expected], abs=1e-4)
        assert [s for _, s in said] == [str(e) for _, e in expected]
        right.append(expected[1][0] < expected[0][0])
    assert run.results["results"]["plphp_choices"]["acc,none"] == sum(right) / len(right)


def test_what_it_cannot_do_it_refuses(folder: Path) -> None:
    """lmms-eval ends with 0 all the same, but without results."""
    run = lmms_eval(folder, "pretrained=embedded,rr=0.4")
    assert "policy 'plphp' has no option 'rr'" in run.printed and not run.results


@pytest.mark.filterwarnings("ignore")  # lmms-eval's, while it is imported
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "none", "r": 0.4}, "method=none has no options, got r"),
        ({"method": "h2o"}, "unknown policy 'h2o'"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"pretrained": "/no/such/model"}, "/no/such/model: no such directory"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], reason: str) -> None:
    from plphp.eval.lmms.model import Chat

    with pytest.raises(ValueError, match=reason):
        Chat(**{"pretrained": "embedded", **arguments})


@pytest.mark.filterwarnings("ignore")
def test_requests_of_other_kinds_are_refused() -> None:
    from plphp.eval.lmms.model import Chat

    model = Chat("embedded", "plphp")
    for request in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(plphp.UnsupportedModeError):
            request([])
    inner = model.loaded.model
    model.clean()
    plphp.prune(inner).remove()  # raises where something is attached still


def test_a_run_that_prunes_nothing_says_so(folder: Path) -> None:
    run = lmms_eval(folder, "pretrained=embedded,r=1,delta_r=0", "--limit", "2")
    assert run.code == 0 and "NOTHING WAS PRUNED" in run.printed
