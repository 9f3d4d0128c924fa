"""Images with masks: layouts, values in all kinds of files, splits, scenes; and errors before training."""

import hashlib
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import masks, scenes
from data.images import BadImage
from data.masks import IGNORE, Coding, read_mask
from data.sources import open_source
from data.splits import write_lists
from options import SegmentOptions
from tests.test_images import write_png16
from util.distributed import Processes

MASKS_OF_THREE_SCENES = "205122716c96f88b666a817ce3be3351933c69da08baa62077cf1184460bc780"
ALONE = Processes(0, 1, 0, torch.device("cpu"))
NAMES = ("sky", "grass", "a cat")


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(path)


def paint(root, split="", count=4, size=(10, 14), masks="masks", start=0, suffix=".jpg"):
    """Write pairs whose masks contain the values 0 to 2, in `images/split` and `masks/split`."""
    for number in range(start, start + count):
        drawn = np.random.default_rng(number)
        save(root / "images" / split / f"{number}{suffix}", drawn.integers(0, 255, (*size, 3), dtype=np.uint8))
        save(root / masks / split / f"{number}.png", drawn.integers(0, 3, size, dtype=np.uint8))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return root


def options(root, **changes):
    return SegmentOptions(data_path=str(root), num_workers=2, **changes)


def opened(root, **changes):
    return masks.open_splits(options(root, **changes), ALONE)


# ---- values in files


def test_numbers_are_read_from_files_of_every_kind(tmp_path):
    numbers = np.array([[0, 1, 2], [3, 1, 0]], np.uint8)
    palette, deep = tmp_path / "p.png", tmp_path / "deep.png"
    save(palette, numbers, "P")
    Image.fromarray(numbers.astype(np.uint16) * 300).save(deep)
    found, kind = read_mask(str(palette))
    assert kind == "palette" and np.array_equal(found, numbers), "the numbers count, not the colours"
    found, kind = read_mask(str(deep))
    assert kind == "16 bit" and found.tolist() == (numbers.astype(int) * 300).tolist()
    for suffix in (".bmp", ".tif", ".gif"):
        save(tmp_path / f"m{suffix}", numbers)
        assert np.array_equal(read_mask(str(tmp_path / f"m{suffix}"))[0], numbers)
    Image.fromarray(numbers[:1, :2] > 0).save(tmp_path / "bit.png")
    assert read_mask(str(tmp_path / "bit.png"))[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [2, 4])
def test_grey_files_of_few_bits_keep_their_numbers(tmp_path, bits, suffix):
    """Pillow scales them to 0..255 when it reads them, and cannot write such files, so the file is written by hand."""
    per_byte = 8 // bits
    row = [0, 1, 2, 3]
    packed = bytearray()
    for first in range(0, 4, per_byte):
        byte = 0
        for value in row[first : first + per_byte]:
            byte = byte << bits | value
        packed.append(byte)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    if suffix == "png":
        header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + bytes(packed))) + chunk(b"IEND", b"")
        (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    else:  # columns, rows, bits, no compression, 0 is black, offset, samples, rows per strip, bytes
        tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: len(packed)}
        entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
        (tmp_path / "m.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 9) + entries + bytes(4) + bytes(packed))
    assert read_mask(str(tmp_path / f"m.{suffix}"))[0].tolist() == [row]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_png_masks_of_sixteen_bits_in_colour_are_refused(tmp_path, colour_type, channels):
    """Pillow drops the lower 8 bits, in which the class numbers are."""
    values = np.full((2, 3, channels), 65535, np.uint16)
    values[..., : channels - (channels != 3)] = 1
    with pytest.raises(BadImage, match="a PNG file of 16 bits in colour or with transparency: store .* grey PNG"):
        read_mask(write_png16(tmp_path / "m.png", values, colour_type))


def test_colours_and_jpeg_are_no_masks(tmp_path):
    save(tmp_path / "c.png", np.array([[[0, 0, 0], [255, 0, 0]]], np.uint8))
    with pytest.raises(BadImage, match="in colour .RGB. of 2 colours .#000000, #ff0000. where each pixel"):
        read_mask(str(tmp_path / "c.png"))
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "j.png", format="JPEG")
    with pytest.raises(BadImage, match="JPEG"):
        read_mask(str(tmp_path / "j.png"))


