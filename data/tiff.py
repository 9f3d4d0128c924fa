"""Read TIFF files that Pillow cannot read correctly: many bands, floats, more than 8 bits in several bands.

This requires the packages `tifffile` and `imagecodecs` (requirements/tiff.txt), which are not needed for other files.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from data.decode import ORIENTATION, upright

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
EXTRA = "pip install -r requirements/tiff.txt"
BITS, SAMPLES, FORMAT = 258, 277, 339  # tags: bits per sample, samples per pixel, sample format
UNSIGNED, SIGNED = 1, 2
SPATIAL = "YX"


def is_tiff(data: bytes) -> bool:
    """Return whether the bytes are the start of a TIFF file."""
    return data.startswith(TIFF_STARTS)


def pillow_reads(picture: Image.Image) -> bool:
    """Return whether Pillow returns all bands and all bits of an opened TIFF file."""
    tags: Any = picture.tag_v2  # type: ignore[attr-defined]
    bits, samples = tuple(tags.get(BITS, (1,))), tags.get(SAMPLES, 1)
    kind = tags.get(FORMAT, (UNSIGNED,))[0]
    if samples == 1:
        return (bits[0], kind) not in ((8, SIGNED), (32, UNSIGNED)) and not _is_stack(picture)
    return max(bits) <= 8 and kind == UNSIGNED and samples == len(picture.getbands())


def _is_stack(picture: Any) -> bool:
    """Return whether a file contains several pages of one size, of which Pillow would read only the first."""
    if getattr(picture, "n_frames", 1) == 1:
        return False
    size = picture.size
    picture.seek(1)  # a thumbnail or a reduced copy has another size
    return picture.size == size


def tiff_values(data: bytes, channels: int) -> np.ndarray:
    """Read the values of the first image of a TIFF file as stored.

    Returns:
        `[H, W, bands]`, upright, with the file's dtype; the bands are those of the file, or its pages.

    Raises:
        ValueError: If the packages are missing, or the file does not have `channels` bands (one band or RGB colours
            are also accepted for 1, 3 and 4 channels).
    """
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            f"a TIFF file of many bands, floats or more than 8 bits, which needs the package tifffile: {EXTRA}"
        ) from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        first: Any = file.pages[0]
        try:
            values = series.asarray()
        except (ValueError, ImportError) as error:
            if "imagecodecs" in str(error):
                raise ValueError(f"a compressed TIFF file, which needs the package imagecodecs: {EXTRA}") from error
            raise
        axes = series.axes
        colours = int(first.photometric) == 2  # RGB
        alpha = any(int(kind) in (1, 2) for kind in getattr(first, "extrasamples", ()))
        orientation = int(first.tags.valueof(ORIENTATION, 1))
    kept = [size != 1 or axis in SPATIAL for axis, size in zip(axes, values.shape, strict=True)]
    axes = "".join(axis for axis, keep in zip(axes, kept, strict=True) if keep)
    values = values.reshape([size for size, keep in zip(values.shape, kept, strict=True) if keep])
    if values.ndim == 2 and axes == SPATIAL:
        return upright(values, orientation)[:, :, None]
    if values.ndim != 3 or not set(SPATIAL) <= set(axes):
        raise ValueError(f"a TIFF file of shape {list(values.shape)} ({axes}); an image has rows, columns and bands")
    (band_axis,) = (place for place, axis in enumerate(axes) if axis not in SPATIAL)
    values = upright(np.moveaxis(values, band_axis, -1), orientation)
    if colours and alpha and values.shape[-1] == 4 and channels in (1, 3):
        values = values[..., :3]  # transparency is dropped, as for other files
    return values
