"""Decode JPEG files with torchcodec: the same pixels as Pillow, faster, and without holding the GIL.

Both packages use libjpeg-turbo, so their RGB pixels are identical. This is verified: at the first use a small image is
decoded by both, and torchcodec is used only if they agree. No result depends on whether it is installed. Files that
the two decode differently (CMYK, truncated files, PNG files named .jpg) are decoded by Pillow. EXIF segments are
removed before decoding, and the EXIF orientation is applied here, so that it is the same with each decoder.

nvimgcodec, an optional package, decodes only the cropped part of a file, with the same pixels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

log = logging.getLogger(__name__)

Decode = Callable[..., Any]  # a file's tensor to uint8 [C, H, W]; torchcodec's own type also covers batches
DecodePart = Callable[[bytes, int, int, int, int], np.ndarray | None]  # bytes, top, left, rows, columns to [H, W, 3]

PNG = b"\x89PNG\r\n\x1a\n"
START, END, START_OF_SCAN, APP1 = b"\xff\xd8\xff", b"\xff\xd9", 0xDA, 0xE1
FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # start of frame: baseline, extended, progressive
EXIF = b"Exif\0\0"
ORIENTATION, LONG = 0x0112, 4  # the EXIF tag, and the type of a 32-bit value


def jpeg_pixels(data: bytes) -> np.ndarray | None:
    """Decode a JPEG file to uint8 `[H, W, 3]`, upright; return None if Pillow must decode it."""
    decode = torchcodec_jpeg()
    if decode is None or (header := read_header(data)) is None:
        return None
    found = _pixels(data, decode, header)
    return None if found is None else upright(found, header.orientation)


@functools.cache
def torchcodec_jpeg() -> Decode | None:
    """Return torchcodec's decoder; None, with a log line, if it cannot replace Pillow."""
    try:
        import torchcodec
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:  # missing, or incompatible with this version of torch
        reason = first_line(error)
        log.warning("data: JPEG files are decoded by Pillow (slower, same pixels): torchcodec fails (%s)", reason)
        return None
    if not all(_agree(decode_jpeg, subsampling) for subsampling in ("4:4:4", "4:2:0")):
        log.warning(
            "data: JPEG files are decoded by Pillow: torchcodec %s gives other pixels than this Pillow",
            torchcodec.__version__,
        )
        return None
    log.info("data: JPEG files are decoded by torchcodec %s", torchcodec.__version__)
    return decode_jpeg


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _agree(decode: Decode, subsampling: str) -> bool:
    """Return whether `decode` gives the same pixels as Pillow for a test image."""
    data, expected = _trial(subsampling)
    header = read_header(data)
    found = _pixels(data, decode, header) if header else None
    return found is not None and np.array_equal(found, expected)


def _trial(subsampling: str) -> tuple[bytes, np.ndarray]:
    """Return a JPEG file with edges, gradients and an odd size, and its pixels as decoded by Pillow."""
    rows, columns = np.mgrid[:37, :53]
    picture = np.stack([rows * 6, columns * 4, (rows * columns) % 256], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90, subsampling=subsampling)
    with Image.open(file) as by_pillow:
        return file.getvalue(), np.asarray(by_pillow)


def _pixels(data: bytes, decode: Decode, header: Header) -> np.ndarray | None:
    try:
        # torchcodec would convert bytes to a tensor itself, but changes the warning filters each time
        file = torch.frombuffer(bytearray(header.without_exif(data)), dtype=torch.uint8)
        return decode(file).permute(1, 2, 0).numpy()
    except (RuntimeError, ValueError):  # damaged: Pillow decodes it or reports the reason
        return None


def png_values(data: bytes) -> np.ndarray:
    """Decode a 16-bit PNG file to uint16 `[H, W, bands]`, upright. Pillow cannot do this for several bands.

    Raises:
        ValueError: If torchcodec cannot be used.
    """
    try:
        from torchcodec.decoders import decode_png
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"a PNG file of 16 bits in colour, which needs torchcodec, and that fails ({first_line(error)}): "
            "store it with 8 bits, as a TIFF file or as a .npy array"
        ) from error
    data, orientation = split_png_exif(data)  # torchcodec ignores EXIF data after the pixels
    file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    values_HWC = decode_png(file, mode="UNCHANGED", output_dtype=torch.uint16).permute(1, 2, 0).numpy()
    return upright(values_HWC, orientation)


# ---- parts ----------------------------------------------------------------------------------------------------------


def lacks_parts() -> str:
    """Return why parts of JPEG files cannot be decoded, or an empty string."""
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ImportError:
        found = None
    return "" if found else "the package nvidia-nvimgcodec-cu13 is not installed (requirements/region.txt)"


