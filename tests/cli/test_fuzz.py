"""Files that nobody thought of: InputError or an answer, never another exception."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from plphp.cli.batch_lines import read_lines
from plphp.errors import InputError
from plphp.inputs import lines, open_image

CALM = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
KINDS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "BLP", "DDS", "ICO",
         "ICNS", "PCX", "PPM", "SGI", "TGA", "MSP", "SPIDER", "XBM", "QOI")  # fmt: skip


def encoded(kind: str) -> bytes:
    """A small picture in a format, or nothing where this Pillow cannot write it."""
    mode = {"MSP": "1", "XBM": "1", "BLP": "P", "SPIDER": "F", "ICNS": "RGBA"}.get(kind, "RGB")
    side = 16 if kind == "ICNS" else 12
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.effect_noise((side, side), 90).convert(mode)
    try:
        picture.save(out, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    except (OSError, KeyError, ValueError):
        return b""
    return out.getvalue()


def tried(call: Callable[[], Any]) -> tuple[Any, str]:
    """What came of it, or what the InputError says."""
    try:
        return call(), ""
    except InputError as error:
        return None, str(error)


WHOLE = {kind: data for kind in KINDS if (data := encoded(kind))}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("fuzz") / "picture"
    return path


@CALM
@given(kind=st.sampled_from(sorted(WHOLE)), seed=st.integers(0, 2**32), cut=st.booleans())
def test_broken_images_are_refused_or_read(file: Path, kind: str, seed: int, cut: bool) -> None:
    rng, data = random.Random(seed), bytearray(WHOLE[kind])
    for _ in range(rng.choice((1, 2, 8, 40))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if cut:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    image, said = tried(lambda: open_image(file))
    assert str(file) in said if image is None else image.mode == "RGB" and min(image.size) > 0


def test_decoders_that_raise_what_they_like(file: Path) -> None:
    assert {"AVIF", "BLP", "JPEG2000"} <= WHOLE.keys()
    for kind, data in WHOLE.items():
        for size in (len(data) // 3, len(data) // 2, len(data) - 1):
            for damaged in (data[:size], data[:size] + b"\xff" * (len(data) - size)):
                file.write_bytes(damaged)
                image, said = tried(lambda: open_image(file))
                assert image is not None or (str(file) in said and "\n" not in said), kind


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"id": VALUES, "prompt": VALUES, "images": VALUES, "video": VALUES}
    ).map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.fixed_dictionaries({"id": VALUES, "prompt": st.text()}).map(
        lambda r: json.dumps(r).encode()
    ),
    st.binary(max_size=40),
    st.sampled_from([b"[" * 5000, b'{"id":' * 3000, b"9" * 5000, b"1e99999", b"\xef\xbb\xbf{}"]),
).map(lambda row: row.replace(b"\n", b" "))


@CALM
@given(rows=st.lists(ROWS, max_size=6))
def test_lines_of_a_batch_are_read_or_errors_in_their_place(file: Path, rows: list[bytes]) -> None:
    file.write_bytes(b"".join(row + b"\n" for row in rows))
    found, said = tried(lambda: list(read_lines(file, "a prompt")))
    if found is None:
        assert "UTF-16" in said
        return
    assert [line.number for line in found] == list(range(len(rows)))
    for line in found:
        assert line.request({}) == line.request({})
        written = lines.dump({"id": line.id, "error": line.error, "prompt": line.prompt})
        assert len(written.splitlines()) == 1
        assert lines.load(written.encode("utf-8").rstrip(b"\n"))["id"] == line.id


@CALM
@given(value=VALUES)
def test_what_is_written_is_read_back(value: Any) -> None:
    try:
        written = lines.dump(value)
    except ValueError:
        return  # NaN and infinity have no JSON
    assert (len(written.splitlines()) == 1 and written.isascii()) or written.encode("utf-8")
    assert lines.load(written.encode("utf-8").rstrip(b"\n")) == value
