"""The homes of parked tokens without a model, against their formulas."""

import pytest
import torch
from torch import Tensor

import plphp
from plphp import _blocks
from plphp.attention import reference
from plphp.cache import KVStore, allocated
from plphp.policy import Look
from plphp.recall import Home, park
from plphp.recall.budget import share_of_layer
from plphp.recall.codes import (
    code_bytes,
    from_rows,
    keys_to_codes,
    to_rows,
    unpacked,
    values_to_codes,
)

BATCH, HEADS, GROUPS, DIM = 2, 2, 3, 32
SPANS = torch.tensor(
    [
        [0] * 5 + [1] * 60 + [0] * 3 + [2] * 40 + [0] * 4,
        [-1] * 30 + [0] * 4 + [1] * 70 + [0] * 8,
    ]
)
SCALE = DIM**-0.5


def pair(seed: int = 0, length: int = SPANS.shape[1]) -> tuple[Tensor, Tensor]:
    """Keys near a subspace of 8 dimensions, as keys of images are, and values."""
    drawn = torch.Generator().manual_seed(seed)
    basis = torch.randn(BATCH, HEADS, 8, DIM, generator=drawn)
    keys = torch.randn(BATCH, HEADS, length, 8, generator=drawn) @ basis + 3
    return keys, torch.randn(BATCH, HEADS, length, DIM, generator=drawn)


def parked(recall: plphp.Recall, window: int | None = None) -> tuple[KVStore, Home, Tensor, Tensor]:
    """A compacted store, its home, and the prompt's keys and values."""
    keys, values = pair()
    store = KVStore(keys.clone(), values.clone(), window)
    scores = torch.rand(BATCH, HEADS, SPANS.shape[1], generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(BATCH)
    look = Look(scores, SPANS, nothing.double(), nothing, nothing.long())
    home = park(store, look, recall)
    store.compact(home.plan)
    return store, home, keys, values


def query(seed: int) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS * GROUPS, 1, DIM, generator=drawn)


def vision_of(row: int) -> Tensor:
    return (SPANS[row] > 0).nonzero()[:, 0]


def padding(row: int) -> int:
    return int((SPANS[row] < 0).sum())


def read_of(home: Home, row: int, head: int) -> list[int]:
    """Row-logical positions of the tokens that were read last."""
    return [position for position in home.log[-1][row, head].tolist() if position >= 0]


def scores_by_the_formula(keys: Tensor, asked: Tensor, basis: Tensor) -> Tensor:
    """Scores of keys (V, D) for queries (G, D) and directions (D, r), in float64, in units of their
    standard deviation.
    """
    keys, asked, basis = keys.double(), asked.double(), basis.double()
    found = torch.linalg.lstsq(basis, (keys - keys.mean(0)).T).solution.T
    logits = asked @ basis @ rounded(found, 4, 0).T
    scores = (logits - logits.amax(-1, keepdim=True)).amax(0)
    return scores / scores.std()


