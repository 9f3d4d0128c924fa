"""Packs contain the images of the source, can be resumed after an interruption, and refuse changed files."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data import packs
from data.images import shrink
from data.loader import Batches, TrainSamples, pretrain_transform
from data.packs import Recipe, open_pack
from data.sources import open_source
from tests.runs import assert_same_end, children, context, finish
from tools import pack

ROWS, COLUMNS = 30, 40


def write_image(path, seed, rows=ROWS, columns=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:rows, :columns]
    picture = np.stack([(x * 5 + seed * 40) % 256, (y * 7) % 256, (x * y + seed) % 256], axis=-1)
    Image.fromarray(picture.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Create a folder with two classes of 7 and 6 images, and a val split of 2 each; JPEG and PNG."""
    root = tmp_path / "images"
    for number in range(13):
        write_image(root / "train" / "ab"[number % 2] / f"{number:02d}{'.jpg' if number % 3 else '.png'}", number)
    for number in range(4):
        write_image(root / "val" / "ab"[number % 2] / f"{number}.jpg", 50 + number)
    return root


@pytest.fixture
def logged(monkeypatch):
    """Return the list of messages that the tool logs."""
    lines = []
    for level in ("info", "warning", "error"):
        monkeypatch.setattr(pack.log, level, lambda text, *words: lines.append(text % words if words else text))
    monkeypatch.setattr(pack, "log_to_terminal", lambda main: None)
    monkeypatch.setattr(pack, "SHARD_IMAGES", (4, 8192))  # several shards
    return lines


def packed(folder, target, *words):
    assert pack.main([str(folder), "--output", str(target), "--num_workers", "1", *words]) == 0
    return open_source("auto", str(target))


def images(source):
    return {name: source.read(number) for number, name in enumerate(source.names)}


@pytest.mark.parametrize(
    "words",
    [["--size", "0", "--quality", "0"], ["--size", "30", "--raw"], ["--size", "64", "--raw"], ["--size", "0", "--raw"]],
)
def test_what_need_not_shrink_comes_back_to_the_last_bit(folder, tmp_path, logged, words):
    of_folder, of_pack = open_source("auto", str(folder)), packed(folder, tmp_path / "pack", *words)
    assert list(of_pack.names) == list(of_folder.names)
    assert of_pack.classes == of_folder.classes == ["a", "b"]
    assert np.array_equal(of_pack.labels, of_folder.labels)
    for name, image in images(of_folder).items():
        assert np.array_equal(images(of_pack)[name], image), name


def test_shrunken_images_are_those_of_the_recipe(folder, tmp_path, logged):
    as_files = images(packed(folder, tmp_path / "files", "--size", "12", "--quality", "80"))
    as_pixels = images(packed(folder, tmp_path / "pixels", "--size", "12", "--raw"))
    for name, image in images(open_source("auto", str(folder))).items():
        small = shrink(image, 12)
        assert small.shape == (12, 16, 3)
        assert np.array_equal(as_pixels[name], small)
        file = io.BytesIO()
        Image.fromarray(small).save(file, "JPEG", quality=80, subsampling="4:2:0")
        assert np.array_equal(as_files[name], np.asarray(Image.open(file)))


def test_an_image_that_need_not_shrink_keeps_its_own_file_if_that_is_no_larger(folder, tmp_path, logged):
    source, stored = open_source("auto", str(folder)), packed(folder, tmp_path / "pack", "--size", "64")
    for number in range(len(source)):
        own = open(source.path(number), "rb").read()
        file = io.BytesIO()
        Image.fromarray(source.read(number)).save(file, "JPEG", quality=90, subsampling="4:2:0")
        smaller = min(own, file.getvalue(), key=len)
        assert np.array_equal(stored.read(number), np.asarray(Image.open(io.BytesIO(smaller))))


def test_shrinking_keeps_the_short_side_and_the_shape():
    assert shrink(np.zeros((30, 40, 3), np.uint8), 15).shape == (15, 20, 3)
    assert shrink(np.zeros((501, 334, 1), np.uint8), 256).shape == (384, 256, 1)


