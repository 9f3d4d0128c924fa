"""Sources: which files are found, how they are labelled, and the messages when something is wrong."""

import hashlib
import io
import json
import logging
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from data.images import BadImage
from data.sources import IMAGENET100, TORCHVISION, Names, open_source, read_class_list


def put(root, *names, size=(4, 3)):
    """Write tiny images with different grey levels."""
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (shade,) * 3).save(path, "PNG")
    return root


def labelled(source):
    return dict(zip(source.names, [source.classes[label] for label in source.labels], strict=True))


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_kept_whatever_they_hold():
    given = ["", "a/b.jpg", "größe.png", "new\nline.jpg", os.fsdecode(b"not-utf8-\xff.jpg"), ""]
    names = Names(given)
    assert list(names) == given and len(names) == 6
    assert names[-2] == given[-2] and names[1:3] == given[1:3]
    assert list(pickle.loads(pickle.dumps(names))) == given
    with pytest.raises(IndexError):
        names[6]


def test_a_million_names_are_two_objects():
    names = Names(f"n01440764/n01440764_{number:05d}.JPEG" for number in range(100_000))
    assert len(pickle.dumps(names)) < 100_000 * 40
    assert names[99_999] == "n01440764/n01440764_99999.JPEG"


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "train/"])
def test_a_folder_for_each_class(tmp_path, caplog, below):
    put(tmp_path, f"{below}cat/2.png", f"{below}dog/1.JPEG", f"{below}cat/1.png", f"{below}ant/x.webp")
    (tmp_path / below / "cat" / "notes.txt").write_text("not an image")
    with caplog.at_level(logging.INFO):
        source = open_source("auto", str(tmp_path))
    assert list(source.names) == ["ant/x.webp", "cat/1.png", "cat/2.png", "dog/1.JPEG"]
    assert source.classes == ["ant", "cat", "dog"] and source.labels.tolist() == [0, 1, 1, 2]
    assert source.read(1).shape == (3, 4, 3) and source.read(1)[0, 0, 0] == 2
    assert "4 images, 3 classes (a folder for each class)" in caplog.text


def test_train_and_val_are_found_beside_each_other(tmp_path):
    put(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/9.png", "val/b/9.png")
    assert list(open_source("folder", str(tmp_path)).names) == ["a/1.png", "b/1.png"]
    assert list(open_source("folder", str(tmp_path), "val").names) == ["a/9.png", "b/9.png"]


def test_without_a_val_folder_there_is_no_val(tmp_path):
    with pytest.raises(
        ValueError, match="no val images: .* has no folder val or validation or valid or test; it holds 2 f"
    ):
        open_source("folder", str(put(tmp_path, "a/1.png", "b/1.png")), "val")


def test_a_class_named_train_is_a_class(tmp_path):
    source = open_source("auto", str(put(tmp_path, "bus/1.png", "train/1.png", "test/1.png")))
    assert source.classes == ["bus", "test", "train"]


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["train/1.png", "train/2.png", "val/1.png", "labels/1.csv.png.txt"]]
)
def test_a_flat_folder_has_no_labels(tmp_path, caplog, files):
    with caplog.at_level(logging.INFO):
        source = open_source("auto", str(put(tmp_path, *files)))
    assert list(source.names) == ["1.png", "2.png"]
    assert source.labels is None and source.classes is None
    assert "2 images, no labels (a flat folder)" in caplog.text


@pytest.mark.parametrize(
    "files, depths",
    [
        (["2024/may/1.png", "2025/1.png"], "1 to 2"),
        (["a/1.png", "2.png"], "0 to 1"),
        (["a/b/1.png", "c/d/1.png"], "2 to 2"),
    ],
)
def test_nested_folders_are_not_taken_for_classes(tmp_path, caplog, files, depths):
    with caplog.at_level(logging.INFO):
        source = open_source("auto", str(put(tmp_path, *files)))
    assert list(source.names) == sorted(files) and source.labels is None
    assert f"images lie {depths} folders deep" in caplog.text