def test_numbers_become_classes_as_ade20k_counts_them():
    ade, plain = Coding(150, 255, True), Coding(3, 255, False)
    found = ade.to_classes(np.array([[0, 1, 150, 255]], np.uint8))
    assert found.tolist() == [[IGNORE, 0, 149, IGNORE]] and found.dtype == np.int16
    assert plain.to_classes(np.array([[0, 2, 255]], np.uint8)).tolist() == [[0, 2, IGNORE]]
    with pytest.raises(ValueError, match="it holds 3, 7; the 3 classes are 0 to 2, and 255 is ignored"):
        plain.to_classes(np.array([[3, 0], [7, 3]], np.uint8))
    with pytest.raises(ValueError, match="it holds 151; the 150 classes are 1 to 150"):
        ade.to_classes(np.array([[151]], np.uint8))


# ---- mapping of values


def binary(root, values=(0, 255), count=4, names=("ground", "tumour"), split="", size=(10, 14), area=0.3):
    """Write pairs whose masks contain the values; all but the first fill the share `area` of the pixels."""
    for number in range(count):
        drawn = np.random.default_rng(number)
        save(root / "images" / split / f"{number}.png", drawn.integers(0, 255, (*size, 3), dtype=np.uint8))
        mask = np.full(size, values[0])
        later = drawn.permutation(mask.size)[: max(len(values) - 1, round(area * mask.size))]
        for place, value in enumerate(values[1:]):
            mask.reshape(-1)[later[place :: len(values) - 1]] = value
        dtype = np.uint8 if max(values) < 256 else np.uint16
        save(root / "masks" / split / f"{number}.png", mask.astype(dtype))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def test_masks_of_0_and_255_are_refused_with_the_ways_out(tmp_path):
    """Without a mapping, 255 would be ignored, and predicting 0 everywhere would be correct for 100%."""
    root = binary(tmp_path)
    words = (
        r"nothing can be learned\. 255 fills 30\.0% .* ignored, while the class tumour \(value 1\) is in none of the 4"
    )
    ways = r"store 1 in its place, or give --mask_values 0,255, or name .* --ignore_label \(255 if it is this one\)"
    with pytest.raises(ValueError, match=rf"{words}.*{ways}"):
        opened(root)
    found = opened(root, mask_values=("0", "255"), holdout=0.0, test_share=0.25)
    mask = np.asarray(Image.open(root / "masks" / found.train.names[0].removeprefix("images/")))
    assert np.array_equal(found.train.read(0).mask_HW, mask // 255)
    assert found.train.class_pixels.sum(axis=0).tolist() == [3 * 98, 3 * 42]


def test_a_few_ignored_pixels_and_a_confirmed_label_are_accepted(tmp_path):
    """Three classes listed, of which one is in no mask."""
    root = binary(tmp_path / "area", (0, 1, 255), names=NAMES)
    with pytest.raises(ValueError, match=r"255 fills 15\.0% .* the class a cat \(value 2\) .*--mask_values 0,1,255"):
        opened(root)
    assert opened(root, ignore_label=255).classes == 3
    few = binary(tmp_path / "few", (0, 1, 255), names=NAMES, size=(40, 50), area=0.015)
    assert opened(few).classes == 3


@pytest.mark.parametrize("values", [(0,), (1,), (0, 255)])
@pytest.mark.parametrize("label", [None, 255])
def test_training_masks_of_one_class_are_refused(tmp_path, values, label):
    root = binary(tmp_path, values)
    (only,) = {value for value in values if value != 255}
    with pytest.raises(
        ValueError, match=f"every pixel of the 4 training masks .* is {('ground', 'tumour')[only]}: nothing"
    ):
        opened(root, ignore_label=label)


def test_a_list_of_one_class_is_refused_with_advice(tmp_path):
    with pytest.raises(ValueError, match=r"lists only the class tumour, .*background \(0\) and tumour \(1\)"):
        opened(binary(tmp_path, names=("tumour",)))


def test_validation_masks_may_lack_classes(tmp_path, caplog):
    root = binary(binary(tmp_path, (0, 1), split="train"), (0, 255), split="val")
    assert len(opened(root, holdout=0.0).test) == 4
    assert "1 of 2 classes are in none of these 4 masks: tumour" in caplog.text


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ((0, 127, 255), NAMES, r"it holds 127; .* values 0, 127, 255: as many as .* --mask_values 0,127,255 maps"),
        ((0, 100, 200, 255), NAMES, r"it holds 100, 200; .*with 255 ignored, --mask_values 0,100,200 maps"),
        ((0, 1, 2, 3, 4), NAMES, r"it holds 3, 4; .*hold the values 0, 1, 2, 3, 4, and 3 classes are listed"),
        ((0, 300), ("ground", "tumour"), r"it holds 300; .*--mask_values 0,300 maps"),
    ],
)
def test_values_that_are_no_class_numbers_are_listed_with_a_mapping(tmp_path, values, names, words):
    with pytest.raises(ValueError, match=words):
        opened(binary(tmp_path, values, names=names))


