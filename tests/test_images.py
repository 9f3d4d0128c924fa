"""Reading one image: all kinds of files, and crops."""

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from data.images import (
    BadImage,
    classifier_crop_share,
    decode,
    eval_transform,
    is_image_name,
    pretrain_transform,
    read_image,
    read_stored,
    to_uint8,
)

GREY = np.array([[0, 60], [130, 255]], np.uint8)
RGB = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10


def write(path, picture, **options):
    picture.save(path, **options)
    return str(path)


def png16(path, values_HW):
    """Write a 16-bit greyscale PNG byte by byte, independent of libraries."""
    return write_png16(path, values_HW[..., None], 0)


def write_png16(path, values_HWC, colour_type):
    rows, columns = values_HWC.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", columns, rows, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return str(path)


@pytest.mark.parametrize("name", ["a.JPEG", "a.jpg", "x.y.PNG", "ü.tif", "a.npy", "a.gif"])
def test_names_of_images(name):
    assert is_image_name(name)


@pytest.mark.parametrize("name", ["a.txt", "jpg", ".jpg", "._a.jpg", "Thumbs.db", "a.jpg.part", "a"])
def test_names_of_other_files(name):
    assert not is_image_name(name)


def test_a_lossless_image_comes_back_as_it_is(tmp_path):
    image = read_image(write(tmp_path / "a.png", Image.fromarray(RGB)))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RGB)


def test_contents_decide_and_not_the_name(tmp_path):
    np.testing.assert_array_equal(read_image(write(tmp_path / "png.JPEG", Image.fromarray(RGB), format="PNG")), RGB)


def test_a_name_beyond_ascii(tmp_path):
    np.testing.assert_array_equal(read_image(write(tmp_path / "größe 写真.png", Image.fromarray(RGB))), RGB)


def test_cmyk_is_converted_by_pillow(tmp_path):
    path = write(tmp_path / "a.jpg", Image.fromarray(RGB).convert("CMYK"))
    np.testing.assert_array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))
    assert read_image(path, 1).shape == (2, 4, 1)
    assert read_image(path, 4)[..., 3].min() == 255


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_cie_lab_is_converted_to_srgb(tmp_path, channels):
    """Compared with the formulas of CIE L*a*b* (white D50) and sRGB."""
    lab = np.array([[[71, -12, -23], [61, 6, -21], [50, 0, 0]], [[100, 0, 0], [0, 0, 0], [60, 25, 20]]], float)
    stored = np.stack([lab[..., 0] * 2.55, lab[..., 1] % 256, lab[..., 2] % 256], axis=-1).round().astype(np.uint8)
    path = write(tmp_path / "a.tif", Image.frombytes("LAB", (3, 2), stored.tobytes()))
    y = (lab[..., 0] + 16) / 116
    ratios = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(ratios > 6 / 29, ratios**3, 3 * (6 / 29) ** 2 * (ratios - 4 / 29)) * (0.9642, 1, 0.8249)
    matrix = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    if channels == 1:
        expected = expected @ np.array([[0.299], [0.587], [0.114]])
    found = read_image(path, channels)
    np.testing.assert_allclose(found[..., :3], expected, atol=2)
    assert channels != 4 or (found[..., 3] == 255).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 0, b"\x00\x80\xff"])
def test_a_palette_gives_its_colours_whatever_is_transparent(tmp_path, transparency):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 200, 0, 0, 0, 90])
    path = write(tmp_path / "a.png", picture, **({} if transparency is None else {"transparency": transparency}))
    expected = np.array([[[255, 0, 0], [0, 200, 0]], [[0, 0, 90], [0, 200, 0]]], np.uint8)
    np.testing.assert_array_equal(read_image(path), expected)
    assert read_image(path, 4)[0, 0, 3] == (255 if transparency is None else 0)


def test_alpha_is_dropped_for_three_channels_and_kept_for_four(tmp_path):
    rgba = np.dstack([RGB, np.full((2, 4), 7, np.uint8)])
    path = write(tmp_path / "a.png", Image.fromarray(rgba))
    np.testing.assert_array_equal(read_image(path, 3), RGB)
    np.testing.assert_array_equal(read_image(path, 4), rgba)


