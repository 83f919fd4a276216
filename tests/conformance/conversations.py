"""Later turns with a cache that is kept, and changes of the cache between turns.

The reference of a conversation that keeps everything is the untouched model, which reads all of it
from the start. The reference of a pruned one is the oracle, which reads all of it while the tokens
that earlier turns dropped are hidden from later ones.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from answers import KEEP_ALL, stock_fails_as_not_applicable
from methods import Method
from modes import Mode, NotApplicable
from torch import Tensor
from transformers import DynamicCache

import oracle
import plphp
import tiny
from along import check_greedy, check_logits, dropped, in_codes, kept_of, led
from invariants import (
    EVERY,
    KV_HEADS,
    LOGITS,
    truth,
)

STEPS = 8
FIRST = tiny.RowSpec(images=2, text=30)
TEXT_TURN = (FIRST, tiny.RowSpec(images=0, text=12, salt=1))
# two, because an image alone has other tokens in some families
IMAGE_TURN = (FIRST, tiny.RowSpec(images=2, text=20, salt=1))
THREE_TURNS = (*IMAGE_TURN, tiny.RowSpec(images=0, text=9, salt=2))
EMPTY = tiny.Row([], [], [], [])

Turns = tuple[tiny.RowSpec, ...]


def add(said: tiny.Row, new: tiny.Row) -> tiny.Row:
    """Add spans of a later turn; its images are numbered on."""
    images = max(said.spans, default=0)
    return tiny.Row(
        said.ids + new.ids,
        said.spans + [span + images if span else 0 for span in new.spans],
        said.kinds + new.kinds,
        said.media + new.media,
    )


def spoken(tokens: list[int]) -> tiny.Row:
    nothing = [0] * len(tokens)
    return tiny.Row(tokens, nothing, nothing, [])


def inputs_of(family: tiny.Family, row: tiny.Row) -> dict[str, Tensor]:
    """Inputs for a row that may contain images of earlier turns, without their pixels."""
    if row.media:
        return family.inputs([row])[0]
    ids = torch.tensor([row.ids])
    types = family.types(torch.tensor([row.kinds]))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **types}


@dataclass
class Talk:
    """A conversation of one row.

    said: the whole conversation so far, with all images; also its answers and reports
    """

    model: Any
    family: tiny.Family
    turns: Turns
    said: tiny.Row = EMPTY
    prompts: list[tiny.Row] = field(default_factory=list)  # the conversation up to each turn
    answers: list[list[int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    taken_back: list[oracle.Dropped] = field(
        default_factory=list
    )  # turns whose tokens are in codes

    def ask(self, cache: Any) -> None:
        """The next turn: its prompt repeats the conversation, with the pixels of the turn only."""
        number = len(self.prompts)
        new = self.family.draw_row(self.model, self.turns[number], number)
        self.said = add(self.said, new)
        self.prompts.append(self.said)
        inputs = inputs_of(self.family, replace(self.said, media=new.media))
        answer, logits = answer_to(self.model, inputs, cache=cache)
        self.answers.append(answer)
        self.logits.append(logits)
        self.reports.append(getattr(cache, "report", None))
        self.said = add(self.said, spoken(answer))

    def hold(self, cache: Any) -> list[list[int]]:
        for _ in self.turns:
            self.ask(cache)
        return self.answers

    def from_scratch(self) -> Iterator[tuple[list[int], Tensor]]:
        """The answers of the untouched model to each turn, if it reads the whole conversation."""
        for prompt in self.prompts:
            yield answer_to(self.model, inputs_of(self.family, prompt))

    def says(self, other: Iterable[tuple[list[int], Tensor]]) -> bool:
        """Whether two conversations have the same answers and logits."""
        return all(
            tokens == answer and bool((logits - own).abs().max() < LOGITS)
            for (tokens, logits), answer, own in zip(other, self.answers, self.logits, strict=True)
        )


def answer_to(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[list[int], Tensor]:
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.stack(out.logits, 1)


def start(family: str, turns: Turns) -> Talk:
    return Talk(EVERY[family].build(0), EVERY[family], turns)


def attached(model: Any, family: str, method: Method) -> Any:
    return method.attach(model, truth(family, 0, "three").numbers)


def check_turns(turns: Turns, mode: Mode, family: str, method: Method) -> None:
    check_kept_whole(turns, family)
    talk = start(family, turns)
    with attached(talk.model, family, method):
        talk.hold(plphp.PrunedCache(talk.model))
    earlier: list[oracle.Dropped] = []
    for turn in range(len(turns)):
        check_turn(talk, turn, earlier, family, method)
        earlier.append(dropped(talk.reports[turn], spans_of(talk, turn, method)))


def check_kept_whole(turns: Turns, family: str) -> None:
    talk = start(family, turns)
    with plphp.prune(talk.model, KEEP_ALL):
        talk.hold(plphp.PrunedCache(talk.model))
    if talk.says(talk.from_scratch()):
        return
    stock = start(family, turns)
    with stock_fails_as_not_applicable():
        stock.hold(stock_cache(stock.model))
    if not talk.says(zip(stock.answers, stock.logits, strict=True)):
        raise AssertionError("neither what reading from scratch gives nor what transformers does")
    raise NotApplicable("the unpruned model computes other logits in a later turn")


def stock_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def spans_of(talk: Talk, turn: int, method: Method) -> Tensor:
    """(1, columns so far): this turn's images; without recall those of earlier turns are text."""
    before = max(talk.prompts[turn - 1].spans) if turn and method.recall is None else 0
    spans = torch.tensor([talk.prompts[turn].spans])
    return (spans - before).clamp(min=0)


