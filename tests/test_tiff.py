"""TIFF files of many bands, floats and more than 8 bits."""

import sys

import numpy as np
import pytest
from PIL import Image

from data.decode import upright
from data.images import BadImage, read_image, read_stored
from data.mask_files import read_mask
from data.masks import _size
from data.sources import open_source

tifffile = pytest.importorskip("tifffile")


def values(bands, dtype, high):
    made = np.linspace(0, high, 5 * 7 * bands).reshape(5, 7, bands)
    return (made.round() if np.dtype(dtype).kind != "f" else made).astype(dtype)


def write(path, array, planar="contig", **options):
    bands = array.shape[-1]
    options = {"photometric": "rgb" if bands == 3 else "minisblack"} | options
    if bands == 1:
        tifffile.imwrite(path, array[..., 0], **options)
    else:
        stored = array if planar == "contig" else np.moveaxis(array, -1, 0)
        tifffile.imwrite(path, stored, planarconfig=planar, **options)
    return str(path)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize(
    ("bands", "dtype", "high"),
    [(4, np.uint16, 4095), (13, np.uint16, 10000), (3, np.uint16, 65535), (3, np.float32, 1), (6, np.uint8, 255),
     (2, np.uint8, 255), (5, np.float64, 1), (4, np.int16, 3000), (4, np.uint8, 255)],
)  # fmt: skip
def test_bands_are_read_as_stored(tmp_path, bands, dtype, high, planar):
    array = values(bands, dtype, high)
    found = read_stored(write(tmp_path / "a.tif", array, planar), bands)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("dtype", "high"), [(np.float16, 1), (np.float64, 1), (np.int8, 100), (np.uint32, 4e9), (np.int16, 900), (bool, 1)]
)
def test_one_band_of_every_type(tmp_path, dtype, high):
    array = values(1, dtype, high)
    found = read_stored(write(tmp_path / "a.tif", array), 1)
    expected = array.astype(np.uint8) * 255 if dtype is bool else array
    np.testing.assert_array_equal(found, expected)


def test_a_compressed_file_and_one_page_for_each_band(tmp_path):
    array = values(4, np.uint16, 4095)
    np.testing.assert_array_equal(read_stored(write(tmp_path / "z.tif", array, compression="zlib"), 4), array)
    np.testing.assert_array_equal(
        read_stored(write(tmp_path / "l.tif", array, compression="lzw", predictor=True), 4), array
    )
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(array, -1, 0), photometric="minisblack")
    np.testing.assert_array_equal(read_stored(str(tmp_path / "pages.tif"), 4), array)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("bands", "dtype"), [(3, np.uint16), (5, np.uint8), (1, np.uint32)])
def test_the_orientation_of_the_file_is_applied(tmp_path, orientation, bands, dtype):
    array = values(bands, dtype, 200)
    path = write(tmp_path / "a.tif", array, extratags=[(274, "H", 1, orientation, True)])
    found = read_stored(path, bands)
    np.testing.assert_array_equal(found, upright(array, orientation))
    if bands == 1:
        np.testing.assert_array_equal(read_mask(path)[0], found[..., 0])
    else:
        assert (_size(path) or found.shape)[:2] == found.shape[:2]


def test_colours_of_sixteen_bits_serve_for_other_channels(tmp_path):
    array = values(3, np.uint16, 4095)
    path = write(tmp_path / "a.tif", array)
    scaled = np.floor(array * (255 / 4095) + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read_image(path, 3, (0, 4095)), scaled)
    np.testing.assert_array_equal(
        read_image(path, 1, (0, 4095))[..., 0], np.asarray(Image.fromarray(scaled).convert("L"))
    )
    with_alpha = np.concatenate([array, np.full((5, 7, 1), 9, np.uint16)], axis=-1)
    path = write(tmp_path / "b.tif", with_alpha, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(path, 3, (0, 4095)), scaled)


def test_another_number_of_bands_is_refused_and_the_option_named(tmp_path):
    path = write(tmp_path / "a.tif", values(4, np.uint16, 99))
    with pytest.raises(BadImage, match=r"shape \[5, 7, 4\] where \[H, W, 3\] is needed \(--in_chans 4\?\)"):
        read_image(path, 3)
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((6, 5, 7), np.uint8), photometric="minisblack")
    with pytest.raises(BadImage, match=r"--in_chans 6\?"):
        read_image(str(tmp_path / "stack.tif"), 1)
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((3, 4, 5, 7), np.uint8), photometric="minisblack")
    with pytest.raises(BadImage, match=r"shape \[3, 4, 5, 7\]"):
        read_image(str(tmp_path / "volume.tif"), 3)


def test_without_the_package_its_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", values(4, np.uint16, 99))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match=r"needs the package tifffile: pip install -r requirements/tiff\.txt"):
        read_image(path, 4)


def test_a_thumbnail_beside_the_image_is_no_band(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    image = Image.fromarray(values(1, np.uint8, 200)[..., 0])
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image.resize((3, 2))])
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.tif"), 1)[..., 0], np.asarray(image))


def test_files_that_pillow_reads_need_no_extra_and_keep_their_pixels(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    drawn = np.random.default_rng(0).integers(0, 255, (5, 7, 4), dtype=np.uint8)
    for mode, channels in (("RGB", 3), ("RGBA", 4), ("L", 1), ("P", 3), ("CMYK", 3)):
        picture = Image.fromarray(drawn[..., : 4 if mode == "RGBA" else 3]).convert(mode)
        picture.save(tmp_path / f"{mode}.tif")
        target = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        expected = np.asarray(picture.convert(target)).reshape(5, 7, channels)
        np.testing.assert_array_equal(read_image(str(tmp_path / f"{mode}.tif"), channels), expected)


def test_a_folder_of_many_bands_has_one_scale(tmp_path):
    """Similar to Sentinel-2: 13 bands of 16 bits, and a brighter file."""
    for number, high in enumerate((4000, 10000)):
        write(tmp_path / f"{number}.tif", values(13, np.uint16, high))
    source = open_source("auto", str(tmp_path), in_chans=13)
    assert source.value_range == (0, 16383) and source.read(0).shape == (5, 7, 13)
    expected = np.floor(values(13, np.uint16, 4000) * (255 / 16383) + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(source.read(0), expected)
