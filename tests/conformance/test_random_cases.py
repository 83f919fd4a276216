"""Random layers: scoring, selection, compaction and decoding against slow float64 formulas.

One layer at a time is tested, without a model. Batch, padding, images (in pieces, touching, tiny),
heads, rates, thresholds, options, windows and dtypes are drawn. The seed is fixed, so that every
run is the same.
"""

import math
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor

import oracle
from invariants import plphp_policy
from oracle import Numbers
from plphp.attention import attend, last_token_probabilities
from plphp.cache import KVStore
from plphp.policy import LayerView
from plphp.report import layer_report

SEED = 20261122
SHORT, LONG = 100, 2000
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    spans: tuple[tuple[int, ...], ...]  # rows, not padded
    kv_heads: int
    groups: int
    dim: int
    dtype: torch.dtype
    numbers: Numbers
    new: tuple[int, ...]  # columns of each later forward
    window: int | None  # additional columns of the prompt
    seed: int

    @property
    def padded(self) -> Tensor:
        width = max(map(len, self.spans))
        return torch.tensor([(-1,) * (width - len(row)) + row for row in self.spans])


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, ...]:
    """Images in up to three pieces, with or without text around them. The last token is text."""
    row: list[int] = []
    for image in range(1, draw(st.integers(0, 4)) + 1):
        row += [0] * draw(st.integers(0, 3))
        for size in draw(st.lists(st.integers(1, 10), min_size=1, max_size=3)):
            row += [image] * size + [0] * draw(st.integers(0, 1))
    return (*row, *[0] * draw(st.integers(1, 4)))


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    r = draw(st.sampled_from((0.0, 0.1, 0.3, 0.4, 0.5, 0.7, 1.0)))
    beta, alpha = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    return Numbers(
        r=r,
        delta_r=draw(st.sampled_from((0.0, min(r, 1 - r), min(r, 1 - r) / 2))),
        alpha=alpha,
        beta=beta,
        budget=draw(st.sampled_from(("image", "global"))),
        gqa=draw(st.sampled_from(("mean", "max"))),
        min_tokens=draw(st.sampled_from((0, 0, 1, 3, 50))),
        round_to=draw(st.sampled_from((1, 1, 4, 16, 64))),
    )


cases = st.builds(
    Case,
    spans=st.lists(rows(), min_size=1, max_size=4).map(tuple),
    kv_heads=st.sampled_from((1, 2, 4)),
    groups=st.sampled_from((1, 2, 3)),
    dim=st.sampled_from((4, 8)),
    dtype=st.sampled_from(tuple(TOLERANCE)),
    numbers=numbers(),
    new=st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
    window=st.sampled_from((None, None, 0, 2, 5)),
    seed=st.integers(0, 2**31),
)


# --- slow formulas --------------------------------------------------------------------------------


def softmax(case: Case, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """float64 (B, H, T, N). seen: bool (B, Hkv or 1, T, N)."""
    key, seen = (
        x.repeat_interleave(case.groups, dim=1) if x.shape[1] > 1 or case.kv_heads == 1 else x
        for x in (key.double(), seen)
    )
    logits = query.double() @ key.transpose(2, 3) / math.sqrt(case.dim)
    return logits.masked_fill(~seen, -math.inf).softmax(-1)


def decode(case: Case, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """The last T queries over all N + T columns, without the `hidden` ones (B, Hkv, N + T)."""
    total, count = k.shape[2], q.shape[2]
    columns = torch.arange(total)
    ask = columns[-count:, None]
    causal = columns <= ask
    if case.window is not None:
        causal &= columns > ask - (case.padded.shape[1] + case.window)
    seen = causal & ~hidden[:, :, None]
    p = softmax(case, q, k, seen)
    return p @ v.double().repeat_interleave(case.groups, dim=1)


# --- the comparison -------------------------------------------------------------------------------


@dataclass
class Tally:
    cases: int = 0
    total: int = 0
    exempt: int = 0
    dropped: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        share = self.exempt / max(self.total, 1)
        worst = ", ".join(f"{name} {value:.1e}" for name, value in sorted(self.worst.items()))
        return (
            f"{self.cases} cases, {self.total} token x head choices, {self.dropped} dropped, "
            f"{share:.2%} exempt; worst difference: {worst}"
        )


def compare(case: Case, tally: Tally) -> None:
    spans, options = case.padded, {"dtype": case.dtype}
    batch, length = spans.shape
    generator = torch.Generator().manual_seed(case.seed)
    heads, steps = case.kv_heads * case.groups, sum(case.new)

    def draw(count: int, columns: int) -> Tensor:
        return torch.randn(batch, count, columns, case.dim, generator=generator).to(**options)

    q = draw(heads, length + steps) * 2
    k, v = (draw(case.kv_heads, length + steps) for _ in range(2))
    valid = spans >= 0
    exact = softmax(case, q[:, :, length - 1 : length], k[:, :, :length], valid[:, None, None])
    scale = case.dim**-0.5
    probs = last_token_probabilities(q[:, :, length - 1], k[:, :, :length], valid, scale)
    assert (probs - exact[:, :, 0]).abs().max() < 1e-6

    plan = plphp_policy(case.numbers).plan(LayerView(probs, spans, case.kv_heads))
    positions = valid.cumsum(-1) - 1
    vision = tuple((spans > 0).sum(-1).tolist())
    kept = layer_report(0, plan, spans, positions, vision).kept
    selection = oracle.select([exact[:, :, 0]], spans, case.numbers, case.kv_heads)
    verdict = oracle.compare(selection, [kept])
    assert not verdict.wrong, "\n".join(verdict.wrong)

    gone = oracle.hidden_columns(spans, kept) | ~valid[:, None]
    window = None if case.window is None else length + case.window
    store = KVStore(k[:, :, :length].clone(), v[:, :, :length].clone(), window)
    store.compact(plan)
    worst, end = 0.0, length
    for count in case.new:
        new = slice(end, end + count)
        store.append(k[:, :, new], v[:, :, new])
        out = attend(q[:, :, new], *store.held(), store.visible(count), scale)
        end += count
        hidden = torch.nn.functional.pad(gone, (0, end - length))
        expected = decode(case, q[:, :, new], k[:, :, :end], v[:, :, :end], hidden)
        worst = max(worst, float((out.double() - expected).abs().max()))
    assert worst < TOLERANCE[case.dtype]
    assert store.logical == length + steps

    tally.cases += 1
    tally.total += verdict.total
    tally.exempt += verdict.exempt
    tally.dropped += int((gone & valid[:, None]).sum())
    name = str(case.dtype).removeprefix("torch.")
    tally.worst[name] = max(worst, tally.worst.get(name, 0.0))


def run(examples: int) -> Tally:
    tally = Tally()

    @seed(SEED)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def test(case: Case) -> None:
        compare(case, tally)

    test()
    return tally


@pytest.mark.parametrize("examples", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_random_layers(examples: int) -> None:
    tally = run(examples)
    print(f"seed {SEED}: {tally.line()}")
    assert tally.cases >= examples
    assert tally.exempt <= 0.02 * tally.total
    assert tally.dropped > tally.cases, "cases that drop nothing show nothing"
    assert set(tally.worst) == {"float32", "bfloat16", "float16"}
