"""Sliding windows: predict images of any size with a model that was trained on crops.

N images   C channels   K classes   H W rows and columns of an image
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Windows:
    """How an image of any size is split into the inputs of a model that was trained on crops.

    crop    rows and columns of a window; None: the image is one window, padded to a multiple of the patch size
    stride  pixels between the starts of two windows, down and across
    patch   patch size
    flip    average with the prediction for the flipped image
    batch   windows per forward pass
    """

    crop: tuple[int, int] | None
    stride: tuple[int, int]
    patch: int
    flip: bool = False
    batch: int = 1


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Return the starts of windows of `crop` pixels that cover `length` pixels; the last window ends at the end."""
    count = math.ceil(max(0, length - crop) / stride) + 1
    return [min(number * stride, max(0, length - crop)) for number in range(count)]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, windows: Windows, size: Sequence[int] | None = None) -> Tensor:
    """Compute the scores `[N, K, *size]` of the classes at each pixel; the highest score is the prediction.

    Scores are logits, averaged over the windows that contain a pixel. With `flip` they are probabilities, averaged over
    the image and the flipped image, as in mmsegmentation.

    Args:
        model: Returns logits at any resolution as its first output.
        images: Normalised images `[N, C, H, W]`. If they are smaller than a window, they are padded with the mean
            colour on the right and below.
        windows: How the images are split into the inputs of the model.
        size: Rows and columns to which logits are resized before the softmax; default: H, W.
    """
    if windows.flip:
        once = replace(windows, flip=False)
        straight, mirrored = (predict(model, shown, once, size).softmax(dim=1) for shown in (images, images.flip(-1)))
        return (straight + mirrored.flip(-1)) / 2
    height, width = images.shape[-2:]
    patch = windows.patch
    crop = windows.crop or (math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
    images = F.pad(images, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
    rows, columns = (starts(length, *how) for length, *how in zip(images.shape[-2:], crop, windows.stride, strict=True))
    places = [(top, left) for top in rows for left in columns]
    total, seen = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for first in range(0, len(places), windows.batch):
        group = places[first : first + windows.batch]
        shown = torch.cat([images[..., top : top + crop[0], left : left + crop[1]] for top, left in group])
        logits = F.interpolate(model(shown)[0].float(), size=crop, mode="bilinear", align_corners=False)
        if not total.ndim:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
        for (top, left), of_window in zip(group, logits.chunk(len(group)), strict=True):
            total[..., top : top + crop[0], left : left + crop[1]] += of_window
            seen[top : top + crop[0], left : left + crop[1]] += 1
    logits = (total / seen)[..., :height, :width]
    if size is None or tuple(size) == (height, width):
        return logits
    return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)
