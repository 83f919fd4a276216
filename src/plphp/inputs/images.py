"""Image files, and the one line that a file gets which is none."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from PIL import EpsImagePlugin, Image, ImageFile, UnidentifiedImageError

from plphp.errors import InputError

ORIENTATION = 0x0112  # the EXIF tag: how a picture must be turned to stand upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An upright RGB image. Raises InputError that names the file and says what is wrong with it.

    Every image of the package is opened here: it is turned as its EXIF orientation says, which is
    what transformers does with the same file.
    """
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a reader's remarks; what it cannot read it raises
            # Pillow only warns of bombs at first: a picture of 90 megapixels is refused here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return upright(image).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS or 0
        raise InputError(
            f"image {path}: more than {most:,} pixels (a decompression bomb?); make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: not an image that Pillow can read") from None
    except MemoryError:
        raise InputError(f"image {path}: no memory left to decode it; make it smaller") from None
    except Exception as error:  # every decoder of Pillow fails in ways of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path}: broken or truncated ({reason})") from None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says. An orientation that cannot be read is none."""
    image.load()  # a PNG may say it after its pixels, and some readers turn the image themselves
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the block is broken, the pixels are not
        return image
    return image if turn is None else image.transpose(turn)


def image_files(folder: Path) -> list[Path]:
    """The image files of a directory by name: those whose ending Pillow can read, not only write.

    Raises InputError for a directory that cannot be listed.
    """
    kinds = Image.registered_extensions()
    try:
        found = [path for path in folder.iterdir() if not path.is_dir()]
    except OSError as error:
        raise InputError(f"{folder}: the directory cannot be read: {error.strerror}") from error
    return sorted(path for path in found if _can_read(kinds.get(path.suffix.lower())))


def _can_read(kind: str | None) -> bool:
    """Whether Pillow can decode a format here. It recognizes some that it cannot."""
    if kind in (None, "MPEG"):
        return False
    if kind == "EPS":
        return bool(EpsImagePlugin.has_ghostscript())
    reader = Image.OPEN.get("JPEG" if kind == "MPO" else kind or "", (None,))[0]
    return reader is not None and not (
        isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    )


def _check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a path that leads to no file, or to none that can be an image."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"image {path}: no such file") from None
    except OSError as error:
        raise InputError(f"image {path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a zero byte, or a character that no file name can hold
        raise InputError(f"image {path!r}: not a file name") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"image {path}: is a directory; --batch takes directories")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"image {path}: not a regular file; save the image to one")
    if found.st_size == 0:
        raise InputError(f"image {path}: the file is empty")
