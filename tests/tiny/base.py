"""The parts that all tiny models share: prompts with known spans, and suitable random weights."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

# Ids of the tokens that processors write. All of them are below SPECIAL: never drawn as text, all
# but never generated.
PAD, IMAGE, VIDEO, VISION_START, VISION_END, FAKE = 0, 3, 4, 5, 6, 7
GLOBAL, TILE, NEWLINE, BREAK, GRID, COLUMN, ROW, STAMP = 8, 9, 10, 11, 12, 13, 14, 15
DIGITS = (16, 17, 18, 19)  # ids of timestamps and tile numbers
SPECIAL = 20
VOCAB = 160
PATCH = 4

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}

# The standard deviation of the attention logits in each layer, from nearly uniform to peaked
# attention, so that the vision attention of layers differs and they fall into different classes.
SHARPNESS = (0.7, 1.4, 1.0, 1.7)


@dataclass(frozen=True)
class RowSpec:
    """One prompt: `text` tokens, with `images` images and `videos` videos in turn between them.

    With `touching` there is no text between them. `salt` draws other text and pixels.
    """

    images: int
    text: int
    touching: bool = False
    salt: int = 0
    videos: int = 0


@dataclass(frozen=True)
class Image:
    """An image or a video as its processor returns it; `layout` are its ids in the prompt."""

    layout: tuple[int, ...]
    pixels: Tensor
    size: tuple[int, ...]  # height and width in pixels, or the patch grid of grid families
    video: bool = False


@dataclass(frozen=True)
class Row:
    ids: list[int]
    spans: list[int]
    kinds: list[int]  # 0 text, 1 image, 2 video: the code of mm_token_type_ids
    media: list[Image]

    @property
    def images(self) -> list[Image]:
        return [item for item in self.media if not item.video]

    @property
    def videos(self) -> list[Image]:
        return [item for item in self.media if item.video]


Draw = Callable[[Any, int, int, torch.Generator], Image]


def no_types(kinds: Tensor) -> dict[str, Tensor]:
    return {}


def mm_types(kinds: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": kinds.int()}


@dataclass(frozen=True)
class Family:
    """A model class, the config of its tiny model, and how its processor treats images.

    model_class: name of the class; releases of transformers without it do not have the family
    draw, draw_video: make image number `index` of `count` in a row; None if the class has no videos
    collate: makes the model inputs with the pixels of the rows of a batch
    types: the token types of the processor: 0 text, 1 image, 2 video
    merged: a token that the processor writes only once where two of them meet
    alone, longer: layers that pruning leaves alone, for prompts with more than `longer` columns
    keyless: those of these layers that have no keys and values of their own
    videos_told: whether the processor's output says which frames make a video
    """

    name: str
    model_class: str
    config: Callable[[], PreTrainedConfig]
    draw: Draw
    collate: Callable[[list[Row]], dict[str, Tensor]]
    draw_video: Draw | None = None
    types: Callable[[Tensor], dict[str, Tensor]] = no_types
    merged: int | None = None
    alone: tuple[int, ...] = ()
    longer: int = 0
    keyless: tuple[int, ...] = ()
    videos_told: bool = True

    @property
    def available(self) -> bool:
        return hasattr(transformers, self.model_class)

    def build(self, seed: int, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """A float32 model in eval mode that never stops early. `config` may be one in use."""
        model_class = getattr(transformers, self.model_class)
        model = model_class(config if config is not None else self.config()).eval()
        randomize(model, seed)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        return model

    def make_inputs(
        self, model: PreTrainedModel | PreTrainedConfig, rows: Sequence[RowSpec], seed: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs for forward and generate, spans). Rows are padded on the left.

        A config may be given in place of its model.
        """
        return self.inputs([self.draw_row(model, spec, seed) for spec in rows])

    def inputs(self, drawn: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """The same as `make_inputs`, for rows that have been drawn already."""
        drawn = list(drawn)
        ids = left_pad([row.ids for row in drawn], PAD)
        spans = left_pad([row.spans for row in drawn], -1)
        inputs = {"input_ids": ids, "attention_mask": (spans >= 0).long()}
        inputs |= self.types(left_pad([row.kinds for row in drawn], 0))
        if any(row.media for row in drawn):
            inputs |= self.collate(drawn)
        return inputs, spans

    def whole_layers(self, length: int) -> set[int]:
        """Layers that pruning leaves alone for prompts of `length` columns, padding included."""
        return set(self.alone) if length > self.longer else set()

    def draw_row(self, model: PreTrainedModel | PreTrainedConfig, spec: RowSpec, seed: int) -> Row:
        config = getattr(model, "config", model)
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, spec)).encode()))
        media = self._media(config, spec, generator)
        ids: list[int] = []
        spans: list[int] = []
        kinds: list[int] = []
        for number, segment in enumerate(text_segments(spec, generator)):
            layout = media[number - 1].layout if number else ()
            if ids and layout and ids[-1] == layout[0] == self.merged:
                layout = layout[1:]
            kind = 2 if number and media[number - 1].video else 1
            vision = [token in (IMAGE, VIDEO) for token in layout]
            ids += [*layout, *segment]
            spans += [number * seen for seen in vision] + [0] * len(segment)
            kinds += [kind * seen for seen in vision] + [0] * len(segment)
        return Row(ids, spans, kinds, media)

    def _media(self, config: Any, spec: RowSpec, generator: torch.Generator) -> list[Image]:
        """Images and videos in turn, as long as there are any of both."""
        turns = sorted([(i, 0) for i in range(spec.images)] + [(i, 1) for i in range(spec.videos)])
        draw = (self.draw, self.draw_video)
        count = (spec.images, spec.videos)
        return [draw[kind](config, index, count[kind], generator) for index, kind in turns]


