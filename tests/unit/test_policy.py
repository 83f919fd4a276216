"""Policies on random spans, rates and probabilities, each option against its own definition."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plphp
from plphp.policy import KeepPlan, LayerView


@st.composite
def views(draw: st.DrawFn) -> LayerView:
    """A layer of random size: left-padded rows with 0 to 4 images each, scores with many ties."""
    rows = [
        draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=6))
        for _ in range(draw(st.integers(1, 3)))
    ]
    spans = [_row(row) for row in rows]
    length = max(map(len, spans))
    padded = [[-1] * (length - len(row)) + row for row in spans]
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(len(rows), kv_heads * groups, length, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()  # ties
    table = torch.tensor(padded)
    probs = logits.masked_fill((table < 0)[:, None], -math.inf).softmax(-1)
    return LayerView(probs, table, kv_heads)


def _row(parts: list[tuple[int, int]]) -> list[int]:
    """Text and images in turn. The last token is text, as in every prompt."""
    row: list[int] = []
    for number, (image, text) in enumerate(parts, start=1):
        row += [number] * (2 * image) + [0] * text
    present = sorted({i for i in row if i > 0})
    return [present.index(i) + 1 if i > 0 else 0 for i in row]


@st.composite
def policies(draw: st.DrawFn) -> plphp.PLPHP:
    low, middle = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    delta = min(middle - low, 1 - middle)
    thresholds = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return plphp.PLPHP(r=middle, delta_r=delta, beta=thresholds[0], alpha=thresholds[1])


def kept_columns(plan: KeepPlan, row: int, head: int) -> list[int]:
    columns: list[int] = plan.columns[
        row, head, plan.columns.shape[-1] - plan.lengths[row] :
    ].tolist()
    return columns


def images(view: LayerView, row: int) -> dict[int, list[int]]:
    spans = view.spans[row].tolist()
    return {i: [j for j, s in enumerate(spans) if s == i] for i in sorted({*spans} - {0, -1})}


def scores(view: LayerView, row: int, head: int) -> Tensor:
    groups = view.probs.shape[1] // view.kv_heads
    return view.probs[row, head * groups : (head + 1) * groups]


@settings(deadline=None, max_examples=150)
@given(views(), policies())
def test_kept_tokens_are_the_best_of_each_image(view: LayerView, policy: plphp.PLPHP) -> None:
    plan = policy.plan(view)
    for row in range(len(view.spans)):
        text = [j for j, s in enumerate(view.spans[row].tolist()) if s == 0]
        rate = float(plan.rate[row])
        for head in range(view.kv_heads):
            kept = kept_columns(plan, row, head)
            assert kept == sorted(set(kept))
            assert set(text) <= set(kept)
            assert all(view.spans[row, j] >= 0 for j in kept)
            score = scores(view, row, head).mean(0)
            for columns in images(view, row).values():
                mine = [j for j in columns if j in set(kept)]
                n = len(columns)
                assert len(mine) == min(n, max(0, math.ceil(rate * n - 1e-6)))
                dropped = [j for j in columns if j not in set(kept)]
                for a in mine:
                    for b in dropped:
                        assert (score[a], -a) > (score[b], -b) or (a < b and score[a] == score[b])


@settings(deadline=None, max_examples=100)
@given(views(), policies())
def test_gamma_rate_and_class_follow_their_formulas(view: LayerView, policy: plphp.PLPHP) -> None:
    plan = policy.plan(view)
    for row in range(len(view.spans)):
        vision = [j for columns in images(view, row).values() for j in columns]
        if not vision:
            assert plan.gamma[row].isnan()
            assert plan.rate[row].isnan()
            assert plan.classes[row] == -1
            continue
        gamma = float(view.probs[row].double()[:, vision].sum(-1).mean())
        assert float(plan.gamma[row]) == pytest.approx(gamma, abs=1e-6)
        if min(abs(gamma - policy.alpha), abs(gamma - policy.beta)) > 1e-5:
            level = 1 if gamma >= policy.alpha else -1 if gamma < policy.beta else 0
            assert float(plan.rate[row]) == pytest.approx(policy.r + level * policy.delta_r)
            assert int(plan.classes[row]) == 1 + level


@settings(deadline=None, max_examples=100)
@given(views(), policies(), st.integers(0, 5))
def test_global_budget_is_one_top_k_over_all_images(
    view: LayerView, policy: plphp.PLPHP, floor: int
) -> None:
    plan = replace(policy, budget="global", min_tokens=floor).plan(view)
    for row in range(len(view.spans)):
        found = images(view, row)
        vision = [j for columns in found.values() for j in columns]
        if not vision:
            continue
        share = min(len(vision), math.ceil(float(plan.rate[row]) * len(vision) - 1e-6))
        floors = sum(min(floor, len(columns)) for columns in found.values())
        for head in range(view.kv_heads):
            score = scores(view, row, head).mean(0).tolist()
            order = sorted(vision, key=lambda j: (-score[j], j))
            firsts = [
                j for c in found.values() for j in sorted(c, key=lambda j: (-score[j], j))[:floor]
            ]
            rest = [j for j in order if j not in firsts]
            wanted = {*firsts, *rest[: max(0, share - floors)]}
            kept = {j for j in kept_columns(plan, row, head) if view.spans[row, j] > 0}
            assert kept == wanted


@settings(deadline=None, max_examples=100)
@given(views(), policies(), st.integers(0, 7), st.sampled_from(["image", "global"]))
def test_min_tokens_is_a_floor_per_image(
    view: LayerView, policy: plphp.PLPHP, floor: int, budget: str
) -> None:
    plan = replace(policy, min_tokens=floor, budget=budget).plan(view)
    for row in range(len(view.spans)):
        for head in range(view.kv_heads):
            kept = set(kept_columns(plan, row, head))
            for columns in images(view, row).values():
                assert len(kept & set(columns)) >= min(floor, len(columns))


@settings(deadline=None, max_examples=100)
@given(views(), policies(), st.integers(2, 9))
def test_round_to_adds_the_best_dropped_tokens(
    view: LayerView, policy: plphp.PLPHP, multiple: int
) -> None:
    exact, rounded = policy.plan(view), replace(policy, round_to=multiple).plan(view)
    for row in range(len(view.spans)):
        vision = [j for columns in images(view, row).values() for j in columns]
        length = int(rounded.lengths[row])
        for head in range(view.kv_heads):
            before = set(kept_columns(exact, row, head))
            after = set(kept_columns(rounded, row, head))
            assert before <= after
            dropped = [j for j in vision if j not in before]
            score = scores(view, row, head).mean(0).tolist()
            order = sorted(dropped, key=lambda j: (-score[j], j))
            assert after - before == set(order[: length - len(before)])
            assert (len(dropped) - len(after - before)) % multiple == 0
            assert length - len(before) < multiple


@settings(deadline=None, max_examples=50)
@given(views())
def test_gqa_max_scores_by_the_strongest_query_head(view: LayerView) -> None:
    plan = plphp.PLPHP(r=0.5, delta_r=0, gqa="max").plan(view)
    for row in range(len(view.spans)):
        for head in range(view.kv_heads):
            score = scores(view, row, head).amax(0).tolist()
            kept = set(kept_columns(plan, row, head))
            for columns in images(view, row).values():
                order = sorted(columns, key=lambda j: (-score[j], j))
                assert kept & set(columns) == set(order[: math.ceil(len(columns) * 0.5 - 1e-6)])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"r": 0.2}, "r - delta_r"),
        ({"r": 0.8}, "r + delta_r"),
        ({"delta_r": -0.1}, "delta_r"),
        ({"alpha": 0.05}, "beta"),
        ({"r": math.nan}, "r"),
        ({"alpha": "high"}, "alpha"),
        ({"budget": "all"}, "budget"),
        ({"gqa": "min"}, "gqa"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 1.5}, "min_tokens"),
        ({"round_to": 0}, "round_to"),
    ],
)
def test_bad_options_name_their_field(options: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field.replace("+", r"\+")):
        plphp.PLPHP(**options)


def test_messages_say_how_to_write_the_option() -> None:
    import numpy as np

    for value in (np.float32(0.4), torch.tensor(0.4)):
        for make in (
            lambda: plphp.PLPHP(r=value),  # noqa: B023
            lambda: plphp.policy("snapkv", budget=value),  # noqa: B023
            lambda: plphp.PLPHP(min_tokens=value),  # noqa: B023
        ):
            with pytest.raises(plphp.InputError, match=r"give a number of Python, its \.item"):
                make()
    with pytest.raises(
        plphp.InputError, match=r"a share from 0 to 1, 'image' or 'global', got '\.3'"
    ):
        plphp.PLPHP(budget=".3")  # type: ignore[arg-type]
    with pytest.raises(plphp.InputError, match="gqa must be 'mean' or 'max', got 'min'"):
        plphp.PLPHP(gqa="min")  # type: ignore[arg-type]
    for name in (None, 0.4, plphp.PLPHP):
        with pytest.raises(TypeError, match="a policy has a name such as 'snapkv', got"):
            plphp.policy(name)  # type: ignore[arg-type]


def test_policies_come_by_name() -> None:
    assert plphp.policy("plphp", r=0.5) == plphp.PLPHP(r=0.5)
    with pytest.raises(
        ValueError, match=r"unknown policy 'plhpp' \(did you mean 'plphp'\?\); known"
    ):
        plphp.policy("plhpp")
    with pytest.raises(ValueError, match="no option 'rate'"):
        plphp.policy("plphp", rate=0.5)