def test_mapped_values_are_classes_in_the_order_given(tmp_path):
    root = binary(tmp_path, (0, 127, 255), names=NAMES)
    found = opened(root, mask_values=("255", "0", "127"))
    assert np.array_equal(np.unique(found.train.read(0).mask_HW), [0, 1, 2])
    stored = np.asarray(Image.open(root / "masks" / found.train.names[0].removeprefix("images/")))
    assert np.array_equal(found.train.read(0).mask_HW == 0, stored == 255)
    with pytest.raises(ValueError, match="it holds 255; the 3 classes have the values 0, 1, 127"):
        opened(root, mask_values=("0", "1", "127"), ignore_label=254)
    known = opened(root, mask_values=("0", "1", "127"), ignore_label=255)
    assert (known.train.read(0).mask_HW == IGNORE).sum() == (stored == 255).sum(), "255 is ignored"
    assert known.train.fingerprint != found.train.fingerprint


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask_values": ("0", "1", "2")}, r"mask_values: 3 values \(0, 1, 2\) for 2 classes"),
        ({"mask_values": ("0", "0")}, "mask_values: 0, 0 holds a value twice"),
        ({"mask_values": ("0", "red")}, "mask_values: expected numbers, or colours as #ff0000, found 0, red"),
        ({"mask_values": ("0", "#ff0000")}, "mask_values: expected numbers, or colours"),
        ({"mask_values": ("0", "255"), "ignore_label": 255}, "ignore_label 255 is also among mask_values"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        opened(binary(tmp_path), **given)
    with pytest.raises(ValueError, match="mask_values: already assigns values to classes"):
        SegmentOptions(mask_values=("0", "255"), reduce_zero_label=True)


def test_coloured_masks_are_mapped_by_their_colours(tmp_path):
    root = binary(tmp_path, (0, 1, 2), names=NAMES)
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 7]], np.uint8)
    for path in (root / "masks").iterdir():
        save(path, palette[np.asarray(Image.open(path))])
    with pytest.raises(ValueError, match="in colour .RGB. of 3 colours .#000000, #008007, #ff0000.*--mask_values"):
        opened(root)
    found = opened(root, mask_values=("#000000", "#ff0000", "#008007"))
    stored = np.asarray(Image.open(root / "masks" / found.train.names[0].removeprefix("images/")))
    assert np.array_equal(palette[found.train.read(0).mask_HW], stored)
    with pytest.raises(ValueError, match="it holds #008007; the 3 classes have the values #000000, #ff0000, #000001"):
        opened(root, mask_values=("#000000", "#ff0000", "#000001"))


def test_what_masks_hold_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    opened(binary(tmp_path, (0, 1, 255), size=(10, 20), area=0.2), ignore_label=255)
    assert "masks: 4 grey; values: 0 80.0%, 1 10.0%, 255 10.0% (ignored)" in caplog.text


