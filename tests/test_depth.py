"""The scale of pixel values of more than 8 bits: how it is chosen, logged, stored and used."""

import logging

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from data.depth import decide, look
from data.images import BadImage, read_image, read_stored
from data.sources import open_source
from tests.runs import finish
from tests.test_images import png16
from tools import embed, given, pack
from tools import encoder as encoders
from util import checkpoint


def ramp(low, high, dtype, size=(8, 16)):
    return np.linspace(low, high, size[0] * size[1]).astype(dtype).reshape(size)


def folder(root, arrays):
    """Write a folder of .npy files (or .png for uint8 and uint16), one for each array."""
    root.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        if array.dtype == np.uint16 and array.ndim == 2:
            png16(root / f"{number:03}.png", array)
        elif array.dtype == np.uint8 and array.ndim == 2:
            Image.fromarray(array).save(root / f"{number:03}.png")
        else:
            np.save(root / f"{number:03}.npy", array)
    return str(root)


def decided(root, arrays):
    path = folder(root, arrays)
    return open_source("folder", path, in_chans=1).value_range


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ([ramp(0, 3900, np.uint16)] * 3, (0, 4095)),
        ([ramp(0, 255, np.uint16)], (0, 255)),
        ([ramp(0, 256, np.uint16)], (0, 1023)),
        ([ramp(0, 900, np.uint16), ramp(0, 60000, np.uint16)], (0, 65535)),
        ([ramp(0, 200000, np.int32)], (0, 200000)),
        ([ramp(-1024, 3071, np.int16)], (-1024, 3071)),
        ([ramp(0, 1, np.float32)] * 2, (0, 1)),
        ([ramp(0, 1, np.float32), ramp(0, 1.003, np.float32)], (0, 1)),
        ([ramp(-0.002, 1.003, np.float64)], (0, 1)),
        ([ramp(0, 255, np.float32), ramp(0, 90, np.float32)], (0, 255)),
        ([ramp(0, 4000, np.float32)], (0, 65535)),
        ([ramp(-1, 1, np.float32)], (-1, 1)),
        ([ramp(-3, 2.5, np.float32)], (-3, 2.5)),
        ([ramp(0, 255, np.uint8)] * 2, ()),
        ([ramp(0, 255, np.uint8), ramp(0, 4095, np.uint16)], (0, 4095)),
        ([np.zeros((8, 16), np.float32), ramp(0, 255, np.float32)], (0, 255)),
        ([np.full((8, 16), 70000, np.int32)], (0, 70000)),
    ],
)
def test_the_range_is_decided_from_a_sample(tmp_path, arrays, expected):
    assert decided(tmp_path / "data", arrays) == expected


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([ramp(0, 1, np.float32), ramp(0, 255, np.float32)], "1 hold floats up to 1 .000.npy. and 1 floats up to 255"),
        ([ramp(0, 1, np.float32), ramp(0, 4095, np.uint16)], "001.png holds integers .* 000.npy floats from 0 to 1"),
    ],
)
def test_images_without_a_common_scale_are_refused_and_the_option_is_named(tmp_path, arrays, words):
    path = folder(tmp_path / "data", arrays)
    with pytest.raises(ValueError, match=f"no common scale.*{words}.*--value_range LOW HIGH"):
        open_source("folder", path, in_chans=1)
    source = open_source("folder", path, in_chans=1, value_range=(0, 255))
    assert source.read(0).dtype == np.uint8 and source.value_range == (0, 255)


