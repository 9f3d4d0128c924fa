"""Random splits: complete groups, enough images to select the best epoch, and paths with ~."""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
from data import splits
from data.sources import Names, Source, open_source
from options import FinetuneOptions, PretrainOptions, SegmentOptions, parse
from tests import test_masks
from tests.runs import final, finish
from tests.test_data_table import archive, opened, refused, several
from tests.test_sources import put
from util import checkpoint


def source_of(names, labels):
    classes = [str(label) for label in range(max(labels) + 1)]
    return Source(Names(names), lambda number: number, np.array(labels), classes)


def films(root, classes="ab", count=8, frames=10):
    return put(
        root, *[f"{name}/film{film}_{n}.png" for name in classes for film in range(count) for n in range(frames)]
    )


def groups_on(source, digits=1):
    return {name.split("film")[1][:digits] for name in source.names}


@pytest.mark.parametrize("options", [{}, {"label_share": 0.5}, {"labels_per_class": 15}, {"subset_seed": 3}])
def test_no_group_is_on_both_sides_of_any_random_split(tmp_path, options, caplog):
    caplog.set_level(logging.INFO)
    found = opened(films(tmp_path), group_by=r"(film\d+)_", **options)
    parts = [groups_on(part) for part in (found.train, found.choice, found.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts))
    assert len(found.choice) >= 20 and len(found.test) >= 20
    assert r"group_by (film\d+)_: 160 images in 8 groups" in caplog.text
    if options.get("label_share"):  # of 70 images per class that are not held out, at least 35, in complete films
        kept = len(found.train) + len(found.choice)
        assert kept == 2 * 40
    everything = opened(tmp_path)
    assert groups_on(everything.train) & groups_on(everything.test), "without groups films are divided"


def test_groups_by_folder_and_what_is_logged_without(tmp_path, caplog):
    several(tmp_path, *[f"train/{name}/film{film}" for name in "ab" for film in range(6)], count=10)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    options = {"class_list": str(tmp_path / "classes.txt")}
    found = opened(tmp_path, group_by="folder", **options)
    folders = [{Path(name).parent for name in part.names} for part in (found.train, found.choice, found.test)]
    assert sum(map(len, folders)) == len(set.union(*folders)) == 12
    assert "both sides" not in caplog.text
    opened(tmp_path, **options)
    assert "test_share: images of 12 of 12 folders are on both sides, such as a/film0." in caplog.text
    assert "--group_by folder" in caplog.text


@pytest.mark.parametrize(
    "group_by, message",
    [
        ("folder", "every class is one group, .*regular expression with one group for names such as a/film0_0.png"),
        ("film", "'film' has 0 groups in parentheses; one names the group"),
        ("(", "neither the word folder nor a regular expression"),
        ("(movie[0-9])", "is not found in 160 of 160 names, such as a/film0_0.png"),
        ("(film)", "all images are in one group"),
        ("film(x)?", "is not found in 160 of 160 names, such as a/film0_0.png"),
    ],
)
def test_groups_that_cannot_be_meant(tmp_path, group_by, message):
    refused(message, films(tmp_path), group_by=group_by)


def test_whole_groups_reach_what_is_wanted_and_leave_every_class_some():
    labels = np.repeat([0, 1], [60, 30])
    groups = np.concatenate([np.repeat(np.arange(6), 10), np.repeat(np.arange(6, 9), 10)])
    kept, held = splits.hold_out(labels, 0.25, 0, groups=groups)
    assert np.bincount(labels[held]).tolist() == [20, 10]  # 15 and 8 wanted
    assert not set(groups[kept]) & set(groups[held]) and sorted([*kept, *held]) == list(range(90))
    with pytest.raises(ValueError, match="no group can be held out: there are 2 groups"):
        splits.hold_out(labels, 0.25, 0, groups=labels)
    small, large = (splits.subset(labels, share, 0, 5, groups) for share in (0.2, 0.6))
    assert set(small) < set(large)


