"""Small data sets, decoded and kept in device memory, where crops, flips and mask noise are computed per batch.

As in `data.loader`, a sample is a function of (seed, epoch, index) only. The random numbers are counter-based: number k
of a sample is a hash of (seed, epoch, index, stream, k), so that a batch needs no generator and no loop over its
samples. Crops, flips and masks have the same distribution as in `data.loader`, but other random numbers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import ASPECT_RATIOS, ATTEMPTS, BadImage
from data.loader import (
    AUGMENTATION,
    NOISE,
    TRIES,
    Allocate,
    Batch,
    DrawNoise,
    NothingReadable,
    Source,
    empty,
    mix,
    noise_generator,
)

log = logging.getLogger(__name__)

MEMORY = Path("/proc/meminfo")
SHARE_OF_MEMORY = 0.5  # maximum share of free memory for images
LOOKED_AT = 64  # images from which the required memory is estimated
RESIZE_BYTES = 2**28  # bytes of float pixels that are resized at a time
CUBIC = -0.5  # Pillow's parameter of the bicubic kernel


class DeviceSamples:
    """Augmented images with mask noise by (epoch, index), as `data.loader.TrainSamples`, computed on the device.

    The noise is uniform with `noise_shape`, or drawn by `draw_noise` from a generator for each sample.
    `source` is read once, by `num_workers` threads; images of different sizes are padded to the largest size. An
    unreadable image is replaced by the next readable one and reported with the first batch. Raises ValueError if there
    is not enough memory.
    """

    def __init__(
        self,
        source: Source,
        *,
        input_size: tuple[int, int],
        min_scale: float,
        hflip: float,
        seed: int,
        noise_shape: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        num_workers: int = 0,
        draw_noise: DrawNoise | None = None,
    ):
        self.input_size, self.min_scale, self.hflip = input_size, min_scale, hflip
        self.seed, self.noise_shape, self.draw_noise = seed, noise_shape, draw_noise
        self.mean, self.std, self.device = tuple(mean), tuple(std), device
        self.images, self.sizes, shown, self._problems = _load(source, device, num_workers)
        self.labels = None if source.labels is None else torch.from_numpy(source.labels[shown]).to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]], allocate: Allocate = empty) -> Batch:
        """Make a batch; `allocate` is not used, because its tensors are made on the device."""
        epochs, index = np.array(keys, np.int64).T
        boxes, mirrored = self.boxes(epochs, index)
        on_device = _moved(index, self.device)
        noise = None
        if self.draw_noise is not None:  # sample by sample on the CPU, the same numbers as `TrainSamples` draws
            drawn = [self.draw_noise(noise_generator(self.seed, epoch, number)) for epoch, number in keys]
            noise = _moved(torch.stack(drawn), self.device)
        elif self.noise_shape is not None:
            states = _moved(compute_states(self.seed, epochs, index, NOISE).view(np.int64), self.device)
            noise = uniforms(states, int(np.prod(self.noise_shape))).view(-1, *self.noise_shape)
        problems, self._problems = self._problems, []
        return Batch(
            images=resized_crops(self.images, on_device, boxes, mirrored, self.input_size),
            labels=None if self.labels is None else self.labels[on_device],
            noise=noise,
            index=on_device,
            problems=problems,
            mean=self.mean,
            std=self.std,
        )

    def boxes(self, epochs: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the random crops (top, left, rows, columns) `[N, 4]` and whether each is flipped, `[N]`."""
        states = compute_states(self.seed, epochs, index, AUGMENTATION)
        drawn = uniforms(torch.from_numpy(states.view(np.int64)), 2 * ATTEMPTS + 3, torch.float64).numpy()
        return random_boxes(self.sizes[index], self.min_scale, drawn[:, :-1]), drawn[:, -1] < self.hflip