def test_other_files_that_hold_class_numbers_are_read(tmp_path):
    numbers = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    save(tmp_path / "rgb.png", np.repeat(numbers[..., None], 3, -1))
    save(tmp_path / "rgba.png", np.dstack([numbers] * 3 + [np.full_like(numbers, 255)]))
    Image.fromarray(numbers.astype(np.float32)).save(tmp_path / "float.tif")
    for name, array in (
        ("u8", numbers),
        ("i64", numbers.astype(np.int64)[..., None]),
        ("f", numbers.astype(np.float64)),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "bool.npy", numbers > 1)
    expected = dict.fromkeys(["rgb.png", "rgba.png", "float.tif", "u8.npy", "i64.npy", "f.npy"], numbers)
    for name, right in {**expected, "bool.npy": numbers > 1}.items():
        assert np.array_equal(read_mask(str(tmp_path / name))[0], right), name


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[0, 0.5]], np.float32), "floats that are not whole numbers"),
        (np.array([[0, np.nan]], np.float32), "floats that are not whole numbers"),
        (np.zeros((2, 3, 4), np.uint8), r"shape \[2, 3, 4\] where \[H, W\] is needed"),
        (np.array([[-1, 0]]), "it holds -1 to 0; class numbers are 0 to 65535"),
        (np.array([["a"]]), "class numbers are integers"),
    ],
)
def test_arrays_that_hold_no_class_numbers_are_refused(tmp_path, array, words):
    np.save(tmp_path / "m.npy", array)
    with pytest.raises(BadImage, match=words):
        read_mask(str(tmp_path / "m.npy"))


def test_a_mask_in_the_alpha_channel_is_named(tmp_path):
    alpha = np.array([[0, 255], [255, 0]], np.uint8)
    save(tmp_path / "a.png", np.dstack([np.zeros((2, 2, 3), np.uint8), alpha]))
    with pytest.raises(BadImage, match=r"transparent pixels \(RGBA\), which seem to be the mask.*getchannel"):
        read_mask(str(tmp_path / "a.png"))
    Image.merge("LA", [Image.fromarray(alpha), Image.fromarray(alpha)]).save(tmp_path / "la.png")
    with pytest.raises(BadImage, match=r"transparent pixels \(LA\), whose meaning is not known"):
        read_mask(str(tmp_path / "la.png"))
    (tmp_path / "masks" / "x").mkdir(parents=True)
    Image.fromarray(alpha).save(tmp_path / "masks" / "m.jpg")
    with pytest.raises(ValueError, match="m.jpg cannot be a mask: .*JPEG changes the numbers"):
        masks._by_stem(str(tmp_path / "masks"), "masks", masks.MASK_SUFFIXES)


# ---- EXIF orientation


def tag(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as opened_:
        opened_.load()
        opened_.save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6])
@pytest.mark.parametrize("size", [(12, 12), (8, 12)])
def test_a_tagged_photograph_and_an_upright_mask_fit(tmp_path, orientation, size, caplog):
    """The value of a pixel of the image is its position; the mask was drawn on the image after EXIF orientation."""
    numbers = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size) % 3
    stored = {1: numbers, 3: np.rot90(numbers, 2), 5: numbers.T, 6: np.rot90(numbers)}[
        orientation
    ]  # before EXIF orientation
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png", np.repeat(stored[..., None], 3, -1))
        save(tmp_path / "masks" / f"{number}.png", numbers)
        tag(tmp_path / "images" / f"{number}.png", orientation)
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES))
    pair = opened(tmp_path).train.read(0)
    assert np.array_equal(pair.image_HWC[..., 0], pair.mask_HW) and pair.mask_HW.shape == size
    assert ("4 of 4 images have an EXIF orientation tag" in caplog.text) == (orientation > 1)
    for path in (tmp_path / "masks").iterdir():
        save(path, stored)
        tag(path, orientation)
    pair = opened(tmp_path).train.read(0)
    assert np.array_equal(pair.image_HWC[..., 0], pair.mask_HW), "both tagged"


def test_a_mask_that_lies_as_the_pixels_are_stored_is_refused_naming_the_tag(tmp_path):
    root = paint(tmp_path)
    tag(root / "images" / "1.jpg", 6)
    words = r"masks/1\.png: it has 10 x 14 pixels, and its image 14 x 10 after .* EXIF orientation tag \(6\).*exiftool"
    with pytest.raises(ValueError, match=words):
        opened(root)


