"""Each method against its formula, which is written again in loops here."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import plphp
from plphp.policy import POLICIES, HiddenPolicy, KeepPlan, LayerView, SequencePolicy, steps
from plphp.policy.plphp import calibrated

CACHE_METHODS = [n for n in POLICIES if POLICIES[n]().prunes_cache]
HEADS, KV_HEADS, WINDOW = 4, 2, 6


def layer(seed: int = 0, padding: int = 0, index: int = 0, layers: int = 4) -> LayerView:
    """One row, left-padded: text, image of 12, text, image of 20, 9 columns of text."""
    generator = torch.Generator().manual_seed(100 * index + seed)
    row = [0] * 3 + [1] * 12 + [0] * 2 + [2] * 20 + [0] * 9
    spans = torch.tensor([[-1] * padding + row])
    columns = torch.arange(len(row))
    asked = columns[-WINDOW:]
    logits = torch.randn(HEADS, WINDOW, len(row), generator=generator) * 2
    seen = logits.masked_fill(columns > asked[:, None], -math.inf).softmax(-1)
    values = torch.randn(KV_HEADS, len(row), 8, generator=generator)
    window = torch.nn.functional.pad(seen, (padding, 0))[None]
    return LayerView(
        probs=window[:, :, -1],
        spans=spans,
        kv_heads=KV_HEADS,
        layer=index,
        layers=layers,
        window=window,
        asked=asked[None] + padding,
        values=torch.nn.functional.pad(values, (0, 0, padding, 0))[None],
    )


def kept(plan: KeepPlan, head: int = 0) -> list[int]:
    found: list[int] = plan.columns[0, head, -int(plan.lengths[0]) :].tolist()
    return found


def vision_kept(plan: KeepPlan, view: LayerView, head: int = 0) -> list[int]:
    return [column for column in kept(plan, head) if view.spans[0, column] > 0]


def plans(policy: plphp.policy, views: list[LayerView]) -> list[KeepPlan]:
    if policy.kind == "layers":
        made: list[KeepPlan] = policy.plan_all([policy.look(v) for v in views])
        return made
    return [policy.plan(view) for view in views]


def top(scores: Tensor, columns: list[int], count: int) -> list[int]:
    return sorted(sorted(columns, key=lambda j: (-float(scores[j]), j))[:count])


@pytest.mark.parametrize("name", [n for n in CACHE_METHODS if n != "full"])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4, 0.6, 1.0])
def test_every_method_keeps_its_budget_over_all_layers(name: str, budget: float) -> None:
    views = [layer(index=index) for index in range(4)]
    made = plans(plphp.policy(name, budget=budget), views)
    share = sum(len(vision_kept(p, v)) for p, v in zip(made, views, strict=True)) / (4 * 32)
    assert (
        budget - 1e-6 <= share <= budget + 2 / 32
    )  # at most one token more for each layer and image
    for plan, view in zip(made, views, strict=True):
        text = {j for j, s in enumerate(view.spans[0].tolist()) if s == 0}
        assert text <= set(kept(plan))
        assert len(set(kept(plan, 1))) == len(kept(plan))


@pytest.mark.parametrize("name", CACHE_METHODS)
def test_padding_changes_nothing(name: str) -> None:
    alone = [layer(index=index) for index in range(4)]
    padded = [layer(index=index, padding=5) for index in range(4)]
    for one, other in zip(
        plans(plphp.policy(name), alone), plans(plphp.policy(name), padded), strict=True
    ):
        for head in range(KV_HEADS):
            assert kept(one, head) == [column - 5 for column in kept(other, head)]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_rates_meet_the_budget_in_proportion(asked: list[float], budget: float) -> None:
    want = torch.tensor(asked).double()[:, None]
    rates = steps.meet_budget(want, budget)[:, 0]
    assert float(rates.mean()) == pytest.approx(budget, abs=1e-6)
    assert bool(((rates >= 0) & (rates <= 1)).all())
    free = (rates < 1 - 1e-9) & (want[:, 0] > 1e-3)
    if int(free.sum()) > 1:
        ratio = (rates / want[:, 0])[free]
        assert float(ratio.max() - ratio.min()) < 1e-4 * float(ratio.max()) + 1e-9


def test_rows_without_images_have_no_rate() -> None:
    rates = steps.meet_budget(torch.tensor([[0.1, math.nan], [0.7, math.nan]]), 0.4)
    assert rates[:, 0].tolist() == pytest.approx([0.1, 0.7])
    assert bool(rates[:, 1].isnan().all())


def test_random_draws_differ_by_seed_layer_and_head_and_favour_no_place() -> None:
    pick = plphp.policy("random", budget=0.5)
    view = layer()
    other = plphp.policy("random", budget=0.5, seed=1)
    assert kept(pick.plan(view)) == kept(pick.plan(layer()))
    assert kept(pick.plan(view)) != kept(pick.plan(view), 1)
    assert kept(pick.plan(view)) != kept(pick.plan(replace(view, layer=1)))
    assert kept(pick.plan(view)) != kept(other.plan(view))
    counts = torch.zeros(46)
    for seed in range(400):
        chosen = vision_kept(plphp.policy("random", budget=0.5, seed=seed).plan(view), view)
        counts[chosen] += 1
    vision = counts[view.spans[0] > 0]
    assert float(vision.min()) > 150 and float(vision.max()) < 250  # 200 +- 5 standard deviations


@pytest.mark.parametrize("name", ["uniform", "plphp-shared"])
def test_shared_selection_is_the_top_by_mean_attention(name: str) -> None:
    view = layer()
    policy = plphp.policy(name)
    plan = policy.plan(view)
    rate = float(plan.rate[0])
    mean = view.probs[0].mean(0)
    wanted = [
        *top(mean, list(range(3, 15)), math.ceil(rate * 12 - 1e-6)),
        *top(mean, list(range(17, 37)), math.ceil(rate * 20 - 1e-6)),
    ]
    for head in range(KV_HEADS):
        assert vision_kept(plan, view, head) == wanted


def test_flat_is_plphp_at_one_rate() -> None:
    view = layer()
    flat, own = plphp.policy("plphp-flat", budget=0.3), plphp.PLPHP(r=0.3, delta_r=0)
    assert torch.equal(flat.plan(view).columns, own.plan(view).columns)


def test_global_is_plphp_with_one_ranking() -> None:
    view = layer()
    one, other = plphp.policy("plphp-global"), plphp.PLPHP(budget="global")
    assert torch.equal(one.plan(view).columns, other.plan(view).columns)


def test_a_number_as_budget_scales_the_rates_of_plphp() -> None:
    views = [layer(index=index) for index in range(4)]
    gammas = [float(plphp.PLPHP().plan(view).gamma[0]) for view in views]
    own = plphp.PLPHP(alpha=sorted(gammas)[2], beta=sorted(gammas)[1])
    before = [float(own.plan(view).rate[0]) for view in views]
    assert sorted({round(rate, 6) for rate in before}) == [0.1, 0.4, 0.7]
    after = [float(p.rate[0]) for p in plans(replace(own, budget=0.2), views)]
    factor = 0.2 / (sum(before) / 4)
    assert after == pytest.approx([rate * factor for rate in before])


@pytest.mark.parametrize("window", [1, 3, 6])
def test_snapkv_pools_the_mean_of_its_window(window: int) -> None:
    view = layer()
    policy = plphp.policy("snapkv", budget=0.25, window=window, kernel=3)
    assert policy.window == window
    assert view.window is not None and view.asked is not None
    view = replace(view, window=view.window[:, :, -window:], asked=view.asked[:, -window:])
    plan = policy.plan(view)
    length = view.spans.shape[1]
    for group in range(KV_HEADS):
        scores = torch.zeros(length)
        for head in (2 * group, 2 * group + 1):
            for j in range(length - window):
                near = [i for i in (j - 1, j, j + 1) if 0 <= i < length - window]
                for i in near:
                    for w in range(window):
                        scores[j] += view.window[0, head, w, i] / window / 3 / 2
        vision = (view.spans[0] > 0).nonzero()[:, 0].tolist()
        assert vision_kept(plan, view, group) == top(scores, vision, 8)


def test_snapkv_keeps_the_vision_tokens_inside_its_window() -> None:
    spans = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0]])
    probs = torch.full((1, 2, 4, 9), 1 / 9)
    asked = torch.tensor([[5, 6, 7, 8]])
    view = LayerView(probs[:, :, -1], spans, 1, window=probs, asked=asked)
    plan = plphp.policy("snapkv", budget=0.5, window=4).plan(view)
    assert vision_kept(plan, view) == [5, 6, 7]


def test_pyramid_rates_fall_in_a_line_and_have_the_budget_as_mean() -> None:
    for budget, slope in ((0.4, 20.0), (0.8, 20.0), (0.3, 1.0)):
        policy = plphp.policy("pyramidkv", budget=budget, slope=slope)
        rates = [float(policy.plan(layer(index=i)).rate[0]) for i in range(4)]
        assert sum(rates) / 4 == pytest.approx(budget)
        falls = [a - b for a, b in itertools.pairwise(rates)]
        assert falls == pytest.approx([falls[0]] * 3)
        assert falls[0] >= -1e-9 and max(rates) <= 1
    assert rates == pytest.approx([0.3] * 4)


def test_vl_cache_gives_dense_layers_more() -> None:
    views = [layer(index=index) for index in range(4)]
    sharp = views[2].window
    assert sharp is not None
    concentrated = sharp.pow(4) / sharp.pow(4).sum(-1, keepdim=True)
    views[2] = replace(views[2], window=concentrated, probs=concentrated[:, :, -1])
    policy = plphp.policy("vl-cache", budget=0.3, threshold=0.05)
    dense = [1 - sparsity(view, 0.05) for view in views]
    made = plans(policy, views)
    rates = [float(plan.rate[0]) for plan in made]
    assert rates == pytest.approx([0.3 * 4 * d / sum(dense) for d in dense], rel=1e-5)
    assert rates[2] == min(rates)
    vision = (views[0].spans[0] > 0).nonzero()[:, 0].tolist()
    window = views[0].window
    assert window is not None
    scores = window[0].sum(1)  # every scored token is after the last image
    for group in range(KV_HEADS):
        wanted = top(
            scores[2 * group : 2 * group + 2].mean(0), vision, math.ceil(rates[0] * 32 - 1e-6)
        )
        assert vision_kept(made[0], views[0], group) == wanted


def sparsity(view: LayerView, threshold: float) -> float:
    assert view.window is not None and view.asked is not None
    shares = []
    for head in range(HEADS):
        small = seen = 0
        for w, column in enumerate(view.asked[0].tolist()):
            row = view.window[0, head, w]
            for j in range(column + 1):
                seen += 1
                small += bool(row[j] < threshold * row.max())
        shares.append(small / seen)
    return sum(shares) / len(shares)


def test_vl_cache_asks_only_tokens_after_the_last_image() -> None:
    view = layer()
    assert view.asked is not None and view.window is not None
    spans = view.spans.clone()
    spans[0, -4] = 3  # an image of one token, three tokens before the end
    policy = plphp.policy("vl-cache", budget=0.5)
    look = policy.look(replace(view, spans=spans))
    wanted = view.window[0, :, -3:].sum(1).view(KV_HEADS, 2, -1).mean(1)
    assert torch.allclose(look.scores[0], wanted, atol=1e-6)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 1))
def test_smaller_pictures_have_at_most_their_share_of_tokens(
    columns: int, rows: int, budget: float
) -> None:
    width, height = plphp.policy("downsample", budget=budget).size(28 * columns, 28 * rows, 28)
    assert width % 28 == 0 and height % 28 == 0
    tokens = width * height // 28**2
    assert 1 <= tokens <= max(math.ceil(budget * columns * rows - 1e-6), 1)
    if columns * rows >= 64 and budget >= 0.1 and 0.5 <= columns / rows <= 2:
        assert tokens >= 0.5 * budget * columns * rows


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        *((n, {"budget": 1.5}, "budget") for n in CACHE_METHODS),
        ("snapkv", {"kernel": 4}, "kernel"),
        ("snapkv", {"window": 0}, "window"),
        ("pyramidkv", {"slope": 0.5}, "slope"),
        ("vl-cache", {"threshold": -1}, "threshold"),
        ("random", {"seed": -1}, "seed"),
        ("fastv", {"layer": 0}, "layer"),
        ("fastv", {"keep": 2}, "keep"),
        ("vtw", {"layer": 3, "budget": 0.5}, "budget and layer"),
        ("downsample", {"budget": 0}, "budget"),
    ],
)
def test_bad_options_name_their_field(name: str, options: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        plphp.policy(name, **options)


def test_calibration_splits_the_layers_in_three_and_keeps_the_budget() -> None:
    gammas = torch.linspace(0.05, 0.9, 60).tolist()
    for budget in (0.1, 0.4, 0.6, 0.9):
        found = calibrated(gammas, budget)
        _, rates = found.rate(torch.tensor(gammas))
        assert float(rates.mean()) == pytest.approx(budget, abs=1e-6)
        assert sorted({round(float(rate), 6) for rate in rates}) == pytest.approx(
            [found.r - found.delta_r, found.r, found.r + found.delta_r], abs=1e-6
        )


def test_tgv_kv_ranks_by_text_and_rates_layers_by_text_to_vision_attention() -> None:
    views = [layer(index=index, padding=2) for index in range(4)]
    policy, crossing, scores = plphp.policy("tgv-kv", budget=0.3), [], []
    for view in views:
        columns = range(view.spans.shape[1])
        vision = [j for j in columns if view.spans[0, j] > 0]
        text = [j for j in columns if j > vision[-1] and view.spans[0, j] == 0]
        row = {int(c): i for i, c in enumerate(view.asked[0])}
        text = [t for t in text if t in row]
        a = {t: view.window[0, :, row[t]].double().mean(0) for t in text}
        weight = {t: sum(float(a[i][t]) for i in text if i >= t) / sum(i >= t for i in text)
                  for t in text}  # fmt: skip
        scores.append([sum(weight[t] * float(a[t][j]) for t in text) for j in columns])
        crossing.append(sum(float(a[t][j]) for t in text for j in vision))
    rates = [0.3 * 4 * c / sum(crossing) for c in crossing]
    assert max(rates) < 1, "no layer is full in this case"
    for plan, view, rate, score in zip(plans(policy, views), views, rates, scores, strict=True):
        vision = [j for j in range(view.spans.shape[1]) if view.spans[0, j] > 0]
        wanted = top(torch.tensor(score), vision, math.ceil(rate * len(vision) - 1e-6))
        assert [vision_kept(plan, view, head) for head in range(KV_HEADS)] == [wanted] * KV_HEADS


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_novelty_keeps_what_differs_from_its_image(floor: float) -> None:
    view = layer()
    values = torch.randn(1, KV_HEADS, view.spans.shape[1], 8, generator=torch.manual_seed(3))
    policy = plphp.policy("novelty", budget=0.4, floor=floor)
    plan = policy.plan(replace(view, values=values))
    images = [list(range(3, 15)), list(range(17, 37))]
    for head in range(KV_HEADS):
        scores = torch.zeros(view.spans.shape[1])
        for columns in images:
            mean = sum(values[0, head, j] for j in columns) / len(columns)
            for j in columns:
                scores[j] = (values[0, head, j] - mean).pow(2).sum().sqrt()
        own = [j for c in images for j in top(scores, c, math.ceil(0.4 * floor * len(c) - 1e-6))]
        rest = [j for c in images for j in c if j not in own]
        more = max(math.ceil(0.4 * 32 - 1e-6) - len(own), 0)
        assert vision_kept(plan, view, head) == sorted([*own, *top(scores, rest, more)])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("plphp-shared", {"gqa": "max"}, "gqa"),
        ("plphp-global", {"budget": "image"}, "budget"),
        ("fastv", {"keep": 0.5, "budget": 0.6}, "keep"),
        ("vtw", {"layer": 1, "budget": 0.6}, "layer"),
    ],
)
def test_an_option_without_effect_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plphp.policy(name, **options)


# Pairs of options. The second changes what is kept, unless the first refuses it.
CHANGES: dict[str, tuple[Any, Any]] = {
    "r": (0.4, 0.6), "delta_r": (0.0, 0.3), "alpha": (0.05, 0.9), "beta": (0.0, 0.89),
    "budget": (0.5, 0.8), "gqa": ("mean", "max"), "min_tokens": (0, 12), "round_to": (1, 16),
    "seed": (0, 1), "window": (1, 6), "kernel": (1, 7), "slope": (1.0, 20.0),
    "threshold": (0.001, 0.9), "floor": (0.0, 1.0), "keep": (0.2, 0.7), "layer": (1, 3),
}  # fmt: skip
FIXED = {"beta": {"alpha": 0.9, "r": 0.5, "delta_r": 0.3}, "alpha": {"beta": 0.0, "r": 0.5}}


def options_of_methods() -> list[tuple[str, str]]:
    """Every option of every method that reads attention; test_hidden_methods has the others."""
    reads = [n for n in POLICIES if not issubclass(POLICIES[n], HiddenPolicy)]
    names = [n for n in reads if n not in ("full", "downsample")]
    return [(n, o) for n in names for o in POLICIES[n].__dataclass_fields__]


@pytest.mark.parametrize(("name", "option"), options_of_methods())
def test_every_option_of_a_method_has_an_effect(name: str, option: str) -> None:
    views = [layer(seed=seed, index=index) for seed in range(3) for index in range(4)]
    found: list[list[Any]] = []
    for value in CHANGES[option]:
        try:
            made = plphp.policy(name, **{**FIXED.get(option, {}), option: value})
        except ValueError as error:
            found.append([option in str(error)])
            continue
        last = [replace(v, window=v.window[:, :, -w:], asked=v.asked[:, -w:])
                for v in views if (w := made.window)]  # fmt: skip
        at = [made.leave_at(4)] if isinstance(made, SequencePolicy) else []
        found.append([*at, *(plan.columns.tolist() for plan in plans(made, last))])
    assert found[0] != found[1]


def test_round_to_rounds_what_is_dropped() -> None:
    view = layer()
    assert (32 - len(vision_kept(plphp.PLPHP(round_to=8).plan(view), view))) % 8 == 0