def test_twelve_bits_in_sixteen_keep_their_grey_levels(tmp_path):
    """4096 consecutive values become all 256 grey levels; with a scale of 16 bits they would become 16."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    source = open_source("folder", folder(tmp_path / "data", [values, values // 2]), in_chans=1)
    found = source.read(0)[..., 0]
    expected = [[round(255 * value / 4095) for value in row] for row in values.tolist()]
    assert len(np.unique(found)) == 256 and found.tolist() == expected
    np.testing.assert_array_equal(source.read(1)[0, :4, 0], [round(255 * (v // 2) / 4095) for v in range(4)])
    assert len(np.unique(read_image(source.path(0), 1))) == 17, "alone, a file of 16 bits is taken to use them"


def test_one_value_beyond_one_changes_one_pixel(tmp_path):
    clean = ramp(0, 1, np.float32)
    spoilt = clean.copy()
    spoilt[3, 5] = 1.003
    source = open_source("folder", folder(tmp_path / "data", [clean, spoilt]), in_chans=1)
    first, second = source.read(0), source.read(1)
    assert second[3, 5] == 255 and np.delete(first.ravel(), 53).tolist() == np.delete(second.ravel(), 53).tolist()


def test_files_of_eight_bits_are_used_as_they_are(tmp_path):
    eight = np.arange(128, dtype=np.uint8).reshape(8, 16)
    path = folder(tmp_path / "data", [eight, ramp(0, 4095, np.uint16)])
    for value_range in ((), (0, 100)):
        source = open_source("folder", path, in_chans=3, value_range=value_range)
        np.testing.assert_array_equal(source.read(0), np.repeat(eight[..., None], 3, -1))


def test_what_was_found_is_logged_and_waste_is_warned_of(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    open_source("folder", folder(tmp_path / "a", [ramp(0, 3900, np.uint16), ramp(0, 255, np.uint8)]), in_chans=1)
    assert "1 of 2 sampled files have more than 8 bits (1 uint16), from 0 to 3900; 0 to 4095 is scaled" in caplog.text
    assert "--value_range LOW HIGH sets it); files of 8 bits are used as they are" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    hot = ramp(0, 3000, np.uint16, (40, 40))
    hot[0, 0] = 65535
    open_source("folder", folder(tmp_path / "b", [hot]), in_chans=1)
    assert "most of the range 0 to 65535 is unused" in caplog.text and "13 of 256 grey levels" in caplog.text
    caplog.clear()
    open_source("folder", folder(tmp_path / "c", [ramp(0, 4000, np.uint16)]), in_chans=1, value_range=(0, 1000))
    assert "75.0% lie outside of 0 to 1000" in caplog.text and "as value_range says" in caplog.text
    caplog.clear()
    open_source("folder", folder(tmp_path / "d", [ramp(0, 255, np.uint16), ramp(0, 9000, np.uint16)]), in_chans=1)
    assert "1 of 2 files have no value above 255, such as 000.png" in caplog.text
    caplog.clear()
    open_source("folder", folder(tmp_path / "e", [ramp(0, 255, np.uint8)]), in_chans=1, value_range=(0, 9))
    assert "value_range has no effect" in caplog.text


def test_a_given_range_clips_and_another_split_does_not_decide_again(tmp_path):
    values = np.array([[-200, -160, 40, 240, 900]], np.int16)
    source = open_source("folder", folder(tmp_path / "data", [values]), "train", in_chans=1, value_range=(-160, 240))
    assert source.read(0)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_values_that_are_not_finite_are_bad_images(tmp_path):
    spoilt = ramp(0, 1, np.float32)
    spoilt[0, 0] = np.nan
    source = open_source("folder", folder(tmp_path / "data", [ramp(0, 1, np.float32), spoilt]), in_chans=1)
    assert source.value_range == (0, 1)
    with pytest.raises(BadImage, match="001.npy: pixel values from nan to nan, which are not finite"):
        source.read(1)


def test_floats_that_no_sampled_file_announced_are_bad_images(tmp_path, monkeypatch):
    path = folder(tmp_path / "data", [ramp(0, 255, np.uint8), ramp(0, 1, np.float32)])
    monkeypatch.setattr("data.depth.look", lambda *given: (1, []))
    source = open_source("folder", path, in_chans=1)
    with pytest.raises(BadImage, match="floats, and no sampled file holds any: give --value_range"):
        source.read(1)


def test_only_files_that_may_have_more_bits_are_read(tmp_path):
    path = folder(tmp_path / "data", [ramp(0, 255, np.uint8)] * 3 + [ramp(0, 9, np.uint16)])
    Image.fromarray(ramp(0, 255, np.uint8)).save(tmp_path / "data" / "photo.jpg")
    names = ["000.png", "001.png", "002.png", "003.png", "photo.jpg"]
    read = []

    def note(number):
        read.append(number)
        return read_stored(f"{path}/{names[number]}", 1)

    looked, found = look(names, note, lambda number: f"{path}/{names[number]}")
    assert looked == 4 and read == [3] and [values.name for values in found] == ["003.png"]
    assert decide(found) == (0, 255)


def test_a_checkpoints_range_that_does_not_fit_other_images_is_refused(tmp_path):
    path = folder(tmp_path / "data", [ramp(0, 1, np.float32)])
    with pytest.raises(ValueError, match="value_range 0 4095 does not fit these images: .* 1 of 256 grey levels"):
        open_source("folder", path, in_chans=1, value_range=(0, 4095))


def test_the_range_of_pretraining_is_used_by_everything_that_follows(tmp_path):
    """Options, checkpoint, resume, fine-tuning and tools use it for images that alone would have another range."""
    bright, dark = tmp_path / "bright", tmp_path / "dark"
    folder(bright, [ramp(0, 3900, np.uint16)] * 8)
    for name in ("a", "b"):
        for split in ("train", "val"):
            (dark / split / name).mkdir(parents=True)
            folder(dark / split / name, [ramp(0, 900, np.uint16)] * 4)
    words = ["--data_path", bright, "--total_batch_size", 4, "--epochs", 1]
    finish(tmp_path / "run", *words)
    options = yaml.safe_load((tmp_path / "run" / "options.yaml").read_text())
    assert options["value_range"] == [0, 4095]
    finish(tmp_path / "run", *words, "--value_range", 0, 4095)  # the same run, not a change
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pth")["options"]["value_range"] == [0, 4095]
    start = ["--init_from", tmp_path / "run/checkpoints/last.pth", "--data_path", dark, "--total_batch_size", 4]
    finish(tmp_path / "tuned", *start, "--epochs", 1, script="main_finetune")
    assert checkpoint.load(tmp_path / "tuned/checkpoints/last.pth")["options"]["value_range"] == [0, 4095]
    trained = given.load(tmp_path / "run", "cpu")
    for split in ("train", "val"):
        assert given.source(trained, split, str(dark)).read(0).max() == round(255 * 900 / 4095)
    assert embed.main([str(tmp_path / "run"), str(dark / "train"), "--device", "cpu"]) == 0
    told = np.load(tmp_path / "run" / "features.npz")["features"]
    encoder = encoders.load(tmp_path / "run")
    source = open_source("auto", str(dark / "train"), in_chans=1, value_range=(0, 4095))
    np.testing.assert_allclose(told, embed.embed(encoder, source, device=torch.device("cpu"))["features"])


def test_a_pack_keeps_the_range_that_its_pixels_were_scaled_by(tmp_path):
    for split, high in (("train", 3900), ("val", 900)):
        (tmp_path / "data" / split).mkdir(parents=True)
        folder(tmp_path / "data" / split, [ramp(0, high, np.uint16)] * 3)
    words = [str(tmp_path / "data"), "--output", str(tmp_path / "pack"), "--raw", "--size", "0", "--in_chans", "1"]
    assert pack.main([*words, "--num_workers", "1"]) == 0
    for split, high in (("train", 3900), ("val", 900)):
        source = open_source("auto", str(tmp_path / "pack"), split, in_chans=1)
        assert source.value_range == (0, 4095) and source.read(0).max() == round(255 * high / 4095)