def _moved(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy to the device asynchronously."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ---- random numbers -------------------------------------------------------------------------------------------------


def compute_states(seed: int, epochs: np.ndarray, index: np.ndarray, stream: int) -> np.ndarray:
    """Return the initial random state of each sample in a stream, uint64 `[N]`."""
    epochs_seeds = {epoch: mix(seed, epoch, stream) for epoch in set(epochs.tolist())}
    state = np.array([epochs_seeds[epoch] for epoch in epochs.tolist()], np.uint64) ^ index.astype(np.uint64)
    return _scrambled(state + np.uint64(0x9E3779B97F4A7C15))


def _scrambled(state: np.ndarray) -> np.ndarray:
    """Apply the final steps of SplitMix64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def uniforms(states: Tensor, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uniform numbers in [0, 1) with 24 random bits, `[N, count]`: SplitMix64 from the int64 `states` `[N]`.

    They are computed with integers, so that they are the same on every device.
    """
    step = torch.arange(1, count + 1, device=states.device) * -7046029254386353131  # 0x9E3779B97F4A7C15, signed
    state = states[:, None] + step
    state = (state ^ _shifted(state, 30)) * -4658895280553007687
    state = (state ^ _shifted(state, 27)) * -7723592293110705685
    state = state ^ _shifted(state, 31)
    return _shifted(state, 40).to(dtype) * 2.0**-24


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Compute the logical right shift; torch's shift of signed integers is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


# ---- crops ----------------------------------------------------------------------------------------------------------


def random_boxes(sizes: np.ndarray, min_scale: float, drawn: np.ndarray) -> np.ndarray:
    """Return random crops (top, left, rows, columns), `[N, 4]`.

    The distribution is that of torchvision's RandomResizedCrop: a share of the area between `min_scale` and 1 and a
    log-uniform aspect ratio, drawn again until the crop fits, then a uniform position. If no crop fits after `ATTEMPTS`
    draws, the result is the largest central crop with an allowed aspect ratio.

    Args:
        sizes: Rows and columns of the images, `[N, 2]`.
        min_scale: Minimum share of the area.
        drawn: Uniform numbers in [0, 1), `[N, 2 ATTEMPTS + 2]`.
    """
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (min_scale + (1 - min_scale) * drawn[:, :ATTEMPTS])
    low, high = np.log(ASPECT_RATIOS)
    ratio = np.exp(low + (high - low) * drawn[:, ATTEMPTS : 2 * ATTEMPTS])
    columns, rows = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (columns > 0) & (columns <= width[:, None]) & (rows > 0) & (rows <= height[:, None])
    first = fits.argmax(axis=1)[:, None]
    rows, columns = (np.take_along_axis(side, first, 1)[:, 0].astype(np.int64) for side in (rows, columns))
    top = (drawn[:, -2] * (height - rows + 1)).astype(np.int64)
    left = (drawn[:, -1] * (width - columns + 1)).astype(np.int64)
    if not (some := fits.any(axis=1)).all():
        whole_rows = np.minimum(height, np.rint(width / ASPECT_RATIOS[0])).astype(np.int64)
        whole_columns = np.minimum(width, np.rint(height * ASPECT_RATIOS[1])).astype(np.int64)
        rows, columns = np.where(some, rows, whole_rows), np.where(some, columns, whole_columns)
        top = np.where(some, top, (height - rows) // 2)
        left = np.where(some, left, (width - columns) // 2)
    return np.stack([top, left, rows, columns], axis=1)


def resized_crops(
    images: Tensor, index: Tensor, boxes: np.ndarray, mirrored: np.ndarray, size: tuple[int, int]
) -> Tensor:
    """Crop, resize and flip images on the device; return uint8 `[N, C, *size]`.

    The interpolation is Pillow's antialiased bicubic: along rows, rounded to 0..255, then along columns. Each pass is
    one matrix product per image.

    Args:
        images: uint8 `[n, C, H, W]`, of which `index` selects N.
    """
    top, left, rows, columns = _moved(boxes.T.copy(), images.device)
    across = weights(left, columns, images.shape[3], size[1])
    across = torch.where(_moved(mirrored, images.device)[:, None, None], across.flip(1), across)
    down = weights(top, rows, images.shape[2], size[0])
    bytes_each = 4 * images.shape[1] * images.shape[2] * (images.shape[3] + size[1])
    parts = []
    for some in torch.arange(len(index), device=images.device).split(max(1, RESIZE_BYTES // bytes_each)):
        chosen = images[index[some]].float()
        chosen = _rounded(chosen @ across[some].transpose(1, 2)[:, None])
        parts.append(_rounded(down[some][:, None] @ chosen).to(torch.uint8))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.add_(0.5).floor_().clamp_(0, 255)


def weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Return the weights `[N, size, side]` that interpolate `length` pixels, the first at `start`, to `size` pixels."""
    scale = (length / size)[:, None, None]
    pixel = torch.arange(side, device=start.device) + 0.5
    center = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    distance = ((pixel - center) / scale.clamp(min=1)).abs()
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    inside = (pixel > start[:, None, None]) & (pixel < (start + length)[:, None, None])
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0)) * inside
    return weight / weight.sum(dim=-1, keepdim=True)


# ---- loading --------------------------------------------------------------------------------------------------------


def _load(
    source: Source, device: torch.device, num_workers: int
) -> tuple[Tensor, np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Load all images to the device.

    Returns the images uint8 `[n, C, H, W]`, their sizes `[n, 2]`, the index of the image at each position, and the
    unreadable images.
    """
    n = len(source)
    with ThreadPoolExecutor(max(1, num_workers)) as threads:
        few = list(threads.map(_reader(source), range(0, n, -(-n // LOOKED_AT))))
        _require_room([each for each in few if isinstance(each, np.ndarray)], n, device)
        log.info("data: reading %d images into the memory of %s", n, device)
        read = list(threads.map(_reader(source), range(n)))
    shown = np.arange(n)
    problems = [(each.path, each.reason) for each in read if isinstance(each, BadImage)]
    for place in [place for place in range(n) if isinstance(read[place], BadImage)]:
        following = (number % n for number in range(place, place + min(TRIES, n)))
        found = next((number for number in following if isinstance(read[number], np.ndarray)), None)
        if found is None:
            raise NothingReadable(f"{min(TRIES, n)} images in a row cannot be read, such as {': '.join(problems[0])}")
        shown[place] = found
    pictures = [each for each in read if isinstance(each, np.ndarray)]
    _require_room(pictures, n, device)
    sizes = np.array([read[number].shape[:2] for number in shown], np.int64)  # type: ignore[union-attr]
    rows, columns = sizes.max(axis=0)
    images = torch.zeros(n, pictures[0].shape[2], rows, columns, dtype=torch.uint8, device=device)
    for place, number in enumerate(shown):
        picture = torch.from_numpy(np.require(read[number], requirements=["C", "W"]))
        images[place, :, : picture.shape[0], : picture.shape[1]] = picture.permute(2, 0, 1)
    return images, sizes, shown, problems


def _reader(source: Source) -> Callable[[int], np.ndarray | BadImage]:
    def read(number: int) -> np.ndarray | BadImage:
        try:
            return source.read(number)
        except BadImage as error:
            return error

    return read


def _require_room(pictures: Sequence[np.ndarray], n: int, device: torch.device) -> None:
    if not pictures:
        return
    rows, columns = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    needed, available = n * rows * columns * pictures[0].shape[2], SHARE_OF_MEMORY * free_bytes(device)
    if needed > available:
        raise ValueError(
            f"data_on_device: {n} images, all padded to {rows} x {columns}, take {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB of {device} may be used for them. Pack them smaller first "
            "(tools.pack --size 256), or train from the disk"
        )


def free_bytes(device: torch.device) -> int:
    """Return the available memory of the device, or its total memory if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):  # free memory and file caches
        if found := re.search(r"^MemAvailable:\s*(\d+) kB", MEMORY.read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