def test_an_index_has_the_directions_in_which_keys_differ_most() -> None:
    _, home, keys, _ = parked(plphp.Recall(budget=0.4))
    basis = unpacked(home.index.basis, 4)
    for row in range(BATCH):
        for head in range(HEADS):
            own = keys[row, head, vision_of(row)].double()
            wanted = torch.linalg.svd(own - own.mean(0)).Vh[: DIM // 4].flip(0)
            same = (wanted * basis[row, head]).sum(-1, keepdim=True).sign() * wanted
            half = (same.amax(-1) - same.amin(-1)) / 30
            assert ((basis[row, head] - same).abs().amax(-1) < half + 1e-3).all()


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_a_step_brings_what_its_query_looks_for(budget: float) -> None:
    store, home, keys, values = parked(plphp.Recall(budget=budget, record=True))
    basis = unpacked(home.index.basis, 4).mT
    for step in range(6):
        asked = query(step)
        home.attend(asked, store, SCALE, None)
        for row in range(BATCH):
            columns = vision_of(row)
            for head in range(HEADS):
                held = home.held[row, head].long()
                held = held[held < home.keys.shape[2]]
                places = columns[held].sort().values - padding(row)
                assert read_of(home, row, head) == places.tolist()
                queries = asked[row, head * GROUPS : (head + 1) * GROUPS, 0]
                scores = scores_by_the_formula(keys[row, head, columns], queries, basis[row, head])
                chosen = torch.zeros(len(columns), dtype=torch.bool)
                chosen[held] = True
                assert int(chosen.sum()) == len(held) < len(columns)
                # a number between two codes may be rounded to either
                assert scores[chosen].min() > scores[~chosen].max() - 0.25
                own = slice(int(store.start[row]), int(store.start[row]) + len(held))
                assert torch.equal(store.keys[row, head, own], keys[row, head, columns[held]])
                assert torch.equal(store.values[row, head, own], values[row, head, columns[held]])


def test_attention_reads_text_and_what_was_chosen() -> None:
    store, home, keys, values = parked(plphp.Recall(budget=0.4, record=True))
    asked = query(0)
    out = home.attend(asked, store, SCALE, None)
    visible = (SPANS == 0)[:, None].repeat(1, HEADS, 1)
    for row in range(BATCH):
        for head in range(HEADS):
            visible[row, head, torch.tensor(read_of(home, row, head)) + padding(row)] = True
    expected = reference.attend(asked, keys, values, visible[:, :, None], SCALE)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("home", ["int4", "int2"])
def test_codes_are_read_as_the_rounded_numbers(home: str) -> None:
    store, found, keys, values = parked(plphp.Recall(home, 0.6))  # type: ignore[arg-type]
    bits = int(home[3:])
    kept = torch.zeros(BATCH, HEADS, SPANS.shape[1], dtype=torch.bool)
    for row in range(BATCH):
        own = found.plan.columns[row, :, -int(found.plan.lengths[row]) :]
        kept[row].scatter_(1, own, True)
    rough = keys.clone(), values.clone()
    for row in range(BATCH):
        for head in range(HEADS):
            gone = ((SPANS[row] > 0) & ~kept[row, head]).nonzero()[:, 0]
            for begin in range(0, len(gone), 32):
                group = gone[begin : begin + 32]
                rough[0][row, head, group] = rounded(keys[row, head, group], bits, 0)
            rough[1][row, head, gone] = rounded(values[row, head, gone], bits, 1)
    asked = query(0)
    out = found.attend(asked, store, SCALE, None)
    valid = (SPANS >= 0)[:, None, None]
    expected = reference.attend(asked, *rough, valid, SCALE)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    exact = reference.attend(asked, keys, values, valid, SCALE)
    assert (out - exact).abs().max() > 1e-3, "nothing was rounded"


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """Numbers rounded along `dim`, with a step and a lowest number in float16."""
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
    return ((x - low) / step).round().clamp(min=0) * step + low


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    "length", [77, 64, 7]
)  # whole groups and a rest, whole groups, and only a rest
@pytest.mark.parametrize("block", [_blocks.BLOCK, 2**12])
def test_codes_are_near_what_they_stand_for(
    bits: int, length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocks, "BLOCK", block)
    keys, values = pair(length=length)
    coded = keys_to_codes(keys, bits), values_to_codes(values, bits)
    for own, x, dim in zip(coded, (keys, values), (2, 3), strict=True):
        half = (x.amax(dim) - x.amin(dim)).max() / (2**bits - 1) / 2
        assert (own.dense() - x).abs().max() <= half + 5e-3  # ranges are in float16
    weights, asked = torch.rand(BATCH, HEADS, 3, length), torch.rand(BATCH, HEADS, 3, DIM)
    products = torch.cat(list(coded[0].products(asked)), -1)
    torch.testing.assert_close(products, asked @ coded[0].dense().mT)
    torch.testing.assert_close(coded[1].read(weights), weights @ coded[1].dense())
    took = sum(own.packed.numel() for own in coded)
    assert took == BATCH * HEADS * int(code_bytes(torch.tensor(length), (DIM, DIM), bits))


@pytest.mark.parametrize("bits", [4, 2])
def test_both_ways_to_read_codes_agree(bits: int) -> None:
    """PyTorch's operator for rows of this format, and the tensor operations for other devices."""
    rows = to_rows(torch.randn(3, 5, 36) * 100, bits)
    torch.testing.assert_close(unpacked(rows, bits), from_rows(rows, bits), atol=0, rtol=1e-6)


HOMES = (plphp.Recall(budget=0.4), plphp.Recall("int4", 0.4), plphp.Recall("int2", 0.2))


@pytest.mark.parametrize("recall", HOMES, ids=str)
def test_a_row_does_not_depend_on_the_others(recall: plphp.Recall) -> None:
    keys, values = pair()
    scores = torch.rand(BATCH, HEADS, SPANS.shape[1])
    outputs = []
    for rows in ([0, 1], [0], [1]):
        lead = int((SPANS[rows] < 0).sum(-1).min())
        spans = SPANS[rows][:, lead:]
        nothing = torch.zeros(len(rows))
        look = Look(scores[rows][:, :, lead:], spans, nothing.double(), nothing, nothing.long())
        store = KVStore(*(x[rows][:, :, lead:].clone() for x in (keys, values)))
        home = park(store, look, recall)
        store.compact(home.plan)
        outputs.append(home.attend(query(0)[rows], store, SCALE, None))
    torch.testing.assert_close(torch.cat(outputs[1:]), outputs[0])


