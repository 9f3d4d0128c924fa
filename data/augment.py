"""Augmentation for classifiers: random crops, timm's automatic augmentation, colour jitter and random erasing.

Random erasing fills rectangles with noise that uint8 cannot represent. With erasing, the results are therefore
normalised floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose

from data.images import Transform, pretrain_transform


def posterize(image: Image.Image, bits_to_keep: int, **unused: object) -> Image.Image:
    """Keep the highest `bits_to_keep` bits of each value: timm's operation, extended to 0 bits (a black image).

    timm requests 0 bits at the strongest level (`rand-m9-mstd0.5-inc1`: about one image in a thousand), for which
    Pillow raises an error.
    """
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def operations(pipeline: Compose) -> Iterator[AugmentOp]:
    """Yield the operations that timm's automatic augmentations in `pipeline` choose from."""
    for step in pipeline.transforms:
        yield from getattr(step, "ops", ())  # RandAugment, AugMixAugment
        for policy in getattr(step, "policy", ()):  # AutoAugment
            yield from policy


def finetune_transform(
    input_size: tuple[int, int],
    *,
    min_scale: float,
    hflip: float,
    aa: str,
    color_jitter: float,
    reprob: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """Create the augmentation of fine-tuning: random crop, flip, automatic augmentation or colour jitter, erasing.

    The result maps uint8 `[H, W, C]` to `[C, rows, columns]`, uint8 or normalised floats. `aa` is a policy in timm's
    notation, such as `rand-m9-mstd0.5-inc1`; it and `color_jitter` need 3 channels.

    Raises:
        ValueError: timm does not know the policy.
    """
    if not (aa or color_jitter):
        crop = pretrain_transform(input_size, min_scale, hflip)
        if not reprob:
            return crop
        erase = RandomErasing(reprob, mode="pixel", device="cpu")
        return functools.partial(_crop_and_erase, crop=crop, erase=erase, mean=tuple(mean), std=tuple(std))
    try:
        pipeline = create_transform(
            input_size=input_size,
            is_training=True,
            scale=(min_scale, 1.0),
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=aa or None,
            interpolation="bicubic",
            re_prob=reprob,
            re_mode="pixel",
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"aa: timm knows no augmentation {aa!r}; e.g. rand-m9-mstd0.5-inc1 or augmix-m3-w3") from error
    for operation in operations(pipeline):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return functools.partial(_through_pillow, pipeline=pipeline)


def _through_pillow(image: np.ndarray | Image.Image, *, pipeline: Callable[[Image.Image], Tensor]) -> Tensor:
    return pipeline(Image.fromarray(image) if isinstance(image, np.ndarray) else image)


def _crop_and_erase(
    image: np.ndarray | Image.Image,
    *,
    crop: Transform,
    erase: Callable[[Tensor], Tensor],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    pixels_CHW = crop(image).float().div_(255)
    return erase((pixels_CHW - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))
