"""Training on a folder that contains unusual and invalid image files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.runs import Training, assert_same_end, finish, losses

GOOD, SIZE = 40, (16, 16, 3)
WORDS = "--dataset folder --in_chans 3 --total_batch_size 13 --epochs 1 --save_steps 1".split()


def picture(seed=0, shape=SIZE, dtype=np.uint8):
    """Return random pixels."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def encoded(image, kind, **how):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def enormous():
    """Return a PNG file whose header declares 30000 x 30000 pixels."""
    data = encoded(Image.fromarray(picture()), "PNG")
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def turned():
    """Return EXIF data that declares a rotation by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


COLOUR = Image.fromarray(picture(1))
ODD = {  # unusual, but valid
    "a PNG named.JPEG": encoded(COLOUR, "PNG"),
    "cmyk.jpg": encoded(COLOUR.convert("CMYK"), "JPEG"),
    "palette.png": encoded(COLOUR.convert("P"), "PNG", transparency=0),
    "alpha.png": encoded(COLOUR.convert("RGBA"), "PNG"),
    "sixteen bits.png": encoded(Image.fromarray(picture(2, SIZE[:2], np.uint16)), "PNG"),
    "one pixel.png": encoded(Image.fromarray(picture(3, (1, 1, 3))), "PNG"),
    "turned.jpg": encoded(COLOUR, "JPEG", exif=turned()),
    "übergröße \u56fe.png": encoded(COLOUR, "PNG"),
    "moving.gif": encoded(COLOUR, "GIF", save_all=True, append_images=[Image.fromarray(picture(4))]),
}
BROKEN = {
    "empty.jpg": b"",
    "cut off.jpg": encoded(Image.fromarray(picture(5, (64, 64, 3))), "JPEG")[:900],
    "cut off.png": encoded(Image.fromarray(picture(5, (64, 64, 3))), "PNG")[:900],
    "words.jpg": b"not a picture at all",
    "header only.jpg": encoded(COLOUR, "JPEG")[:20],
    "enormous.png": enormous(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "all"
    path.mkdir()
    for number in range(GOOD):
        Image.fromarray(picture(number)).save(path / f"{number:02}.png")
    for name, data in (ODD | BROKEN).items():
        (path / name).write_bytes(data)
    (path / "link.jpg").symlink_to("nowhere.jpg")
    (path / "folder.jpg").mkdir()  # a folder with the extension of an image
    return path


def listed(run):
    """Return the file names in bad_images.txt with the reasons."""
    lines = (run / "bad_images.txt").read_text().splitlines()
    return {line.split("\t")[0].rpartition("/")[2]: line.split("\t")[1] for line in lines}


def test_every_kind_of_image_is_used_or_replaced_and_listed_by_any_loader(folder, tmp_path):
    """An epoch has 4 steps of 13 images and leaves out 4 of 56: up to 3 invalid files may not be listed."""
    words = [*WORDS, "--data_path", folder, "--max_bad_fraction", 0.2]
    for name, workers in (("here", 0), ("worker", 1)):
        said = finish(tmp_path / name, *words, "--num_workers", workers)
        assert "Traceback" not in said
    found = listed(tmp_path / "here")
    assert set(found) <= {*BROKEN, "link.jpg"} and len(found) >= len(BROKEN) - 3
    assert all(found.values())
    assert found == listed(tmp_path / "worker")
    assert_same_end(tmp_path / "here", tmp_path / "worker")
    assert losses(tmp_path / "here") == losses(tmp_path / "worker")


def test_more_of_them_than_allowed_end_the_run_with_their_names(folder, tmp_path):
    training = Training(tmp_path / "run", *WORDS, "--data_path", folder, "--max_bad_fraction", 0.01)
    assert training.wait() == 2
    assert "images cannot be read, more than --max_bad_fraction 0.01 allows" in training.stderr
    assert any(name in training.stderr for name in BROKEN) and "Traceback" not in training.stderr
