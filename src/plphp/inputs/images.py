"""Image files, and the one line that a file gets which is none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from plphp.errors import InputError


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An RGB image. Raises InputError that names the file and says what is wrong with it."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"image {path}: no such file")
    if file.is_dir():
        raise InputError(f"image {path}: is a directory; --batch takes directories")
    if file.stat().st_size == 0:
        raise InputError(f"image {path}: the file is empty")
    try:
        with warnings.catch_warnings():
            # Pillow only warns of bombs at first: a picture of 90 megapixels is refused here.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = Image.MAX_IMAGE_PIXELS or 0
        raise InputError(
            f"image {path}: more than {most:,} pixels (a decompression bomb?); make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"image {path}: not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {path}: broken or truncated ({error})") from None
