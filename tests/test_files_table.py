"""Every row of the table of image and mask files in docs/data.md, with tiny files."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import BadImage, read_image, read_stored
from data.masks import read_mask
from data.sources import open_source
from tests.test_depth import folder, ramp
from tests.test_images import smooth, tagged, write_png16
from tests.test_masks import NAMES, binary, opened, paint, save, tag

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
ROWS = {}


def row(start):
    """Register a function of `tmp_path` as the test of the first row whose first cell starts so."""

    def register(check):
        ROWS[start] = check
        return check

    return register


def cells():
    table = PAGE.read_text(encoding="utf-8").split("## Image and mask files")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines]


def test_every_row_has_a_test_and_every_test_a_row():
    assert len(cells()) == len(ROWS)
    assert all(cell.startswith(start) for cell, start in zip(cells(), ROWS, strict=True)), "in the order of the page"


@pytest.mark.parametrize("number", range(len(cells())), ids=[cell[:30] for cell in cells()])
def test_row(number, tmp_path):
    list(ROWS.values())[number](tmp_path)


@row("8 bits per channel")
def _(path):
    picture = Image.fromarray(smooth(16, 24))
    for suffix in ("jpg", "png", "bmp", "webp", "avif", "tif", "jp2", "ppm"):
        picture.save(path / f"a.{suffix}")
        with Image.open(path / f"a.{suffix}") as expected:
            assert np.array_equal(read_image(str(path / f"a.{suffix}")), np.asarray(expected.convert("RGB"))), suffix


@row("16 bits, 32-bit")
def _(path):
    for number, (array, expected) in enumerate(
        [(ramp(0, 3900, np.uint16), (0, 4095)), (ramp(0, 70000, np.int32), (0, 70000)),
         (ramp(0, 1.003, np.float32), (0, 1)), (ramp(-1024, 3071, np.int16), (-1024, 3071))]
    ):  # fmt: skip
        assert open_source("auto", folder(path / str(number), [array]), in_chans=1).value_range == expected


@row("16 bits in colour")
def _(path):
    values = np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 50
    write_png16(path / "a.png", values, 2)
    assert np.array_equal(read_stored(str(path / "a.png")), values)


@row("8 and more bits")
def _(path):
    eight = ramp(0, 200, np.uint8)
    source = open_source("auto", folder(path / "d", [eight, ramp(0, 4000, np.uint16)]), in_chans=1)
    assert source.value_range == (0, 4095) and np.array_equal(source.read(0)[..., 0], eight)


@row("floats up to 1 and floats")
def _(path):
    with pytest.raises(ValueError, match="000.npy.*001.npy.*--value_range"):
        open_source("auto", folder(path / "d", [ramp(0, 1, np.float32), ramp(0, 255, np.float32)]), in_chans=1)


@row("integers and floats")
def _(path):
    with pytest.raises(ValueError, match="001.png.*000.npy.*--value_range"):
        open_source("auto", folder(path / "d", [ramp(0, 1, np.float32), ramp(0, 900, np.uint16)]), in_chans=1)


@row("NaN or infinite")
def _(path):
    np.save(path / "a.npy", np.full((2, 2), np.inf, np.float32))
    with pytest.raises(BadImage, match="not finite"):
        read_image(str(path / "a.npy"), 1)


@row("TIFF of many bands")
def _(path):
    tifffile = pytest.importorskip("tifffile")
    values = np.arange(5 * 7 * 4, dtype=np.uint16).reshape(5, 7, 4)
    tifffile.imwrite(path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(read_stored(str(path / "a.tif"), 4), values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tifffile", None)
        with pytest.raises(BadImage, match=r"requirements/tiff\.txt"):
            read_image(str(path / "a.tif"), 4)


@row("number of bands")
def _(path):
    np.save(path / "a.npy", np.zeros((4, 4, 5), np.uint8))
    with pytest.raises(BadImage, match="--in_chans 5"):
        read_image(str(path / "a.npy"))


@row("`.npy`")
def _(path):
    for array in (np.ones((4, 4), bool), np.zeros((4, 4, 1), np.int64), np.zeros((4, 4, 1), np.float64)):
        np.save(path / "a.npy", array)
        assert read_image(str(path / "a.npy"), 1).shape == (4, 4, 1)


@row("BMP of 8 bits with two colours")
def _(path):
    numbers = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3 % 2
    for name, palette in (("binary", [0, 0, 0, 255, 255, 255]), ("other", [255, 255, 255, 0, 0, 0])):
        picture = Image.fromarray(numbers)
        picture.putpalette(palette)
        picture.save(path / f"{name}.bmp")
    Image.fromarray(numbers > 0).save(path / "bit.bmp")
    for read in (read_image, read_mask):
        with pytest.raises(BadImage, match="a BMP file of 8 bits and two colours.*: store it as PNG"):
            read(str(path / "binary.bmp"))
    for name in ("other", "bit"):
        assert np.array_equal(read_mask(str(path / f"{name}.bmp"))[0], numbers), name
    assert np.array_equal(read_image(str(path / "bit.bmp"), 1)[..., 0], 255 * numbers)


@row("EXIF orientation")
def _(path):
    for suffix in ("jpg", "png", "webp"):
        file = tagged(path / f"a.{suffix}", Image.fromarray(smooth(16, 24)), 6)
        with Image.open(io.BytesIO(Path(file).read_bytes())) as picture:
            assert np.array_equal(read_image(file), np.asarray(ImageOps.exif_transpose(picture)))
    save(path / "m.png", np.zeros((2, 3), np.uint8))
    tag(path / "m.png", 6)
    assert read_mask(str(path / "m.png"))[0].shape == (3, 2)


@row("EXIF orientation, mask of the stored size")
def _(path):
    tag(paint(path) / "images" / "1.jpg", 6)
    with pytest.raises(ValueError, match=r"EXIF orientation tag \(6\)"):
        opened(path)


@row("grey of 1, 2")
def _(path):
    numbers = np.array([[0, 1], [2, 1]], np.uint8)
    save(path / "grey.png", numbers), save(path / "palette.png", numbers, "P")
    save(path / "rgb.png", np.repeat(numbers[..., None], 3, -1))
    np.save(path / "a.npy", numbers)
    Image.fromarray(numbers.astype(np.float32)).save(path / "f.tif")
    for name in ("grey.png", "palette.png", "rgb.png", "a.npy", "f.tif"):
        assert np.array_equal(read_mask(str(path / name))[0], numbers), name


@row("RGB or palette with")
def _(path):
    root = binary(path, (0, 1))
    for mask in (root / "masks").iterdir():
        save(mask, np.array([[0, 0, 0], [255, 0, 0]], np.uint8)[np.asarray(Image.open(mask))])
    assert np.unique(opened(root, mask_values=("#000000", "#ff0000")).train.read(0).mask_HW).tolist() == [0, 1]


@row("RGB of several")
def _(path):
    save(path / "m.png", np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8))
    with pytest.raises(BadImage, match="#000000, #ff0000"):
        read_mask(str(path / "m.png"))


@row("transparent pixels")
def _(path):
    save(path / "m.png", np.dstack([np.zeros((2, 2, 3), np.uint8), np.array([[0, 255], [255, 0]], np.uint8)]))
    with pytest.raises(BadImage, match="seem to be the mask.*getchannel"):
        read_mask(str(path / "m.png"))


@row("JPEG")
def _(path):
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(path / "m.png", format="JPEG")
    with pytest.raises(BadImage, match="JPEG"):
        read_mask(str(path / "m.png"))


@row("0 and 255")
def _(path):
    with pytest.raises(ValueError, match="--mask_values 0,255"):
        opened(binary(path))
    assert opened(path, mask_values=("0", "255")).classes == 2


@row("values that are no class")
def _(path):
    with pytest.raises(ValueError, match="--mask_values 0,127,255"):
        opened(binary(path, (0, 127, 255), names=NAMES))


@row("255 on at least")
def _(path):
    with pytest.raises(ValueError, match="--ignore_label"):
        opened(binary(path, (0, 1, 255), names=NAMES))
    assert opened(path, ignore_label=255).classes == 3


@row("one class in all")
def _(path):
    with pytest.raises(ValueError, match="nothing can be learned"):
        opened(binary(path / "a", (0,)))
    with pytest.raises(ValueError, match="background"):
        opened(binary(path / "b", (0, 1), names=("x",)))


@row("another size")
def _(path):
    save(paint(path) / "masks" / "1.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="9 x 9 pixels, and its image 10 x 14"):
        opened(path)
