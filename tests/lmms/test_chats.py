"""What of the plugin needs no lmms-eval: messages, options, stops, and what the log says."""

from pathlib import Path

import pytest
from PIL import Image
from tiny_llava import save

from plphp.errors import InputError
from plphp.eval.lmms import chats, kept
from plphp.inputs import load

PICTURE = Image.new("RGB", (112, 112), "white")


def test_greedy_unless_a_temperature_asks_for_more() -> None:
    greedy = chats.generation({"temperature": 0, "top_p": 0.9, "until": ["x"], "foo": 1})
    assert greedy["do_sample"] is False
    assert greedy["temperature"] is None and greedy["top_p"] is None
    assert "until" not in greedy and "foo" not in greedy
    assert chats.generation({"do_sample": False, "temperature": 0.7})["do_sample"] is False
    sampled = chats.generation({"temperature": 0.7, "max_new_tokens": 5})
    assert sampled == {"temperature": 0.7, "max_new_tokens": 5, "do_sample": True}


def test_stops_cut_but_not_at_the_one_that_lmms_eval_adds() -> None:
    assert chats.stops({"until": ["\n\n", "ASSISTANT:"]}) == ["ASSISTANT:"]
    assert chats.stops({"until": None}) == [] and chats.stops({"until": "x"}) == ["x"]
    assert chats.cut("one\n\ntwo ASSISTANT: three", ["ASSISTANT:"]) == "one\n\ntwo "
    assert chats.cut("one", []) == "one"


def test_large_pictures_are_made_smaller_in_proportion() -> None:
    image = Image.new("RGB", (400, 100))
    assert chats.at_most(10_000)(image).size == (200, 50)
    assert chats.at_most(40_000)(image) is image and chats.at_most(None)(image) is image


def test_the_embedded_model_reads_one_turn() -> None:
    loaded = load("embedded", "auto", "cpu")
    message = chats.user_message([PICTURE, PICTURE], "describe picture 1.")
    made = chats.encode(loaded, [[message], [message]], chats.at_most(None), 8)
    expected = loaded.batch([([PICTURE, PICTURE], "describe picture 1.")] * 2)
    assert made.keys() == expected.keys()
    assert all((made[name] == expected[name]).all() for name in made)
    for chat in ([message, message], [chats.user_message(["a.mp4"], "what?")]):
        with pytest.raises(InputError, match="one turn of pictures"):
            chats.encode(loaded, [chat], chats.at_most(None), 8)


def test_text_and_pictures_keep_the_order_of_the_task(tmp_path: Path) -> None:
    save(tmp_path)
    loaded = load(str(tmp_path), "auto", "cpu")
    picture, a, b = {"type": "image", "url": PICTURE}, *({"type": "text", "text": t} for t in "ab")
    chat = [
        {"role": "user", "content": [a, picture, b]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [picture, picture, a]},
    ]
    made = chats.encode(loaded, [chat, [chats.user_message((), "a")]], chats.at_most(None), 8)
    image = loaded.model.config.image_token_id
    text = loaded.tokenizer.decode([i for i in made["input_ids"][0] if i != image])
    assert text == "user: abassistant: buser: aassistant:"
    assert made["pixel_values"].shape[0] == 3
    assert (made["input_ids"] == image).sum(-1).tolist() == [48, 0]
    assert made["attention_mask"][:, 0].tolist() == [1, 0], "shorter rows are padded on the left"


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "audio", "url": "a.wav"},
        {"type": "video", "url": {"video_start": 1}},
        {"type": "video", "url": "a.mp4", "start_time": 1.0},
        {"type": "image", "url": "no-such.png"},
    ],
)
def test_media_that_cannot_be_read_are_refused(entry: dict[str, object]) -> None:
    loaded = load("embedded", "auto", "cpu")
    with pytest.raises(InputError):
        chats.encode(loaded, [[{"role": "user", "content": [entry]}]], chats.at_most(None), 8)


def test_the_log_says_what_was_pruned_and_warns_where_nothing_was() -> None:
    some = [kept.Kept(1, 10, 0.5, 60, 100), kept.Kept(3, 30, 0.25, 20, 100)]
    some.append(kept.Kept(0, 0, 1.0, 40, 40))
    line, warn = kept.in_words("plphp", some)
    assert not warn and "kept 31.2% of the vision K/V of 4 prompts; cache 0.500" in line
    everything = [kept.Kept(1, 5, 1.0, 100, 100)]
    assert kept.in_words("plphp", everything)[1] and not kept.in_words("full", everything)[1]
    assert kept.in_words("plphp", [kept.Kept(0, 0, 1.0, 40, 40)])[1]
    assert not kept.in_words("none", [])[1]