# ---- layouts and splits


def test_splits_of_folders(tmp_path):
    """val is the test set, and a share of train selects the best epoch; if there is a test split, val selects it."""
    root = paint(paint(tmp_path / "two", "train", 10), "val", 3, start=50)
    found = opened(root, holdout=0.2)
    assert [len(part) for part in (found.train, found.choice, found.test)] == [8, 2, 3]
    assert not {*found.train.names} & {*found.choice.names} and found.chosen_on == "held-out training images"
    assert found.classes == 3 and found.train.classes == list(NAMES)
    image, mask = found.test.read(1)
    assert image.shape == (10, 14, 3)
    assert np.array_equal(mask, np.asarray(Image.open(root / "masks" / "val" / "51.png")))
    assert found.test.path(1) == str(root / "images" / "val" / "51.jpg")
    assert [*opened(root, holdout=0.2).choice.names] == [*found.choice.names]
    assert [*opened(root, holdout=0.2, subset_seed=1).choice.names] != [*found.choice.names]
    assert opened(root, holdout=0.0).chosen_on == "the test images"
    paint(root, "test", 2, start=70)
    assert opened(root).chosen_on == "the split val"
    assert len(opened(root).train) == 10 and [*opened(root).test.names] == ["images/test/70.jpg", "images/test/71.jpg"]


def test_a_share_of_the_training_images_is_part_of_a_larger_one(tmp_path):
    root = paint(paint(tmp_path, "train", 12), "val", 2, start=50)
    few, more, whole = (opened(root, holdout=0.25, label_share=share) for share in (0.2, 0.6, 1.0))
    names = [{*found.train.names} for found in (few, more, whole)]
    assert list(map(len, names)) == [2, 5, 9] and names[0] < names[1] < names[2]
    assert [*few.choice.names] == [*whole.choice.names] and len(few.test) == 2


def test_without_splits_a_seeded_share_is_the_test_set(tmp_path):
    root = paint(tmp_path, count=10)
    found = opened(root, test_share=0.3, holdout=0.2)
    parts = [{*part.names} for part in (found.train, found.choice, found.test)]
    assert list(map(len, parts)) == [6, 1, 3] and len(set.union(*parts)) == 10
    assert [*masks.open_test(options(root, test_share=0.3), ALONE).names] == [*found.test.names]


def test_an_evaluation_keeps_the_test_images_of_a_folder_that_has_grown(tmp_path, caplog):
    root, run = paint(tmp_path / "data", count=10), tmp_path / "run"
    run.mkdir()
    found = opened(root, test_share=0.3, holdout=0.2)
    write_lists(found, run)
    evaluate = {"eval": True, "test_share": 0.3}
    paint(tmp_path / "data", count=3, start=10)
    caplog.set_level("INFO")
    assert [*masks.open_test(options(root, **evaluate), ALONE, run).names] == [*found.test.names]
    assert "the 3 images of the run's images_test.txt are evaluated instead" in caplog.text
    other = paint(tmp_path / "other", count=4, start=20)
    assert len(masks.open_test(options(other, **evaluate), ALONE, run)) == 4
    assert "all 4 images are evaluated" in caplog.text


def test_groups_of_images_stay_together(tmp_path, caplog):
    for number, name in enumerate("abcde"):
        paint(tmp_path, name, 4, start=10 * number)
    opened(tmp_path, test_share=0.2)
    assert "test_share: images of" in caplog.text and "folders are on both sides" in caplog.text
    caplog.clear()
    found = opened(tmp_path, test_share=0.2, holdout=0.25, group_by="folder")
    folders = [{name.split("/")[1] for name in part.names} for part in (found.train, found.choice, found.test)]
    assert list(map(len, folders)) == [3, 1, 1] and len(set.union(*folders)) == 5
    assert "on both sides" not in caplog.text


def test_images_may_be_arrays(tmp_path):
    root = paint(tmp_path)
    for path in sorted((root / "images").iterdir()):
        np.save(path.with_suffix(".npy"), np.asarray(Image.open(path)))
        path.unlink()
    image, mask = opened(root).train.read(0)
    assert image.shape == (10, 14, 3) and mask.shape == (10, 14)