def test_one_folder_is_no_class(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        source = open_source("auto", str(put(tmp_path, "photos/1.png", "photos/2.png")))
    assert list(source.names) == ["photos/1.png", "photos/2.png"] and source.labels is None
    assert "all in one folder, photos, which is not taken for a class" in caplog.text


def test_hidden_files_and_folders_are_skipped_and_broken_links_are_not(tmp_path):
    put(tmp_path, "1.png", "._1.png", ".cache/2.png")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    source = open_source("auto", str(tmp_path))
    assert list(source.names) == ["1.png", "link.jpg", "self.jpg"]
    for index, reason in ((1, "No such file"), (2, "Too many levels")):
        with pytest.raises(BadImage, match=reason):
            source.read(index)


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    put(tmp_path, "store/1.png", "data/b/2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store")
    assert list(open_source("auto", str(tmp_path / "data")).names) == ["a/1.png", "b/2.png"]
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    assert list(open_source("auto", str(tmp_path / "data")).names) == ["a/1.png", "b/2.png"]


def test_a_file_that_vanishes_is_a_bad_image(tmp_path):
    source = open_source("auto", str(put(tmp_path, "1.png")))
    (tmp_path / "1.png").unlink()
    with pytest.raises(BadImage) as error:
        source.read(0)
    assert error.value.path == str(tmp_path / "1.png")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is a file and not a folder"),
        (lambda folder: folder.mkdir(), "no images in .*it holds nothing"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.csv").write_text(""), (folder / "b").mkdir()),
            "it holds 1 .csv, 1 folders",
        ),
    ],
)
def test_data_paths_without_images(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_source("auto", str(tmp_path / "data"))


@pytest.mark.parametrize("forbidden", ["train/b", "train", ""])
def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, forbidden):
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.samefile(path, tmp_path / forbidden):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="cannot read .*: Permission denied"):
        open_source("auto", str(tmp_path))


def test_no_data_path():
    with pytest.raises(ValueError, match="give --data_path"):
        open_source("auto", "")
    with pytest.raises(ValueError, match="give --data_path"):
        open_source("folder", "")


@pytest.mark.parametrize("dataset", ["hfids/imagenet", "tfds/cifar10"])
def test_streams_are_refused(dataset):
    with pytest.raises(ValueError, match="cannot be resumed"):
        open_source(dataset, "")


def test_an_unknown_dataset_gets_the_nearest_name():
    with pytest.raises(ValueError, match="unknown dataset 'digit'; did you mean 'digits'"):
        open_source("digit", "")


def test_more_channels_than_pictures_have_need_arrays(tmp_path):
    with pytest.raises(ValueError, match="in_chans 6 needs .npy arrays"):
        open_source("auto", str(put(tmp_path, "1.png")), in_chans=6)
    np.save(tmp_path / "2.npy", np.full((3, 4, 6), 9, np.uint8))
    source = open_source("auto", str(tmp_path), in_chans=6)
    assert source.read(1).shape == (3, 4, 6)


def test_the_fingerprint_knows_names_and_labels_and_not_the_place(tmp_path):
    one, two = put(tmp_path / "one", "a/1.png", "b/1.png"), put(tmp_path / "two", "a/1.png", "b/1.png")
    same = open_source("auto", str(one)).fingerprint
    assert same == open_source("auto", str(two)).fingerprint
    put(two, "b/2.png")
    assert same != open_source("auto", str(two)).fingerprint
    listed = (
        open_source("auto", str(one), class_list=[]).fingerprint,
        open_source("folder", str(one), class_list=["b", "a"]),
    )
    assert listed[0] == same and listed[1].fingerprint != same
    expected = hashlib.sha256(b"a/1.png\0b/1.png\0" + np.array([0, 1], "<i8").tobytes()).hexdigest()
    assert same == expected  # written into checkpoints: it must not change between versions


# --- class lists ------------------------------------------------------------------------------------------------------


def test_the_default_list_is_the_one_that_most_work_uses():
    data = IMAGENET100.read_bytes()
    assert hashlib.sha256(data).hexdigest() == "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"
    assert len(data.split()) == 100


