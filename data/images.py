"""One image: from a file's bytes to uint8 pixels, and from pixels to the crop a model sees.

Everything that can be wrong with a file ends as one exception, `BadImage`, with the reason in words. EXIF orientation
is ignored, as torchvision and MAE ignore it: pixels are taken as they lie in the file. Crops are cut and resized as
uint8 tensors, which is Pillow's antialiased bicubic to a level or so, several times faster, and works for any number of
channels; they become floats on the device (`data.loader.Batch.to`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from data.decode import can_be_cut, jpeg_part, jpeg_pixels

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .npy".split()
)
PICTURE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> the Pillow mode that has them
CROP_SHARE = 224 / 256  # of the short side, that evaluation shows
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of MAE's random crops, columns to rows
LOG_RATIOS = torch.tensor(ASPECT_RATIOS).log().tolist()
ATTEMPTS = 10  # at a crop that fits, as torchvision's; then the largest central one

Transform = Callable[[np.ndarray | Image.Image], Tensor]


class Pair(NamedTuple):
    """An image and the class of each of its pixels."""

    image_HWC: np.ndarray
    mask_HW: np.ndarray


PairTransform = Callable[[Pair], tuple[Tensor, Tensor]]


class BadImage(Exception):  # noqa: N818 - it says what the file is
    """A file that cannot be read as an image: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image (contents are only looked at when it is read)."""
    dot = name.rfind(".")
    return dot > 0 and not name.startswith(".") and name[dot:].lower() in SUFFIXES


def read_image(path: str, in_chans: int = 3, *, lazy: bool = False) -> np.ndarray:
    """Read the image file at `path` as uint8 `[H, W, in_chans]`; see `decode`. Raises `BadImage`."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error
    return decode(data, in_chans, path, lazy=lazy)


