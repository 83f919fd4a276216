"""Images whose numbers have more than 8 bits: what Pillow's own conversion would make white."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import plphp
from plphp.inputs import open_image

RAMP = np.array([[0, 257, 30_000, 32_768, 65_535]] * 2, np.uint16)
WANTED = [0, 1, 117, 128, 255]


def big_endian(path: Path) -> None:
    height, width = RAMP.shape
    Image.frombytes("I;16B", (width, height), RAMP.astype(">u2").tobytes()).save(path)


def netpbm(path: Path) -> None:
    path.write_bytes(b"P5 %d %d 65535 " % RAMP.shape[::-1] + RAMP.astype(">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.png", lambda path: Image.fromarray(RAMP).save(path)),
        ("a.tif", lambda path: Image.fromarray(RAMP).save(path)),
        ("b.tif", big_endian),
        ("a.pgm", netpbm),
    ],
)
def test_grey_of_16_bits_is_scaled(name: str, save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[grey] * 3 for grey in WANTED]


def test_grey_of_16_bits_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    assert np.asarray(open_image(tmp_path / "a.png"))[:, 0, 0].tolist() == WANTED


@pytest.mark.parametrize("numbers", [[0.0, 1.0], [-1.0, 4.0], [0.0, 3e4]])
def test_grey_without_a_known_range_is_refused(numbers: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array([numbers], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(plphp.InputError, match=r"a\.tif: its numbers have 32 bits, from"):
        open_image(tmp_path / "a.tif")


def test_grey_that_fits_8_bits_is_read(tmp_path: Path) -> None:
    for kind in (np.float32, np.int32):
        Image.fromarray(np.array([[0, 7, 255]], kind)).save(tmp_path / "a.tif")
        assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 7, 255]
