"""Augment images with masks for segmentation: scale, crop, flip and colour distortion.

The recipe is MMSegmentation's, which published ADE20K results use: resize at random between half and twice the
evaluation size, crop so that no class fills most of the crop if possible, flip, distort brightness, contrast,
saturation and hue as for SSD, and pad on the right and below. All random numbers are drawn from torch's default
generator, which is seeded for each sample.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as pixels

from data.images import Pair, PairTransform
from data.masks import IGNORE

LONG = 4  # maximum ratio of the long side to `short_side`: images are resized to fit 2048 x 512
CROPS = 10  # attempts to find a crop that no class fills
BRIGHTNESS, CONTRAST, HUE = 32.0, (0.5, 1.5), 0.1  # grey levels; factors (also of saturation); part of the circle


def fitted(size: Sequence[int], short_side: float) -> tuple[int, int]:
    """Return rows and columns of an image resized to `short_side`.

    The short side is smaller if the long side would otherwise exceed four times `short_side`.
    """
    factor = min(short_side / min(size), LONG * short_side / max(size))
    rows, columns = (max(1, int(side * factor + 0.5)) for side in size)
    return rows, columns


def train_transform(
    input_size: tuple[int, int],
    *,
    short_side: int,
    min_resize: float,
    max_resize: float,
    max_class_share: float,
    hflip: float,
    photometric: bool,
    mean: Sequence[float],
) -> PairTransform:
    """Create the augmentation of pairs of an image and its mask.

    It returns uint8 `[C, rows, columns]` and an int16 mask `[rows, columns]`; padding is the mean colour and IGNORE.
    """
    return functools.partial(
        _train,
        size=input_size,
        short_side=short_side,
        scales=(min_resize, max_resize),
        max_class_share=max_class_share,
        hflip=hflip,
        photometric=photometric,
        mean=tuple(mean),
    )


def eval_transform(short_side: int) -> PairTransform:
    """Create the transform from a pair to the resized image, uint8 `[C, rows, columns]`, and its unchanged mask."""
    return functools.partial(_eval, short_side=short_side)


def _eval(pair: Pair, *, short_side: int) -> tuple[Tensor, Tensor]:
    image_CHW, mask_HW = _tensors(pair)
    return resize_image(image_CHW, fitted(mask_HW.shape, short_side)), mask_HW


def _train(
    pair: Pair,
    *,
    size: tuple[int, int],
    short_side: int,
    scales: tuple[float, float],
    max_class_share: float,
    hflip: float,
    photometric: bool,
    mean: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    image_CHW, mask_HW = _tensors(pair)
    wanted = fitted(mask_HW.shape, short_side * uniform(*scales))
    image_CHW, mask_HW = resize_image(image_CHW, wanted), resize_mask(mask_HW, wanted)
    top, left = place_crop(mask_HW, size, max_class_share)
    image_CHW = image_CHW[:, top : top + size[0], left : left + size[1]]
    mask_HW = mask_HW[top : top + size[0], left : left + size[1]]
    if torch.rand(()) < hflip:
        image_CHW, mask_HW = image_CHW.flip(-1), mask_HW.flip(-1)
    if photometric:
        image_CHW = distort(image_CHW)
    return padded(image_CHW, mask_HW, size, mean)


def _tensors(pair: Pair) -> tuple[Tensor, Tensor]:
    image_HWC, mask_HW = (torch.from_numpy(np.require(part, requirements=["C", "W"])) for part in pair)
    return image_HWC.permute(2, 0, 1), mask_HW


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def resize_image(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    if image_CHW.shape[1:] == size:
        return image_CHW
    return pixels.resize(image_CHW, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def resize_mask(mask_HW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask: each pixel of the result has the class at its centre."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long() for new, old in zip(size, mask_HW.shape, strict=True)
    )
    return mask_HW[rows][:, columns]


def place_crop(mask_HW: Tensor, size: tuple[int, int], max_class_share: float) -> tuple[int, int]:
    """Return top and left of a random crop; a crop in which one class exceeds the maximum share is drawn again.

    After ten attempts the last crop is used.
    """
    for _ in range(CROPS):
        room = [max(0, length - crop) + 1 for length, crop in zip(mask_HW.shape, size, strict=True)]
        top, left = (int(torch.randint(each, ())) for each in room)
        if max_class_share >= 1:
            break
        crop_HW = mask_HW[top : top + size[0], left : left + size[1]]
        pixels_of_class = torch.bincount((crop_HW - IGNORE).flatten().long())[1:]
        if (pixels_of_class > 0).sum() > 1 and pixels_of_class.max() < max_class_share * pixels_of_class.sum():
            break
    return top, left


def distort(image_CHW: Tensor) -> Tensor:
    """Distort brightness, contrast, saturation and hue at random, each with probability 0.5.

    The contrast is changed before or after the colours, at random. Saturation and hue are those of HSV, and are changed
    for 3 channels only.
    """

    def coin() -> bool:
        return bool(torch.rand(()) < 0.5)

    image = image_CHW.float()
    if coin():
        image = (image + uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast_first = coin()
    if contrast_first and coin():
        image = (image * uniform(*CONTRAST)).clamp(0, 255)
    if len(image) == 3:
        if coin():
            image = saturate(image, uniform(*CONTRAST))
        if coin():
            image = pixels.adjust_hue(image / 255, uniform(-HUE, HUE)) * 255
    if not contrast_first and coin():
        image = (image * uniform(*CONTRAST)).clamp(0, 255)
    return image.round().to(torch.uint8)


def saturate(image_CHW: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV by a factor, limited to 1; hue and value are unchanged."""
    highest_HW = image_CHW.amax(dim=0)
    lacking = highest_HW - image_CHW
    most_HW = highest_HW / lacking.amax(dim=0).clamp(min=1e-6)  # the factor that makes the saturation 1
    return highest_HW - lacking * most_HW.clamp(max=factor)


def padded(image_CHW: Tensor, mask_HW: Tensor, size: tuple[int, int], mean: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Place the crop in the upper left of an image of `size`."""
    rows, columns = mask_HW.shape
    if (rows, columns) == size:
        return image_CHW, mask_HW
    colour = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
    whole_CHW = colour[:, None, None].expand(-1, *size).clone()
    whole_HW = torch.full(size, IGNORE, dtype=mask_HW.dtype)
    whole_CHW[:, :rows, :columns], whole_HW[:rows, :columns] = image_CHW, mask_HW
    return whole_CHW, whole_HW
