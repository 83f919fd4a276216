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


def largest_determinant(x: Tensor, text: Tensor, wanted: int) -> list[int]:
    """The greedy maximum of the determinant of CDPruner's kernel, one determinant at a time."""
    raw = [-sum(cosine(a, t) for t in text) / len(text) for a in x]
    low, high = min(raw), max(raw)
    relevance = [(r - low + 1e-6) / (high - low) for r in raw]
    kernel = torch.tensor(
        [[relevance[i] * relevance[j] * cosine(x[i], x[j]) for j in range(len(x))]
         for i in range(len(x))], dtype=torch.float64)  # fmt: skip
    chosen: list[int] = []
    while len(chosen) < wanted:
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(kernel[[*chosen, i]][:, [*chosen, i]].det())))
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_cdpruner_is_the_greedy_maximum_of_its_determinant(share: float) -> None:
    """Up to the rank of the kernel, above which every determinant is 0."""
    seen = view()
    texts = [(SPANS[0] == 0).nonzero()[7 - 3 :, 0], (SPANS[1] == 0).nonzero()[2:, 0]]
    assert texts[0].tolist() == [23, 24, 25, 26] and len(texts[1]) == 11
    expected = []
    for row, columns in of_images(SPANS):
        text = seen.hidden[row, texts[row]]
        found = largest_determinant(seen.hidden[row, columns], text, count(share, len(columns)))
        expected.append([columns[i] for i in found])
    assert kept(plphp.policy("cdpruner", budget=share), seen) == expected


def test_cdpruner_chooses_as_many_as_asked_beyond_the_rank() -> None:
    """The embeddings have 6 numbers, so the rule decides about 6 tokens; the others fill up."""
    seen = view()
    some, more = (kept(plphp.policy("cdpruner", budget=b), seen) for b in (0.5, 0.9))
    for few, many, (_, columns) in zip(some, more, of_images(SPANS), strict=True):
        assert set(few) <= set(many)
        assert len(many) == count(0.9, len(columns))


def test_cdpruner_chooses_by_the_question() -> None:
    seen = view()
    other = seen.hidden.clone()
    other[:, 23:] *= -1
    policy = plphp.policy("cdpruner", budget=0.3)
    assert kept(policy, seen) != kept(policy, HiddenView(other, SPANS))


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("pivots", [(1, 0), (2, 3), (4, 4)])
def test_dart_keeps_pivots_and_what_is_unlike_them(share: float, pivots: tuple[int, int]) -> None:
    seen = view(key_sizes=torch.rand(2, SPANS.shape[1], generator=torch.manual_seed(2)))
    expected = []
    for row, columns in of_images(SPANS):
        norm = dict(enumerate(seen.key_sizes[row].tolist()))
        text = [c for c in range(columns[-1], SPANS.shape[1]) if SPANS[row, c] == 0]
        wanted = count(share, len(columns))
        own = sorted(columns, key=lambda c: -norm[c])[: min(pivots[0], wanted)]
        every = own + sorted(text, key=lambda c: -norm[c])[: pivots[1]]
        stays, rest = list(own), wanted - len(own)
        for number, pivot in enumerate(every):
            left = [c for c in columns if c not in stays]
            x = seen.hidden[row]
            left.sort(key=lambda c: cosine(x[pivot], x[c]))
            stays += left[: rest // len(every) + (number < rest % len(every))]
        expected.append(sorted(stays))
    policy = plphp.policy("dart", keep=share, pivots=pivots[0], text_pivots=pivots[1])
    assert kept(policy, seen) == expected


def test_dart_meets_a_budget_over_all_layers() -> None:
    policy = plphp.policy("dart", budget=0.7)
    assert policy.leave_at(4) == 2 and policy.share(4) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="at least layer / layers = 2 / 4"):
        plphp.policy("dart", budget=0.3).check(4)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.95])
