"""The data of the inspector's page, as frozen data classes.

The page is drawn from `Page.to_json` alone. A new view needs a field here, code in `gather` or
`examine` that fills it, and a section of the template.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Picture:
    """An image or a video of the prompt, and the places of its tokens.

    width, height: size of the given image in pixels
    frames: data URIs, one for an image; empty if no image was given
    first: index of its first token among the vision tokens of the prompt
    tokens: number of its tokens
    boxes: left, top, right, bottom of each token in pixels, None for a token without a place; empty
        if the geometry of the model family is unknown
    views: for each token 0 if it shows a part of the whole picture, 1 if it shows a part of a tile
    frame: for each token the frame that it shows
    shared: whether several tokens share a box, as the latents of Idefics2 do
    """

    name: str
    width: int
    height: int
    frames: tuple[str, ...] = field(repr=False)
    first: int
    tokens: int
    boxes: tuple[tuple[float, float, float, float] | None, ...] = field(default=(), repr=False)
    views: tuple[int, ...] = field(default=(), repr=False)
    frame: tuple[int, ...] = field(default=(), repr=False)
    shared: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer of one policy's result.

    kept: for each KV head a bit mask over the prompt's vision tokens, base64, lowest bit first
    share: for each KV head the share of the vision tokens that it kept, 0 to 1
    agreement: for each KV head the mean, over the other heads, of the tokens that both kept
        divided by the tokens that either kept
    entered: a bit mask of the vision tokens that a sequence method had left for this layer; empty
        if all entered it
    """

    gamma: float | None
    layer_class: str | None
    rate: float | None
    pruned: bool
    kept: tuple[str, ...] = field(repr=False)
    share: tuple[float, ...]
    agreement: tuple[float, ...]
    kv_bytes: int
    kv_bytes_full: int
    entered: str = field(default="", repr=False)


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    text: the answer without special tokens
    tokens: the same text, token by token
    first_ms: median milliseconds until the first token
    ms_per_token: median milliseconds of a later token

    Times are None if they were not measured. The full and the pruned side take turns.
    """

    text: str
    tokens: tuple[str, ...] = ()
    first_ms: float | None = None
    ms_per_token: float | None = None


@dataclass(frozen=True)
class Steps:
    """The pruned answer, token by token. Each tuple has one entry per token.

    kept: the attention of each layer to the vision tokens that it kept, 0 to 1, averaged over the
        query heads; None for a layer whose attention was not recorded, and of the first token for
        layers after a sequence method
    lost: the full model's attention, for the same answer, to the tokens that were dropped
    gone: the part of `lost` that is to tokens which a sequence method had dropped before the layer;
        empty without such a method
    full_kept: the full model's attention to the tokens that were kept
    said: the token that the full model would generate here
    kl: KL(full || pruned) in nats
    fetched: with the home `host`, how many tokens all layers and KV heads fetched
    read: with the home `host`, which tokens they read: for every token after the first and every
        layer, masks as in `Layer.kept`. It is empty for layers that are not pruned, and has no
        entries for the last tokens of long answers, so that the page stays small

    With recall, a token counts as kept where it was read at a step, and as dropped otherwise.
    """

    kept: tuple[Numbers, ...]
    lost: tuple[Numbers, ...] = ()
    gone: tuple[Numbers, ...] = ()
    full_kept: tuple[Numbers, ...] = ()
    said: tuple[str, ...] = ()
    kl: tuple[float, ...] = ()
    fetched: tuple[int, ...] = ()
    read: tuple[tuple[tuple[str, ...], ...], ...] = ()


@dataclass(frozen=True)
class PolicyResult:
    """The result of one policy on the prompt.

    settings: options of the policy
    kv_bytes, kv_bytes_full: as in `plphp.Report`
    answer: the answer with the pruned cache, with its times
    full: the answer with the full cache, measured in turn with it
    differs: index of the first token that differs between the two, None if all are equal
    recall: `plphp.report.RecallReport` as a dict, None without recall
    codes: `plphp.report.CodesReport` as a dict, None without `kv_bits`
    stages: each `plphp.report.StageReport` as a dict; empty without a sequence method
    """

    policy: str
    settings: dict[str, Any]
    layers: tuple[Layer, ...]
    retention: float
    kv_bytes: int
    kv_bytes_full: int
    notes: tuple[str, ...] = ()
    answer: Answer | None = None
    full: Answer | None = None
    differs: int | None = None
    steps: Steps | None = field(default=None, repr=False)
    recall: dict[str, Any] | None = None
    codes: dict[str, Any] | None = None
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def held(self) -> str:
        """What `retention` is the share of, in words that follow "of the vision K/V"."""
        held = "kept" if self.recall is None else "in full on the device"
        return held + (
            "" if self.codes is None else f" in codes, {self.codes['share']:.0%} of its bytes"
        )


@dataclass(frozen=True)
class Page:
    """A prompt and the result of each policy.

    model: name of the model
    tokens: columns of the prompt without padding
    vision: vision tokens of the prompt
    made: machine, versions and date, for the reader of the page
    """

    prompt: str
    model: str
    tokens: int
    vision: int
    pictures: tuple[Picture, ...]
    runs: tuple[PolicyResult, ...]
    made: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The page as dicts, lists, numbers and strings."""
        return asdict(self)