def test_classes_may_have_any_name(tmp_path):
    """Names that `splitlines` would split."""
    names = ["a\u2028b", "c\x85d", "e\x0cf"]
    images = replace(source_of(["1"], [0]), classes=names)
    splits.write_lists(splits.Splits(images, images, splits.VAL, images), tmp_path)
    assert splits.read_classes(tmp_path) == names
    assert splits.read_classes(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("dataset", "metric"),
    [("torch/Caltech101", "mean_class_acc"), ("torch/OXFORD_IIIT_PET", "mean_class_acc"), ("torch/CIFAR10", "acc1")],
)
def test_the_metric_belongs_to_the_data_set_in_any_case(dataset, metric):
    assert splits.metric(FinetuneOptions(dataset=dataset, data_path="D")) == metric


def test_folders_on_both_sides_are_counted(caplog):
    """Compared with a loop over the folders; images in no folder and in archives do not count."""
    drawn = np.random.RandomState(0)
    folders = ["", "a/", "a/b/", "c/", "set.tar/", "d/"]
    names = [f"{folders[drawn.randint(6)]}{number}.jpg" for number in range(40)] + ["alone/1.jpg"]
    chosen = np.sort(drawn.permutation(41)[:12])
    sides = {}
    for number, name in enumerate(names):
        folder = name.rpartition("/")[0]
        if folder and not folder.endswith(".tar"):
            sides.setdefault(folder, set()).add(number in chosen)
    both = sorted(folder for folder, found in sides.items() if len(found) == 2)
    splits.warn_of_split_folders(names, chosen, "test_share")
    assert f"images of {len(both)} of {len(sides)} folders are on both sides, such as {both[0]}." in caplog.text
    caplog.clear()
    splits.warn_of_split_folders(names, chosen, "test_share", np.arange(41))
    assert not caplog.text, "folders are not more than classes"


def test_many_folders_take_no_time_that_grows_with_their_square():
    names = [f"film{number % 20_000}/{number}.jpg" for number in range(60_000)]
    began = time.process_time()
    splits.warn_of_split_folders(names, np.arange(0, 60_000, 10), "test_share")
    splits.whole_groups(np.zeros(60_000, int), np.arange(60_000) % 20_000, {0: 6_000}, 0)
    assert time.process_time() - began < 5


def test_segmentation_keeps_groups_whole(tmp_path, caplog):
    for film in range(10):
        for number in range(4):
            test_masks.save(tmp_path / f"images/film{film}/{number}.png", np.zeros((10, 14, 3), np.uint8))
            test_masks.save(tmp_path / f"masks/film{film}/{number}.png", np.full((10, 14), number % 2, np.uint8))
    (tmp_path / "classes.txt").write_text("a\nb\n")
    found = test_masks.opened(tmp_path, group_by="folder", test_share=0.2, holdout=0.2, label_share=0.5)
    folders = [{Path(name).parent for name in part.names} for part in (found.train, found.choice, found.test)]
    assert [len(each) for each in folders] == [3, 2, 2] and len(set.union(*folders)) == 7
    assert [len(part) for part in (found.train, found.choice, found.test)] == [12, 8, 8]
    assert "both sides" not in caplog.text and "best is chosen on 8 images only" in caplog.text
    test_masks.opened(tmp_path, test_share=0.2)
    assert "test_share: images of" in caplog.text and "folders are on both sides, such as" in caplog.text


@pytest.mark.parametrize(
    "images, classes, held", [(400, 2, 20), (120, 4, 20), (2000, 2, 40), (60, 3, 15), (12, 3, 3), (2000, 50, 100)]
)
def test_best_is_chosen_on_enough_images(images, classes, held, caplog):
    """2% of the images, at least 20 and two of each class, at most a quarter of each class."""
    labels = np.arange(images) % classes
    kept, chosen = splits.divide(source_of(map(str, range(images)), labels), 0.02, 0, "", "holdout")
    assert len(chosen) == held and len(kept) == images - held
    counts = np.bincount(chosen.labels, minlength=classes)
    assert counts.max() - counts.min() <= 0 or held == images // 50


