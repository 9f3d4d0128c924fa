"""Decoding JPEG with torchcodec: bit-exactly Pillow's pixels; Pillow is used if torchcodec differs or is missing."""

import io
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from data import decode, images

torchcodec = pytest.importorskip("torchcodec")


@pytest.fixture(autouse=True)
def reset_decision():
    decode.torchcodec_jpeg.cache_clear()
    yield
    decode.torchcodec_jpeg.cache_clear()


def picture(rows, columns, channels=3, seed=0):
    """Return an image with edges, gradients and noise."""
    y, x = np.mgrid[:rows, :columns]
    waves = np.stack([127 + 120 * np.sin(x / 5 + y / 9 + channel) for channel in range(channels)], axis=-1)
    noisy = waves + np.random.default_rng(seed).normal(0, 20, waves.shape)
    noisy[rows // 3 :, columns // 2 :] = 255 - noisy[rows // 3 :, columns // 2 :]
    return np.clip(noisy, 0, 255).astype(np.uint8)


def jpeg(array, **how):
    file = io.BytesIO()
    Image.fromarray(array.squeeze(), how.pop("mode", None)).save(file, "JPEG", **how)
    return file.getvalue()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}])
def test_every_kind_of_jpeg_has_pillows_pixels(subsampling, how):
    for rows, columns in [(1, 1), (8, 8), (17, 33), (64, 63), (120, 1), (200, 333)]:
        for quality in (20, 75, 95):
            data = jpeg(picture(rows, columns), quality=quality, subsampling=subsampling, **how)
            found = decode.jpeg_pixels(data)
            assert found is not None
            assert np.array_equal(found, by_pillow(data)), (rows, columns, quality)


def test_grey_files_and_unconverted_rgb_have_pillows_pixels_too():
    for data in (jpeg(picture(40, 50, 1)), jpeg(picture(40, 50), keep_rgb=True)):
        assert np.array_equal(decode.jpeg_pixels(data), by_pillow(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(40, 60), exif=exif)
    assert b"Exif" in data
    assert np.array_equal(decode.jpeg_pixels(data), turned_by_pillow(data))


def turned_by_pillow(data):
    with Image.open(io.BytesIO(data)) as opened:
        return np.asarray(ImageOps.exif_transpose(opened))


def test_exif_data_that_is_cut_off_or_of_another_type_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes().removeprefix(b"Exif\0\0")
    assert decode.orientation_in(data) == 6
    for end in range(len(data) - 5):
        assert decode.orientation_in(data[:end]) in (1, 6)
    assert decode.orientation_in(b"") == decode.orientation_in(b"XX" + data[2:]) == 1
    assert decode.orientation_in(b"II*\0\x08\0\0\0\x01\0\x12\x01\x04\0\x01\0\0\0\x08\0\0\0") == 8, "of 32 bits"


def test_several_exif_segments_turn_a_picture_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(picture(40, 60), exif=exif)
    start = data.index(b"Exif\0\0") - 4
    length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
    twice = data[:start] + data[start : start + length] * 2 + data[start + length :]
    assert np.array_equal(decode.jpeg_pixels(twice), turned_by_pillow(data))


def test_other_formats_and_colours_are_left_to_pillow():
    png = io.BytesIO()
    Image.fromarray(picture(20, 30)).save(png, "PNG")
    cmyk = io.BytesIO()
    Image.fromarray(picture(20, 30)).convert("CMYK").save(cmyk, "JPEG")
    for file in (png, cmyk):
        assert decode.jpeg_pixels(file.getvalue()) is None
        assert np.array_equal(images.decode(file.getvalue(), 3, "odd.JPEG"), by_pillow(file.getvalue()))


def test_a_size_that_pillow_would_warn_about_is_left_to_pillow(monkeypatch):
    data = jpeg(picture(40, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60)
    assert decode.jpeg_pixels(data) is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
    assert decode.jpeg_pixels(data) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode.jpeg_pixels(data) is not None


def test_a_file_cut_off_anywhere_ends_as_it_does_with_pillow(monkeypatch):
    data = jpeg(picture(60, 80))
    cuts = [*range(0, 700, 13), *range(700, len(data), 487), len(data) - 2, len(data) - 1]
    with_torchcodec = [outcome(data[:cut]) for cut in cuts]
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    decode.torchcodec_jpeg.cache_clear()
    for cut, found in zip(cuts, with_torchcodec, strict=True):
        assert outcome(data[:cut]) == found, cut


def test_damage_in_the_middle_ends_as_it_does_with_pillow(monkeypatch):
    data = jpeg(picture(60, 80))
    spots = np.random.default_rng(0).integers(3, len(data), 60)
    damaged = [data[:spot] + bytes([data[spot] ^ 16]) + data[spot + 1 :] for spot in spots]
    with_torchcodec = [outcome(each) for each in damaged]
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    decode.torchcodec_jpeg.cache_clear()
    assert [outcome(each) for each in damaged] == with_torchcodec


def outcome(data):
    """Return the pixels as bytes, or the error."""
    try:
        return images.decode(data, 3, "file").tobytes()
    except images.BadImage as error:
        return str(error)


def test_decoding_neither_warns_nor_touches_the_filters_of_warnings(monkeypatch):
    def touched(*words, **options):
        raise AssertionError("filters of warnings are changed for every image")

    data = jpeg(picture(40, 60))
    decode.torchcodec_jpeg()
    monkeypatch.setattr(warnings, "filterwarnings", touched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode.jpeg_pixels(data), by_pillow(data))


def test_without_torchcodec_pillow_decodes_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    data = jpeg(picture(40, 60))
    assert decode.jpeg_pixels(data) is None
    assert np.array_equal(images.decode(data, 3, "a.jpg"), by_pillow(data))
    assert "JPEG files are decoded by Pillow" in caplog.text and "torchcodec" in caplog.text


def test_a_png_of_sixteen_bits_without_torchcodec_gives_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"that fails \(import of torchcodec.decoders halted[^']*\): store it"):
        decode.png_values(b"")


@pytest.mark.parametrize(("message", "line"), [("\n a b\nc", "a b"), ("", "OSError"), (" \n", "OSError")])
def test_the_first_line_of_an_error(message, line):
    assert decode.first_line(OSError(message)) == line


def test_a_torchcodec_with_other_pixels_is_not_used(monkeypatch, caplog):
    import torchcodec.decoders

    true = torchcodec.decoders.decode_jpeg
    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", lambda data: true(data) ^ 1)
    assert decode.torchcodec_jpeg() is None
    assert "gives other pixels" in caplog.text


def test_the_log_says_who_decodes(caplog):
    caplog.set_level("INFO")
    decode.torchcodec_jpeg()
    assert f"JPEG files are decoded by torchcodec {torchcodec.__version__}" in caplog.text
