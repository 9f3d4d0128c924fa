"""--region_decode: pixels of the crop equal those of the complete file, which is decoded if no region can be."""

import importlib.util
import io
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import decode, images
from data.images import BadImage, Undecoded, pretrain_transform
from data.loader import TrainSamples
from data.sources import open_source
from tests.test_decode import by_pillow, jpeg, outcome, picture

with_package = pytest.mark.skipif(bool(decode.lacks_parts()), reason=decode.lacks_parts())


def boxes(rows, columns, count=12):
    draw = np.random.default_rng(rows * columns)
    for _ in range(count):
        height, width = draw.integers(1, rows + 1), draw.integers(1, columns + 1)
        yield int(draw.integers(0, rows - height + 1)), int(draw.integers(0, columns - width + 1)), height, width


def read_later(data):
    return images.decode(data, 3, "a.jpg", lazy=True)


@with_package
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_every_part_of_every_kind_of_jpeg_has_the_pixels_of_the_whole(subsampling, how):
    for size in [(1, 1), (8, 8), (17, 33), (120, 1), (200, 333)]:
        data = jpeg(picture(*size), quality=95, subsampling=subsampling, **how)
        whole, found = by_pillow(data), read_later(data)
        assert isinstance(found, Undecoded) and found.shape == whole.shape
        for top, left, rows, columns in boxes(*size):
            part = slice(top, top + rows), slice(left, left + columns)
            assert np.array_equal(found[part], whole[part]), (size, part)


@with_package
@pytest.mark.parametrize("kind", ["grey", "rgb", "exif"])
def test_grey_rgb_and_turned_files_too(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    how = {"grey": {}, "rgb": {"keep_rgb": True}, "exif": {"exif": exif}}[kind]
    data = jpeg(picture(40, 60, 1 if kind == "grey" else 3), **how)
    part = slice(3, 23), slice(5, 35)
    assert decode.part_decoder(os.getpid()) is not None
    assert np.array_equal(read_later(data)[part], by_pillow(data)[part])


def test_other_files_and_other_readers_have_whole_pixels():
    png, data = io.BytesIO(), jpeg(picture(20, 30))
    Image.fromarray(picture(20, 30)).save(png, "PNG")
    assert isinstance(read_later(png.getvalue()), np.ndarray)
    assert isinstance(read_later(data + b"more"), np.ndarray)
    assert isinstance(images.decode(data, 3, "a.jpg"), np.ndarray)
    assert images.decode(data, 1, "a.jpg", lazy=True).shape == (20, 30, 1)


def test_a_file_that_is_cut_off_is_bad_whatever_its_crop_shows():
    data = jpeg(picture(60, 80))
    for cut in [*range(0, 700, 61), *range(700, len(data), 487), len(data) - 2, len(data) - 1]:
        with pytest.raises(BadImage) as error:
            read_later(data[:cut])
        assert str(error.value).removeprefix("a.jpg: ") == outcome(data[:cut]).removeprefix("file: ")


@with_package
def test_damage_in_the_middle_gives_the_same_pixels_or_none():
    data = jpeg(picture(60, 80))
    part = slice(30, 50), slice(10, 70)
    for spot in np.random.default_rng(0).integers(3, len(data), 60):
        damaged = data[:spot] + bytes([data[spot] ^ 16]) + data[spot + 1 :]
        try:
            whole = images.decode(damaged, 3, "a.jpg")
        except BadImage:
            continue  # its crop may be readable
        if whole.shape == (60, 80, 3):
            assert np.array_equal(read_later(damaged)[part], whole[part]), spot


def folder_of(tmp_path, *files):
    for number, data in enumerate(files):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    return open_source("auto", str(tmp_path))


def samples(source, later):
    read = source.read_lazily if later else source.read
    source = type(source)(source.names, read)
    return TrainSamples(source, pretrain_transform(16), 0, (1, 4), mean=(0.5,) * 3, std=(0.5,) * 3)


@with_package
def test_samples_are_the_same_whether_files_are_decoded_whole_or_not(tmp_path):
    source = folder_of(tmp_path, *(jpeg(picture(60, 80, seed=seed)) for seed in range(3)))
    for epoch in range(5):
        keys = [(epoch, index) for index in range(3)]
        whole, parts = (samples(source, later).__getitems__(keys) for later in (False, True))
        assert torch.equal(whole.images, parts.images) and torch.equal(whole.noise, parts.noise)


@pytest.mark.parametrize("works", [True, False])
def test_a_file_whose_damage_shows_when_it_is_cropped_is_replaced_like_any_other(tmp_path, monkeypatch, works):
    damaged = bytearray(jpeg(picture(60, 80)))
    start = damaged.index(b"\xff\xda")
    damaged[start + 2 : start + 4] = b"\x00\x00"  # the header is valid up to the scan, which cannot be decoded
    source = folder_of(tmp_path, jpeg(picture(60, 80, seed=1)), bytes(damaged), jpeg(picture(60, 80, seed=2)))
    if not works:
        monkeypatch.setattr(images, "jpeg_part", lambda *_: None)
    whole, parts = (samples(source, later)[(0, 1)] for later in (False, True))
    assert [path for path, _ in whole.problems] == [path for path, _ in parts.problems] == [str(tmp_path / "1.jpg")]
    assert torch.equal(whole.image, parts.image)


def test_without_the_package_whole_files_are_decoded_and_the_log_says_so(monkeypatch, caplog):
    decode.part_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.setitem(sys.modules, "nvidia", None)
    data = jpeg(picture(40, 60))
    part = slice(3, 23), slice(5, 35)
    assert np.array_equal(read_later(data)[part], by_pillow(data)[part])
    assert "decoded completely" in caplog.text
    decode.part_decoder.cache_clear()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "requirements/region.txt" in decode.lacks_parts()