def test_the_val_split_is_packed_with_the_same_classes(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack")
    held_out = open_source("auto", str(tmp_path / "pack"), "val", class_list=["a", "b"])
    assert len(held_out) == 4
    assert held_out.classes == ["a", "b"]
    with pytest.raises(ValueError, match="other classes"):
        open_source("auto", str(tmp_path / "pack"), "val", class_list=["b", "a"])


def test_sources_without_files_are_packed_without_loss(tmp_path, logged):
    target = tmp_path / "digits"
    assert (
        pack.main(
            [
                "digits",
                "--output",
                str(target),
                "--in_chans",
                "1",
                "--size",
                "0",
                "--quality",
                "0",
                "--num_workers",
                "2",
            ]
        )
        == 0
    )
    source, stored = open_source("digits", "", in_chans=1), open_source("auto", str(target), in_chans=1)
    assert np.array_equal(stored.labels, source.labels)
    for number in range(0, len(source), 97):
        assert np.array_equal(stored.read(number), source.read(number))


def test_batches_of_a_pack_are_those_of_the_folder_and_resume_anywhere(folder, tmp_path, logged):
    """The guarantee of every source: a batch is a function of seed, epoch and position."""

    def batches(source, **more):
        samples = TrainSamples(source, pretrain_transform(16), 0, (1, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
        return Batches(samples, batch_size=3, seed=0, **more)

    stored = packed(folder, tmp_path / "pack", "--size", "0", "--raw")
    from_folder = list(batches(open_source("auto", str(folder))).epoch(1))
    for first in (0, 2):
        for each, expected in zip(batches(stored).epoch(1, first), from_folder[first:], strict=True):
            assert torch.equal(each.images, expected.images)
            assert torch.equal(each.index, expected.index)
            assert torch.equal(each.noise, expected.noise)


def test_several_processes_write_the_same_pack_as_one(folder, tmp_path, logged):
    packed(folder, tmp_path / "one")
    before = multiprocessing.active_children()
    assert pack.main([str(folder), "--output", str(tmp_path / "two"), "--num_workers", "2"]) == 0
    for path in (tmp_path / "one" / "train").iterdir():
        if path.name != packs.VERIFIED:
            assert path.read_bytes() == (tmp_path / "two" / "train" / path.name).read_bytes()
    assert multiprocessing.active_children() == before


def killed(self, shard):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_packing_process_ends_the_packing_with_advice(folder, tmp_path, logged, monkeypatch):
    monkeypatch.setattr(packs.Packing, "write", killed)
    assert pack.main([str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "2"]) == 1
    assert any("process was killed" in line and "fewer than --num_workers 2" in line for line in logged)
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    assert pack.main([str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "2"]) == 0


def test_packing_processes_end_with_the_one_that_began_them(folder, tmp_path):
    words = [str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "2"]
    packing = context.Process(target=pack_slowly, args=(words,))
    packing.start()
    until(lambda: len(children(packing.pid)) == 2)
    workers = children(packing.pid)
    packing.kill()
    packing.join(30)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))


def pack_slowly(words):
    multiprocessing.set_start_method("fork", force=True)
    packs.Packing.write = lambda self, shard: time.sleep(3)
    pack.SHARD_IMAGES = (4, 8192)
    pack.main(words)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupted_packing_resumes(folder, tmp_path, logged, monkeypatch):
    written, write = [], packs.Packing.write

    def stopped_after_two(self, shard):
        if len(written) == 2:
            (self.folder / f".{packs.shard_name(shard)}").write_bytes(b"half a sh")
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard)

    words = [str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "1"]
    monkeypatch.setattr(packs.Packing, "write", stopped_after_two)
    assert pack.main(words) == 130
    with pytest.raises(ValueError, match="incomplete.*resume"):
        open_source("auto", str(tmp_path / "pack"))
    monkeypatch.setattr(packs.Packing, "write", lambda self, shard: written.append(shard) or write(self, shard))
    assert pack.main(words) == 0
    assert written[:4] == [0, 1, 2, 3]
    assert any("2 of 4 shards are complete" in line for line in logged)
    packed(folder, tmp_path / "whole")
    for name in ("index.npy", "names.bin", "shard-00003.bin"):
        assert (tmp_path / "pack/train" / name).read_bytes() == (tmp_path / "whole/train" / name).read_bytes()
    assert not list((tmp_path / "pack/train").glob("*.json.*")) and not list(
        (tmp_path / "pack/train").glob("shard*.json")
    )
    assert pack.main(words) == 0
    assert any("packed already" in line for line in logged)