def test_few_images_to_choose_best_on_are_reported(tmp_path, caplog):
    several(tmp_path, "train/a", "train/b", "test/a", "test/b", count=20)
    assert len(opened(tmp_path).choice) == 10
    assert "best is chosen on 10 held-out images only" in caplog.text


def test_best_is_chosen_on_val_rather_than_on_six_images(tmp_path):
    several(tmp_path, "train/a", "train/b", "train/c", count=100)
    several(tmp_path, "val/a", "val/b", "val/c", count=40)
    found = opened(tmp_path)
    assert len(found.choice) == 120 and len(found.train) == 300


def test_test_images_that_are_trained_on_are_counted_however_their_paths_are_written(tmp_path, caplog):
    several(tmp_path, "a", "b", count=30)
    names = [f"{name}/{number:03d}.png" for name in "ab" for number in range(30)]
    (tmp_path / "train.txt").write_text("".join(f"{name}\t{name[0]}\n" for name in names[:25] + names[30:55]))
    written = ["./a/000.png", f"{tmp_path}/a/001.png", "b/../a/002.png", *names[25:30], *names[55:]]
    (tmp_path / "val.txt").write_text("".join(f"{name}\t{Path(name).parent.name}\n" for name in written))
    opened(tmp_path / "train.txt", holdout=0)
    assert f"3 of 13 test images are also training images: ./a/000.png, {tmp_path}/a/001.png, b/../a" in caplog.text


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_the_home_folder_is_expanded_in_recipes_and_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    paths = ("data_path", "output_dir", "init_from", "class_list", "dataset")
    recipe.write_text("".join(f"{name}: ~/{name}\n" for name in paths))
    found = parse(FinetuneOptions, ["-c", str(recipe), "--resume=~/last.pth"])
    assert [getattr(found, name) for name in paths] == [f"{tmp_path}/{name}" for name in paths]
    assert found.resume == f"{tmp_path}/last.pth"
    assert SegmentOptions(data_path="~/x").data_path == f"{tmp_path}/x"


def test_the_checkpoint_whose_options_are_inherited_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    parse(FinetuneOptions, ["--init_from=~/last.pth"], base=lambda given: seen.append(dict(given)) or {})
    assert seen[0]["init_from"] == f"{tmp_path}/last.pth"


def test_an_empty_resume_is_automatic():
    assert PretrainOptions(resume="").resume == "auto" and parse(FinetuneOptions, ["--resume", ""]).resume == "auto"
    with pytest.raises(ValueError, match="eval needs a checkpoint: no checkpoint at nowhere"):
        checkpoint.evaluated_checkpoint({"resume": "", "output_dir": "nowhere"})


def test_the_splits_of_masks_may_be_named_in_capitals(tmp_path, caplog):
    for split in ("Train", "VALIDATION", "Test"):
        test_masks.paint(tmp_path, split)
    found = test_masks.opened(tmp_path)
    assert [Path(part.names[0]).parent.name for part in (found.train, found.choice, found.test)] == [
        "Train",
        "VALIDATION",
        "Test",
    ]
    test_masks.paint(tmp_path, "val")
    with pytest.raises(ValueError, match="several folders of val images: images/VALIDATION, images/val"):
        test_masks.opened(tmp_path)


def test_evaluation_leaves_out_what_its_run_has_trained_on():
    """The share that is held out for testing depends on these options, which are inherited from the checkpoint."""
    assert {"test_share", "subset_seed", "group_by", "label_offset"} <= set(FinetuneOptions.INHERITS_EVAL)


def test_the_home_folder_is_expanded_for_teachers_and_callers(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "photos/1.png")
    assert open_source("auto", "~/photos").path(0) == str(tmp_path / "photos/1.png")
    for load in (checkpoint.load, checkpoint.load_model):
        with pytest.raises(ValueError, match=f"no checkpoint at {tmp_path}/teacher.pth"):
            load("~/teacher.pth")


