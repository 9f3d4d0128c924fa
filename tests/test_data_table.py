"""Every row of the table of data sets in docs/data.md, with tiny data."""

import logging
import re
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from data import folders, images, splits
from data.folders import NoSplit
from data.sources import open_source
from options import FinetuneOptions
from tests.test_sources import labelled, png, put, shard

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
ROWS = {}


def row(layout):
    """Register a function `(tmp_path, text)` as the test of a row; `text()` returns what was logged."""

    def register(check):
        assert layout not in ROWS, layout
        ROWS[layout] = check
        return check

    return register


def rows_of_the_page():
    table = PAGE.read_text(encoding="utf-8").split("## What is accepted")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines]


def test_every_row_has_a_test_and_every_test_a_row():
    assert sorted(rows_of_the_page()) == sorted(ROWS)


@pytest.mark.parametrize("layout", rows_of_the_page())
def test_row(layout, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    ROWS[layout](tmp_path, lambda: caplog.text)


def several(root, *names, count=40):
    """Write `count` images to each of the folders."""
    return put(root, *[f"{name}/{number:03d}.png" for name in names for number in range(count)])


def classes_of(source):
    return {name: int(count) for name, count in zip(source.classes, np.bincount(source.labels), strict=True)}


def opened(root, **options):
    return splits.open_splits(FinetuneOptions(data_path=str(root), **options))


def refused(message, root, **options):
    with pytest.raises(ValueError, match=message):
        opened(root, **options)


# ---- folders ---------------------------------------------------------------------------------------------------------


@row("`DATA/train/CLASS/*`")
def _(root, text):
    several(root, "train/a", "train/b", "val/a", "val/b", "test/a", "test/b", count=2)
    for split in ("train", "val", "test"):
        source = open_source("auto", str(root), split)
        assert classes_of(source) == {"a": 2, "b": 2} and source.path(0).endswith(f"{split}/a/000.png")


@row("`DATA/CLASS/*`")
def _(root, text):
    assert classes_of(open_source("auto", str(several(root, "a", "b", count=2)))) == {"a": 2, "b": 2}
    assert "a folder for each class" in text()


@row("`DATA/*`")
def _(root, text):
    assert open_source("auto", str(put(root, "1.png", "2.png"))).labels is None and "a flat folder" in text()


@row("`DATA/a/*`, `DATA/b/c/*` (several depths)")
def _(root, text):
    several(root, "a", "b/c")
    assert open_source("auto", str(root)).labels is None
    refused("needs labels.*1 to 2 folders deep.*--class_list", root)


@row("`DATA/*` with `--class_list FILE`")
def _(root, text):
    several(root, "a", "b/deep", "c", count=2)
    (root / "classes.txt").write_text("b\na\n")
    source = open_source("auto", str(root), class_list=str(root / "classes.txt"))
    assert source.classes == ["b", "a"] and source.labels.tolist() == [0, 0, 1, 1]
    assert "left out: 1 folders that the class list does not name (c)" in text()


@row("`DATA/Train`, `DATA/Validation`, `DATA/valid`, `DATA/TEST`")
def _(root, text):
    for number, (val, test) in enumerate([("Validation", "TEST"), ("valid", "Testing"), ("VAL ", "test")]):
        place = several(root / str(number), "Train/a", "Train/b", f"{val}/a", f"{val}/b", f"{test}/a", f"{test}/b")
        found = opened(place)
        assert (len(found.train), len(found.choice), len(found.test), found.chosen_on) == (80, 80, 80, splits.VAL)
        assert f"/{val}/" in found.choice.path(0) and f"/{test}/" in found.test.path(0)


@row("`DATA/train2017`, `DATA/val_images`")
def _(root, text):
    several(root, "train2017", "val_images", count=2)
    assert open_source("auto", str(root)).path(0) == str(root / "train2017/000.png")
    assert open_source("auto", str(root), "val").path(0) == str(root / "val_images/000.png")


@row("`DATA/val`, `DATA/validation`")
def _(root, text):
    several(root, "train/a", "train/b", "val/a", "validation/a")
    refused("several folders of val images: 'val', 'validation'", root)


@row("`DATA/train/train/CLASS/*`, `DATA/NAME/train/CLASS/*`")
def _(root, text):
    several(root / "one", "train/train/a", "train/train/b", "val/val/a", "val/val/b", count=2)
    several(root / "two", "archive/data/train/a", "archive/data/train/b", "archive/data/val/a", count=2)
    several(root / "three", "photos/2024/a", "photos/2024/b", count=2)
    for place in ("one", "two", "three"):
        assert classes_of(open_source("auto", str(root / place))) == {"a": 2, "b": 2}
    for place in ("one", "two"):
        assert open_source("auto", str(root / place), "val", known=["a", "b"]).labels[0] == 0
    assert "below photos/2024" in text()


@row("`DATA/CLASS/*`, `DATA/val/CLASS/*`")
def _(root, text):
    several(root, "a", "b", "val/a", "val/b")
    found = opened(root)
    assert classes_of(found.train) == {"a": 40, "b": 40} and "/val/" in found.test.path(0)
    assert "no folder train; the folders of other splits (val) are left out" in text()


@row("`train`, no `val`, no `test`")
def _(root, text):
    several(root, "train/a", "train/b", count=200)
    found = opened(root)
    assert classes_of(found.test) == {"a": 20, "b": 20} and classes_of(found.choice) == {"a": 10, "b": 10}
    assert not set(found.train.names) & {*found.test.names, *found.choice.names} and len(found.train) == 340
    assert "test_share: 40 of 400 images are set aside, seed 0" in text()
    assert [*opened(root).test.names] == [*found.test.names]
    assert len(opened(root, test_share=0.5).test) == 200
    evaluated = splits.open_test(FinetuneOptions(data_path=str(root)), ["a", "b"])
    assert [*evaluated.names] == [*found.test.names]


@row("`train`, `val`")
def _(root, text):
    several(root, "train/a", "train/b", "val/a", "val/b")
    found = opened(root)
    assert (len(found.train), len(found.choice), len(found.test)) == (80, 80, 80)
    assert "best is chosen on the split val, which also evaluates" in text()
    found = opened(root, holdout=0.25)
    assert (len(found.train), len(found.choice), found.chosen_on) == (60, 20, splits.HELD_OUT)


@row("`train`, `val`, `test`")
def _(root, text):
    several(root, *[f"{split}/{name}" for split in ("train", "val", "test") for name in "ab"])
    found = opened(root)
    assert found.chosen_on == splits.VAL and len(found.train) == 80
    assert "/val/" in found.choice.path(0) and "/test/" in found.test.path(0)


@row("`val` without a class of `train`")
def _(root, text):
    several(root, "train/0", "train/90", "train/180", "val/0", "val/90")
    (root / "val" / "180").mkdir()
    found = opened(root)
    assert found.train.classes == ["0", "180", "90"] and sorted(set(found.test.labels.tolist())) == [0, 2]
    assert "1 of 3 classes have no val images, so nothing evaluates them: 180" in text()
    assert "listed" not in text()


@row("`val` with a class that `train` lacks")
def _(root, text):
    several(root, "train/a", "train/b", "val/a", "val/c")
    refused("val has images of classes that the training images do not have: c", root)


@row("`test` without labels")
def _(root, text):
    several(root, "train/a", "train/b", "test", count=30)
    found = opened(root)
    assert "/train/" in found.test.path(0) and "the 30 test images have no labels" in text()
    several(root, "val/a", "val/b", "test/unknown")
    assert "/val/" in opened(root).test.path(0)


@row("`val/Cat`, `val/cat ` (a blank), decomposed Unicode")
def _(root, text):
    composed, decomposed = (unicodedata.normalize(form, "Käse") for form in ("NFC", "NFD"))
    several(root, f"train/{composed}", "train/cat", "train/dog", f"val/{decomposed}", "val/Cat", "val/dog ")
    found = opened(root)
    names = dict(zip(found.test.names, found.test.labels, strict=True))
    assert [names[f"{folder}/000.png"] for folder in (decomposed, "Cat", "dog ")] == [
        found.train.classes.index(name) for name in (composed, "cat", "dog")
    ]


@row("two classes that differ only in Unicode form or blanks")
def _(root, text):
    several(root, *[f"train/{unicodedata.normalize(form, 'é')}" for form in ("NFC", "NFD")])
    refused(r"'e\\u0301' and '\\xe9' have the same name in other characters", root)


@row("class folder without images in `train`")
def _(root, text):
    several(root, "train/a", "train/b", "val/a", "val/b")
    (root / "train" / "c").mkdir()
    refused("class folders without images: c; remove them, or give a class_list", root)


@row("folder of a training run in `DATA`")
def _(root, text):
    several(root, "a", "b", count=2)
    before = open_source("auto", str(root))
    for run in ("runs/x", "a/run"):
        (root / run / "checkpoints").mkdir(parents=True)
        (root / run / "options.yaml").write_text("")
        put(root / run, "samples/1.png", "2.png")
    (root / "link").symlink_to(root / "runs")
    after = open_source("auto", str(root))
    assert [*after.names] == [*before.names] and after.fingerprint == before.fingerprint
    assert "left out: 3 folders of training runs (a/run, link/x, runs/x)" in text()


@row("`DATA/images/*`, `DATA/masks/*`")
def _(root, text):
    several(root, "images", "masks", count=3)
    assert [name.split("/")[0] for name in open_source("auto", str(root)).names] == ["images"] * 3
    assert "left out: 1 folders of masks beside images (masks)" in text()
    several(root / "yolo", "images/train", "images/val", "labels/train", count=3)
    assert open_source("auto", str(root / "yolo")).path(0) == str(root / "yolo/images/train/000.png")


@row("`.DS_Store`, `._a.jpg`, `__MACOSX`, `@eaDir`")
def _(root, text):
    put(root, "a.png", ".DS_Store", "._a.png", "__MACOSX/a.png", "@eaDir/a.png", ".cache/a.png")
    assert [*open_source("auto", str(root)).names] == ["a.png"]


@row("`.mp4`, `.txt` and other files")
def _(root, text):
    put(root, "a.png", "b/c.png")
    for name in ("1.MP4", "b/2.mp4", "notes.txt", "README"):
        (root / name).write_text("")
    assert len(open_source("auto", str(root))) == 2
    assert "left out: 4 files that are not images (2 .mp4, 1 .txt, 1 without suffix)" in text()


@row("`.heic`, `.heif`")
def _(root, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "SUFFIXES", images.SUFFIXES - set(images.HEIF))
        put(root, "a.jpg")
        for number in range(47):
            (root / f"{number}.HEIC").write_bytes(b"")
        assert len(open_source("auto", str(root))) == 1
        assert "left out: 47 files that are not images (47 .heic)" in text()
        assert "47 HEIF photographs (.heic) can be read with an optional package" in text()
        (root / "a.jpg").unlink()
        with pytest.raises(ValueError, match="no images in .*requirements/heif.txt"):
            open_source("auto", str(root))
    heif = pytest.importorskip("pillow_heif")
    pixels = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    heif.from_bytes("RGB", (24, 16), pixels.tobytes()).save(root / "b.heic", quality=100)
    source = open_source("auto", str(root))
    found = source.read([*source.names].index("b.heic"))
    assert found.shape == (16, 24, 3) and np.abs(found.astype(int) - pixels).max() < 8


# ---- lists -----------------------------------------------------------------------------------------------------------


def listing(root, *labels, name="train.txt"):
    """Write images and a list of them; each of `labels` is the end of a line."""
    put(root, *[f"{name}-{number}.png" for number in range(len(labels))])
    (root / name).write_text("".join(f"{name}-{number}.png{label}\n" for number, label in enumerate(labels)))
    return root / name


@row("`PATH`")
def _(root, text):
    path = listing(root, "", "")
    assert open_source("auto", str(path)).labels is None
    refused("needs labels.*the list has no labels", path)


@row("`PATH 3`")
def _(root, text):
    source = open_source("auto", str(listing(root, " 3", " 0", "\t3")))
    assert source.labels.tolist() == [3, 0, 3] and source.classes == ["0", "1", "2", "3"]
    assert "2 of 4 class numbers have no image: 1, 2" in text()


@row("`PATH cat`")
def _(root, text):
    source = open_source("auto", str(listing(root, "\tsea lion", "\tcat", "\tCat")))
    assert source.classes == ["Cat", "cat", "sea lion"] and source.labels.tolist() == [2, 1, 0]
    assert "names differ in capitals alone: Cat, cat" in text()


@row("`PATH 1` ... `PATH 5`, none 0")
def _(root, text):
    path = listing(root, *[f" {1 + number % 5}" for number in range(200)])
    assert open_source("auto", str(path)).labels.max() == 5  # pretraining does not use labels
    refused("labels are 1 to 5 and none is 0. --label_offset 1 makes 1 the first class; --label_offset 0", path)
    found = opened(path, label_offset=1)
    assert found.train.classes == ["1", "2", "3", "4", "5"] and np.bincount(found.test.labels).tolist() == [4] * 5
    assert opened(path, label_offset=0).train.classes == ["0", "1", "2", "3", "4", "5"]
    refused("label_offset 2: .* hold the label 1", path, label_offset=2)


@row(r"`PATH cat;dog`, `PATH cat\|dog`")
def _(root, text):
    for joined in ("\tcat;dog", "\tcat|dog", "\t1 2", "\t1,2"):
        path = listing(root, "\tcat" if "cat" in joined else "\t1", joined)
        source = open_source("auto", str(path))
        assert source.labels is None and source.classes is None
        refused("several labels of one image", path)


@row("`PATH -1`, `PATH 0.5`")
def _(root, text):
    for label in ("-1", "0.5"):
        with pytest.raises(ValueError, match=f"the label '{label}' is neither the number of a class"):
            open_source("auto", str(listing(root, " 0", f" {label}")))


@row("a label on some lines only")
def _(root, text):
    with pytest.raises(ValueError, match="2 of 3 images have a label, number 2 has none"):
        open_source("auto", str(listing(root, " 0", "", " 1")))


@row("one image with two labels")
def _(root, text):
    path = listing(root, " 0", " 1")
    path.write_text(path.read_text() + "train.txt-0.png 0\n")
    assert len(open_source("auto", str(path))) == 3 and "1 of 3 lines repeat an image" in text()
    path.write_text(path.read_text() + "train.txt-0.png 1\n")
    with pytest.raises(ValueError, match="train.txt-0.png is listed with the labels '0' and '1'"):
        open_source("auto", str(path))


@row("a heading, or commas between path and label")
def _(root, text):
    path = listing(root, " 0", " 1")
    path.write_text("image label\n" + path.read_text())
    with pytest.raises(ValueError, match="the first line is not the path of an image, found 'image': remove"):
        open_source("auto", str(path))
    with pytest.raises(ValueError, match="separated by a tab or spaces, not by a comma"):
        open_source("auto", str(listing(root, ",0", ",1")))


@row("`lists/train.txt`, `lists/val.txt`")
def _(root, text):
    train = listing(root, *[f" {number % 2}" for number in range(80)])
    val = listing(root, *[f" {number % 2}" for number in range(20)], name="val.txt")
    val.write_text(val.read_text() + "train.txt-3.png 1\n")
    found = opened(train, holdout=0.0)
    assert len(found.test) == 21 and "1 of 21 test images are also training images: train.txt-3.png" in text()


# ---- archives --------------------------------------------------------------------------------------------------------


def archive(root, *names, name="a.tar", **texts):
    """Write an archive of images, and of label files whose text is given by key."""
    members = {each: png(number) for number, each in enumerate(names)}
    members |= {key.replace("__", "."): text.encode() for key, text in texts.items()}
    shard(root / name, members)
    return str(root / name)


@row("`KEY.jpg`, `KEY.cls`")
def _(root, text):
    source = open_source("auto", archive(root, "d/0.JPG", "d/1.x.jpg", "e/0.jpg", **{"d/0.CLS": "2", "d/1.cls": "0\n"},
                                         **{"e/0.cls": "1"}))  # fmt: skip
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {
        "a.tar/d/0.JPG": 2, "a.tar/d/1.x.jpg": 0, "a.tar/e/0.jpg": 1
    }  # fmt: skip
    assert "labels from .cls files" in text()
    words = open_source("auto", archive(root, "0.jpg", "1.jpg", **{"0.cls": "dog", "1.cls": "cat"}))
    assert words.classes == ["cat", "dog"] and words.labels.tolist() == [1, 0]
    marked = {"0.cls": "\ufeff1\r\n", "1.cls": "\ufeff0"}
    assert open_source("auto", archive(root, "0.jpg", "1.jpg", **marked)).classes == ["0", "1"]
    assert "labels are words, numbered in alphabetical order: cat, dog" in text()


@row("`KEY.jpg`, `KEY.json`")
def _(root, text):
    texts = {"0.json": '{"label": 1, "width": 4}', "1.json": '{"label": 0}'}
    assert open_source("auto", archive(root, "0.jpg", "1.jpg", **texts)).labels.tolist() == [1, 0]
    assert 'labels from "label" in .json files' in text()
    assert open_source("auto", archive(root, "0.jpg", **{"0.json": '\ufeff{"label": 0}'})).labels.tolist() == [0]
    assert open_source("auto", archive(root, "0.jpg", **{"0.json": '{"width": 4}'})).labels is None
    assert "1 .json files without a label" in text()
    with pytest.raises(ValueError, match='0.json: "label" is a list, several labels of one image'):
        open_source("auto", archive(root, "0.jpg", **{"0.json": '{"label": [1, 2]}'}))
    with pytest.raises(ValueError, match="0.json is not JSON"):
        open_source("auto", archive(root, "0.jpg", **{"0.json": "{"}))


@row("`KEY.jpg`, `KEY.txt`")
def _(root, text):
    four = [f"{number}.jpg" for number in range(4)]
    texts = {f"{number}.txt": ("cat", "dog")[number % 2] for number in range(4)}
    assert open_source("auto", archive(root, *four, **texts)).labels.tolist() == [0, 1, 0, 1]
    captions = {f"{number}.txt": f"photo {number} of a cat" for number in range(4)}
    source = open_source("auto", archive(root, *four, **captions))
    assert source.labels is None and "4 .txt files with captions" in text()


@row("`CLASS/a.jpg`")
def _(root, text):
    source = open_source("auto", archive(root, "set/b/1.jpg", "set/a/1.jpg"))
    assert labelled(source) == {"a.tar/set/b/1.jpg": "b", "a.tar/set/a/1.jpg": "a"}
    assert "a folder for each class below set, no .cls, .json or .txt files" in text()


@row("`train/CLASS/a.jpg`, `val/CLASS/a.jpg`")
def _(root, text):
    path = archive(root, *[f"set/{split}/{name}/1.jpg" for split in ("train", "Val") for name in "ab"])
    for split, folder in (("train", "train"), ("val", "Val")):
        source = open_source("auto", path, split)
        assert labelled(source) == {f"a.tar/set/{folder}/{name}/1.jpg": name for name in "ab"}
    with pytest.raises(NoSplit, match="no test"):
        open_source("auto", path, "test")


@row("`data-train-000.tar`, `val/000.tar`")
def _(root, text):
    for number, name in enumerate(("data-train-000.tar", "val/000.tar", "test-000.tar")):
        archive(root, f"{number}.jpg", name=name)
    for number, split in enumerate(("train", "val", "test")):
        assert [each.split("/")[1] for each in open_source("wds", str(root), split).names] == [f"{number}.jpg"]


@row("`KEY.jpg`, `KEY.seg.png` (`mask`, `depth`, ...)")
def _(root, text):
    names = [f"{number:03d}.{end}" for number in range(24) for end in ("jpg", "seg.png", "mask.png")]
    source = open_source(
        "auto", archive(root, *names, **{f"{number:03d}.cls": str(number % 3) for number in range(24)})
    )
    assert len(source) == 24 and source.labels.tolist() == [number % 3 for number in range(24)]
    assert "left out: 48 members that are not images (24 .mask.png, 24 .seg.png)" in text()
    masks = open_source("auto", archive(root, "images/1.jpg", "masks/1.png"))
    assert [*masks.names] == ["a.tar/images/1.jpg"] and "1 masks in masks" in text()


@row("`s_1.000.jpg`, `s_1.001.jpg`, with labels")
def _(root, text):
    labels = {f"s_{scene}.{number:03d}.cls": str(number) for scene in (1, 2) for number in range(3)}
    names = [name.replace("cls", "jpg") for name in labels]
    with pytest.raises(ValueError, match=r"s_1.000.jpg and s_1.001.jpg have the same key 's_1'.*such as s_1_000.jpg"):
        open_source("auto", archive(root, *names, **labels))


@row("`a.jpg`, `a.png`")
def _(root, text):
    for labels in ({}, {"a.cls": "0"}):
        with pytest.raises(ValueError, match=r"a.jpg and a.png have the same key 'a'"):
            open_source("auto", archive(root, "a.jpg", "a.png", **labels))


@row("`IMG.1.jpg`, `IMG.2.jpg`, without labels")
def _(root, text):
    assert len(open_source("auto", archive(root, "IMG.1.jpg", "IMG.2.jpg"))) == 2


@row("one name twice, or names that differ in the suffix's capitals")
def _(root, text):
    path = archive(root, "a.jpg")
    with tarfile.open(path, "a") as more, tarfile.open(archive(root, "a.jpg", name="b.tar")) as other:
        member = other.getmember("a.jpg")
        more.addfile(member, other.extractfile(member))
    with pytest.raises(ValueError, match="holds a.jpg and a.jpg: which of them is meant"):
        open_source("auto", path)
    with pytest.raises(ValueError, match="holds a.jpg and a.JPG"):
        open_source("auto", archive(root, "a.jpg", "a.JPG"))
    with pytest.raises(ValueError, match="0.cls and 0.class label the same image"):
        open_source("auto", archive(root, "0.jpg", **{"0.cls": "1", "0.class": "2"}))


@row("a label on some images only")
def _(root, text):
    with pytest.raises(ValueError, match="1 of 2 images in the shards have no .cls file: 1.jpg"):
        open_source("auto", archive(root, "0.jpg", "1.jpg", **{"0.cls": "0"}))
    open_source("auto", archive(root, "0.jpg", **{"0.cls": "0", "7.cls": "1"}))
    assert "1 .cls files without an image (7)" in text()


@row("one key in two shards")
def _(root, text):
    for name in ("0.tar", "1.tar"):
        archive(root, "a.jpg", name=name, **{"a.cls": name[0]})
    source = open_source("wds", str(root))
    assert source.labels.tolist() == [0, 1] and "1 keys are in more than one shard" in text()


@row("`._a.jpg`, `__MACOSX/a.jpg`, `.cache/a.jpg`")
def _(root, text):
    path = archive(root, "d/a.jpg", "d/._a.jpg", "__MACOSX/d/a.jpg", "d/.cache/a.jpg", "./d/b.jpg")
    assert [*open_source("auto", path).names] == ["a.tar/d/a.jpg", "a.tar/d/b.jpg"]


@row("hard links, as in a tar of a folder with links")
def _(root, text):
    put(root / "set", "cat/0.png", "cat/1.png", "dog/2.png")
    for number in range(2):
        (root / "set" / "dog" / f"{number}.png").hardlink_to(root / "set" / "cat" / f"{number}.png")
    (root / "set" / "dog" / "3.png").symlink_to("2.png")
    with tarfile.open(root / "a.tar", "w") as archived:
        archived.add(root / "set", arcname=".")
    from_folder, source = open_source("auto", str(root / "set")), open_source("auto", str(root / "a.tar"))
    pixels = {name.removeprefix("a.tar/"): source.read(number) for number, name in enumerate(source.names)}
    assert [*pixels] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    for number, name in enumerate(from_folder.names[:5]):
        assert np.array_equal(pixels[name], from_folder.read(number)), name
    assert "left out: 1 members that are not images (1 links)" in text()


@row("a shard that is damaged, cut off or joined of several")
def _(root, text):
    one, other = (Path(archive(root, "a.jpg", "b.jpg", name=f"{name}.tar")) for name in "ab")
    one.write_bytes(one.read_bytes() + other.read_bytes())
    with pytest.raises(ValueError, match="is not a complete, uncompressed tar file: other bytes follow after 2 mem"):
        open_source("auto", str(one))


@row("`.tar.gz`, `.zip`")
def _(root, text):
    for name in ("a.tar.gz", "a.zip", "a.TGZ"):
        (root / name).write_bytes(b"")
        with pytest.raises(ValueError, match="is a compressed archive: unpack it"):
            open_source("auto", str(root / name))


# ---- parts of it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split, exact",
    [
        ("train", "train", True),
        (" Training ", "train", True),
        ("VALID", "val", True),
        ("val2017", "val", False),
        ("test-set", "test", False),
        ("trainset", "train", False),
        ("train_val", "", False),
        ("trains", "", False),
        ("contest", "", False),
    ],
)
def test_names_of_splits(name, split, exact):
    assert folders.split_named(name) == (split, exact)


def test_names_match_classes_only_where_one_can_be_meant():
    assert folders.match_classes(["Cat", "dog"], ["cat", "dog"]) == ({"dog": 1, "Cat": 0}, [])
    assert folders.match_classes(["A", "a"], ["a", "A"]) == ({"A": 1, "a": 0}, [])
    assert folders.match_classes(["Cat"], ["cat", "CAT"]) == ({}, ["Cat"])
    assert folders.match_classes(["x"], ["cat"]) == ({}, ["x"])
    with pytest.raises(ValueError, match="'cat' and 'cat ' are the same class name"):
        folders.match_classes(["cat", "cat "], ["cat"])