def test_vidcom2_keeps_what_is_unlike_its_frame_and_video(share: float) -> None:
    frames = torch.zeros_like(SPANS)
    frames[0, 3:15] = torch.arange(12) // 4 * 2  # numbers with gaps are allowed
    frames[1, 4:16] = torch.arange(12) // 3
    seen = view(frames=frames)
    expected = []
    for row, columns in of_images(SPANS):
        x = seen.hidden[row, columns].double()
        even = sorted(range(6), key=lambda e: float(x[:, e].var(unbiased=False)))[:3]
        u = [v[even] / v[even].norm() for v in x]

        def like(i: int, group: list[int], u: list[Tensor] = u) -> float:
            centre = sum(u[k] for k in group) / len(group)
            far = float((u[i] - centre).square().sum())
            return sum(math.exp(-far / (2 * 2.0**k)) for k in range(-3, 2))

        of_frame: dict[int, list[int]] = {}
        for i, column in enumerate(columns):
            of_frame.setdefault(int(frames[row, column]), []).append(i)
        every = list(range(len(columns)))
        mean = {f: sum(like(i, every) for i in own) / len(own) for f, own in of_frame.items()}
        weight = {f: math.exp(-(m - min(mean.values())) / 0.01) for f, m in mean.items()}
        p = {f: w / sum(weight.values()) for f, w in weight.items()}
        stays: list[int] = []
        for f, own in of_frame.items():
            rate = min(share * (1 + p[f] - 1 / len(p)), 1.0)
            score = {i: like(i, every) + like(i, own) for i in own}
            best = sorted(own, key=score.__getitem__)
            stays += best[: max(1, round(rate * len(own)))]
        expected.append(sorted(columns[i] for i in stays))
    assert kept(plphp.policy("vidcom2", budget=share), seen) == expected


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
    assert plphp.policy("divprune:.25") == plphp.policy("divprune", budget=0.25)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plphp,divprune", {}, "got PLPHP, DivPrune: give them in the other order"),
        ("divprune,vtw", {}, "got DivPrune, VTW"),
        ("divprune,plphp,snapkv", {}, "must name a sequence method and a cache method"),
        ("divprune:much,plphp", {}, "the share after ':' must be a number, got 'much'"),
        ("divprune:much", {}, "the share after ':' must be a number, got 'much'"),
        ("divprune,", {}, "must name a sequence method and a cache method"),
        ("divprune,plphp:.5", {}, "give the share of both stages together as the budget"),
        ("divprune,plphp", {"budget": -1}, "budget must be a share from 0 to 1, got -1"),
        ("fastv,plphp", {"budget": 0.3}, "needs the share of the first: name it, as in 'fastv:.5,"),
        ("vtw,plphp", {"budget": 0.3}, "needs the share of the first: name it, as in 'vtw:.5,"),
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


@pytest.mark.parametrize("name", ["divprune", "cdpruner"])
def test_images_of_many_sizes_are_chosen_from_as_each_alone(name: str) -> None:
    """One loop serves several sizes; each image keeps what it keeps in a prompt of its own."""
    torch.manual_seed(3)
    sizes = [1, 2, 3, 3, 9, 11, 15, 16, 24, 24, 31, 63]
    spans = torch.cat([torch.tensor([i] * n + [0]) for i, n in enumerate(sizes, 1)])[None]
    hidden = torch.randn(1, spans.shape[1], 80)
    text = hidden[:, spans[0] == 0]
    policy = plphp.policy(name, budget=0.9)
    plan = policy.choose(HiddenView(hidden, spans))
    together = set(plan.columns[0, 0].tolist())
    for number, size in enumerate(sizes, 1):
        columns = (spans[0] == number).nonzero()[:, 0]
        own = torch.cat([hidden[:, columns], text[:, -1:]], 1)
        alone = policy.choose(HiddenView(own, torch.tensor([[1] * size + [0]])))
        wanted = {int(columns[c]) for c in alone.columns[0, 0] if c < size}
        assert together & set(columns.tolist()) == wanted and len(wanted) == count(0.9, size)
