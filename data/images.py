"""Read one image: from the bytes of a file to uint8 pixels, and to the crop for the model.

Every problem with a file is raised as `BadImage`, with the reason. The EXIF orientation is applied wherever an image
or a mask is read, as image viewers do; files without this tag are not affected. Files of more than 8 bits are read as
stored and scaled by the data set's `value_range` (`data.depth`). Crops are resized as uint8 tensors: the result equals
Pillow's antialiased bicubic to about one grey level, is several times faster, and works for any number of channels.
They are converted to floats on the device (`data.loader.Batch.to`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from data.decode import EXIF, PNG, START, can_be_cut, jpeg_part, jpeg_pixels, orientation_in, png_values, upright
from data.tiff import is_tiff, pillow_reads, tiff_values

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .npy".split()
)
NUMPY = b"\x93NUMPY"
HEIF = (".heic", ".heif", ".hif")
HEIF_EXTRA = "HEIF photographs (.heic) can be read with an optional package: pip install -r requirements/heif.txt"
if importlib.util.find_spec("pillow_heif") is not None:
    SUFFIXES |= frozenset(HEIF)
PICTURE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow mode by number of channels
CROP_SHARE = 224 / 256  # size of the central crop in evaluation, as a share of the short side
EVAL_CROPS = ("keep_size", "mae")  # see `eval_transform`
ASPECT_RATIOS = (3 / 4, 4 / 3)  # of MAE's random crops, columns to rows
LOG_RATIOS = torch.tensor(ASPECT_RATIOS).log().tolist()
ATTEMPTS = 10  # draws of a crop that fits, as in torchvision; then the largest central crop is used

Interpolation = Literal["bicubic", "bilinear"]
Transform = Callable[[np.ndarray | Image.Image], Tensor]


class Pair(NamedTuple):
    """An image and the class of each of its pixels."""

    image_HWC: np.ndarray
    mask_HW: np.ndarray


PairTransform = Callable[[Pair], tuple[Tensor, Tensor]]


class BadImage(Exception):  # noqa: N818 - the name describes the error
    """A file that cannot be read as an image: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def is_image_name(name: str) -> bool:
    """Return whether a file has the name of an image; its content is checked when it is read."""
    dot = name.rfind(".")
    return dot > 0 and not name.startswith(".") and name[dot:].lower() in SUFFIXES


def read_image(path: str, in_chans: int = 3, value_range: Sequence[float] = ()) -> np.ndarray:
    """Read the image file at `path` as uint8 `[H, W, in_chans]`. Raises `BadImage`.

    Values of more than 8 bits are scaled, see `to_uint8`.
    """
    stored = read_stored(path, in_chans)
    with blamed_on(path):
        return to_uint8(stored, in_chans, value_range)