def test_a_run_inside_its_own_data_resumes(tmp_path):
    """Its images and checkpoints are below data_path, and are not part of the data."""
    several(tmp_path, "photos", count=64)
    words = ["--data_path", tmp_path, "--total_batch_size", 32, "--picture_every", 1]
    run = tmp_path / "runs" / "a"
    finish(run, *words, "--epochs", 1)
    assert list((run / "samples").glob("*.png"))
    said = finish(run, *words, "--epochs", 2, "--allow_change", "epochs")
    assert "left out: 1 folders of training runs (runs/a)" in said
    assert final(run)["epoch"] == 2 and final(run)["step"] == 4


def test_class_folders_without_val_are_fine_tuned(tmp_path):
    several(tmp_path / "data", "a", "b", count=60)
    words = ["--data_path", tmp_path / "data", "--total_batch_size", 8, "--epochs", 1, "--resume", ""]
    said = finish(tmp_path / "run", *words, script="main_finetune")
    assert "test_share: 20 of 120 images are set aside" in said and "holdout: 20 of 100 images are set aside" in said
    listed = [
        set((tmp_path / "run" / f"images_{name}.txt").read_text().splitlines()) for name in ("train", "choice", "test")
    ]
    assert [len(each) for each in listed] == [80, 20, 20] and len(set.union(*listed)) == 120


def test_label_files_that_count_from_1_are_refused_until_the_first_class_is_named(tmp_path):
    texts = {f"{number}.cls": str(1 + number % 3) for number in range(120)}
    path = archive(tmp_path, *[name.replace("cls", "jpg") for name in texts], **texts)
    refused(r"\.cls files: labels are 1 to 3 and none is 0", path)
    found = opened(path, label_offset=1)
    assert found.train.classes == ["1", "2", "3"] and np.bincount(found.test.labels).tolist() == [7, 7, 7]
    refused("label_offset is for numbers in lists", put(tmp_path, "a/1.png", "b/1.png"), label_offset=1)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def labelled_images(root, kind, classes):
    """Write 40 images of each class as `kind`, and return the data path."""
    several(root, *[f"val/{name}" if kind == "val folder" else name for name in classes])
    if "folder" in kind:
        return root
    lines = "".join(f"{name}/{number:03d}.png\t{name}\n" for name in classes for number in range(40))
    (root / "train.txt").write_text(lines)
    if kind == "val list":
        (root / "val.txt").write_text(lines)
    return root / "train.txt"


def evaluated(root, trained, **options):
    return splits.open_test(FinetuneOptions(data_path=str(root), test_share=0.25, **options), trained)


@pytest.mark.parametrize("kind", ["folder", "val folder", "list", "val list"])
@pytest.mark.parametrize("present", ["bac", "ca"])
def test_evaluated_images_have_the_class_indices_of_the_classifier(tmp_path, kind, present, caplog):
    found = evaluated(labelled_images(tmp_path, kind, present), ["c", "a", "b"])
    assert found.classes == ["c", "a", "b"]
    assert [found.classes[label] for label in found.labels] == [Path(name).parent.name for name in found.names]
    assert len(found) == (40 if "val" in kind else 10) * len(present)
    assert ("1 of 3 classes have no" in caplog.text) == (present == "ca")


@pytest.mark.parametrize("kind", ["folder", "val folder", "list", "val list"])
def test_evaluated_images_of_classes_that_the_classifier_lacks_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="of classes that the training images do not have: c.* [Rr]ename"):
        evaluated(labelled_images(tmp_path, kind, "bc"), ["a", "b"])


@pytest.mark.parametrize("kind", ["folder", "val folder", "list", "val list"])
def test_classes_with_other_names_are_compared_by_number_with_a_warning(tmp_path, kind, caplog):
    root = labelled_images(tmp_path, kind, "xy")
    found = evaluated(root, ["a", "b"])
    assert [["x", "y"][label] for label in found.labels] == [Path(name).parent.name for name in found.names]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warnings if "classes are compared by number: x = a, y = b." in text]
    with pytest.raises(ValueError, match="the classifier has 3 classes, the data have 2, .* has a, b, c; .* have x, y"):
        evaluated(root, ["a", "b", "c"])
    assert evaluated(root, ["a", "b", "c"], num_classes=3).classes == ["x", "y"]


