"""The spans of layouts that are easy to read wrongly."""

from types import SimpleNamespace

import pytest
import torch

import plphp
from plphp.models import find_spans

IMG, VID, FAKE = 90, 91, 92
QWEN = SimpleNamespace(
    model_type="qwen2_vl",
    image_token_id=IMG,
    video_token_id=VID,
    vision_config=SimpleNamespace(spatial_merge_size=2),
)
LLAVA = SimpleNamespace(
    model_type="llava",
    image_token_index=IMG,
    vision_feature_select_strategy="full",
    vision_config=SimpleNamespace(image_size=8, patch_size=4, model_type="siglip_vision_model"),
)
IDEFICS = SimpleNamespace(model_type="idefics2", image_token_id=IMG)
UNKNOWN = SimpleNamespace(model_type="brand_new_vl", image_token_id=IMG)


def spans(config: object, ids: list[int], **inputs: object) -> list[int]:
    found: list[int] = plphp.vision_spans(config, torch.tensor([ids]), **inputs)[0].tolist()
    return found


def test_images_and_videos_are_numbered_in_order() -> None:
    ids = [1, IMG, IMG, 2, VID, VID, VID, 3, IMG]
    assert spans(QWEN, ids) == [0, 1, 1, 0, 2, 2, 2, 0, 3]


def test_padding_is_minus_one() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert spans(QWEN, [0, 0, IMG, IMG, 5], attention_mask=mask) == [-1, -1, 1, 1, 0]


def test_adjacent_images_are_separated_by_their_grids() -> None:
    grid = torch.tensor([[1, 2, 4], [1, 4, 4]])  # 2 and 4 tokens
    assert spans(QWEN, [1, *[IMG] * 6, 2], image_grid_thw=grid) == [0, 1, 1, 2, 2, 2, 2, 0]


def test_adjacent_llava_images_are_separated_by_the_number_of_features() -> None:
    assert spans(LLAVA, [*[IMG] * 8, 5]) == [1, 1, 1, 1, 2, 2, 2, 2, 0]


def test_a_note_says_that_image_sizes_do_not_add_up() -> None:
    ids = torch.tensor([[IMG] * 5 + [7]])
    found, notes = find_spans(LLAVA, ids, None, None, {})
    assert found[0].tolist() == [1, 1, 1, 1, 1, 0]
    assert notes == ("images were told apart by the text between them only",)


def test_five_idefics2_tiles_are_one_image_and_other_chains_are_not() -> None:
    tiles = [FAKE, IMG, IMG] * 5 + [FAKE]
    assert max(spans(IDEFICS, tiles)) == 1
    assert max(spans(IDEFICS, [*tiles, 7, *tiles])) == 2
    assert max(spans(IDEFICS, [FAKE, *[IMG, IMG, FAKE] * 10])) == 2
    assert max(spans(IDEFICS, [FAKE, *[IMG, IMG, FAKE] * 3])) == 3


def test_token_types_win_over_ids() -> None:
    kinds = torch.tensor([[0, 1, 1, 0, 2, 3]])
    assert spans(UNKNOWN, [1, 2, 3, 4, 5, 6], mm_token_type_ids=kinds) == [0, 1, 1, 0, 2, 0]


def test_unknown_families_fall_back_to_their_config_or_refuse() -> None:
    assert spans(UNKNOWN, [1, IMG, 2]) == [0, 1, 0]
    with pytest.raises(plphp.UnsupportedModelError, match="vision_mask"):
        spans(SimpleNamespace(model_type="brand_new_vl"), [1, 2])


def test_token_ids_are_found_in_configs_inside_the_config() -> None:
    """The outermost config with such ids counts. Deeper ones may belong to other models."""
    inner = SimpleNamespace(model_type="inner", image_token_id=9)
    deep = SimpleNamespace(model_type="middle", vlm_config=inner)
    for outer in (
        SimpleNamespace(model_type="outer", vlm_config=inner),
        SimpleNamespace(model_type="outer", thinker_config=deep),
        SimpleNamespace(model_type="outer", image_token_id=None, text_config=inner),
        SimpleNamespace(model_type="outer", text_config={"image_token_id": 9}),
    ):
        assert plphp.vision_spans(outer, torch.tensor([[5, 9, 9, 5]])).tolist() == [[0, 1, 1, 0]]
    named = SimpleNamespace(model_type="outer", image_token_id=5, text_config=inner)
    assert plphp.vision_spans(named, torch.tensor([[5, 9, 9]])).tolist() == [[1, 0, 0]]
