"""Synthetic scenes with exact masks: shapes on a textured background. No download, the same on every machine.

A scene is a function of its number only. Every class has its own form, texture and range of hues; the ranges overlap,
so that nearly half of the shapes have a hue that another class may have too. Shapes have random rotations and
positions, and later ones cover earlier ones. The background may have any colour and fills most of the image: predicting
background everywhere is correct for 80% of the pixels, and has a mean IoU of 13%.
"""

from __future__ import annotations

import colorsys
import functools

import numpy as np
from PIL import Image

from data.images import picture_pixels

ROWS, COLUMNS = 64, 96
CLASSES = ("ground", "disc", "square", "triangle", "ring", "cross")
SIZES = {"train": 1000, "val": 100}
HUES = 0.13  # maximum distance from a class's hue (the circle is 1); with 0.1 the hues of classes do not overlap
_KEYS = {"train": 0, "val": 1}


@functools.lru_cache(maxsize=sum(SIZES.values()))  # 24 kB each; drawing takes as long as decoding a photograph
def scene(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the image, uint8 `[64, 96, 3]`, and the class of each pixel, uint8 `[64, 96]`; both read-only."""
    drawn = np.random.RandomState([_KEYS[split], index])  # a legacy generator, whose stream never changes
    image, mask = _ground(drawn), np.zeros((ROWS, COLUMNS), np.uint8)
    for _ in range(drawn.randint(2, 6)):
        number = drawn.randint(1, len(CLASSES))
        radius, angle = drawn.uniform(8, 18), drawn.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:ROWS, :COLUMNS]
        y, x = y - drawn.uniform(4, ROWS - 4), x - drawn.uniform(4, COLUMNS - 4)
        cosine, sine = np.cos(angle) / radius, np.sin(angle) / radius
        across, down = cosine * x + sine * y, cosine * y - sine * x
        inside, texture = _form(CLASSES[number], across, down, cells=drawn.uniform(2.5, 4) * radius / 12)
        dark, bright = _shape_colours(drawn, number)
        image[inside] = np.where(texture[inside][:, None], bright, dark)
        mask[inside] = number
    pixels = np.clip(image + drawn.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
    pixels.flags.writeable = mask.flags.writeable = False
    return pixels, mask


def image(split: str, channels: int, index: int) -> np.ndarray:
    """Return the image of a scene, uint8 `[64, 96, channels]`."""
    pixels = scene(split, index)[0]
    return pixels if channels == 3 else picture_pixels(Image.fromarray(pixels), channels)


def _form(name: str, across: np.ndarray, down: np.ndarray, cells: float) -> tuple[np.ndarray, np.ndarray]:
    """Return two boolean arrays: the inside of a shape with a radius of about 1, and the bright part of its texture."""
    far = np.hypot(across, down)
    if name == "disc":
        return far < 1, np.sin(np.pi * cells * across) > 0  # stripes
    if name == "square":
        inside = np.maximum(abs(across), abs(down)) < 0.85
        return inside, np.sin(np.pi * cells * across) * np.sin(np.pi * cells * down) > 0  # a chequerboard
    if name == "triangle":
        inside = (down < 0.6) & (np.sqrt(3) * abs(across) - down < 1.1)
        return inside, np.cos(np.pi * cells * across) + np.cos(np.pi * cells * down) > 1  # dots
    if name == "ring":
        return (far > 0.5) & (far < 1), np.sin(4 * cells * np.arctan2(down, across)) > 0  # spokes
    inside = (np.minimum(abs(across), abs(down)) < 0.3) & (np.maximum(abs(across), abs(down)) < 1)
    return inside, np.sin(2 * np.pi * cells * far) > 0  # the cross: circles


def _shape_colours(drawn: np.random.RandomState, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a dark and a bright colour of a random hue near the class's hue; the five hues are evenly spaced."""
    hue = (number / 5 + drawn.uniform(-HUES, HUES)) % 1
    saturation, value = drawn.uniform(0.55, 1), drawn.uniform(0.7, 1)
    bright = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    return bright * drawn.uniform(0.2, 0.55), bright


def _colours(drawn: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours, the second one brighter."""
    dark = drawn.uniform(0, 140, 3)
    return dark, np.clip(dark + drawn.uniform(50, 110, 3), 0, 255)


def _ground(drawn: np.random.RandomState) -> np.ndarray:
    """Draw smooth noise of two scales between two colours."""
    dark, bright = _colours(drawn)
    height = sum(share * _smooth(drawn.uniform(0, 1, (cells, cells))) for cells, share in ((4, 0.7), (16, 0.3)))
    return dark + (bright - dark) * np.asarray(height)[:, :, None]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Interpolate a square grid of values linearly to the size of a scene."""
    rows, columns = (np.linspace(0, len(values) - 1.001, length) for length in (ROWS, COLUMNS))
    top, left = rows.astype(int), columns.astype(int)
    down, across = (rows - top)[:, None], (columns - left)[None]
    upper = values[top][:, left] * (1 - across) + values[top][:, left + 1] * across
    lower = values[top + 1][:, left] * (1 - across) + values[top + 1][:, left + 1] * across
    return upper * (1 - down) + lower * down