def text_segments(spec: RowSpec, generator: torch.Generator) -> list[list[int]]:
    """The text before, between and after the images. The last segment is never empty."""
    tokens = torch.randint(SPECIAL, VOCAB, (spec.text,), generator=generator).tolist()
    media = spec.images + spec.videos
    if spec.touching and media:
        share = spec.text // 2
        ends = [share] * media
    else:
        share = spec.text // (media + 1)
        ends = [share * (i + 1) for i in range(media)]
    assert share > 0, f"too little text: {spec}"
    return [tokens[a:b] for a, b in zip([0, *ends], [*ends, spec.text], strict=True)]


def left_pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw weights that keep activations near one, unlike the 0.02 of most initializers.

    With the initialization of the classes attention is uniform, logits are flat, and all latents of
    Idefics2 are equal. All tokens would have the same score, and no selection would be tested.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = model.get_decoder().layers
    sharp = {
        id(projection.weight): math.sqrt(std)
        for attention, std in zip(attentions(layers), SHARPNESS, strict=True)
        for name in ("q_proj", "k_proj")
        if (projection := getattr(attention, name, None)) is not None
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                continue
            if name.endswith("bias"):
                std = 0.2
            elif any(part in name for part in ("embed_tokens", "position", "latents", "newline")):
                std = 1.0
            else:
                std = sharp.get(id(weight), 1.0) / math.sqrt(fan_in(name, weight))
            weight.normal_(0.0, std, generator=generator)
        sharpen_norms(layers)
        # logits with clear greedy choices, and with no special token
        model.lm_head.weight.mul_(2.0)
        model.lm_head.weight[:SPECIAL] = 0.0


def attentions(layers: Any) -> list[Any]:
    """The attention module of each layer; None for a layer of another kind."""
    return [getattr(layer, "self_attn", None) for layer in layers]


def fan_in(name: str, weight: Tensor) -> int:
    """The number of inputs of one output. Expert weights have one matrix for each expert."""
    return min(weight.shape[1:]) if "experts" in name else weight[0].numel()


def sharpen_norms(layers: Any) -> None:
    """Make the layers with normalized queries and keys differ.

    In such layers the size of the logits depends on the weights of the norms, not of the
    projections.
    """
    for attention, std in zip(attentions(layers), SHARPNESS, strict=True):
        norm = getattr(attention, "k_norm", None)
        if getattr(norm, "weight", None) is not None:
            # Some norms have weights around 0 and add 1.
            gain = norm(torch.ones(1, 1, norm.weight.shape[-1])).mean()
            norm.weight.add_((std - 1) * gain)


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """The pixels of one image: noise around a colour of its own."""
    colour = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(shape, generator=generator) + colour


def siglip_config(image_size: int) -> PreTrainedConfig:
    return transformers.SiglipVisionConfig(
        **VISION,
        num_hidden_layers=2,
        image_size=image_size,
        patch_size=PATCH,
        vision_use_head=False,
    )


def flat(rows: list[Row]) -> list[Image]:
    return [item for row in rows for item in row.media]
