"""Methods that choose from hidden states, against slow references in float64 with Python loops."""

import math

import pytest
import torch
from torch import Tensor

import plphp
from plphp.policy import HiddenView

# Two images in the first row; one, of the size of its first, after two columns of padding.
SPANS = torch.tensor(
    [[0] * 3 + [1] * 12 + [0] + [2] * 7 + [0] * 4, [-1] * 2 + [0] * 2 + [1] * 12 + [0] * 11]
)


def view(seed: int = 0, **more: object) -> HiddenView:
    torch.manual_seed(seed)
    return HiddenView(torch.randn(*SPANS.shape, 6), SPANS, layers=4, **more)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))


def count(share: float, size: int) -> int:
    return min(size, math.ceil(share * size - 1e-6))


def of_images(spans: Tensor) -> list[tuple[int, list[int]]]:
    """(row, columns) of every image."""
    rows = [(row, int(i)) for row, line in enumerate(spans) for i in line.unique() if i > 0]
    return [(row, (spans[row] == i).nonzero()[:, 0].tolist()) for row, i in rows]


def kept(policy: plphp.policy.Policy, seen: HiddenView) -> list[list[int]]:
    """The columns that stay of every image."""
    plan = policy.choose(seen)
    stays = [set(plan.columns[row, 0][plan.valid[row]].tolist()) for row in range(len(SPANS))]
    for row, line in enumerate(SPANS):
        assert {int(c) for c in (line == 0).nonzero()} <= stays[row], "text is missing"
        assert not stays[row] & {int(c) for c in (line < 0).nonzero()}, "padding stays"
    return [[c for c in columns if c in stays[row]] for row, columns in of_images(SPANS)]


def max_min(x: Tensor, wanted: int) -> list[int]:
    """The greedy max-min rule, one distance at a time."""
    far = [[1 - cosine(a, b) for b in x] for a in x]
    every = range(len(x))
    chosen: list[int] = []
    while len(chosen) < wanted:
        left = [i for i in every if i not in chosen]
        others = chosen or list(every)
        chosen.append(max(left, key=lambda i: min(far[i][j] for j in others if j != i)))
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75, 1.0])
def test_divprune_is_the_greedy_solution_of_max_min(share: float) -> None:
    seen = view()
    expected = [
        [columns[i] for i in max_min(seen.hidden[row, columns], count(share, len(columns)))]
        for row, columns in of_images(SPANS)
    ]
    assert kept(plphp.policy("divprune", budget=share), seen) == expected


def test_an_image_keeps_its_floor_and_its_share() -> None:
    sizes = [12, 7, 12]
    for share, floor in ((0.0, 0), (0.0, 3), (0.3, 5), (0.5, 20)):
        policy = plphp.policy("divprune", budget=share, min_tokens=floor)
        wanted = [max(count(share, n), min(floor, n)) for n in sizes]
        assert [len(columns) for columns in kept(policy, view())] == wanted


def test_equal_tokens_are_not_chosen_twice() -> None:
    seen = HiddenView(torch.ones(*SPANS.shape, 6), SPANS)
    assert [len(columns) for columns in kept(plphp.policy("divprune"), seen)] == [6, 4, 6]


def test_a_row_alone_keeps_the_same_tokens() -> None:
    seen, policy = view(), plphp.policy("divprune", budget=0.4)
    alone = policy.choose(HiddenView(seen.hidden[1:], SPANS[1:]))
    together = policy.choose(seen)
    row = together.columns[1, 0][together.valid[1]]
    assert torch.equal(alone.columns[0, 0], row)
    assert torch.isnan(alone.gamma).all() and alone.rate.tolist() == [0.4]


def test_stages_by_name_share_a_budget() -> None:
    made = plphp.policy("divprune,plphp", budget=0.2, delta_r=0.1)
    assert (made.first.budget, made.second.budget, made.second.delta_r) == (0.5, 0.4, 0.1)
    assert plphp.policy("divprune:.25/novelty", budget=0.2).second.budget == pytest.approx(0.8)
    assert plphp.policy("divprune:.25,novelty").second == plphp.policy("novelty")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plphp,divprune", {}, "a sequence method such as divprune, then a cache method"),
        ("divprune,vtw", {}, "got DivPrune, VTW"),
        ("divprune,plphp,snapkv", {}, "must name a sequence method and a cache method"),
        ("divprune:much,plphp", {}, "could not convert string to float"),
        ("divprune:2,plphp", {}, "budget must be a share from 0 to 1"),
        ("divprune,plphp", {"budget": 0.6}, "at most the share of the first stage, 0.5, got 0.6"),
        ("divprune,nothing", {}, "unknown policy 'nothing'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plphp.policy(name, **options)