def test_resuming_with_another_recipe_or_other_images_is_refused(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack", "--size", "12")
    words = [str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "1"]
    assert pack.main([*words, "--size", "20"]) == 2
    assert "short_side 12 -> 20" in logged[-1]
    write_image(folder / "train/a/new.png", 99)
    assert pack.main([*words, "--size", "12"]) == 2
    assert "images 13 -> 14" in logged[-1]


def test_unreadable_images_are_left_out_and_named_up_to_the_limit(folder, tmp_path, logged):
    (folder / "train/a/00.png").write_bytes(b"no image")
    words = [str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "1"]
    assert pack.main([*words, "--max_bad_fraction", "0"]) == 2
    assert "1 of 13 images cannot be read" in logged[-1] and "00.png" in logged[-1]
    assert pack.main([*words, "--max_bad_fraction", "0.1"]) == 0
    assert any(line.startswith("left out: a/00.png") for line in logged)
    assert len(open_source("auto", str(tmp_path / "pack"))) == 12


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda train: os.truncate(train / "shard-00001.bin", 10), "shard-00001.bin has 10 bytes, not"),
        (lambda train: (train / "shard-00002.bin").unlink(), "shard-00002.bin is missing"),
        (lambda train: flip(train / "shard-00000.bin"), "shard-00000.bin has sha256 .* not"),
        (lambda train: flip(train / "index.npy"), "index.npy has sha256"),
        (lambda train: edit(train, version=7), "version 7, but this program reads version 1"),
        (lambda train: (train / "pack.json").write_text("{"), "pack.json is damaged"),
    ],
)
def test_a_pack_that_is_not_as_it_was_made_is_refused(folder, tmp_path, logged, damage, words):
    packed(folder, tmp_path / "pack")
    damage(tmp_path / "pack" / "train")
    with pytest.raises(ValueError, match=words):
        open_source("auto", str(tmp_path / "pack"))
    assert pack.main(["--verify", str(tmp_path / "pack")]) == 2


