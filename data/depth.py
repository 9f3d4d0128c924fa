"""Pixel values of more than 8 bits: one scale to 0..255 for the complete data set.

8-bit files are used unchanged. 16-bit, 32-bit and float values need a scale, which no file states reliably: 12-bit
sensors store 0..4095 in 16-bit files, and floats may have a maximum of 1, 255 or anything else. With one scale per
file, equal values would have different grey levels in different images. So the scale is chosen once, from a sample of
the training files, logged, and stored with the run's options as `value_range`; fine-tuning, evaluation and tools use
the stored one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.images import BadImage, Pair, blamed_on, is_uint8_file, to_uint8

log = logging.getLogger(__name__)

Range = tuple[float, ...]  # (lowest, highest) value, which become 0 and 255; () if all files have 8 bits

LOOKED_AT = 64  # sampled files of each suffix
LOOKED_AT_UNSEEN = 16  # sampled files if a header cannot be read without the pixels
LISTED = 4096  # evenly spaced names that are searched for suffixes
MOST_BYTES = 2**29  # limit of decoded pixels, after which eight files are enough
VALUES = 4096  # values kept of each file, for quantiles
WHITES = {"i": (255, 1023, 4095, 16383, 65535), "f": (1, 255, 65535)}  # usual maxima of integers and floats
OVERSHOOT = 1.1  # floats may exceed a maximum by this factor, because of interpolation or noise
FEW = 1e-4  # fraction of values that may exceed a maximum, by up to ten times, as outliers
FEWEST_LEVELS = 4  # grey levels that a given range must leave
MIXED = 0.05  # fraction of files above which a second scale is an error
EIGHT_BIT_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class Values:
    """The pixel values of one file of more than 8 bits."""

    name: str
    dtype: np.dtype
    low: float
    high: float
    some: np.ndarray
    """At most `VALUES` values, evenly spaced in the file."""

    @property
    def kind(self) -> str:
        """`f` for floats, `i` for integers."""
        return "f" if self.dtype.kind == "f" else "i"


def look(
    names: Sequence[str], read: Callable[[int], Any], path: Callable[[int], str] | None
) -> tuple[int, list[Values]]:
    """Read a sample of the files that may have more than 8 bits.

    Args:
        names: File names of the images, whose suffixes show which may have more than 8 bits.
        read: Function of an image's index that returns its pixels as stored, or a Pair; raises `BadImage`.
        path: Function of an image's index that returns its file, whose header is read first; None without files.

    Returns:
        The number of files in the sample, and the values of those with more than 8 bits.
    """
    groups: dict[str, list[int]] = {}
    for number in np.unique(np.linspace(0, len(names) - 1, min(len(names), LISTED)).astype(int)).tolist():
        suffix = os.path.splitext(names[number])[1].lower()
        if suffix not in EIGHT_BIT_SUFFIXES:
            groups.setdefault(suffix, []).append(number)
    looked, decoded = 0, 0
    found: list[Values] = []
    for group in groups.values():
        count = LOOKED_AT if path else LOOKED_AT_UNSEEN
        for place in np.unique(np.linspace(0, len(group) - 1, min(len(group), count)).astype(int)).tolist():
            looked += 1
            if path and is_uint8_file(path(group[place])):
                continue
            if decoded > MOST_BYTES and len(found) >= 8:
                return looked, found
            try:
                pixels = read(group[place])
            except BadImage:  # reported when training reads it
                continue
            pixels = pixels.image_HWC if isinstance(pixels, Pair) else pixels
            decoded += pixels.nbytes
            if isinstance(pixels, np.ndarray) and pixels.dtype != np.uint8:
                flat = pixels.reshape(-1)
                if not np.isfinite(flat.min()) or not np.isfinite(flat.max()):
                    continue
                some = flat[:: max(1, -(-flat.size // VALUES))].astype(np.float64)
                found.append(Values(names[group[place]], pixels.dtype, float(flat.min()), float(flat.max()), some))
    return looked, found


def decide(found: Sequence[Values]) -> Range:
    """Choose the range of values that is mapped to 0..255.

    * Non-negative integers: from 0 to the first of 255, 1023, 4095, 16383 and 65535 that no value exceeds.
    * Non-negative floats: from 0 to the first of 1, 255 and 65535 that no value except a few outliers exceeds.
    * Floats from -1 to 1: this range.
    * All others: from 0, or the minimum of the sample if that is negative, to its maximum.

    Raises:
        ValueError: If the files have no common scale.
    """
    kinds = {kind: [values for values in found if values.kind == kind] for kind in "if"}
    ranges = {kind: _choose_range(kind, group) for kind, group in kinds.items() if group}
    if len(set(ranges.values())) > 1:
        integer, floating = kinds["i"][0], kinds["f"][0]
        raise ValueError(
            f"the images have no common scale: {integer.name} holds integers from {integer.low:g} to {integer.high:g}, "
            f"{floating.name} floats from {floating.low:g} to {floating.high:g}. Store all in one way, or give "
            "--value_range LOW HIGH"
        )
    _require_one_white(kinds["f"])
    return next(iter(ranges.values()))


def _choose_range(kind: str, group: Sequence[Values]) -> Range:
    low, high = min(values.low for values in group), max(values.high for values in group)
    some = np.concatenate([values.some for values in group])
    for white in WHITES[kind]:
        if kind == "i" and low >= 0 and high <= white:
            return 0.0, float(white)
        if kind == "f" and _within(some, low, high, 0, white):
            return 0.0, float(white)
    if kind == "f" and _within(some, low, high, -1, 1):
        return -1.0, 1.0
    low = min(low, 0.0)
    return (low, high) if low < high else (low, low + 1)


def _within(some: np.ndarray, low: float, high: float, black: float, white: float) -> bool:
    """Return whether values lie between `black` and `white`, except for overshoot or a few outliers."""
    margin = (OVERSHOOT - 1) * (white - black)
    if not (black - 9 * white <= low and high <= 10 * white):
        return False
    beyond = np.mean((some > white) | (some < black))
    return bool((black - margin <= low and high <= white + margin and beyond < 0.05) or beyond <= FEW)


def _require_one_white(group: Sequence[Values]) -> None:
    """Raise ValueError if the maximum is 1 in some float files and 255 or more in others."""
    small = [values for values in group if 0 < values.high <= OVERSHOOT and values.low >= 0]
    large = [values for values in group if values.high > 10]
    if small and large and min(len(small), len(large)) >= MIXED * len(group):
        raise ValueError(
            f"the images have no common scale: of {len(group)} sampled files, {len(small)} hold floats up to 1 "
            f"({small[0].name}) and {len(large)} floats up to {large[0].high:g} ({large[0].name}). Store all in one "
            "way, or give --value_range LOW HIGH"
        )


def with_range(
    source: Any, channels: int, value_range: Sequence[float] = (), *, report: bool = True, files: bool = True
) -> Any:
    """Return a source whose `read` returns uint8, with the `value_range` that it uses.

    Args:
        source: A `data.sources.Source` whose `read` returns pixels as stored.
        channels: Channels of the images.
        value_range: Lowest and highest value; () to choose them from a sample.
        report: Log the values in a sample of the files even if the range is given.
        files: Whether the images are stored in files, which may have more than 8 bits.

    Raises:
        ValueError: If the files have no common scale.
    """
    chosen: Range = tuple(value_range)
    if files and (report or not chosen):
        looked, found = look(source.names, source.read, source.path)
        decided = not chosen
        if found:
            chosen = chosen or decide(found)
            _report(looked, found, chosen, decided)
        elif chosen:
            log.info("pixel values: 8 bits in every sampled file; value_range has no effect on such files")
    read, lazily = (
        part and functools.partial(_read, part, source.names, channels, chosen)
        for part in (source.read, source.read_lazily)
    )
    return replace(source, read=read, read_lazily=lazily, value_range=chosen)


def _read(read: Callable[[int], Any], names: Sequence[str], channels: int, value_range: Range, number: int) -> Any:
    image = read(number)
    stored = image.image_HWC if isinstance(image, Pair) else image
    if not isinstance(stored, np.ndarray) or stored.dtype == np.uint8:
        return image
    with blamed_on(names[number]):
        if not value_range and stored.dtype.kind == "f":
            raise ValueError("floats, and no sampled file holds any: give --value_range LOW HIGH")
        scaled = to_uint8(stored, channels, value_range)
    return Pair(scaled, image.mask_HW) if isinstance(image, Pair) else scaled


def _report(looked: int, found: Sequence[Values], chosen: Range, decided: bool) -> None:
    """Log the values of a sample and their scale; warn if much of the range is unused or many values are clipped."""
    low, high = chosen
    types = Counter(str(values.dtype.newbyteorder("=")) for values in found)
    some = np.concatenate([values.some for values in found])
    log.info(
        "pixel values: %d of %d sampled files have more than 8 bits (%s), from %g to %g; %g to %g is scaled to black "
        "to white in all images (%s)%s",
        *(len(found), looked, ", ".join(f"{count} {name}" for name, count in types.most_common())),
        *(min(values.low for values in found), max(values.high for values in found), low, high),
        "decided from this sample; --value_range LOW HIGH sets it" if decided else "as value_range says",
        "; files of 8 bits are used as they are" if len(found) < looked else "",
    )
    outside = np.mean((some < low) | (some > high))
    if outside > 0.01:
        log.warning("pixel values: %.1f%% lie outside of %g to %g and become black or white", 100 * outside, low, high)
    bottom, top = np.quantile(some, [0.001, 0.999])
    levels = max(1, round(255 * (min(top, high) - max(bottom, low)) / (high - low)) + 1)
    if bottom < top and levels < FEWEST_LEVELS and not decided:
        raise ValueError(
            f"value_range {low:g} {high:g} does not fit these images: 99.8% of the sampled values lie between "
            f"{bottom:g} and {top:g}, which become {levels} of 256 grey levels. It was given, or belongs to the "
            "checkpoint; give another --value_range LOW HIGH"
        )
    if top - bottom < 0.5 * (high - low):
        log.warning(
            "pixel values: most of the range %g to %g is unused: 99.8%% of the sampled values lie between %g and %g, "
            "which become %d of 256 grey levels; --value_range LOW HIGH sets another range",
            *(low, high, bottom, top, levels),
        )
    dark = [values for values in found if values.kind == "i" and values.high <= 255]
    if high > 1023 and len(found) > len(dark) >= MIXED * len(found):
        log.warning(
            "pixel values: %d of %d files have no value above 255, such as %s: if they hold 8-bit values, convert them "
            "to 8-bit files",
            *(len(dark), len(found), dark[0].name),
        )