@pytest.mark.parametrize("below", ["", "val/"])
def test_a_classifier_of_a_class_list_is_evaluated_on_data_with_more_classes(tmp_path, below):
    data = several(tmp_path / "data", *[f"{below}{name}" for name in "abc"])
    (tmp_path / "classes.txt").write_text("c\na\n")
    run = tmp_path / "run" / "checkpoints" / "last.pth"
    run.parent.mkdir(parents=True)
    options = {"data_path": "elsewhere", "class_list": str(tmp_path / "classes.txt")}
    checkpoint.save(run, {"format": 1, "model": {"weight": torch.ones(1)}, "options": options})
    words = ["--eval", "--resume", str(run), "--data_path", str(data), "--test_share", "0.25"]
    found = splits.open_test(main_finetune.parse_options(words), ["c", "a"])
    assert found.classes == ["c", "a"] and np.bincount(found.labels).tolist() == ([40, 40] if below else [10, 10])
    assert [found.classes[label] for label in found.labels] == [Path(name).parent.name for name in found.names]
    with pytest.raises(ValueError, match="of classes that the training images do not have: b.*--class_list"):
        splits.open_test(main_finetune.parse_options([*words, "--class_list", ""]), ["c", "a"])


def split_run(tmp_path, *classes):
    """Return data without `val`, the checkpoint of a run on them, and the images of its splits."""
    data = several(tmp_path / "data", *classes, count=60)
    found = opened(data)
    (tmp_path / "run").mkdir()
    splits.write_lists(found, tmp_path / "run")
    return data, tmp_path / "run", found


def evaluated_names(data, run=None, **options):
    trained = splits.read_classes(data.parent / "run")
    return [*splits.open_test(FinetuneOptions(data_path=str(data), **options), trained, run).names]


@pytest.mark.parametrize("name", ["b", os.fsdecode(b"b\xff")])
def test_images_of_a_run_are_evaluated_as_in_training(tmp_path, name, caplog):
    caplog.set_level(logging.INFO)
    data, run, found = split_run(tmp_path, "a", name)
    for folder in (run, None):
        assert evaluated_names(data, folder) == [*found.test.names]
    assert "20 of 120 images are evaluated; the others may" in caplog.text
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("name", ["b", os.fsdecode(b"b\xff")])
def test_images_that_are_added_later_move_no_training_image_into_the_test_images(tmp_path, name, caplog):
    data, run, found = split_run(tmp_path, "a", name)
    put(data, "a/new.png", f"{name}/0.png")
    assert {*found.train.names, *found.choice.names} & {*evaluated_names(data)}, "without the lists of the run"
    for options in ({}, {"test_share": 0.5}):
        caplog.clear()
        assert evaluated_names(data, run, **options) == [*found.test.names]
        assert "the 20 images of the run's images_test.txt are evaluated instead" in caplog.text


def test_training_images_among_the_test_images_are_counted(tmp_path, caplog):
    data, run, found = split_run(tmp_path, "a", "b")
    for name in found.test.names:
        (data / name).unlink()
    names = evaluated_names(data, run)
    assert len(names) == 20 and {*names} <= {*found.train.names, *found.choice.names}
    assert "20 of the 20 test images have names of images that the run was trained on" in caplog.text
    assert "instead" not in caplog.text


def test_images_that_a_run_does_not_know_are_all_evaluated(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    _, run, _ = split_run(tmp_path, "a", "b")
    data = put(tmp_path / "new", *[f"{name}/new{number}.png" for name in "ab" for number in range(30)])
    assert len(evaluated_names(data, run)) == 60
    assert "all 60 images are evaluated" in caplog.text
