"""Data sets by name: tiny files in the original layouts, read by torchvision's classes; splits and subsets."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from data import splits
from data.sources import open_source
from options import FinetuneOptions


def paint(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), shade, np.uint8)).save(path)


def shades(source):
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def near(values, expected):
    """Return whether grey values are equal up to JPEG compression."""
    return np.abs(np.array(values) - expected).max() <= 2


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def flowers(root):
    base = root / "flowers-102"
    for number in range(1, 7):
        paint(base / "jpg" / f"image_{number:05d}.jpg", 10 * number)
    savemat(base / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]])})
    savemat(base / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 3]], "tstid": [[5, 6]]})
    return [10, 40, 20, 30], [0, 1, 1, 0], [50, 60], [0, 1]


def pets(root):
    base = root / "oxford-iiit-pet"
    rows = {"trainval": [("Abyssinian_1", 1), ("beagle_2", 2)], "test": [("Abyssinian_3", 1), ("beagle_4", 2)]}
    for split, images in rows.items():
        write_lines(base / "annotations" / f"{split}.txt", [f"{name} {label} 1 1" for name, label in images])
        for name, _ in images:
            paint(base / "images" / f"{name}.jpg", 10 * int(name[-1]))
    return [10, 20], [0, 1], [30, 40], [0, 1]


def dtd(root):
    base = root / "dtd" / "dtd"
    rows = {"train": (1, 2), "val": (3, 4), "test": (5, 6)}
    for split, numbers in rows.items():
        names = [f"banded/banded_{numbers[0]}", f"dotted/dotted_{numbers[1]}"]
        write_lines(base / "labels" / f"{split}1.txt", [f"{name}.jpg" for name in names])
        for name in names:
            paint(base / "images" / f"{name}.jpg", 10 * int(name[-1]))
    return [10, 20, 30, 40], [0, 1, 0, 1], [50, 60], [0, 1]


def food(root):
    base = root / "food-101"
    rows = {"train": {"pie": ["pie/1"], "soup": ["soup/2"]}, "test": {"pie": ["pie/3"], "soup": ["soup/4"]}}
    for split, classes in rows.items():
        write_lines(base / "meta" / f"{split}.json", [json.dumps(classes)])
        for name in (name for names in classes.values() for name in names):
            paint(base / "images" / f"{name}.jpg", 10 * int(name[-1]))
    return [10, 20], [0, 1], [30, 40], [0, 1]


def aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    rows = {"trainval": [("0000001", "707-320"), ("0000002", "A 300")], "test": [("0000003", "A 300")]}
    write_lines(base / "variants.txt", ["707-320", "A 300"])
    for split, images in rows.items():
        write_lines(base / f"images_variant_{split}.txt", [f"{name} {variant}" for name, variant in images])
        for name, _ in images:
            paint(base / "images" / f"{name}.jpg", 10 * int(name[-1]))
    return [10, 20], [0, 1], [30], [1]


@pytest.mark.parametrize(
    ("name", "write"),
    [("flowers102", flowers), ("oxford_iiit_pet", pets), ("dtd", dtd), ("food101", food), ("fgvc_aircraft", aircraft)],
)
def test_sets_have_the_splits_of_the_literature(tmp_path, caplog, monkeypatch, name, write):
    """Training and validation images are merged as in the literature; test images are used for testing."""
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # it compares hashes
    train_shades, train_labels, test_shades, test_labels = write(tmp_path)
    caplog.set_level("INFO")
    options = FinetuneOptions(dataset=f"torch/{name}", data_path=str(tmp_path), holdout=0.0)
    found = splits.open_splits(options)
    assert near(shades(found.train), train_shades) and found.train.labels.tolist() == train_labels
    assert near(shades(found.test), test_shades) and found.test.labels.tolist() == test_labels
    said = " ".join(caplog.messages)
    expected = "mean_class_acc" if name == "oxford_iiit_pet" else "acc1"
    assert f"best is chosen by {expected}" in said and "'split': 'test'" in said
    settled = {"dtd": "'partition': 1", "fgvc_aircraft": "'annotation_level': 'variant'"}
    assert settled.get(name, "") in said


def caltech(root, counts):
    for name, count in counts.items():
        for number in range(1, count + 1):
            paint(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", number)
    (root / "caltech101" / "Annotations").mkdir(parents=True)
    return root


def test_caltech_trains_on_thirty_of_each_class_and_tests_on_at_most_fifty_others(tmp_path):
    root = caltech(tmp_path / "all", {"BACKGROUND_Google": 3, "ant": 31, "bass": 90})
    train, test = (open_source("torch/caltech101", str(root), split) for split in ("train", "val"))
    assert train.classes == ["ant", "bass"] and np.bincount(train.labels).tolist() == [30, 30]
    assert np.bincount(test.labels).tolist() == [1, 50]
    assert not set(train.names) & set(test.names)
    assert all(name.startswith(train.classes[label]) for name, label in zip(train.names, train.labels, strict=True))
    assert near([shades(test)[0]], int(test.names[0][-8:-4])), "a name is that of the file it shows"
    assert splits.metric(FinetuneOptions(dataset="torch/caltech101")) == "mean_class_acc"
    other = caltech(tmp_path / "fewer", {"BACKGROUND_Google": 3, "bass": 90})
    alone = open_source("torch/caltech101", str(other), "train")
    assert list(alone.names) == [name for name in train.names if name.startswith("bass")]
    with pytest.raises(ValueError, match="30 images of ant"):
        open_source("torch/caltech101", str(caltech(tmp_path / "few", {"BACKGROUND_Google": 1, "ant": 30})))


def test_a_missing_data_set_is_reported_with_how_to_download_it(tmp_path):
    with pytest.raises(ValueError, match=r"torch/dtd cannot be opened .* download=True"):
        splits.open_splits(FinetuneOptions(dataset="torch/dtd", data_path=str(tmp_path)))


# ---- subsets


LABELS = np.repeat([0, 1, 2], [500, 40, 3])


def test_a_share_is_of_every_class_and_a_smaller_one_is_part_of_it():
    ten, one = (splits.subset(LABELS, share, 0, seed=4) for share in (0.1, 0.01))
    assert np.bincount(LABELS[ten]).tolist() == [50, 4, 1] and np.bincount(LABELS[one]).tolist() == [5, 1, 1]
    assert set(one) < set(ten)
    assert np.array_equal(ten, splits.subset(LABELS, 0.1, 0, seed=4))
    assert not np.array_equal(ten, splits.subset(LABELS, 0.1, 0, seed=5))
    assert np.bincount(LABELS[splits.subset(LABELS, 1.0, 3, seed=0)]).tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="labels_per_class is 4, but class 2 has 3"):
        splits.subset(LABELS, 1.0, 4, seed=0)


def test_what_is_held_out_is_of_every_class_and_trains_nothing():
    kept, held = splits.hold_out(LABELS, 0.02, seed=4)
    assert np.bincount(LABELS[held]).tolist() == [10, 1, 1]
    assert sorted([*kept, *held]) == list(range(len(LABELS)))
    single = np.array([0, 1, 1])
    kept, held = splits.hold_out(single, 0.5, seed=0)
    assert single[held].tolist() == [1] and sorted(single[kept].tolist()) == [0, 1]


def folder(root, split, classes, images=4):
    for number, name in enumerate(classes):
        for image in range(images):
            paint(root / split / name / f"{image}.png", 50 * number + image)


def test_best_is_chosen_on_val_where_there_is_a_test_beside_it(tmp_path):
    for split in ("train", "val", "test"):
        folder(tmp_path, split, "abc")
    found = splits.open_splits(FinetuneOptions(data_path=str(tmp_path)))
    assert found.chosen_on == splits.VAL and len(found.train) == len(found.choice) == len(found.test) == 12
    assert "/test/" in found.test.path(0).replace("\\", "/") and "/val/" in found.choice.path(0)


def test_a_slice_is_held_out_where_there_is_only_one_other_split(tmp_path):
    for split in ("train", "test"):
        folder(tmp_path, split, "abc")
    found = splits.open_splits(FinetuneOptions(data_path=str(tmp_path)))
    assert (found.chosen_on, len(found.train), len(found.choice), len(found.test)) == (splits.HELD_OUT, 9, 3, 12)
    splits.write_lists(found, tmp_path)
    listed = (tmp_path / "images_choice.txt").read_text().splitlines()
    assert listed == [f"{name}\t{label}" for name, label in zip(found.choice.names, found.choice.labels, strict=True)]
    assert splits.open_splits(FinetuneOptions(data_path=str(tmp_path), holdout=0.0)).chosen_on == splits.TEST


def test_a_class_that_is_missing_from_the_test_images_shifts_no_index(tmp_path):
    folder(tmp_path, "val", "bc")
    options = FinetuneOptions(data_path=str(tmp_path))
    test = splits.open_test(options, ["a", "b", "c"])
    assert test.classes == ["a", "b", "c"] and test.labels.tolist() == [1] * 4 + [2] * 4
    for other in ([], ["x", "y"]):
        assert splits.open_test(options, other).labels.tolist() == [0] * 4 + [1] * 4


def test_labels_outside_the_range_are_refused(tmp_path):
    for number in range(4):
        paint(tmp_path / f"{number}.png", number)
    write_lines(tmp_path / "train.txt", ["0.png 0", "1.png 1"])
    write_lines(tmp_path / "val.txt", ["2.png 0", "3.png 7"])
    with pytest.raises(ValueError, match="the val images are of classes that the training images do not have: 7"):
        splits.open_splits(FinetuneOptions(data_path=str(tmp_path / "train.txt")))