def test_grey_with_alpha(tmp_path):
    picture = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY // 2)])
    path = write(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], GREY)
    np.testing.assert_array_equal(read_image(path, 3), np.repeat(GREY[..., None], 3, -1))
    np.testing.assert_array_equal(read_image(path, 4)[..., 3], GREY // 2)


def test_grey_becomes_three_equal_channels_and_colour_becomes_luma(tmp_path):
    path = write(tmp_path / "a.png", Image.fromarray(GREY))
    np.testing.assert_array_equal(read_image(path, 3), np.repeat(GREY[..., None], 3, -1))
    assert read_image(path, 4)[..., 3].min() == 255
    red = write(tmp_path / "red.png", Image.new("RGB", (1, 1), (255, 0, 0)))
    assert read_image(red, 1).tolist() == [[[76]]]  # 0.299 x 255


def test_one_bit_images_are_black_and_white(tmp_path):
    path = write(tmp_path / "a.png", Image.fromarray(GREY > 100))
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], [[0, 0], [255, 255]])


SIXTEEN = np.array([[0, 128, 129, 257], [10000, 32768, 65407, 65535]], np.uint16)
SCALED = np.array([[0, 0, 1, 1], [39, 128, 255, 255]], np.uint8)  # round(value / 257)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    path = png16(tmp_path / "a.png", SIXTEEN)
    np.testing.assert_array_equal(read_image(path, 1)[..., 0], SCALED)
    np.testing.assert_array_equal(read_image(path, 3), np.repeat(SCALED[..., None], 3, -1))


@pytest.mark.parametrize(
    "picture", [Image.fromarray(SIXTEEN), Image.fromarray(SIXTEEN.astype(np.int32))], ids=["I;16", "I"]
)
def test_sixteen_bit_tiff_in_both_of_pillows_modes(tmp_path, picture):
    np.testing.assert_array_equal(read_image(write(tmp_path / "a.tif", picture), 1)[..., 0], SCALED)


def test_sixteen_bit_colour_is_scaled_too(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 1 1 65535\n" + struct.pack(">HHH", 65535, 32768, 0))
    assert read_image(str(path)).tolist() == [[[255, 128, 0]]]


@pytest.mark.parametrize(("bands", "channels"), [(3, 3), (3, 1), (3, 4), (4, 3), (4, 4), (2, 1), (2, 3), (2, 4)])
def test_colour_png_of_sixteen_bits_keeps_them_all(tmp_path, bands, channels):
    """Pillow would drop the lower 8 bits. Grey with transparency, and colours with and without transparency."""
    values = np.arange(4 * 6 * bands, dtype=np.uint16).reshape(4, 6, bands) * 30
    path = tmp_path / "a.png"
    write_png16(path, values, {2: 4, 3: 2, 4: 6}[bands])
    found = read_image(str(path), channels, (0, 4095))
    colours = values[..., : bands - 1] if bands in (2, 4) else values
    expected = np.floor(colours * (255 / 4095) + 0.5).clip(0, 255).astype(np.uint8)
    if colours.shape[2] == 3 and channels == 1:
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    np.testing.assert_array_equal(found[..., : min(channels, 3)], np.broadcast_to(expected, (4, 6, min(channels, 3))))
    if channels == 4 and bands == 3:
        assert (found[..., 3] == 255).all()


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_tiff_is_scaled_by_its_white(tmp_path, white):
    values = np.array([[0, 0.5], [0.25, 1]], np.float32) * np.float32(white)
    image = read_image(write(tmp_path / "a.tif", Image.fromarray(values)), 1)
    np.testing.assert_array_equal(image[..., 0], [[0, 128], [64, 255]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e6])
def test_floats_without_a_known_white_are_bad(tmp_path, value):
    path = write(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), value, np.float32)))
    with pytest.raises(BadImage, match="pixel values from"):
        read_image(path)


