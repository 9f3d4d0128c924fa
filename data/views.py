"""Several augmented views of one image: random crops with colour jitter, grey, blur and solarisation.

The operations are torchvision's on uint8 `[C, H, W]`, except the Gaussian blur, which is separable here. All random
numbers are drawn from torch's default CPU generator, which the loader seeds for every sample.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from data.images import random_resized_crop
from options.crop import Crop

log = logging.getLogger(__name__)

SOLARIZE_FROM = 128  # values of at least this are inverted

MakeViews = Callable[[np.ndarray | Image.Image], list[Tensor]]
MakeView = Callable[[np.ndarray | Image.Image], Tensor]


def is_plain(crop: Crop) -> bool:
    """Return whether a crop is only resized (bicubic) and flipped, as in masked image modelling."""
    altered = (crop.jitter_prob and any(crop.jitter)) or crop.grayscale or crop.blur or crop.solarize
    return not altered and crop.interpolation == "bicubic" and crop.count == 1


def make_views(crops: Sequence[Crop], in_chans: int) -> MakeViews:
    """Create the transform from an image uint8 `[H, W, C]` to the views that `crops` describe.

    Each view is uint8 `[C, rows, columns]`. Colour jitter and conversion to grey require 3 channels. For other numbers
    of channels they are left out, which is logged; for one channel, brightness and contrast are still jittered.
    """
    _warn_of_missing_colours(crops, in_chans)
    return functools.partial(_views, crops=tuple(crops), in_chans=in_chans)


def make_view(crop: Crop, in_chans: int) -> MakeView:
    """Create the transform from an image uint8 `[H, W, C]` to one view uint8 `[C, rows, columns]`; see `make_views`."""
    _warn_of_missing_colours((crop,), in_chans)
    return functools.partial(augmented_crop, crop=crop, in_chans=in_chans)


def _warn_of_missing_colours(crops: Sequence[Crop], in_chans: int) -> None:
    coloured = any((crop.jitter_prob and any(crop.jitter)) or crop.grayscale for crop in crops)
    if coloured and in_chans != 3:
        kept = "; brightness and contrast are jittered" if in_chans == 1 else ""
        log.warning("views: colour jitter and conversion to grey need 3 channels, found %d: left out%s", in_chans, kept)


def _views(image: np.ndarray | Image.Image, *, crops: Sequence[Crop], in_chans: int) -> list[Tensor]:
    return [augmented_crop(image, crop, in_chans) for crop in crops for _ in range(crop.count)]


def augmented_crop(image: np.ndarray | Image.Image, crop: Crop, in_chans: int) -> Tensor:
    """Take one random crop and apply jitter, grey, blur, solarize and flip, in this order."""
    view = random_resized_crop(image, crop.size, crop.scale, crop.interpolation)
    if in_chans in (1, 3) and _happens(crop.jitter_prob):
        brightness, contrast, saturation, hue = crop.jitter
        colour = (saturation, hue) if in_chans == 3 else (0.0, 0.0)
        view = jitter_colours(view, brightness, contrast, *colour)
    if in_chans == 3 and _happens(crop.grayscale):
        view = pixels.rgb_to_grayscale(view, num_output_channels=3)
    if _happens(crop.blur):
        view = gaussian_blur(view, _uniform(*crop.blur_sigma))
    if _happens(crop.solarize):
        view = pixels.solarize(view, SOLARIZE_FROM)
    return view.flip(-1) if _happens(crop.hflip) else view


def _happens(probability: float) -> bool:
    """Return True with the given probability. No random number is drawn if it is 0."""
    return probability > 0 and torch.rand(()).item() < probability


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


def jitter_colours(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Change brightness, contrast and saturation by factors within 1 ± strength, and shift the hue, in random order."""
    changes: list[tuple[Callable[[Tensor, float], Tensor], float]] = []
    for strength, adjust in (
        (brightness, pixels.adjust_brightness),
        (contrast, pixels.adjust_contrast),
        (saturation, pixels.adjust_saturation),
    ):
        if strength:
            changes.append((adjust, _uniform(max(0.0, 1 - strength), 1 + strength)))
    if hue:
        changes.append((pixels.adjust_hue, _uniform(-hue, hue)))
    for number in torch.randperm(len(changes)).tolist():
        adjust, amount = changes[number]
        image = adjust(image, amount)
    return image


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur uint8 `[C, H, W]` by a Gaussian of `sigma` pixels, truncated at 3 sigma, with replicate padding."""
    radius = max(1, math.ceil(3 * sigma))
    densities = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma).square())
    weights = (densities / densities.sum()).tolist()
    blurred = F.pad(image[None].float().contiguous(), [radius] * 4, mode="replicate")[0]
    for axis, size in ((1, image.shape[1]), (2, image.shape[2])):
        # A sum of shifted images is several times faster than a convolution for a few channels.
        total = blurred.narrow(axis, 0, size) * weights[0]
        for place, weight in enumerate(weights[1:], start=1):
            total.add_(blurred.narrow(axis, place, size), alpha=weight)
        blurred = total
    return blurred.round_().to(torch.uint8)