def read_stored(path: str, in_chans: int = 3, *, lazy: bool = False) -> np.ndarray:
    """Read the image file at `path` as stored; see `decode`. Raises `BadImage`."""
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
        uint8 `[H, W, in_chans]`; of a file of more than 8 bits the stored values, `[H, W, bands]`, for `to_uint8`.

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
        if data.startswith(NUMPY):
            return array_pixels(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
        if is_tiff(data) and (in_chans not in PICTURE_MODES or not pillow_reads_tiff(data)):
            return array_pixels(tiff_values(data, in_chans), in_chans)
        if data.startswith(PNG) and data[24:25] == b"\x10" and data[25:26] != b"\0" and in_chans in PICTURE_MODES:
            return _read_png16_colours(data, in_chans)  # Pillow would drop the lower eight bits
        if data[4:8] == b"ftyp":
            register_heif()
        with Image.open(io.BytesIO(data)) as picture:
            refuse_misread_bmp(picture, data)
            return picture_pixels(picture, in_chans)


def refuse_misread_bmp(picture: Image.Image, data: bytes) -> None:
    """Raise ValueError for a BMP file of 8 bits with a palette of black and white: Pillow reads 1 bit per pixel."""
    if picture.format == "BMP" and picture.mode == "1":
        bits = data[24] if data[14] == 12 else data[28]  # a header of 12 bytes is that of OS/2
        if bits != 1:
            raise ValueError(f"a BMP file of {bits} bits and two colours, which Pillow reads wrongly: store it as PNG")


def pillow_reads_tiff(data: bytes) -> bool:
    """Return whether Pillow reads a TIFF file with all its bands and bits."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return pillow_reads(picture)
    except Image.UnidentifiedImageError:
        return False


def _read_png16_colours(data: bytes, in_chans: int) -> np.ndarray:
    """Return uint16 `[H, W, bands]`, upright, of a PNG file of 16 bits in colour, or grey with transparency.

    Transparency is dropped unless there are 4 channels.
    """
    values = png_values(data)
    if values.shape[2] in (2, 4) and in_chans != 4:
        return values[..., :-1]
    return values if values.shape[2] != 2 else values[..., [0, 0, 0, 1]]


def is_uint8_file(path: str) -> bool:
    """Return whether the first bytes of a file show that its pixels have at most 8 bits."""
    try:
        with open(path, "rb") as file:
            start = file.read(26)
    except OSError:
        return True  # reported when it is read
    if start.startswith(PNG):
        return len(start) == 26 and start[24] <= 8
    return start.startswith((START, b"GIF8", b"BM", b"RIFF"))


def read_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation of a Pillow image, 1 to 8; 1 where it has none, or Pillow has applied it (TIFF)."""
    exif = picture.info.get("exif")
    return 1 if not isinstance(exif, bytes) else orientation_in(exif.removeprefix(EXIF))


@functools.cache
def register_heif() -> None:
    """Let Pillow read HEIF files, where the optional package is installed."""
    with contextlib.suppress(ImportError):
        pillow_heif = importlib.import_module("pillow_heif")
        pillow_heif.register_heif_opener()


class Undecoded:
    """The bytes of a JPEG file that is decoded when it is sliced, and only the requested part."""

    def __init__(self, data: bytes, name: str, rows: int, columns: int):
        self.data, self.name, self.shape, self.nbytes = data, name, (rows, columns, 3), len(data)

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """Decode a part of the image; raise `BadImage` if it is damaged."""
        down, right = part
        found = jpeg_part(self.data, down.start, right.start, down.stop - down.start, right.stop - right.start)
        return decode(self.data, 3, self.name)[part] if found is None else found


@contextlib.contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Convert every exception to `BadImage(name, reason)`: decoders raise many types of errors for broken files."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        raise BadImage(name, "not an image of a known format") from error
    except Exception as error:
        raise BadImage(name, str(error) or type(error).__name__) from error


def picture_pixels(picture: Image.Image, in_chans: int) -> np.ndarray:
    """Convert a Pillow image of any mode to uint8 `[H, W, in_chans]`, for 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    An image of more than 8 bits is returned as stored, `[H, W, 1]`. Only the first frame of an animation is read.
    Without a fourth channel, transparency is dropped, not blended, as in Pillow's and torchvision's conversion to RGB.
    EXIF orientation is applied.
    """
    picture.load()  # only now Pillow applies the orientation of a TIFF file, which may change its size
    mode = PICTURE_MODES.get(in_chans)
    if mode is None:
        raise ValueError(
            f"a picture ({picture.mode}), where {in_chans} channels need .npy arrays [H, W, {in_chans}] or TIFF files "
            "of as many bands"
        )
    if picture.mode == "F" or picture.mode.startswith("I"):
        return upright(np.asarray(picture)[:, :, None], read_orientation(picture))
    original = picture
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # Pillow warns about transparent palettes that are converted to RGB
    elif picture.mode in ("CMYK", "YCbCr", "LAB"):
        picture = picture.convert("RGB")  # Pillow has no direct conversion of all of them to L and RGBA
    array_HWC = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return upright(array_HWC.reshape(*array_HWC.shape[:2], in_chans), read_orientation(original))


def array_pixels(array: np.ndarray, in_chans: int) -> np.ndarray:
    """Check a stored array `[H, W, in_chans]` (or `[H, W]` for one channel), and return it with three axes.

    Arrays with 1 or 3 bands are also accepted for 1, 3 and 4 channels if `to_uint8` can convert them.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    convertible = in_chans in PICTURE_MODES and array.ndim == 3 and array.shape[-1] in (1, 3)
    if array.ndim != 3 or 0 in array.shape or (array.shape[-1] != in_chans and not convertible):
        advice = ""
        if array.ndim == 3 and array.shape[0] == in_chans:
            advice = ": channels come last, np.moveaxis(array, 0, -1) puts them there"
        elif array.ndim == 3:
            advice = f" (--in_chans {array.shape[-1]}?)"
        raise ValueError(f"an array of shape {list(array.shape)} where [H, W, {in_chans}] is needed{advice}")
    if array.dtype.kind not in "buif":
        raise ValueError(f"an array of {array.dtype}; pixels are integers, floats or bool")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8 and array.shape[-1] != in_chans:
        return to_uint8(array, in_chans)
    return array


def to_uint8(values: np.ndarray, in_chans: int, value_range: Sequence[float] = ()) -> np.ndarray:
    """Convert pixels as stored `[H, W, bands]` to uint8 `[H, W, in_chans]`.

    uint8 values are not changed. For other types, `value_range` is mapped to 0..255, values outside are clipped, and
    the result is rounded to nearest. Without a range, the maximum of integers is 65535, and that of floats the first
    of 1, 255 and 65535 that the image does not exceed.

    Raises:
        ValueError: If values are not finite, or, without a range, not in 0..65535.
    """
    if values.dtype != np.uint8:
        low, high = values.min(), values.max()
        if not (np.isfinite(low) and np.isfinite(high)) or (not value_range and (low < 0 or high > 65535)):
            raise ValueError(
                f"pixel values from {low} to {high}: give --value_range LOW HIGH"
                if np.isfinite(low) and np.isfinite(high)
                else f"pixel values from {low} to {high}, which are not finite"
            )
        if not value_range:
            whites = (1, 255, 65535) if values.dtype.kind == "f" else (65535,)
            value_range = 0, next(white for white in whites if high <= white)
        black, white = value_range
        scaled = (values.astype(np.float64) - black) * 255 / (white - black) + 0.5
        values = np.floor(scaled.clip(0, 255)).astype(np.uint8)
    if values.shape[2] == in_chans:
        return values
    picture = Image.fromarray(values.squeeze(-1) if values.shape[2] == 1 else values)
    mode = PICTURE_MODES[in_chans]
    return np.asarray(picture if picture.mode == mode else picture.convert(mode)).reshape(*values.shape[:2], in_chans)


def pretrain_transform(input_size: int | tuple[int, int], min_scale: float = 0.2, hflip: float = 0.5) -> Transform:
    """Create MAE's augmentation: a random resized crop and a horizontal flip.

    The result maps uint8 `[H, W, C]` to uint8 `[C, rows, columns]`.

    Args:
        input_size: Rows and columns of the result.
        min_scale: Minimum share of the image's area.
        hflip: Probability of a flip.
    """
    return functools.partial(_random_crop, size=_rows_columns(input_size), min_scale=min_scale, hflip=hflip)


def eval_transform(
    input_size: int | tuple[int, int], crop_share: float = CROP_SHARE, eval_crop: str = "keep_size"
) -> Transform:
    """Create the evaluation transform: resize so that `input_size` is `crop_share` of the short side, crop the centre.

    Args:
        input_size: Pixels of the result, one side or (rows, columns).
        crop_share: Size of the crop as a share of the resized image's short side.
        eval_crop: `keep_size` leaves an image that already has the input size unchanged; `mae` resizes and crops it
            like any other, as the evaluation of MAE and timm does.
    """
    if eval_crop not in EVAL_CROPS:
        raise ValueError(f"eval_crop is {eval_crop!r}; it can be {', '.join(EVAL_CROPS)}")
    keep = eval_crop == "keep_size"
    return functools.partial(_centre_crop, size=_rows_columns(input_size), crop_share=crop_share, keep=keep)


def describe_eval_crop(input_size: tuple[int, int], crop_share: float, eval_crop: str) -> str:
    """Describe in one line how images are prepared for evaluation, for the log and results."""
    rows, columns = (int(side / crop_share) for side in input_size)
    how = f"eval_crop {eval_crop}: resized to cover {rows} x {columns}, centre crop {input_size[0]} x {input_size[1]}"
    return how if eval_crop == "mae" else f"{how}; images of the input size are not resized or cropped"


def classifier_crop_share(input_size: tuple[int, int]) -> float:
    """Return the `crop_share` for evaluating classifiers: as in MAE and timm, without a margin above 224 pixels."""
    return CROP_SHARE if max(input_size) <= 224 else 1.0


def _rows_columns(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _random_crop(image: np.ndarray | Image.Image, *, size: tuple[int, int], min_scale: float, hflip: float) -> Tensor:
    crop_CHW = random_resized_crop(image, size, (min_scale, 1.0))
    return crop_CHW.flip(-1) if torch.rand(()) < hflip else crop_CHW


def random_resized_crop(
    image: np.ndarray | Image.Image,
    size: tuple[int, int],
    scale: tuple[float, float],
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Crop a random part whose share of the area is within `scale`, and resize it: uint8 `[C, rows, columns]`."""
    array_HWC = _array(image)
    height, width = array_HWC.shape[:2]
    top, left, rows, columns = random_box(height, width, *scale)
    return _resize(_tensor(array_HWC[top : top + rows, left : left + columns]), size, interpolation)


def random_box(height: int, width: int, min_scale: float, max_scale: float = 1.0) -> tuple[int, int, int, int]:
    """Draw a random crop (top, left, rows, columns): the same random numbers as torchvision, five times as fast."""
    for _ in range(ATTEMPTS):
        area = height * width * torch.empty(()).uniform_(min_scale, max_scale).item()
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


def _centre_crop(image: np.ndarray | Image.Image, *, size: tuple[int, int], crop_share: float, keep: bool) -> Tensor:
    image_CHW = _tensor(_array(image))
    rows, columns = image_CHW.shape[1:]
    if keep and (rows, columns) == size:
        return image_CHW
    inner_rows, inner_columns = (int(side / crop_share) for side in size)
    if inner_rows * columns >= inner_columns * rows:  # the rows are the limit
        inner_columns = int(inner_rows * columns / rows)
    else:
        inner_rows = int(inner_columns * rows / columns)
    return pixels.center_crop(_resize(image_CHW, (inner_rows, inner_columns)), list(size))


def _array(image: np.ndarray | Image.Image) -> np.ndarray:
    """Convert an image to an array `[H, W, C]`; a Pillow image keeps 1 or 4 channels and otherwise has 3."""
    if isinstance(image, np.ndarray | Undecoded):
        return image  # both can be cropped
    channels = {"L": 1, "RGBA": 4}.get(image.mode, 3)
    return to_uint8(picture_pixels(image, channels), channels)


def _tensor(array_HWC: np.ndarray) -> Tensor:
    """Convert an array to a tensor `[C, H, W]`, contiguous with channels last in memory.

    It is copied if necessary: torch does not share read-only memory, and numpy copies a crop faster than torch.
    """
    return torch.from_numpy(np.require(array_HWC, requirements=["C", "W"])).permute(2, 0, 1)


def shrink(array_HWC: np.ndarray, short_side: int) -> np.ndarray:
    """Resize an image so that its shorter side has the given number of pixels."""
    size = [round(side * short_side / min(array_HWC.shape[:2])) for side in array_HWC.shape[:2]]
    return np.ascontiguousarray(_resize(_tensor(array_HWC), (size[0], size[1])).permute(1, 2, 0).numpy())


def _resize(image_CHW: Tensor, size: tuple[int, int], interpolation: Interpolation = "bicubic") -> Tensor:
    """Resize with antialiasing, channels last.

    This calls the operation below `F.interpolate`, which would convert the tensor to channels first and take twice as
    long.
    """
    if image_CHW.shape[1:] == size:
        return image_CHW
    resized_NCHW = image_CHW.new_empty(1, *size, len(image_CHW)).permute(0, 3, 1, 2)
    operation = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    return operation.out(image_CHW[None], size, False, None, None, out=resized_NCHW)[0]