def test_one_pixel(tmp_path):
    image = read_image(write(tmp_path / "a.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    assert pretrain_transform(8)(image).flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]
    assert eval_transform(8)(image).shape == (3, 8, 8)


def tagged(path, picture, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return write(path, picture, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "mode", "channels"),
    [("jpg", "RGB", 3), ("jpg", "L", 3), ("jpg", "CMYK", 3), ("jpg", "RGB", 1), ("png", "RGB", 3), ("png", "P", 3),
     ("png", "RGBA", 4), ("webp", "RGB", 3), ("tif", "RGB", 3), ("tif", "L", 1), ("tif", "I;16", 1),
     ("png", "I;16", 1)],
)  # fmt: skip
def test_exif_orientation_is_applied_in_every_format(tmp_path, suffix, mode, channels, orientation):
    """Compared with Pillow's exif_transpose, an independent implementation of the standard."""
    if mode == "I;16":
        picture = Image.fromarray(np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000)
    else:
        picture = Image.fromarray(smooth(16, 24)).convert(mode)
    path = tagged(tmp_path / f"a.{suffix}", picture, orientation, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(io.BytesIO(Path(path).read_bytes())) as opened:  # from a file, Pillow would not turn TIFF
        turned = ImageOps.exif_transpose(opened)
        expected = turned if mode == "I;16" else turned.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    found = read_image(path, channels)
    if mode == "I;16":
        expected = to_uint8(np.asarray(expected)[..., None], 1)
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(found.shape))
    assert (found.shape[0] > found.shape[1]) == (orientation > 4)


@pytest.mark.parametrize("before", ["IDAT", "IEND"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_colour_png_of_sixteen_bits(tmp_path, orientation, before):
    """The EXIF chunk may be before or after the pixels."""
    values = np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 800
    write_png16(tmp_path / "a.png", values, 2)
    data = (tmp_path / "a.png").read_bytes()
    exif = Image.Exif()
    exif[0x0112] = orientation
    tag = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    place = data.index(before.encode()) - 4
    data = data[:place] + struct.pack(">I", len(tag) - 4) + tag + struct.pack(">I", zlib.crc32(tag)) + data[place:]
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))  # the upper eight bits
    np.testing.assert_array_equal(decode(data, 3, "a.png") >> 8, expected)


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_an_impossible_orientation_is_none(tmp_path, orientation):
    picture = Image.fromarray(smooth(16, 24))
    assert read_image(tagged(tmp_path / "a.jpg", picture, orientation)).shape == (16, 24, 3)


def test_orientation_is_the_same_with_each_decoder_and_for_crops(tmp_path, monkeypatch):
    picture = Image.fromarray(smooth(16, 24))
    for orientation in range(1, 9):
        path = tagged(tmp_path / f"{orientation}.jpg", picture, orientation)
        found = read_image(path)
        lazy = read_stored(path, lazy=True)[2:9, 3:8]
        monkeypatch.setattr("data.images.jpeg_pixels", lambda data: None)
        np.testing.assert_array_equal(read_image(path), found)
        monkeypatch.undo()
        np.testing.assert_array_equal(lazy, found[2:9, 3:8])


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    path = write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(path).tolist() == [[[255, 0, 0]] * 3] * 2


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.arange(12, dtype=np.uint8).reshape(1, 2, 6), np.arange(12, dtype=np.uint8).reshape(1, 2, 6)),
        (np.full((2, 2, 6), 65535, np.uint16), np.full((2, 2, 6), 255)),
        (np.full((2, 2, 6), 257 * 3, ">u2"), np.full((2, 2, 6), 3)),
        (np.full((2, 2, 6), 0.5, np.float32), np.full((2, 2, 6), 128)),
        (np.ones((2, 2, 6), bool), np.full((2, 2, 6), 255)),
    ],
)
def test_arrays_of_any_number_of_channels(tmp_path, array, expected):
    np.save(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.npy"), 6), expected)


def test_a_flat_array_is_one_channel(tmp_path):
    np.save(tmp_path / "a.npy", GREY)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.npy"), 1)[..., 0], GREY)


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.zeros((4, 4, 5), np.uint8), r"shape \[4, 4, 5\] where \[H, W, 6\] is needed"),
        (np.zeros((0, 4, 6), np.uint8), "shape"),
        (np.zeros((4, 4, 6), np.complex64), "complex64"),
        (np.zeros((4, 4, 6, 1), np.uint8), "shape"),
        (np.zeros((6, 4, 5), np.uint8), r"shape \[6, 4, 5\] .* channels come last"),
        (np.full((4, 4, 6), -1, np.int64), "give --value_range"),
        (np.array([{"code": 1}]), "allow_pickle"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, array, reason):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(BadImage, match=reason):
        read_image(str(tmp_path / "a.npy"), 6)


def test_a_picture_where_an_array_is_needed(tmp_path):
    with pytest.raises(BadImage, match="6 channels need .npy"):
        read_image(write(tmp_path / "a.png", Image.fromarray(RGB)), 6)


