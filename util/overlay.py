"""Draw masks: overlay an image with a colour for each class.

N images   K classes   C H W image
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.masks import IGNORE
from util.watch import contact_sheet, select_rgb, write_sheet

GOLDEN = 0.618034  # distance of consecutive hues (the circle is 1), so that they differ much for any number of classes
SHADES = ((0.75, 0.95), (0.45, 1.0), (0.9, 0.65))  # saturation and value, used in turn
NO_CLASS = (0, 0, 0)
STRENGTH = 0.6  # opacity of the colours
TILE = 160  # pixels of an image's long side on a sheet


@functools.cache
def colours(classes: int) -> Tensor:
    """Return a fixed colour for each class, uint8 `[K + 1, 3]`; the last row (index -1) is for no class."""
    rows = [colorsys.hsv_to_rgb(GOLDEN * k % 1, *SHADES[k % len(SHADES)]) for k in range(classes)]
    return torch.tensor([*([round(255 * part) for part in row] for row in rows), NO_CLASS], dtype=torch.uint8)


def overlay(image_CHW: Tensor, mask_HW: Tensor, classes: int) -> Tensor:
    """Return the image overlaid with the colours of the classes (black: no class), `[3, H, W]` between 0 and 1."""
    coloured = colours(classes)[mask_HW.long()].permute(2, 0, 1) / 255
    mixed = (1 - STRENGTH) * image_CHW + STRENGTH * coloured
    return torch.where(mask_HW == IGNORE, coloured, mixed)


def to_rgb(image_CHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert a normalised image with any number of channels to RGB `[3, H, W]` between 0 and 1."""
    pixels = (image_CHW.cpu() * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).clamp(0, 1)
    return select_rgb(pixels)


def tile(picture_CHW: Tensor) -> Tensor:
    """Resize an image to fit into a white square of `TILE` pixels, and centre it."""
    height, width = (max(1, round(side * TILE / max(picture_CHW.shape[1:]))) for side in picture_CHW.shape[1:])
    inside = F.interpolate(picture_CHW[None], size=(height, width), mode="area")[0]
    top, left = (TILE - height) // 2, (TILE - width) // 2
    return F.pad(inside, (left, TILE - width - left, top, TILE - height - top), value=1.0)


def mask_sheet(made: Sequence[tuple[Tensor, Tensor, Tensor]], classes: int, path: Path) -> Tensor:
    """Draw rows of images, true and predicted masks, write them to `path`, and return them as uint8 `[H, W, 3]`."""
    columns = [
        [tile(each) for each in (image, overlay(image, true, classes), overlay(image, predicted, classes))]
        for image, true, predicted in made
    ]
    rows = [torch.stack(row) for row in zip(*columns, strict=True)]
    sheet = contact_sheet(rows, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return write_sheet(sheet, "rows: image, mask, predicted mask; black is no class", path)
