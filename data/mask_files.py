"""Read mask files, and map the stored values to classes.

H W rows and columns of a mask
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from data.decode import upright
from data.images import NUMPY, blamed_on, pillow_reads_tiff, read_orientation, refuse_misread_bmp
from data.tiff import BITS, is_tiff, tiff_values
from options import SegmentOptions

IGNORE = -1  # class of ignored pixels, in a mask that was read
IGNORED = 255  # stored value of ignored pixels, unless ignore_label is set
PHOTOMETRIC, ZERO_IS_BLACK = 262, 1  # the TIFF tag, and its value for grey files that Pillow does not invert
NUMBER_MODES = {"1": "1 bit", "L": "grey", "P": "palette", "I;16": "16 bit", "I;16B": "16 bit", "I": "16 bit"}
MOST_LISTED = 8  # values in a message


def ignored_value(options: SegmentOptions) -> int | None:
    """Return the stored value that is ignored, as given or by default; None if no value is ignored."""
    if options.ignore_label is not None:
        return options.ignore_label
    words = options.mask_values
    return None if str(IGNORED) in words or any(word.startswith("#") for word in words) else IGNORED


@dataclass(frozen=True)
class Coding:
    """Mapping of the values stored in a mask to classes.

    The values are class indices from 0, or with `reduce_zero` from 1, where 0 is ignored; or `values` lists the value
    of each class. With `colours` a value is a colour, 65536 red + 256 green + blue.
    """

    classes: int
    ignore: int
    """Value of ignored pixels; -1: none."""
    reduce_zero: bool
    values: tuple[int, ...] = field(default=(), repr=False)
    colours: bool = field(default=False, repr=False)

    @classmethod
    def of(cls, options: SegmentOptions, classes: int) -> Coding:
        """Create the coding for `options`. Raises ValueError if they do not match the number of classes."""
        words = options.mask_values
        colours = bool(words) and words[0].startswith("#")
        try:
            values = tuple(int(word.removeprefix("#"), 16 if colours else 10) for word in words)
        except ValueError:
            values = (-1,)
        if any(value < 0 or word.startswith("#") != colours for word, value in zip(words, values, strict=False)):
            raise ValueError(f"mask_values: expected numbers, or colours as #ff0000, found {', '.join(words)}")
        if values and len(values) != classes:
            raise ValueError(
                f"mask_values: {len(values)} values ({', '.join(words)}) for {classes} classes; one for each"
            )
        if len(set(values)) < len(values):
            raise ValueError(f"mask_values: {', '.join(words)} holds a value twice")
        ignored = ignored_value(options)
        if ignored in values:
            raise ValueError(f"ignore_label {ignored} is also among mask_values, which maps it to a class")
        ignore = -1 if ignored is None else ignored
        return cls(classes, ignore, options.dataset == "ade20k" or options.reduce_zero_label, values, colours)

    def describe_class(self, number: int) -> str:
        """Describe a stored value: the number of its class, or why it has none."""
        return self.show(self.values[number] if self.values else number + self.reduce_zero)

    def show(self, value: int) -> str:
        """Format a stored value for options and messages."""
        return f"#{value:06x}" if self.colours else str(value)

    def to_classes(self, numbers_HW: np.ndarray) -> np.ndarray:
        """Return each pixel's class or IGNORE, int16 `[H, W]`.

        Raises:
            ValueError: If there are values that are neither a class nor ignored.
        """
        numbers_HW = numbers_HW.astype(np.int32)
        if self.values:
            order = np.argsort(self.values)
            known = np.array(self.values)[order]
            place_HW = np.searchsorted(known, numbers_HW).clip(max=len(known) - 1)
            found_HW = np.where(known[place_HW] == numbers_HW, order[place_HW], self.classes).astype(np.int32)
        else:
            found_HW = numbers_HW - self.reduce_zero
        if self.ignore >= 0:
            found_HW[numbers_HW == self.ignore] = IGNORE
        low = IGNORE if self.reduce_zero else 0
        wrong = (found_HW != IGNORE) & ((found_HW < low) | (found_HW >= self.classes))
        if wrong.any():
            values = ", ".join(map(self.show, np.unique(numbers_HW[wrong])[:5].tolist()))
            if self.values:
                right = ", ".join(map(self.show, self.values[:MOST_LISTED]))
                right = f"the {self.classes} classes have the values {right}{' ...' * (self.classes > MOST_LISTED)}"
            else:
                first, last = int(self.reduce_zero), self.classes - 1 + self.reduce_zero
                right = f"the {self.classes} classes are {first} to {last}"
            ignored = f", and {self.ignore} is ignored (--ignore_label)" if self.ignore >= 0 else ""
            raise ValueError(f"it holds {values}; {right}{ignored}")
        return found_HW.astype(np.int16)


def read_mask(path: str, colours: bool = False) -> tuple[np.ndarray, str]:
    """Read the values stored in a mask file.

    Args:
        path: The mask file.
        colours: Whether a value is a colour, 65536 red + 256 green + blue.

    Returns:
        Integers `[H, W]` after EXIF orientation, and the kind of file.

    Raises:
        BadImage: If it is not a mask file, or its values cannot be class indices.
    """
    with blamed_on(path):
        data = Path(path).read_bytes()
        if data.startswith(NUMPY):
            return _whole_numbers(np.load(io.BytesIO(data), allow_pickle=False)), "array"
        if is_tiff(data) and not pillow_reads_tiff(data):
            return _whole_numbers(tiff_values(data, 1)), "TIFF"
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format == "JPEG":
                raise ValueError(
                    "a JPEG file, which changes the numbers a little at every edge: store masks as PNG, from the "
                    "original and not from this file"
                )
            refuse_misread_bmp(picture, data)
            picture.load()
            numbers_HW, kind = _numbers(picture, data, colours)
            return upright(numbers_HW, read_orientation(picture)), kind


def _numbers(picture: Image.Image, data: bytes, colours: bool) -> tuple[np.ndarray, str]:
    """Return the values of a mask that Pillow has opened, and the kind of file."""
    if colours:
        red, green, blue = np.asarray(picture.convert("RGB")).astype(np.int32).transpose(2, 0, 1)
        return (red << 16) + (green << 8) + blue, "colour"
    if picture.format == "PNG" and data[24] == 16 and picture.mode in ("RGB", "RGBA", "LA"):
        raise ValueError("a PNG file of 16 bits in colour or with transparency: store the class numbers as a grey PNG")
    if picture.mode in ("RGB", "RGBA", "LA"):
        return _convert_to_grey(np.asarray(picture), picture.mode), f"grey in {picture.mode}"
    if picture.mode == "F":
        return _whole_numbers(np.asarray(picture)), "float"
    kind = NUMBER_MODES.get(picture.mode)
    if kind is None:
        raise ValueError(f"a picture in colour ({picture.mode}) {NUMBERS_WANTED}")
    numbers_HW = np.asarray(picture)
    if kind == "1 bit":
        numbers_HW = numbers_HW.astype(np.uint8)
    elif kind == "grey" and (bits := _read_grey_bits(picture, data)) < 8:
        numbers_HW = numbers_HW // (255 // (2**bits - 1))  # Pillow scales 2 and 4 bits to 0..255
    return numbers_HW, kind


NUMBERS_WANTED = (
    "where each pixel's class number belongs: store the numbers as a grey PNG or one with a palette, or list the "
    "classes' colours: --mask_values '#000000,#ff0000'"
)


def _convert_to_grey(values_HWC: np.ndarray, mode: str) -> np.ndarray:
    """Convert a mask stored in colour to grey values.

    Raises:
        ValueError: If the channels of a pixel differ, or some pixels are transparent.
    """
    alpha = values_HWC[..., -1] if mode in ("RGBA", "LA") else None
    colours_HWC = values_HWC if alpha is None else values_HWC[..., :-1]
    if alpha is not None and (alpha != 255).any():
        plain = (colours_HWC == colours_HWC[:1, :1]).all()
        where = "which seem to be the mask: its colours are all the same" if plain else "whose meaning is not known"
        raise ValueError(
            f"a picture with transparent pixels ({mode}), {where}. Store the class numbers as a grey PNG, for example "
            f"the transparency: Image.open(FILE).getchannel('A').point(lambda a: a > 127).save(FILE)"
        )
    if (colours_HWC != colours_HWC[..., :1]).any():
        found = np.unique(colours_HWC.reshape(-1, 3), axis=0)
        listed = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in found[:MOST_LISTED])
        raise ValueError(
            f"a picture in colour ({mode}) of {len(found)} colours ({listed}{' ...' * (len(found) > MOST_LISTED)}) "
            f"{NUMBERS_WANTED}"
        )
    return colours_HWC[..., 0]


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Convert an array `[H, W]` or `[H, W, 1]` to integers. Raises ValueError if values are not integers."""
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"an array of shape {list(values.shape)} where [H, W] is needed, the number of each pixel's class"
        )
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.floor(values)).any():
            raise ValueError("floats that are not whole numbers: store the number of each pixel's class")
    elif values.dtype.kind not in "ui":
        raise ValueError(f"an array of {values.dtype}; class numbers are integers")
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it holds {values.min():g} to {values.max():g}; class numbers are 0 to 65535")
    return values.astype(np.int32)


def _read_grey_bits(picture: Image.Image, data: bytes) -> int:
    """Return the bits per pixel of a grey PNG or TIFF file from its header; 8 for any other file."""
    if picture.format == "PNG":
        return data[24]
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(PHOTOMETRIC) == ZERO_IS_BLACK:
        return picture.tag_v2[BITS][0]
    return 8