def jpeg_bytes():
    stream = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def png_bomb():
    """Return a few bytes of a PNG file that declares 30000 x 30000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    data = stream.getvalue()
    header = b"IHDR" + struct.pack(">II", 30000, 30000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (b"not a picture, though named like one", "not an image of a known format"),
        (jpeg_bytes()[:1000], "truncated"),
        (jpeg_bytes()[:20], "."),
        (png_bomb(), "decompression bomb"),
        (b"\x93NUMPY\x01\x00", "."),
    ],
    ids=["empty", "text", "truncated", "header only", "bomb", "array header only"],
)
def test_files_that_are_no_image_are_bad_with_a_reason(tmp_path, data, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=reason) as error:
        read_image(str(path))
    assert error.value.path == str(path) and error.value.reason
    assert "0x" not in error.value.reason  # no memory addresses, because reasons are compared between runs


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("link.jpg", "gone.jpg", "folder.jpg"):
        with pytest.raises(BadImage):
            read_image(str(tmp_path / name))


# --- crops ------------------------------------------------------------------------------------------------------------


def smooth(rows, columns, channels=3):
    """Return an image similar to a photograph: low frequencies only."""
    small = torch.rand(1, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, (rows, columns), mode="bicubic").clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).byte().numpy()


def assert_close_to_pillows(found, expected):
    """Assert equality up to rounding; a crop shifted by one pixel would differ by one level on average."""
    difference = (found.int() - expected.int()).abs().float()
    assert found.shape == expected.shape and difference.max() <= 3 and difference.mean() < 0.1


def test_the_random_crop_is_torchvisions():
    image = smooth(90, 120)
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.3, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.PILToTensor(),
        ]
    )
    ours = pretrain_transform(32, min_scale=0.3, hflip=0)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = reference(Image.fromarray(image))
        torch.manual_seed(seed)
        found = ours(image)
        assert found.dtype == torch.uint8 and found.shape == (3, 32, 32)
        assert_close_to_pillows(found, expected)


def test_mirroring_happens_as_often_as_asked():
    image = np.zeros((8, 8, 1), np.uint8)
    image[:, 4:] = 255
    for hflip, low, high in ((0.0, 0, 0), (1.0, 100, 100), (0.5, 30, 70)):
        torch.manual_seed(0)
        flip = pretrain_transform(8, min_scale=1.0, hflip=hflip)
        mirrored = sum(bool(flip(image)[0, 0, 0] == 255) for _ in range(100))
        assert low <= mirrored <= high


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("make", [pretrain_transform, eval_transform])
def test_any_number_of_channels_and_rectangles(channels, make):
    image = np.full((50, 70, channels), np.arange(channels) * 30, np.uint8)
    found = make((16, 24))(image)
    assert found.shape == (channels, 16, 24) and found.dtype == torch.uint8
    assert found.flatten(1).float().mean(1).tolist() == [30.0 * channel for channel in range(channels)]


def test_a_read_only_array_is_fine_and_stays_untouched():
    image = np.asarray(Image.fromarray(smooth(40, 40)))
    assert not image.flags.writeable
    pretrain_transform(40, min_scale=1.0)(image), eval_transform(40)(image).zero_()
    np.testing.assert_array_equal(image, smooth(40, 40))


@pytest.mark.parametrize("rows, columns", [(300, 400), (400, 300), (256, 256), (100, 150)])
def test_evaluation_crops_as_torchvision_does(rows, columns):
    image = smooth(rows, columns)
    reference = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.PILToTensor(),
        ]
    )
    assert_close_to_pillows(eval_transform(224)(image), reference(Image.fromarray(image)))


def test_evaluation_leaves_an_image_of_the_right_size_alone():
    image = smooth(32, 48)
    np.testing.assert_array_equal(eval_transform((32, 48))(image).permute(1, 2, 0).numpy(), image)


@pytest.mark.parametrize(("size", "inner"), [(32, 36), (224, 256)])
def test_mae_evaluation_also_resizes_and_crops_an_image_of_the_right_size(size, inner):
    """MAE's build_transform: Resize(int(size / (224 / 256)), bicubic), CenterCrop(size)."""
    image = smooth(size, size)
    reference = transforms.Compose(
        [
            transforms.Resize(inner, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
    found = eval_transform(size, classifier_crop_share((size, size)), "mae")(image)
    assert_close_to_pillows(found, reference(Image.fromarray(image)))
    assert (found.permute(1, 2, 0).numpy() != image).any()
    other = smooth(size + 9, size + 30)
    assert torch.equal(eval_transform(size, eval_crop="mae")(other), eval_transform(size)(other))


def test_an_unknown_evaluation_crop_is_refused():
    with pytest.raises(ValueError, match="eval_crop is 'MAE'; it can be keep_size, mae"):
        eval_transform(32, eval_crop="MAE")


def test_evaluation_of_rectangles_takes_the_middle():
    columns = np.repeat(np.arange(240, dtype=np.uint8)[None, :, None], 70, 0)
    found = eval_transform((56, 112), crop_share=0.8)(
        columns
    )  # 70 x 240 is resized to 70 x 240, of which 56 x 112 is cut
    np.testing.assert_array_equal(found[0, 0].numpy(), np.arange(64, 176))


def test_pillow_images_are_taken_too():
    image = smooth(30, 40)
    assert torch.equal(eval_transform(16)(Image.fromarray(image)), eval_transform(16)(image))
    assert eval_transform(16)(Image.fromarray(image).convert("L")).shape == (1, 16, 16)