@pytest.mark.parametrize("name", ["pack.json", "names.bin"])
def test_a_pack_that_may_not_be_read_is_reported(folder, tmp_path, logged, monkeypatch, name):
    packed(folder, tmp_path / "pack")
    opened = io.open

    def refuse(path, *arguments, **more):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(io, "open", refuse)  # called by the methods of Path
    with pytest.raises(ValueError, match=f"cannot read .*{name}: Permission denied"):
        open_source("auto", str(tmp_path / "pack"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(train, **fields):
    manifest = json.loads((train / "pack.json").read_text())
    (train / "pack.json").write_text(json.dumps(manifest | fields))


def test_a_changed_source_is_refused_with_what_differs_until_the_pack_is_detached(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack")
    write_image(folder / "train/b/new.png", 99)
    (folder / "train/a/02.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 images were added \(b/new.png\), 1 are gone \(a/02.jpg\)"):
        open_source("auto", str(tmp_path / "pack"))
    assert pack.main(["--detach", str(tmp_path / "pack")]) == 0
    assert len(open_source("auto", str(tmp_path / "pack"))) == 13


def test_a_source_that_is_gone_or_only_touched_is_no_reason(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack")
    os.utime(folder / "train" / "a")
    assert len(open_source("auto", str(tmp_path / "pack"))) == 13
    shutil.rmtree(folder)
    assert len(open_source("auto", str(tmp_path / "pack"))) == 13


def test_verify_notices_an_image_that_was_edited_in_place(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack")
    assert pack.main(["--verify", str(tmp_path / "pack")]) == 0
    write_image(folder / "train/a/02.jpg", 77)
    assert pack.main(["--verify", str(tmp_path / "pack")]) == 2
    assert "1 images" in logged[-1] and "a/02.jpg" in logged[-1]


def test_hashes_are_taken_once_and_again_after_any_change(folder, tmp_path, logged, monkeypatch):
    packed(folder, tmp_path / "pack")
    hashed = []
    true = packs.sha256
    monkeypatch.setattr(packs, "sha256", lambda path: hashed.append(path.name) or true(path))
    open_pack(tmp_path / "pack" / "train")
    assert hashed == []
    os.utime(tmp_path / "pack" / "train" / "shard-00001.bin")
    open_pack(tmp_path / "pack" / "train")
    assert hashed == ["shard-00001.bin"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--size", "-1"], "size is -1"),
        (["--quality", "101"], "quality is 101"),
        (["--quality", "0"], "also give size 0"),
        (["--in_chans", "4"], "JPEG has 1 or 3 channels"),
        (["--num_workers", "0"], "must be at least 1"),
        (["--dataset", "webdataset"], "unknown dataset"),
    ],
)
def test_bad_arguments_are_refused(folder, tmp_path, logged, words, reason):
    assert pack.main([str(folder), "--output", str(tmp_path / "pack"), *words]) == 2
    assert reason in logged[-1]


def test_places_that_are_something_else_are_refused(folder, tmp_path, logged):
    assert pack.main([str(folder)]) == 2
    assert "--output" in logged[-1]
    (tmp_path / "pack" / "train").mkdir(parents=True)
    (tmp_path / "pack" / "train" / "thesis.txt").write_text("mine")
    assert pack.main([str(folder), "--output", str(tmp_path / "pack")]) == 2
    assert "thesis.txt" in logged[-1]
    assert pack.main(["--verify", str(folder)]) == 2
    assert "is not a pack" in logged[-1]
    inside = tmp_path / "pack" / "train" / "thesis.txt" / "pack"
    assert pack.main([str(folder), "--output", str(inside)]) == 2
    assert "Not a directory" in logged[-1]


def test_a_missing_val_split_is_left_out_and_one_of_other_classes_is_refused(folder, tmp_path, logged):
    for name in "ab":
        (folder / "val" / name).rename(folder / "val" / f"other {name}")
    assert pack.main([str(folder), "--output", str(tmp_path / "pack"), "--num_workers", "1"]) == 2
    assert logged[-1].startswith("error: no images in")
    shutil.rmtree(folder / "val")
    packed(folder, tmp_path / "pack")
    assert "the split val is not packed: no val images" in logged[-1]


def test_raw_pixels_of_other_channels_are_refused(folder, tmp_path, logged):
    packed(folder, tmp_path / "pack", "--raw")
    with pytest.raises(ValueError, match="raw images of 3 channels, not 1"):
        open_source("auto", str(tmp_path / "pack"), in_chans=1)


def test_a_recipe_stores_what_has_no_picture_mode_as_arrays():
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    stored, rows, columns = Recipe(short_side=0, quality=0, channels=7).store(array, None)
    assert (rows, columns) == (0, 0)
    assert np.array_equal(np.load(io.BytesIO(stored)), array)


def test_a_run_on_a_pack_ends_where_a_run_on_the_folder_ends(tmp_path, logged):
    words = ["digits", "--output", str(tmp_path / "pack"), "--in_chans", "1", "--num_workers", "1", "--raw"]
    assert pack.main(words) == 0
    finish(tmp_path / "a", "--epochs", 1)
    finish(tmp_path / "b", "--epochs", 1, "--data_path", tmp_path / "pack", "--num_workers", 1)
    assert_same_end(tmp_path / "a", tmp_path / "b")