def can_be_cut(data: bytes) -> Header | None:
    """Return the header of a JPEG file of which a part can be decoded alone; None for other files.

    The file must seem complete, and its EXIF orientation must be 1.
    """
    header = read_header(data) if data.endswith(END) else None
    return header if header is not None and header.rows and header.orientation == 1 else None


def jpeg_part(data: bytes, top: int, left: int, rows: int, columns: int) -> np.ndarray | None:
    """Decode a part of a file to uint8 `[rows, columns, 3]`; None if the complete file must be decoded."""
    decode = part_decoder(os.getpid())
    if decode is None or columns == 1:  # nvimgcodec swaps the colours of a single column
        return None
    return decode(data, top, left, rows, columns)


@functools.cache
def part_decoder(process: int) -> DecodePart | None:
    """Return nvimgcodec's decoder for this process; None, with a log line, if unusable.

    `process` is the process id, because the decoder cannot be used after a fork.
    """
    try:
        with _silence():
            from nvidia import nvimgcodec

            decoder = nvimgcodec.Decoder(
                device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            )
            how = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        log.warning("data: JPEG files are decoded completely (slower): nvimgcodec fails (%s)", error)
        return None

    def decode(data: bytes, top: int, left: int, rows: int, columns: int) -> np.ndarray | None:
        region = nvimgcodec.Region(top, left, top + rows, left + columns)
        try:
            found = decoder.decode(nvimgcodec.CodeStream(data).get_sub_code_stream(region=region), params=how)
        except RuntimeError:  # damaged
            return None
        return None if found is None else np.asarray(found)

    for subsampling in ("4:4:4", "4:2:0"):
        data, expected = _trial(subsampling)
        found = decode(data, 5, 9, 21, 30)
        if found is None or not np.array_equal(found, expected[5:26, 9:39]):
            log.warning(
                "data: JPEG files are decoded completely: nvimgcodec %s gives other pixels", nvimgcodec.__version__
            )
            return None
    return decode


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the messages about missing GPU libraries that nvimgcodec writes at its start."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ---- headers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a JPEG file.

    rows, columns  as stored; 0 if missing
    exif           start and end of the EXIF segments
    orientation    of EXIF, 1 to 8; 1 if missing
    """

    rows: int
    columns: int
    exif: tuple[tuple[int, int], ...]
    orientation: int = 1

    def without_exif(self, data: bytes) -> bytes:
        start, kept = 0, []
        for begin, end in self.exif:
            kept.append(data[start:begin])
            start = end
        return b"".join([*kept, data[start:]]) if kept else data


def read_header(data: bytes) -> Header | None:
    """Read the header of a JPEG file.

    Returns None if it is not a JPEG file, its colours are not grey, RGB or YCbCr, Pillow would warn about its size, or
    the header is incomplete.
    """
    if not data.startswith(START):
        return None
    try:
        return _read_header(data)
    except IndexError:
        return None


def _read_header(data: bytes) -> Header | None:
    position, rows, columns, orientation = 2, 0, 0, 1
    exif: list[tuple[int, int]] = []
    while (marker := data[position + 1]) != START_OF_SCAN:
        if data[position] != 0xFF or marker == 0xFF:
            return None  # fill bytes, or not a marker
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in FRAMES:
            rows = int.from_bytes(data[position + 5 : position + 7], "big")
            columns = int.from_bytes(data[position + 7 : position + 9], "big")
            if data[position + 9] not in (1, 3) or rows * columns > (Image.MAX_IMAGE_PIXELS or rows * columns):
                return None
        elif marker == APP1 and data.startswith(EXIF, position + 4):
            orientation = orientation_in(data[position + 4 + len(EXIF) : end]) if not exif else orientation
            exif.append((position, end))
        position = end
    return Header(rows, columns, tuple(exif), orientation)


# ---- EXIF orientation ------------------------------------------------------------------------------------------------


def orientation_in(exif: bytes) -> int:
    """Return the orientation, 1 to 8, in EXIF data (a TIFF header with its first directory); 1 if it has none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == ORIENTATION:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == LONG else 'H'}", exif, place + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # truncated
        pass
    return 1


def split_png_exif(data: bytes) -> tuple[bytes, int]:
    """Return a PNG file without its EXIF chunks, which may be before or after the pixels, and their orientation."""
    kept, orientation, position = [data[: len(PNG)]], 1, len(PNG)
    while position < len(data):
        content = position + 8  # after the length and the name
        end = content + int.from_bytes(data[position : position + 4], "big") + 4  # with the checksum
        if data[position + 4 : content] == b"eXIf":
            orientation = orientation_in(data[content : end - 4])
        else:
            kept.append(data[position:end])
        position = end
    return b"".join(kept), orientation


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip an array `[H, W, ...]` according to its EXIF orientation, as image viewers do."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)  # 5
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array
