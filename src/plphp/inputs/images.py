"""Opens image files. A file that cannot be used raises InputError with one line that says why."""

from __future__ import annotations

import os
import re
import stat
import warnings
from pathlib import Path

from PIL import EpsImagePlugin, Image, ImageFile, UnidentifiedImageError

from plphp.errors import InputError

ORIENTATION = 0x0112  # the EXIF tag that says how an image must be turned to stand upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The beginning of a URL. A path may hold one: pathlib takes the second slash away.
URL = re.compile(r"(?:.*/)?(?:https?|ftp|file|s3|gs|hf):/", re.IGNORECASE)

Still = Image.Image | str | os.PathLike[str]  # an image, or the file of one


def open_image(path: Still) -> Image.Image:
    """Open an image file as an upright RGB image. An image that is open already is returned as is.

    The package opens all images here. The image is turned as its EXIF orientation says, as
    transformers does it. Raises InputError that names the file and says what is wrong with it.
    """
    if isinstance(path, Image.Image):
        return path
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # serious faults of a file are errors, not warnings
            # Pillow only warns about an image of 90 megapixels. It is refused here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return in_8_bits(upright(image)).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS or 0
        raise InputError(
            f"image {path}: the image has more than {most:,} pixels and may be a decompression "
            "bomb: make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: this is not an image that Pillow can read") from None
    except InputError as error:
        raise InputError(f"image {path}: {error}") from None
    except MemoryError:
        raise InputError(
            f"image {path}: there is no memory left to decode the image: make it smaller"
        ) from None
    except Exception as error:  # the decoders of Pillow raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {path}: the file is broken or truncated ({reason})") from None


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says. An unreadable orientation is ignored."""
    # A PNG may have its orientation after its pixels, and some decoders turn the image themselves.
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # the EXIF data are broken, but the pixels are not
        return image
    return image if turn is None else image.transpose(turn)


def in_8_bits(image: Image.Image) -> Image.Image:
    """The image with numbers from 0 to 255, where a grey image has larger ones.

    Pillow's `convert("RGB")` sets every number above 255 to 255, so that a scan or a depth map of
    16 bits becomes white. 16 bits are scaled here. The range of 32 bits is not known: raises
    InputError unless the numbers are from 0 to 255 already.
    """
    most_16 = image.mode == "I" and image.format in ("PNG", "PPM")  # formats without 32 bits
    if image.mode.startswith("I;16") or most_16:
        return image.convert("I").point(lambda number: number * (1 / 257) + 0.5).convert("L")
    if image.mode not in ("I", "F"):
        return image
    low, high = (float(one) for one in image.getextrema())  # type: ignore[arg-type]
    if 0 <= low <= high <= 255 and not (image.mode == "F" and 0 < high <= 1):
        return image
    raise InputError(
        f"its numbers have 32 bits, from {low:g} to {high:g}, and which of them is white is not "
        "known: save it with 8 or 16 bits a number"
    )


def image_files(folder: Path) -> list[Path]:
    """The image files of a directory, sorted by name.

    A file is an image file if Pillow can read, and not only write, files with this ending. Raises
    InputError for a directory that cannot be listed.
    """
    kinds = Image.registered_extensions()
    try:
        found = [path for path in folder.iterdir() if not path.is_dir()]
    except OSError as error:
        raise InputError(f"{folder}: the directory cannot be read: {error.strerror}") from error
    return sorted(path for path in found if _can_read(kinds.get(path.suffix.lower())))


def _can_read(kind: str | None) -> bool:
    """Whether Pillow can decode a format on this machine. It recognises some that it cannot."""
    if kind in (None, "MPEG"):
        return False
    if kind == "EPS":
        return bool(EpsImagePlugin.has_ghostscript())
    reader = Image.OPEN.get("JPEG" if kind == "MPO" else kind or "", (None,))[0]
    return reader is not None and not (
        isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    )


def why_missing(path: str | os.PathLike[str]) -> str:
    """Why there is no file with this path: the path may be a URL, which nothing here reads."""
    name = os.fspath(path)
    if URL.match(name):
        return "a URL is not read: save the file here and give its name"
    return f"no such file{wildcard(name)}"


def wildcard(name: str) -> str:
    """The end of a message about a name that is no file's, if it has a character as `*.png` has."""
    return ": wildcards are not read, so name each file" if re.search("[*?]", name) else ""


def _check_file(path: str | os.PathLike[str]) -> None:
    """Raise InputError for a path that does not lead to a file, or only to an empty one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"image {path}: {why_missing(path)}") from None
    except OSError as error:
        raise InputError(f"image {path}: the file cannot be read: {error.strerror}") from None
    except ValueError:  # a zero byte, or a character that no file name can hold
        raise InputError(f"image {path!r}: this is not a file name") from None
    if stat.S_ISDIR(found.st_mode):
        raise InputError(f"image {path}: this is a directory, and only --batch takes directories")
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"image {path}: this is not a regular file: save the image as a file")
    if found.st_size == 0:
        raise InputError(f"image {path}: the file is empty")