def test_ade20k_as_it_is_unpacked(tmp_path):
    """Also from the parent folder of ADEChallengeData2016; 0 is not a class, and class names are known."""
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        paint(root, split, 3, masks="annotations")
    (root / "classes.txt").unlink()
    for place in (root, tmp_path):
        found = opened(place, dataset="ade20k", holdout=0.0)
        assert found.classes == 150 and found.train.classes[:3] == ["wall", "building", "sky"]
        assert found.train.classes[149] == "flag" and found.chosen_on == "the test images"
        file = np.asarray(Image.open(root / "annotations" / "training" / "0.png")).astype(int)
        assert np.array_equal(found.train.read(0).mask_HW, file - 1)


def test_the_fingerprint_tells_other_classes_and_images(tmp_path):
    root = paint(tmp_path, count=6)
    first = opened(root).train.fingerprint
    assert opened(root).train.fingerprint == first
    assert opened(root, ignore_label=254).train.fingerprint != first
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert opened(root).train.fingerprint != first


def test_masks_without_images_are_reported_and_left_out(tmp_path, caplog):
    root = paint(tmp_path, count=4)
    (root / "images" / "2.jpg").unlink()
    with caplog.at_level("INFO"):
        assert len(opened(root, holdout=0.0).train) == 2
    assert "1 masks" in caplog.text and "have no image and are left out: 2.png" in caplog.text


# ---- bad input


def broken(root, what):
    """Write a folder with one error."""
    paint(root, "train"), paint(root, "val")
    mask = root / "masks" / "train" / "1.png"
    if what == "no mask":
        mask.unlink()
    elif what == "size":
        save(mask, np.zeros((10, 15), np.uint8))
    elif what == "label":
        save(mask, np.full((10, 14), 9, np.uint8))
    elif what == "colour":
        save(mask, np.arange(420, dtype=np.uint8).reshape(10, 14, 3))
    elif what == "damaged":
        mask.write_bytes(mask.read_bytes()[:60])
    elif what == "empty":
        for path in (root / "images" / "val").iterdir():
            path.unlink()
    elif what == "void":
        for path in (root / "masks" / "train").iterdir():
            save(path, np.full((10, 14), 255, np.uint8))
    elif what == "no classes":
        (root / "classes.txt").unlink()
    elif what == "twice":
        save(root / "images" / "train" / "1.png", np.zeros((10, 14, 3), np.uint8))
    elif what == "no train":
        for kind in ("images", "masks"):
            (root / kind / "train").rename(root / kind / "elsewhere")
    elif what == "no val masks":
        (root / "masks" / "val").rename(root / "masks" / "other")
    elif what == "no masks":
        (root / "masks").rename(root / "labels")
    return root


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no mask", r"1 of 4 images in .* have no mask: 1\.jpg \(there is no masks/train/1\.png\)"),
        ("size", r"1 of 4 masks .*: masks/train/1\.png: it has 10 x 15 pixels, and its image 10 x 14"),
        ("label", r"masks/train/1\.png: it holds 9; the 3 classes are 0 to 2, and 255 is ignored"),
        ("colour", r"masks/train/1\.png: a picture in colour \(RGB\).* a grey PNG or one with a palette"),
        ("damaged", r"1 of 4 masks in .* cannot be trained on: masks/train/1\.png"),
        ("empty", r"no images in .*val: it holds nothing"),
        ("void", r"not one pixel of the 4 masks in .* has a class"),
        ("no classes", r"classes\.txt does not exist: give --class_list FILE"),
        ("twice", r"holds two files of one name, 1\.jpg and 1\.png: remove or rename one"),
        ("no train", r"has val images with masks, and none in a folder train"),
        ("no val masks", r"has a folder images/val, and no masks/val"),
        ("no masks", r"must hold a folder images, and a folder masks or annotations; it holds .*labels"),
    ],
)
def test_what_is_wrong_is_named_before_training(tmp_path, what, words):
    with pytest.raises(ValueError, match=words):
        opened(broken(tmp_path, what))


