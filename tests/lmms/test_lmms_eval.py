"""lmms-eval's own command line on local tasks: its answers and scores are those of `plphp eval`."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from local_tasks import draw, lmms_eval, plphp_eval, write
from tiny_llava import save

import plphp
from plphp.eval.sample import Sample
from plphp.inputs import load
from versions import cache_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is missing: make test-lmms"
)

# --model_args, and what `plphp eval` calls the same.
METHODS = {
    "method=none": "full",
    "r=0.4,delta_r=0.3": "plphp:paper",
    "method=snapkv,budget=0.4": "snapkv",
    "method=fastv,budget=0.4": "fastv",
    "method=downsample,budget=0.4": "downsample",
}
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return draw()


@pytest.fixture(scope="module")
def folder(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    write(samples, folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Lines:
    methods = ",".join(name for name in METHODS.values() if name != "full")
    return plphp_eval(folder, "--methods", methods, "--budgets", ".4", "--batch", "4")


@pytest.mark.parametrize(
    ("method", "batch"), [*((method, 1) for method in METHODS), ("r=0.4,delta_r=0.3", 4)]
)
def test_scores_are_those_of_plphp_eval(
    samples: list[Sample], folder: Path, evaluated: Lines, method: str, batch: int
) -> None:
    run = lmms_eval(folder, f"pretrained=embedded,{method}", "--batch_size", str(batch))
    assert run.code == 0 and run.results, run.printed
    lines = {line["id"]: line for line in evaluated if line["method"] == METHODS[method]}
    expected = [lines[sample.id] for sample in samples]
    said = [line["filtered_resps"] for line in run.samples["plphp_boards"]]
    # `plphp eval` stops an answer that is longer than all right ones.
    assert all(text.startswith(e["answer"]) for text, e in zip(said, expected, strict=True))
    right = sum(line["exact"] for line in expected) / len(expected)
    assert run.results["results"]["plphp_boards"]["exact,none"] == pytest.approx(right)
    if method == "method=none":
        assert "method=none, the model ran without plphp" in run.printed
    elif "downsample" in method:
        assert "smaller images without pruning" in run.printed
    else:
        vision = {line["id"]: line["vision"] for line in evaluated if line["method"] == "full"}
        kept = sum(line["kept"] * vision[line["id"]] for line in expected) / sum(vision.values())
        assert f"kept {kept:.1%} of the vision K/V of {len(samples)} prompts" in run.printed
        found = run.results["throughput"]["avg_vision_kv_kept"]
        assert found == pytest.approx(kept, abs=1e-4)


@cache
def embedded() -> Any:
    return load("embedded", "auto", "cpu")


def test_a_model_with_a_processor(samples: list[Sample], folder: Path) -> None:
    save(folder / "llava")
    loaded, some = load(str(folder / "llava"), "auto", "cpu"), samples[:5]
    said = []
    with plphp.prune(loaded.model):
        for sample in some:
            inputs = loaded.inputs(sample.images, sample.question)
            out = loaded.model.generate(**inputs, max_new_tokens=96, do_sample=False)
            said.append(loaded.decode(out[0, inputs["input_ids"].shape[1] :]))
    options = ("--limit", str(len(some)), "--batch_size", "2")
    run = lmms_eval(folder, f"pretrained={folder / 'llava'}", *options)
    assert run.code == 0 and run.results, run.printed
    # lmms-eval strips what Python takes for white space, which random answers end in.
    heard = [line["filtered_resps"].strip() for line in run.samples["plphp_boards"]]
    assert heard == [text.strip() for text in said]
    assert run.results["throughput"]["avg_vision_kv_kept"] < 1


@torch.no_grad()
def loss(sample: Sample, answer: str, policy: Any) -> tuple[float, bool]:
    """Of a given answer, one token after the other on what the prompt left."""
    loaded = embedded()
    inputs = loaded.inputs(sample.images, sample.question)
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
        ids, cache = torch.tensor([[token]]), cache_of(out)
        out = loaded.model(input_ids=ids, cache=cache, **step)
    if pruning:
        pruning.remove()
    return sum(losses) / len(losses), greedy


@pytest.mark.parametrize(
    ("method", "policy"), [("method=none", None), ("r=0.4,delta_r=0.3", plphp.PLPHP())]
)
def test_given_answers_are_scored(
    samples: list[Sample], folder: Path, method: str, policy: Any
) -> None:
    """--force_simple: the older kind of task, which also generates."""
    tasks, some = "plphp_boards,plphp_choices", samples[:6]
    arguments = f"pretrained=embedded,{method}"
    run = lmms_eval(folder, arguments, "--force_simple", "--limit", str(len(some)), tasks=tasks)
    assert run.code == 0 and run.results, run.printed
    assert len(run.samples["plphp_boards"]) == len(some)
    right = []
    for k, line in enumerate(run.samples["plphp_choices"]):
        answers = samples[k - 1].answers[0], samples[k].answers[0]
        expected = [loss(some[k], answer, policy) for answer in answers]
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
