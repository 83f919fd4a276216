"""What the inspector's page shows, as plain frozen data: `to_json` is all that the page is given.

A new view is a new field here, what fills it, and a section of the template.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Numbers = tuple[float | None, ...]


@dataclass(frozen=True)
class Picture:
    """An image or a video of the prompt, and where its tokens lie in it.

    width, height: in pixels, as given
    frames: data URIs, one for an image; none where only positions are known
    first, tokens: its vision tokens among all of the prompt's, counted from 0
    boxes: left, top, right, bottom of each token in pixels, None for one without a place; empty
        where the family's geometry is not known
    views: 0 for tokens of the whole picture, 1 for tokens of its tiles; frame: of each token
    shared: whether tokens have no place of their own (Idefics2's latents): several share a box
    """

    name: str
    width: int
    height: int
    frames: tuple[str, ...]
    first: int
    tokens: int
    boxes: tuple[tuple[float, float, float, float] | None, ...] = ()
    views: tuple[int, ...] = ()
    frame: tuple[int, ...] = ()
    shared: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a run.

    kept: for each KV head a bit mask over the prompt's vision tokens, base64, lowest bit first
    share: of its vision tokens that each KV head kept, 0 to 1
    agreement: mean over the other heads of tokens kept by both over tokens kept by either
    """

    gamma: float | None
    layer_class: str | None
    rate: float | None
    pruned: bool
    kept: tuple[str, ...]
    share: tuple[float, ...]
    agreement: tuple[float, ...]
    kv_bytes: int
    kv_bytes_full: int


@dataclass(frozen=True)
class Answer:
    """What was generated. text: as shown; tokens: the same, token by token

    first_ms, ms_per_token: medians, measured in turn with the other side; None if not measured
    """

    text: str
    tokens: tuple[str, ...] = ()
    first_ms: float | None = None
    ms_per_token: float | None = None


@dataclass(frozen=True)
class Steps:
    """The pruned answer, token by token; each list has one entry a token.

    kept: attention that each layer paid to the vision tokens it kept, 0 to 1, mean over heads;
        None for layers that were not watched
    lost: what the full model, reading the same answer, pays to the tokens dropped here
    full_kept: what it pays to those kept
    said: the full model's own choice at this place; kl: KL(full || pruned) in nats
    fetched: with recall from main memory: tokens that all layers and KV heads fetched for it
    read: and which they read, for every token after the first: layer by layer masks as
        `Layer.kept`, none for a layer that was left alone. The last tokens of long answers have
        none: a page stays small

    With recall, "kept" is what was read at a token, and "dropped" what was not.
    """

    kept: tuple[Numbers, ...]
    lost: tuple[Numbers, ...] = ()
    full_kept: tuple[Numbers, ...] = ()
    said: tuple[str, ...] = ()
    kl: tuple[float, ...] = ()
    fetched: tuple[int, ...] = ()
    read: tuple[tuple[tuple[str, ...], ...], ...] = ()


@dataclass(frozen=True)
class Run:
    """One policy on the prompt.

    settings: its options; differs: first token that is not the full model's, None if none is
    kv_bytes, kv_bytes_full: as in `plphp.Report`; full_ms: the full side of the measurement
    recall: `plphp.report.RecallReport` as a dict, None where dropped tokens are gone
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
    steps: Steps | None = None
    recall: dict[str, Any] | None = None


@dataclass(frozen=True)
class Page:
    """A prompt, and one run a policy. made: machine, versions and date, for a reader of the page"""

    prompt: str
    model: str
    tokens: int
    vision: int
    pictures: tuple[Picture, ...]
    runs: tuple[Run, ...]
    made: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        return asdict(self)