@pytest.mark.parametrize("layers", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "recall", [plphp.Recall(budget=0.15), plphp.Recall(budget=0.9), *HOMES], ids=str
)
def test_the_device_holds_what_the_budget_allows(
    recall: plphp.Recall, dtype: torch.dtype, layers: int
) -> None:
    """Storages without text, slack and the numbers of rows, and the bytes reported."""
    spans = torch.cat([torch.zeros(1, 6), torch.ones(1, 501), torch.zeros(1, 10)], 1).long()
    token = 2 * DIM * dtype.itemsize * HEADS
    full, used, held = 501 * token, 0, []
    for layer in range(layers):
        keys = torch.randn(1, HEADS, spans.shape[1], DIM).to(dtype)
        store = KVStore(keys, keys.clone())
        nothing = torch.zeros(1)
        scores = torch.rand(1, HEADS, spans.shape[1])
        look = Look(scores, spans, nothing.double(), nothing, nothing.long())
        home = park(store, look, recall, (layer, layers))
        store.compact(home.plan, reserve=0)
        on_device = store.tensors() + home.tensors()
        for _ in range(3):
            home.attend(torch.randn(1, HEADS * GROUPS, 1, DIM).to(dtype), store, SCALE, None)
            small = allocated([store.start]) + (0 if recall.bits else allocated([home.origin]))
            assert allocated(on_device) - 16 * token - small == home.device
        assert home.full == full
        used += home.device
        held.append(home.held.shape[-1])
    allowed = recall.budget * layers * full
    assert used <= allowed
    left = 2 * layers * token if recall.bits is None else 0.03 * layers * full
    assert used > allowed - left, "room for another token"
    early = -(-layers // 3)
    assert len({*held[:early]}) == 1 and len({*held[early:]}) <= 1
    assert layers == 1 or min(held[0], 501) >= min(2 * held[-1], 500)


def test_early_layers_hold_twice_as_much_up_to_everything() -> None:
    tokens = torch.tensor([100, 100, 100, 30])
    mean = torch.tensor([10.0, 60.0, 90.0, 30.0]).double()
    for layers, early in ((1, 1), (2, 1), (4, 2), (6, 2), (28, 10)):
        parts = torch.stack([share_of_layer(mean, tokens, (i, layers)) for i in range(layers)])
        torch.testing.assert_close(parts.mean(0), mean)
        first, last = parts[0], parts[-1]
        assert torch.equal(parts[:early], first.expand(early, -1))
        assert (parts <= tokens + 1e-9).all()
        free = (first < tokens) & (layers > 1)
        torch.testing.assert_close(first[free], 2 * last[free])


def test_tokens_come_back_in_order() -> None:
    for recall in (plphp.Recall(budget=0.4), plphp.Recall("int4", 0.4)):
        store, home, keys, values = parked(recall)
        found = home.tokens(store)
        for number, whole in enumerate((keys, values)):
            wanted = torch.cat(
                [whole[row][:, vision_of(row)].flatten(0, 1) for row in range(BATCH)]
            )
            off = (found[number] - wanted).abs().max()
            assert off == 0 if recall.bits is None else 0 < off < 1


def test_rows_are_put_in_order_with_what_they_parked() -> None:
    for recall in (plphp.Recall(budget=0.4), plphp.Recall("int4", 0.4)):
        store, home, *_ = parked(recall)
        before = home.attend(query(3), store, SCALE, None)
        rows = torch.tensor([1, 0, 1])
        store.reorder(rows)
        home.reorder(rows)
        after = home.attend(query(3)[rows], store, SCALE, None)
        torch.testing.assert_close(after, before[rows])


def test_fetched_tokens_are_counted() -> None:
    store, home, *_ = parked(plphp.Recall(budget=0.4, record=True))
    for step in (0, 0, 1):
        home.attend(query(step), store, SCALE, None)
    assert home.fetched[0] > 0 and home.fetched[1] == 0
    heads = (log.flatten(0, 1).tolist() for log in home.log[1:])
    new = [len(set(after) - set(before)) for before, after in zip(*heads, strict=True)]
    assert home.fetched[2] == sum(new)


def say(home: Home, store: KVStore, *steps: int) -> Tensor:
    """Attention of new columns with these queries, read in one call."""
    new = torch.zeros(BATCH, HEADS, len(steps), DIM)
    store.append(new, new)
    return home.attend(torch.cat([query(step) for step in steps], 2), store, SCALE, None)


def test_every_other_step_keeps_what_it_has() -> None:
    store, home, *_ = parked(plphp.Recall(budget=0.4, every=2))
    for step in range(4):
        say(home, store, step)
    assert [bool(n) for n in home.fetched] == [True, False, True, False]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_guesses_that_are_taken_back_leave_nothing(every: int) -> None:
    """Columns are read one by one, or two at a time with three wrong ones after them."""
    recall = plphp.Recall(budget=0.4, every=every, record=True)
    plain_store, plain, *_ = parked(recall)
    store, home, *_ = parked(recall)
    for step in range(0, 10, 2):
        wanted = [say(plain, plain_store, step), say(plain, plain_store, step + 1)]
        found = say(home, store, step, step + 1, 77, 78, 79)
        store.crop(3)
        home.crop(store, 3)
        torch.testing.assert_close(found[:, :, :2], torch.cat(wanted, 2))
        assert len(home.log) == len(plain.log) == step + 2
        assert all(map(torch.equal, home.log, plain.log))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"home": "disk"}, "home"),
        ({"budget": 0}, "budget"),
        ({"budget": 1.2}, "budget"),
        ({"rank": 0}, "rank"),
        ({"every": 0}, "every"),
        ({"home": "int4", "every": 2}, "every"),
        ({"home": "int4", "rank": 4}, "rank"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        plphp.Recall(**options)  # type: ignore[arg-type]
