"""JPEG files by torchcodec, for the same pixels as Pillow's in less time and without holding Python's lock.

Both packages carry libjpeg-turbo, so their RGB pixels are equal to the last bit. That is not taken on trust: at the
first use a small picture goes through both, and torchcodec is used only if they agree. So no result depends on whether
it is installed. What it would read otherwise (CMYK, a file that is cut off, PNG under another name) is left to Pillow,
and EXIF segments are cut out before, because torchcodec would turn the picture as they say and Pillow does not.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

Decode = Callable[..., Any]  # bytes to uint8 [C, H, W]; torchcodec's own type also has the answer to a batch

START, START_OF_SCAN, APP1 = b"\xff\xd8\xff", 0xDA, 0xE1
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive: their headers hold the size
EXIF = b"Exif\0\0"


def jpeg_pixels(data: bytes) -> np.ndarray | None:
    """A JPEG file's pixels, uint8 `[H, W, 3]`; None where Pillow must look at it."""
    decode = torchcodec_jpeg()
    return None if decode is None else _pixels(data, decode)


@functools.cache
def torchcodec_jpeg() -> Decode | None:
    """torchcodec's decoder (bytes to `[C, H, W]`); None, with a line in the log, where it is no substitute."""
    try:
        import torchcodec
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # missing, or its libraries do not fit this torch
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("data: Pillow decodes JPEG files, for the same pixels more slowly: torchcodec fails (%s)", reason)
        return None
    if not all(_agree(decode_jpeg, subsampling) for subsampling in ("4:4:4", "4:2:0")):
        log.warning(
            "data: Pillow decodes JPEG files: torchcodec %s gives other pixels than this Pillow", torchcodec.__version__
        )
        return None
    log.info("data: torchcodec %s decodes JPEG files", torchcodec.__version__)
    return decode_jpeg


def _agree(decode: Decode, subsampling: str) -> bool:
    """Whether `decode` reads a picture with edges, gradients and an odd size as Pillow does."""
    rows, columns = np.mgrid[:37, :53]
    picture = np.stack([rows * 6, columns * 4, (rows * columns) % 256], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=subsampling)
    found = _pixels(file.getvalue(), decode)
    with Image.open(file) as by_pillow:
        return found is not None and np.array_equal(found, np.asarray(by_pillow))


def _pixels(data: bytes, decode: Decode) -> np.ndarray | None:
    if not data.startswith(START):
        return None
    try:
        plain = _without_exif(data)
        return None if plain is None else decode(plain).permute(1, 2, 0).numpy()
    except (RuntimeError, ValueError, IndexError):  # damaged: Pillow decides, and finds the words
        return None


def _without_exif(data: bytes) -> bytes | None:
    """A JPEG file without its EXIF segments; None for other colours than grey and YCbCr, and for a size that Pillow
    would warn about. IndexError where the header ends too early."""
    position, whole, kept = 2, 0, []
    while (marker := data[position + 1]) != START_OF_SCAN:
        if data[position] != 0xFF or marker == 0xFF:
            return None  # fill bytes or no header at all
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in FRAMES:
            rows = int.from_bytes(data[position + 5 : position + 7], "big")
            columns = int.from_bytes(data[position + 7 : position + 9], "big")
            if data[position + 9] not in (1, 3) or rows * columns > (Image.MAX_IMAGE_PIXELS or rows * columns):
                return None
        elif marker == APP1 and data.startswith(EXIF, position + 4):
            kept.append(data[whole:position])
            whole = end
        position = end
    return b"".join([*kept, data[whole:]]) if kept else data