def check_turn(
    talk: Talk, turn: int, earlier: list[oracle.Dropped], family: str, method: Method
) -> None:
    """Selection, logits and tokens of one turn, given what the earlier turns kept."""
    report, inputs = talk.reports[turn], inputs_of(talk.family, talk.prompts[turn])
    spans = spans_of(talk, turn, method)
    if method.recall is not None:
        assert report.images == (int(spans.max()),), "of all turns"
        assert report.retention < 1
    elif talk.turns[turn].images == 0:
        assert any("nothing was pruned" in note for note in report.notes)
    elif method.options is not None:
        probabilities = oracle.prefill(talk.model, inputs, earlier)
        numbers = replace(truth(family, 0, "three").numbers, **method.options)
        whole = talk.family.whole_layers(len(talk.prompts[0].ids))
        selection = oracle.select(
            probabilities, spans, numbers, KV_HEADS, whole, talk.family.keyless
        )
        assert not oracle.compare(selection, kept_of(report)).wrong
        assert report.retention < 1 or method.name == "full"
    tokens = torch.tensor([talk.answers[turn]])
    wanted = led(talk.model, inputs, spans, report, tokens, earlier)
    check_logits(talk.logits[turn], wanted, report, again=turn > 0 and report.codes is None)
    check_greedy(tokens, wanted, report)


# --- between two turns ----------------------------------------------------------------------------


def check_between(
    change: Callable[[Talk, Any], Any], mode: Mode, family: str, method: Method
) -> None:
    """`change` changes the cache after the first turn. The second turn must not differ."""
    talk, alone = start(family, IMAGE_TURN), start(family, IMAGE_TURN)
    if not reads_later_images(family):
        talk.turns = alone.turns = TEXT_TURN
    if change is cropped and talk.family.alone:
        stock = start(family, TEXT_TURN)
        cache = stock_cache(stock.model)
        stock.ask(cache)
        with stock_fails_as_not_applicable():
            change(stock, cache)
    with attached(alone.model, family, method):
        alone.hold(plphp.PrunedCache(alone.model))
    with attached(talk.model, family, method):
        cache = plphp.PrunedCache(talk.model)
        talk.ask(cache)
        talk.ask(change(talk, cache))
    if talk.taken_back:
        first = dropped(talk.reports[0], spans_of(talk, 0, method))
        check_turn(talk, 1, [first, *talk.taken_back], family, method)
        return
    assert talk.answers == alone.answers
    assert (talk.logits[1] - alone.logits[1]).abs().max() < LOGITS
    assert talk.reports[0].retention < 1 or method.name == "full"


def reads_later_images(family: str) -> bool:
    try:
        check_kept_whole(IMAGE_TURN, family)
    except NotApplicable:
        return False
    return True


def other_talk(talk: Talk, cache: Any) -> Any:
    """Another conversation on the same model."""
    other = replace(talk, turns=TEXT_TURN[::-1], said=EMPTY)
    for name in ("prompts", "answers", "logits", "reports"):
        setattr(other, name, [])
    other.hold(plphp.PrunedCache(talk.model))
    return cache


def stored(talk: Talk, cache: Any) -> Any:
    with TemporaryDirectory() as home:
        file = Path(home) / "talk.safetensors"
        cache.save(file)
        return plphp.PrunedCache.load(talk.model, file)


def cropped(talk: Talk, cache: Any) -> Any:
    """More tokens are generated and removed again. What they put into codes stays."""
    length = int(cache.get_seq_length())
    row = add(talk.said, spoken([tiny.SPECIAL + i for i in range(5)]))
    answer_to(talk.model, inputs_of(talk.family, replace(row, media=[])), cache=cache)
    if in_codes(cache.report):
        spans = torch.tensor([row.spans[:length]])
        talk.taken_back.append(replace(dropped(cache.report, spans), begin=length))
    cache.crop(length - int(cache.get_seq_length()))
    assert int(cache.get_seq_length()) == length
    return cache


def moved(talk: Talk, cache: Any) -> Any:
    """The cache is moved to another device and back."""
    held = [layer.store.keys.clone() for _, layer in cache.pruned_layers()]
    for _, layer in cache.pruned_layers():
        layer.offload()
        layer.prefetch()
    cache.move("cpu")
    stores = [layer.store.keys for _, layer in cache.pruned_layers()]
    # Unused slots are not initialised and may hold NaN, which is equal to nothing.
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(held, stores, strict=True)
    )
    return cache