@pytest.mark.parametrize("open_", [masks.open_splits, masks.open_test])
def test_a_folder_of_pairs_that_may_not_be_read_is_reported(tmp_path, monkeypatch, open_):
    root, scandir = paint(tmp_path), os.scandir

    def refuse(path):
        if os.path.samefile(path, root / "masks"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="cannot read .*masks/: Permission denied"):
        open_(options(root), ALONE)


def test_options_that_do_not_fit_the_masks_are_refused(tmp_path):
    root = paint(tmp_path, count=6)
    with pytest.raises(ValueError, match="ignore_label 2 is the number of the class a cat"):
        opened(root, ignore_label=2)
    with pytest.raises(ValueError, match="ignore_label 0 is the number of the class sky"):
        opened(root, ignore_label=0)
    assert opened(root, ignore_label=3).classes == 3  # the number after the last class
    with pytest.raises(ValueError, match="num_classes 7: the class list has 3"):
        opened(root, num_classes=7)
    right = r": give --data_path FOLDER with a folder images, and a folder masks or annotations in it .*`scenes`"
    for data_path, wrong in (("", "no data"), (tmp_path / "nowhere", "nowhere does not exist")):
        with pytest.raises(ValueError, match=wrong + right):
            opened(data_path)
    with pytest.raises(ValueError, match=r"classes\.txt is a file" + right):
        opened(root / "classes.txt")
    with pytest.raises(ValueError, match="nothing.txt does not exist"):
        opened(root, class_list="nothing.txt")
    with pytest.raises(ValueError, match="test_share: there is 1 image"):
        opened(paint(tmp_path / "one", count=1))


def test_unchecked_a_bad_mask_is_an_unreadable_image(tmp_path):
    found = opened(broken(tmp_path, "size"), check_masks=False, holdout=0.0)
    with pytest.raises(BadImage, match="10 x 15 pixels, and its image 10 x 14"):
        found.train.read(1)
    assert found.train.read(0).mask_HW.shape == (10, 14)


def test_processes_share_the_check_and_all_hear_of_it(tmp_path):
    """Each process checks every second mask; both report the errors of one."""
    looked = []

    class Pretend(Processes):
        def gather(self, value):
            looked.append(value)
            return [value]

    root = paint(tmp_path, "train", 5)
    folder = masks._open_folder(options(root))
    source, names = folder.open("train")
    for rank in range(2):
        masks._check(folder, source, names, Pretend(rank, 2, 0, torch.device("cpu")), threads=2, train=True)
    assert [[index for index, _ in share] for share in looked] == [[0, 2, 4], [1, 3]]


# ---- scenes


def test_scenes_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for index in range(3):
        digest.update(scenes.scene.__wrapped__("val", index)[1].tobytes())
    assert digest.hexdigest() == MASKS_OF_THREE_SCENES
    image, mask = scenes.scene("train", 5)
    assert image.shape == (64, 96, 3) and image.dtype == np.uint8 and mask.shape == (64, 96)
    assert np.array_equal(image, scenes.scene.__wrapped__("train", 5)[0])
    assert not np.array_equal(mask, scenes.scene("val", 5)[1])


def test_predicting_ground_everywhere_has_the_documented_mean_iou():
    counts = np.bincount(np.concatenate([scenes.scene("val", n)[1].ravel() for n in range(100)]), minlength=6)
    ground = counts[0] / counts.sum()
    assert (counts > 0.02 * counts.sum()).all()
    assert ground == pytest.approx(0.80, abs=0.01) and 100 * ground / 6 == pytest.approx(13, abs=0.5)


def test_scenes_open_with_masks_and_without():
    found = opened("scenes", holdout=0.1)
    assert [len(part) for part in (found.train, found.choice, found.test)] == [900, 100, 100]
    pair = found.test.read(3)
    assert np.array_equal(pair.image_HWC, open_source("scenes", "", "val").read(3))
    assert np.array_equal(pair.mask_HW, scenes.scene("val", 3)[1]) and pair.mask_HW.dtype == np.int16
    assert open_source("auto", "scenes", in_chans=1).read(0).shape == (64, 96, 1)
    assert open_source("scenes", "").labels is None
    assert len(masks.open_test(options("scenes"), ALONE)) == 100
