"""Tiny random models of the real transformers classes, and prompts for them.

Images are pixels that go through the model's own vision tower, prompts have the placeholder layout
that the family's processor writes, and `spans` is known from how the prompt was put together: it is
read from no config and guessed from no ids. A row is drawn from its own `RowSpec` and the seed
alone, so that the same row can be asked for by itself and inside a padded batch.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution

PAD, IMAGE, VIDEO, VISION_START, VISION_END, FAKE = 0, 3, 4, 5, 6, 7
SPECIAL = 8  # every id below is special: never drawn as text, all but never generated
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

# The standard deviation of the attention logits, layer by layer: from nearly uniform to peaked, so
# that layers look at the images to different degrees and thresholds have something to tell apart.
SHARPNESS = (0.7, 1.4, 1.0, 1.7)


@dataclass(frozen=True)
class RowSpec:
    """One prompt: `text` tokens with `images` images between them.

    `touching` puts no text between the images. `salt` draws other text and pixels.
    """

    images: int
    text: int
    touching: bool = False
    salt: int = 0


@dataclass(frozen=True)
class Image:
    """An image as its processor would hand it over: `layout` are its ids in the prompt."""

    layout: tuple[int, ...]
    pixels: Tensor
    size: tuple[int, int]  # height, width; qwen2_vl: its patch grid


@dataclass(frozen=True)
class Row:
    ids: list[int]
    spans: list[int]
    images: list[Image]


@dataclass(frozen=True)
class Family:
    """A model class, the config of its tiny model, and how its processor treats images.

    `draw(config, index, count, generator)` is the index-th of count images of a row, and
    `collate(rows)` gives the model inputs that carry the pixels of a batch.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    draw: Callable[[PreTrainedConfig, int, int, torch.Generator], Image]
    collate: Callable[[list[Row]], dict[str, Tensor]]
    token_types: bool = False

    def build(self, seed: int, config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """A float32 model in eval mode that never stops early; `config` may be one in use."""
        model = self.model_class(config if config is not None else self.config()).eval()
        randomize(model, seed)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
        return model

    def make_inputs(
        self, model: PreTrainedModel, rows: Sequence[RowSpec], seed: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(inputs for forward and generate, spans): rows are padded on the left."""
        drawn = [self._row(model.config, spec, seed) for spec in rows]
        ids = left_pad([row.ids for row in drawn], PAD)
        spans = left_pad([row.spans for row in drawn], -1)
        inputs = {"input_ids": ids, "attention_mask": (spans >= 0).long()}
        if self.token_types:
            inputs["mm_token_type_ids"] = (spans > 0).int()
        if any(row.images for row in drawn):
            inputs |= self.collate(drawn)
        return inputs, spans

    def _row(self, config: PreTrainedConfig, spec: RowSpec, seed: int) -> Row:
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, spec)).encode()))
        images = [self.draw(config, i, spec.images, generator) for i in range(spec.images)]
        ids: list[int] = []
        spans: list[int] = []
        for number, segment in enumerate(text_segments(spec, generator)):
            if number:
                layout = images[number - 1].layout
                if ids[-1] == layout[0] == FAKE:  # the processor merges two that meet
                    layout = layout[1:]
                ids += layout
                spans += [number if token == IMAGE else 0 for token in layout]
            ids += segment
            spans += [0] * len(segment)
        return Row(ids, spans, images)


def text_segments(spec: RowSpec, generator: torch.Generator) -> list[list[int]]:
    """The text before, between and after the images: the last segment is never empty."""
    tokens = torch.randint(SPECIAL, VOCAB, (spec.text,), generator=generator).tolist()
    if spec.touching and spec.images:
        share = spec.text // 2
        ends = [share] * spec.images
    else:
        share = spec.text // (spec.images + 1)
        ends = [share * (i + 1) for i in range(spec.images)]
    assert share > 0, f"too little text: {spec}"
    return [tokens[a:b] for a, b in zip([0, *ends], [*ends, spec.text], strict=True)]


def left_pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Weights that keep activations near one everywhere, unlike the 0.02 of most initializers.

    The classes' own initialization makes attention uniform and logits flat, and Idefics2's latents
    all equal: then every token scores the same, and nothing that selects is tested.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = model.get_decoder()
    sharp = {
        id(projection.weight): math.sqrt(std)
        for layer, std in zip(decoder.layers, SHARPNESS, strict=True)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
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
                std = sharp.get(id(weight), 1.0) / math.sqrt(weight[0].numel())
            weight.normal_(0.0, std, generator=generator)
        # logits that spread enough for clear greedy choices, and none of a special token
        model.lm_head.weight.mul_(2.0)
        model.lm_head.weight[:SPECIAL] = 0.0


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    """Pixels of one image: noise around a colour of its own."""
    colour = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.randn(shape, generator=generator) + colour


# --- Qwen2-VL: <|vision_start|>, one <|image_pad|> per 2 x 2 patches, <|vision_end|> -------------

QWEN2_GRIDS = ((8, 12), (12, 12), (8, 8), (4, 20))  # in patches, height and width


def qwen2_vl_config() -> PreTrainedConfig:
    return transformers.Qwen2VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": TEXT["hidden_size"],
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def qwen2_vl_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    height, width = QWEN2_GRIDS[(index + count) % len(QWEN2_GRIDS)]
    # one frame is shown twice to the temporal patch; patches come flattened, as the processor does
    frame = noise(generator, 3, height * width, PATCH * PATCH).transpose(0, 1)
    pixels = frame.unsqueeze(2).expand(-1, -1, 2, -1).reshape(height * width, -1)
    layout = (VISION_START, *[IMAGE] * (height * width // 4), VISION_END)
    return Image(layout, pixels, (height, width))


def qwen2_vl_collate(rows: list[Row]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row.images]
    return {
        "pixel_values": torch.cat([image.pixels for image in images]),
        "image_grid_thw": torch.tensor([(1, *image.size) for image in images]),
    }


# --- LLaVA as in Mantis: SigLIP without its head, every patch kept, one run of <image> ------------


def llava_config() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=siglip_config(image_size=24),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )


def siglip_config(image_size: int) -> PreTrainedConfig:
    return transformers.SiglipVisionConfig(
        **VISION,
        num_hidden_layers=2,
        image_size=image_size,
        patch_size=PATCH,
        vision_use_head=False,
    )


def llava_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    side = config.vision_config.image_size
    return Image((IMAGE,) * (side // PATCH) ** 2, noise(generator, 3, side, side), (side, side))


def llava_collate(rows: list[Row]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image.pixels for row in rows for image in row.images])}


# --- LLaVA-OneVision: one image alone is cut into tiles, several are not --------------------------

ONEVISION_SIZES = ((20, 32), (32, 24), (16, 16), (30, 11))


def onevision_config() -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=siglip_config(image_size=16),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
    )


def onevision_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    side = config.vision_config.image_size
    grid = side // PATCH
    if count > 1:  # no tiles: the image and one newline
        size = ONEVISION_SIZES[index % len(ONEVISION_SIZES)]
        return Image((IMAGE,) * (grid * grid + 1), noise(generator, 1, 3, side, side), size)
    size = ONEVISION_SIZES[int(torch.randint(2, (), generator=generator))]
    best = select_best_resolution(list(size), config.image_grid_pinpoints)
    tiles = (best[0] // side) * (best[1] // side)
    height, width = onevision_unpadded(size, (best[0] // PATCH, best[1] // PATCH))
    tokens = grid * grid + height * (
        width + 1
    )  # the whole image, the rows of tiles, a newline each
    return Image((IMAGE,) * tokens, noise(generator, 1 + tiles, 3, side, side), size)


def onevision_unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The part of a grid of patches that an image of this size fills, padding cut off."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        filled = int(round(height * columns / width, 7))
        return rows - (rows - filled) // 2 * 2, columns
    filled = int(round(width * rows / height, 7))
    return rows, columns - (columns - filled) // 2 * 2


def onevision_collate(rows: list[Row]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row.images]
    most = max(len(image.pixels) for image in images)
    pixels = torch.zeros(len(images), most, *images[0].pixels.shape[1:])
    for padded, image in zip(pixels, images, strict=True):
        padded[: len(image.pixels)] = image.pixels
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([image.size for image in images]),
        # rows without images are left out, as the processor does
        "batch_num_images": torch.tensor([len(row.images) for row in rows if row.images]),
    }


# --- Idefics2: the perceiver makes a fixed number of tokens of any image, between fake tokens -----

IDEFICS2_SIZES = ((16, 12), (16, 16), (12, 16))
IDEFICS2_TILES = 5  # with image splitting: four quarters and the whole


def idefics2_config(window: int | None = None) -> PreTrainedConfig:
    # nothing said of the sliding window is the default of 4096 for every layer
    sliding = {} if window is None else {"sliding_window": window}
    return transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**TEXT, **sliding),
        vision_config={**VISION, "num_hidden_layers": 2, "image_size": 16, "patch_size": PATCH},
        perceiver_config={
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": 20,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )


def idefics2_image(
    config: Any, index: int, count: int, generator: torch.Generator, tiles: int = 1
) -> Image:
    size = IDEFICS2_SIZES[(index + count) % len(IDEFICS2_SIZES)]
    one = (*[IMAGE] * config.perceiver_config.resampler_n_latents, FAKE)
    return Image((FAKE, *one * tiles), noise(generator, tiles, 3, *size), size)


def idefics2_collate(rows: list[Row]) -> dict[str, Tensor]:
    """[rows, most images of a row, ...]: missing images are zeros, and the model drops those."""
    images = [[tile for image in row.images for tile in image.pixels] for row in rows]
    sizes = [tile.shape[-2:] for row in images for tile in row]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    pixels = torch.zeros(len(rows), max(map(len, images)), 3, height, width)
    mask = torch.zeros(len(rows), max(map(len, images)), height, width, dtype=torch.long)
    for i, row in enumerate(images):
        for j, tile in enumerate(row):
            pixels[i, j, :, : tile.shape[-2], : tile.shape[-1]] = tile
            mask[i, j, : tile.shape[-2], : tile.shape[-1]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


IDEFICS2_WINDOW = 128  # longer than the prompts of CROSSING, shorter than them with 16 new tokens

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "qwen2_vl",
            transformers.Qwen2VLForConditionalGeneration,
            qwen2_vl_config,
            qwen2_vl_image,
            qwen2_vl_collate,
            token_types=True,
        ),
        Family(
            "llava",
            transformers.LlavaForConditionalGeneration,
            llava_config,
            llava_image,
            llava_collate,
        ),
        Family(
            "llava_onevision",
            transformers.LlavaOnevisionForConditionalGeneration,
            onevision_config,
            onevision_image,
            onevision_collate,
        ),
        Family(
            "idefics2",
            transformers.Idefics2ForConditionalGeneration,
            idefics2_config,
            idefics2_image,
            idefics2_collate,
        ),
    )
}

# The same classes in other circumstances
VARIANTS: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "idefics2_split",
            transformers.Idefics2ForConditionalGeneration,
            idefics2_config,
            partial(idefics2_image, tiles=IDEFICS2_TILES),
            idefics2_collate,
        ),
        Family(
            "idefics2_window",
            transformers.Idefics2ForConditionalGeneration,
            partial(idefics2_config, IDEFICS2_WINDOW),
            idefics2_image,
            idefics2_collate,
        ),
    )
}

# Rows that conformance tests use: one image, three, and both beside a row without any
ONE = RowSpec(images=1, text=40)
THREE = RowSpec(images=3, text=40)
NONE = RowSpec(images=0, text=23)
ROWS: dict[str, tuple[RowSpec, ...]] = {
    "one": (ONE,),
    "three": (THREE,),
    "batch": (NONE, ONE, THREE),
}
# Three images of 22 and this text are 122 and 125 tokens: decoding crosses IDEFICS2_WINDOW
CROSSING = (RowSpec(images=3, text=56), RowSpec(images=3, text=59))