def decode(data: bytes, in_chans: int, name: str, *, lazy: bool = False) -> np.ndarray:
    """Decode the bytes of an image file.

    Args:
        lazy: Return a JPEG file of 3 channels as `Undecoded`, from which a crop can be cut.

    Returns:
        uint8 `[H, W, in_chans]`.

    Raises:
        BadImage: With `name` and the reason.
    """
    with blamed_on(name):
        if not data:
            raise ValueError("the file is empty")
        if lazy and in_chans == 3 and (header := can_be_cut(data)) is not None:
            return Undecoded(data, name, header.rows, header.columns)  # type: ignore[return-value]  # it stands for it
        if in_chans == 3 and (array_HWC := jpeg_pixels(data)) is not None:
            return array_HWC
        if data.startswith(b"\x93NUMPY"):
            return array_pixels(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
        with Image.open(io.BytesIO(data)) as picture:
            return picture_pixels(picture, in_chans)


class Undecoded:
    """A JPEG file that stands for its pixels until a crop is cut out of it, which alone is then decoded."""

    def __init__(self, data: bytes, name: str, rows: int, columns: int):
        self.data, self.name, self.shape, self.nbytes = data, name, (rows, columns, 3), len(data)

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Pixels from row and column to row and column; raises `BadImage`."""
        down, right = part
        found = jpeg_part(self.data, down.start, right.start, down.stop - down.start, right.stop - right.start)
        return decode(self.data, 3, self.name)[part] if found is None else found


@contextlib.contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into `BadImage(name, reason)`: on broken bytes a decoder may fail in any way."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise BadImage(name, "not an image of a known format") from error
    except Exception as error:
        raise BadImage(name, str(error) or type(error).__name__) from error


def picture_pixels(picture: Image.Image, in_chans: int) -> np.ndarray:
    """A Pillow image of any mode as uint8 `[H, W, in_chans]`, for 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Only the first frame of an animation is read. Without a fourth channel transparency is dropped, not blended, as
    Pillow's and torchvision's conversion to RGB does.
    """
    mode = PICTURE_MODES.get(in_chans)
    if mode is None:
        raise ValueError(f"a picture ({picture.mode}), where {in_chans} channels need .npy arrays [H, W, {in_chans}]")
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(to_uint8(np.asarray(picture)))
    elif picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns about each transparent palette
    elif picture.mode in ("CMYK", "YCbCr"):
        picture = picture.convert("RGB")  # Pillow knows no direct way to L or RGBA
    array_HWC = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return array_HWC.reshape(*array_HWC.shape[:2], in_chans)


def array_pixels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """A stored array `[H, W, in_chans]` (or `[H, W]` for one channel) as uint8."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[-1] != in_chans or 0 in array.shape:
        raise ValueError(f"an array of shape {list(array.shape)} where [H, W, {in_chans}] is needed")
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") not in (np.uint8, np.uint16, np.bool_):
        raise ValueError(f"an array of {array.dtype}; bool, uint8, uint16 or floats have a known white")
    return to_uint8(array)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale (never clip) pixel values to 0..255, rounding to nearest.

    bool: 255 is True. Wider integers: 16 bit, 65535 is white. Floats: white is 1, 255 or 65535, the first of these that
    the image does not exceed.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # also true of NaN
        raise ValueError(
            f"pixel values from {low} to {high}; a known scale is 0..65535, and for floats 0..1 and 0..255"
        )
    if values.dtype.kind != "f":
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    scale = 255.0 if high <= 1 else 1.0 if high <= 255 else 1 / 257
    return np.floor(values.astype(np.float64) * scale + 0.5).astype(np.uint8)


def pretrain_transform(input_size: int | tuple[int, int], min_scale: float = 0.2, hflip: float = 0.5) -> Transform:
    """MAE's augmentation: a random crop of `min_scale` to all of the image's area, resized to `input_size` (rows,
    columns), and mirrored with probability `hflip`. uint8 `[H, W, C]` in, uint8 `[C, rows, columns]` out."""
    return functools.partial(_random_crop, size=_rows_columns(input_size), min_scale=min_scale, hflip=hflip)


def eval_transform(input_size: int | tuple[int, int], crop_share: float = CROP_SHARE) -> Transform:
    """The middle of the image: resized so that `input_size` is `crop_share` of its short side, then cut.

    An image that already has the input's size is left as it is.
    """
    return functools.partial(_centre_crop, size=_rows_columns(input_size), crop_share=crop_share)


def classifier_crop_share(input_size: tuple[int, int]) -> float:
    """The `crop_share` with which classifiers are judged: as by MAE and timm, with no margin beyond 224 pixels."""
    return CROP_SHARE if max(input_size) <= 224 else 1.0


def _rows_columns(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _random_crop(image: np.ndarray | Image.Image, *, size: tuple[int, int], min_scale: float, hflip: float) -> Tensor:
    array_HWC = _array(image)
    height, width = array_HWC.shape[:2]
    top, left, rows, columns = random_box(height, width, min_scale)
    crop_CHW = _resize(_tensor(array_HWC[top : top + rows, left : left + columns]), size)
    return crop_CHW.flip(-1) if torch.rand(()) < hflip else crop_CHW


def random_box(height: int, width: int, min_scale: float) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) of a random crop: torchvision's, number by number, in a fifth of its time."""
    for _ in range(ATTEMPTS):
        area = height * width * torch.empty(()).uniform_(min_scale, 1.0).item()
        ratio = torch.empty(()).uniform_(*LOG_RATIOS).exp_().item()
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top = torch.randint(0, height - rows + 1, ()).item()
            return int(top), int(torch.randint(0, width - columns + 1, ()).item()), rows, columns
    low, high = ASPECT_RATIOS
    rows, columns = height, width
    if width < low * height:
        rows = round(width / low)
    elif width > high * height:
        columns = round(height * high)
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def _centre_crop(image: np.ndarray | Image.Image, *, size: tuple[int, int], crop_share: float) -> Tensor:
    image_CHW = _tensor(_array(image))
    rows, columns = image_CHW.shape[1:]
    if (rows, columns) == size:
        return image_CHW
    inner_rows, inner_columns = (int(side / crop_share) for side in size)
    if inner_rows * columns >= inner_columns * rows:  # the rows are what is short
        inner_columns = int(inner_rows * columns / rows)
    else:
        inner_rows = int(inner_columns * rows / columns)
    return pixels.center_crop(_resize(image_CHW, (inner_rows, inner_columns)), list(size))


def _array(image: np.ndarray | Image.Image) -> np.ndarray:
    """`[H, W, C]`, of a Pillow image too (1 or 4 channels where it has them, else 3)."""
    if isinstance(image, np.ndarray | Undecoded):
        return image  # crops are cut from both alike
    return picture_pixels(image, {"L": 1, "RGBA": 4}.get(image.mode, 3))


def _tensor(array_HWC: np.ndarray) -> Tensor:
    """`[C, H, W]`, channels last in memory without gaps; copied where it must be, since torch shares no read-only
    memory (and numpy copies a crop faster than torch)."""
    return torch.from_numpy(np.require(array_HWC, requirements=["C", "W"])).permute(2, 0, 1)


def shrink(array_HWC: np.ndarray, short_side: int) -> np.ndarray:
    """The image resized so that its shorter side has so many pixels."""
    size = [round(side * short_side / min(array_HWC.shape[:2])) for side in array_HWC.shape[:2]]
    return np.ascontiguousarray(_resize(_tensor(array_HWC), (size[0], size[1])).permute(1, 2, 0).numpy())


def _resize(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic, channels last. `F.interpolate` would lay the channels out one after the other, in twice the
    time; this is the operation that it calls."""
    if image_CHW.shape[1:] == size:
        return image_CHW
    resized_NCHW = image_CHW.new_empty(1, *size, len(image_CHW)).permute(0, 3, 1, 2)
    return torch.ops.aten._upsample_bicubic2d_aa.out(image_CHW[None], size, False, None, None, out=resized_NCHW)[0]