def test_imagenet100_by_its_word(tmp_path, caplog):
    ids = IMAGENET100.read_text().split()
    put(tmp_path, *[f"train/{name}/{name}_1.JPEG" for name in ids], "train/n00000000/other.JPEG")
    with caplog.at_level(logging.INFO):
        source = open_source("auto", str(tmp_path), class_list="imagenet100")
    assert source.classes == ids and source.labels.tolist() == list(range(100))
    assert "sha256 5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07" in caplog.text
    assert source.fingerprint != open_source("auto", str(tmp_path)).fingerprint


def test_a_class_list_gives_the_order_of_labels(tmp_path):
    put(tmp_path, "a/1.png", "b/1.png", "c/deeper/1.png", "c/0.png")
    (tmp_path / "list.txt").write_text("c\n\na\n")
    expected = {"c/0.png": "c", "c/deeper/1.png": "c", "a/1.png": "a"}
    assert labelled(open_source("auto", str(tmp_path), class_list=str(tmp_path / "list.txt"))) == expected
    source = open_source("auto", str(tmp_path), class_list=("c", "a"))
    assert labelled(source) == expected and source.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "x"], "1 of the 2 listed classes have no folder in .*: x"),
        (["a", "empty"], "1 of the 2 listed classes have no images in .*: empty"),
        (["a", "a"], "names a more than once"),
        ("nowhere.txt", "neither the word imagenet100 nor a file"),
    ],
)
def test_class_lists_that_do_not_fit(tmp_path, names, message):
    put(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_source("auto", str(tmp_path), class_list=names)


def test_a_class_list_may_hold_any_name_and_begin_with_a_mark(tmp_path):
    put(tmp_path, "a/1.png", "Käse/1.png")
    (tmp_path / "list.txt").write_bytes("\ufeffKäse\r\na\r\n".encode())
    assert open_source("auto", str(tmp_path), class_list=str(tmp_path / "list.txt")).classes == ["Käse", "a"]
    (tmp_path / "list.txt").write_text("x\u2028y\nz\x85z\n", encoding="utf-8")  # characters at which splitlines splits
    assert read_class_list(str(tmp_path / "list.txt"))[0] == ["x\u2028y", "z\x85z"]


def test_lists_that_may_not_be_read(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png")
    (tmp_path / "list.txt").write_text("a\n")

    def refuse(path, **more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    for words in ({"class_list": str(tmp_path / "list.txt")}, {"dataset": str(tmp_path / "list.txt")}):
        with pytest.raises(ValueError, match="cannot read the list .*list.txt: Permission denied"):
            open_source(**{"dataset": "auto", "data_path": str(tmp_path)} | words)


def test_an_empty_class_list_file(tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        open_source("auto", str(put(tmp_path, "a/1.png")), class_list=str(tmp_path / "list.txt"))


def test_a_class_list_is_for_folders():
    with pytest.raises(ValueError, match="does not apply to dataset 'digits'"):
        open_source("digits", "", class_list="imagenet100")


# --- list files -------------------------------------------------------------------------------------------------------


def listed(tmp_path, text, **options):
    (tmp_path / "train.txt").write_text(text, encoding=options.pop("encoding", "utf-8"))
    return open_source(str(tmp_path / "train.txt"), "", **options)


def test_a_list_of_paths(tmp_path):
    put(tmp_path, "x/1.png", "y/a b.png", "x/2.png")
    source = listed(tmp_path, "x/2.png\n\n  y/a b.png\r\nx/1.png\n")
    assert list(source.names) == ["x/2.png", "y/a b.png", "x/1.png"] and source.labels is None
    assert source.read(1)[0, 0, 0] == 1
    assert list(open_source("auto", str(tmp_path / "train.txt")).names) == list(source.names)


@pytest.mark.parametrize("text", ["1.png 3\nmy dog.png 0\n", "1.png\t3\nmy dog.png\t0\n", "1.png   3 \nmy dog.png\t0"])
def test_numbers_are_labels_as_they_stand(tmp_path, text):
    source = listed(put(tmp_path, "1.png", "my dog.png"), text)
    assert list(source.names) == ["1.png", "my dog.png"]
    assert source.labels.tolist() == [3, 0] and source.classes == ["0", "1", "2", "3"]


def test_words_are_labels_in_alphabetical_order(tmp_path):
    source = listed(put(tmp_path, "1.png", "2.png", "3.png"), "1.png\tsea lion\n2.png\tant\n3.png\tsea lion\n")
    assert source.labels.tolist() == [1, 0, 1] and source.classes == ["ant", "sea lion"]


def test_a_list_with_a_byte_order_mark(tmp_path):
    assert list(listed(put(tmp_path, "ü.png"), "ü.png\n", encoding="utf-8-sig").names) == ["ü.png"]


def test_paths_are_relative_to_the_data_path_or_to_the_list_or_absolute(tmp_path):
    put(tmp_path / "store", "a/1.png")
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "train.txt"
    path.write_text("a/1.png\n")
    assert open_source(str(path), str(tmp_path / "store")).read(0).shape == (3, 4, 3)
    path.write_text("../store/a/1.png\n")
    assert open_source("auto", str(path)).read(0).shape == (3, 4, 3)
    path.write_text(f"{tmp_path}/store/a/1.png\n")
    assert open_source("auto", str(path)).read(0).shape == (3, 4, 3)


def test_an_image_is_repeated_however_its_path_is_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    put(tmp_path, "x/1.png", "2.png")
    listed(tmp_path, f"x/1.png\n./x/1.png\nx/../2.png\n{tmp_path}//x/1.png\n2.png\n")
    assert "3 of 5 lines repeat an image" in caplog.text
    with pytest.raises(ValueError, match=r"\./x/1\.png is listed with the labels 'a' and 'b'"):
        listed(tmp_path, "x/1.png a\n./x/1.png b\n")


def test_the_val_list_is_beside_the_train_list(tmp_path):
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "my_val.txt").write_text("2.png\n")
    (tmp_path / "my_train.txt").write_text("1.png\n")
    assert list(open_source(str(tmp_path / "my_train.txt"), "", "val").names) == ["2.png"]
    with pytest.raises(ValueError, match="no val images"):
        open_source(str(tmp_path / "my_val.txt"), "", "val")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("9.png\n8.png\n", "none of the first images exists, such as .*9.png"),
        ("1.png 3\n1.png\n", "1 of 2 images have a label, number 2 has none"),
        ("1.png 99999999\n", "label 99999999 is too large"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        listed(put(tmp_path, "1.png"), text)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source("auto", str(tmp_path / "train.txt"))


# --- embedded and public data sets ------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all():
    train, val = open_source("digits", "", in_chans=1), open_source("auto", "digits", "val", in_chans=1)
    assert len(train) == 1352 and len(val) == 445
    assert not set(train.names) & set(val.names) and len({*train.names, *val.names}) == 1797
    shares = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert (0.24 < shares).all() and (shares <= 0.25).all()
    assert list(val.names[:3]) == ["digits/0003", "digits/0007", "digits/0013"]
    assert train.classes == [str(digit) for digit in range(10)]


def test_digits_are_scaled_to_bytes():
    from sklearn.datasets import load_digits

    source = open_source("digits", "", in_chans=1)
    number = int(source.names[5].split("/")[1])
    np.testing.assert_array_equal(source.read(5)[..., 0], np.round(load_digits().images[number] * 15.9375))
    assert source.labels[5] == load_digits().target[number]
    assert open_source("digits", "").read(5).shape == (8, 8, 3)


def fake_cifar(root):
    """Write CIFAR-10 as torchvision unpacks it, with ten images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    for number, name in enumerate(names):
        data = np.full((2, 3072), number, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [number % 3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_torchvisions_data_sets_by_name(tmp_path, monkeypatch):
    fake_cifar(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train, val = open_source("torch/cifar10", str(tmp_path)), open_source("torch/CIFAR10", str(tmp_path), "val")
    assert (
        len(train) == 10
        and train.labels.tolist() == [0, 9, 1, 9, 2, 9, 0, 9, 1, 9]
        and train.classes == list("abcdefghij")
    )
    assert train.read(4).shape == (32, 32, 3) and train.read(4).mean() == 2
    assert len(val) == 2 and val.read(0).mean() == 5
    assert open_source("torch/cifar10", str(tmp_path), in_chans=1).read(0).shape == (32, 32, 1)
    assert train.fingerprint != val.fingerprint


def test_every_torchvision_name_is_a_class_that_takes_the_options():
    for name, (class_name, splits) in TORCHVISION.items():
        maker = getattr(torchvision.datasets, class_name)
        for asks in splits.values():
            for ask in asks:
                with pytest.raises(RuntimeError, match="(?i)not found|corrupted"):  # and not: unknown option or split
                    maker(root=f"/nonexistent/{name}", download=False, **ask)


def test_a_torchvision_data_set_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="torch/cifar10 cannot be opened .*To fetch it: python -c .*CIFAR10"):
        open_source("torch/cifar10", str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'torch/cifar100'"):
        open_source("torch/cifar1000", str(tmp_path))
    with pytest.raises(ValueError, match="needs --data_path"):
        open_source("torch/mnist", "")


def test_hugging_face_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install -r requirements/data.txt"):
        open_source("hfds/cifar10", "")


def test_a_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    data, cache = (
        put(tmp_path / "data", "train/b/1.png", "train/a/2.png", "validation/a/3.png"),
        str(tmp_path / "cache"),
    )
    (data / "train" / "b" / "1.png").write_bytes(b"broken")
    datasets.disable_progress_bars()
    source = open_source(f"hfds/{data}", cache)
    assert len(source) == 2 and source.classes == ["a", "b"] and sorted(source.labels.tolist()) == [0, 1]
    good = source.labels.tolist().index(0)
    assert source.read(good).shape == (3, 4, 3) and source.read(good)[0, 0, 0] == 1
    with pytest.raises(BadImage, match="not an image"):
        source.read(1 - good)
    assert len(open_source(f"hfds/{data}", cache, "val")) == 1
    with pytest.raises(ValueError, match="none of them is for extra"):
        open_source(f"hfds/{data}", cache, "extra")
    with pytest.raises(ValueError, match="hfds/.*nowhere cannot be opened"):
        open_source(f"hfds/{tmp_path}/nowhere", cache)


# --- tar shards -------------------------------------------------------------------------------------------------------


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def webdataset(root):
    for number in range(2):
        members = {}
        for row in range(2):
            key = f"sample{row}"
            members |= {
                f"{key}.png": png(10 * number + row),
                f"{key}.cls": str(number + row).encode(),
                f"{key}.json": b"{}",
            }
        shard(root / f"my-train-00{number}.tar", members)
    shard(root / "my-val-000.tar", {"s.png": png(99), "s.cls": b"1"})


def test_webdataset_shards_are_read_in_any_order(tmp_path):
    webdataset(tmp_path)
    source = open_source("wds", str(tmp_path))
    assert list(source.names) == [f"my-train-00{n}.tar/sample{row}.png" for n in range(2) for row in range(2)]
    assert source.labels.tolist() == [0, 1, 1, 2] and source.classes == ["0", "1", "2"]
    assert [source.read(index)[0, 0, 0] for index in (3, 0, 2)] == [11, 0, 10]
    assert pickle.loads(pickle.dumps(source)).read(3)[0, 0, 0] == 11  # as in a worker that is not forked
    assert open_source("wds", str(tmp_path), "val").read(0)[0, 0, 0] == 99


@pytest.mark.parametrize(
    "pattern, images", [("my-train-001.tar", 2), ("my-train-{000..001}.tar", 4), ("my-train-*.tar", 4)]
)
def test_shards_by_pattern(tmp_path, pattern, images):
    webdataset(tmp_path)
    assert len(open_source(f"wds/{pattern}", str(tmp_path))) == images


def test_shards_named_outright_are_trained_on_whatever_they_are_called(tmp_path):
    webdataset(tmp_path)
    assert open_source("wds/my-val-000.tar", str(tmp_path)).read(0)[0, 0, 0] == 99
    with pytest.raises(ValueError, match="no val shards"):
        open_source("wds/my-train-*.tar", str(tmp_path), "val")


def test_a_tar_of_class_folders(tmp_path):
    shard(tmp_path / "images.tar", {"./b/1.png": png(1), "./a/2.png": png(2)})
    source = open_source("auto", str(tmp_path / "images.tar"))
    assert labelled(source) == {"images.tar/b/1.png": "b", "images.tar/a/2.png": "a"}
    shard(tmp_path / "flat.tar", {"1.png": png(1), "._1.png": b"", "notes.json": json.dumps({}).encode()})
    assert open_source("auto", str(tmp_path / "flat.tar")).labels is None


def test_shards_in_folders_and_files_with_special_characters(tmp_path):
    """Folders such as data[v2] are not patterns."""
    for folder, name in (("data[v2]", "a.tar"), ("what?", "photos[1].tar")):
        shard(tmp_path / folder / name, {"1.png": png(7)})
        for opened in (
            open_source("wds", str(tmp_path / folder)),
            open_source("auto", str(tmp_path / folder / name)),
            open_source("wds/*.tar", str(tmp_path / folder)),
        ):
            assert [*opened.names] == [f"{name}/1.png"] and opened.read(0)[0, 0, 0] == 7


def tampered(shards, what):
    """Return the bytes of a damaged shard; `shards` are complete, with 6 members each."""
    first, second = shards
    start = 1024 * 3  # of the fourth member: each has a header and one block
    return {
        "damaged header": first[: start + 10] + b"\xff" * 20 + first[start + 30 :],
        "cut header": first[: start + 100],
        "cut member": first[: start + 700],
        "joined": first + second,
        "joined after another end": first + bytes(50_000) + second,
    }[what]


@pytest.mark.parametrize(
    "what, words",
    [
        ("damaged header", "other bytes follow after 3 members: it is damaged or cut off, or several archives"),
        ("cut header", "other bytes follow after 3 members"),
        ("cut member", "unexpected end of data"),
        ("joined", "other bytes follow after 6 members"),
        ("joined after another end", "other bytes follow after 6 members"),
    ],
)
def test_shards_that_are_damaged_are_not_read_in_part(tmp_path, what, words):
    for number in range(2):
        shard(tmp_path / f"{number}.tar", {f"{number}-{row}.png": png(row) for row in range(6)})
    data = tampered([(tmp_path / f"{number}.tar").read_bytes() for number in range(2)], what)
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"0\.tar is not a complete, uncompressed tar file: {words}"):
        open_source("wds", str(tmp_path))


def test_a_shard_that_ends_after_a_member_is_reported(tmp_path, caplog):
    shard(tmp_path / "a.tar", {f"{row}.png": png(row) for row in range(6)})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: 3 * 1024])
    assert len(open_source("wds", str(tmp_path))) == 3
    assert "a.tar has no end-of-archive mark: if it was cut off, images at its end are left out" in caplog.text


def test_a_bad_image_in_a_shard(tmp_path):
    shard(tmp_path / "images.tar", {"1.png": b"broken"})
    source = open_source("wds", str(tmp_path))
    with pytest.raises(BadImage, match="images.tar/1.png: not an image"):
        source.read(0)
    (tmp_path / "images.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)


def test_shards_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="no .tar files in .*; --data_path must be the folder of the shards"):
        open_source("wds", str(tmp_path))
    with pytest.raises(ValueError, match="no a-.*.tar files in "):
        open_source("wds/a-*.tar", str(tmp_path))
    with pytest.raises(ValueError, match="the folder of the tar shards"):
        open_source("wds", str(tmp_path / "nowhere"))
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="not a complete, uncompressed tar file"):
        open_source("wds", str(tmp_path))
    shard(tmp_path / "a.tar", {"notes.json": b""})
    with pytest.raises(ValueError, match="no images in the 1 tar shards"):
        open_source("wds", str(tmp_path))
    shard(tmp_path / "a.tar", {"1.png": png(0), "1.cls": b"0", "2.png": png(0)})
    with pytest.raises(ValueError, match="1 of 2 images in the shards have no .cls file: 2.png"):
        open_source("wds", str(tmp_path))
    shard(tmp_path / "a.tar", {"1.png": png(0), "1.cls": b"-3"})
    with pytest.raises(ValueError, match=".cls files: the label '-3' is neither the number of a class .* nor a word"):
        open_source("wds", str(tmp_path))
    with pytest.raises(ValueError, match="no val shards"):
        open_source("wds", str(tmp_path), "val")
    shard(tmp_path / "a.tar", {"1.png": png(0), "2.png": png(0)})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="not a complete, uncompressed tar file: unexpected end of data"):
        open_source("wds", str(tmp_path))
