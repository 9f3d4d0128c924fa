"""Which labelled images train a classifier, which choose its best epoch, and which judge it.

Published numbers are mostly the best epoch on the test images, which flatters. Here the best epoch is chosen on other
images: on the split `val` where there is a `test` beside it, else on a slice of the training images. Subsets take the
same number or share of each class, and are fixed by a seed: a smaller one is part of a larger one.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.sources import SPLIT_NAMES, Names, Source, class_folders_without_images, open_source
from options import ClassifierOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

TEST, VAL, HELD_OUT = "the test images", "the split val", "held-out training images"
CLASSES = "classes.txt"  # of a run's folder: the name of each class, in the order of the logits
MEAN_CLASS_ACC = ("torch/oxford_iiit_pet", "torch/caltech101")  # the literature averages these over classes


@dataclass(frozen=True)
class Splits:
    """Training images; those on which the best epoch is chosen, and what they are; those that judge."""

    train: Source
    choice: Source
    chosen_on: str
    test: Source

    @property
    def classes(self) -> int:
        return len(self.train.classes or [])


def open_splits(options: ClassifierOptions) -> Splits:
    """The images that `options` name, of one numbering of classes. ValueError for all that cannot be learned from."""
    whole = _labelled(options, "train")
    classes = whole.classes or []
    if options.num_classes and len(classes) > options.num_classes:
        raise ValueError(f"num_classes {options.num_classes}: the training images have labels 0 to {len(classes) - 1}")
    options = replace(options, value_range=whole.value_range)  # of all splits
    test = like(whole, _labelled(options, _test_split(options), classes))
    train = take(whole, subset(_labels(whole), options.label_share, options.labels_per_class, options.subset_seed))
    if _has_both(options):
        choice, chosen_on = like(whole, _labelled(options, "val", classes)), VAL
    elif options.holdout:
        kept, held = hold_out(_labels(train), options.holdout, options.subset_seed)
        train, choice, chosen_on = take(train, kept), take(train, held), HELD_OUT
    else:
        choice, chosen_on = test, TEST
    counts = np.bincount(_labels(train), minlength=len(classes))
    log.info(
        "%d of %d labelled training images, %d to %d of each of %d classes; best is chosen by %s on %d images (%s); "
        "%d test images",
        *(len(train), len(whole), counts.min(), counts.max(), len(classes)),
        *(metric(options), len(choice), chosen_on, len(test)),
    )
    return Splits(replace(train, classes=_enough(classes, options.num_classes)), choice, chosen_on, test)


def open_test(options: ClassifierOptions, trained: list[str]) -> Source:
    """The images that judge, alone.

    Their classes are numbered as the `trained` ones of the same names, because a class may be missing here; where names
    are others, in their own order.
    """
    test = _labelled(options, _test_split(options))
    by_name = test.classes and set(test.classes) <= set(trained)
    return like(replace(test, classes=trained), test) if by_name else test


def read_classes(folder: Path) -> list[str]:
    """The names of a classifier's classes, from its run's folder; none where it does not tell."""
    file = folder / CLASSES
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def metric(options: ClassifierOptions) -> str:
    """The figure that counts for a data set: `acc1`, or `mean_class_acc`, the average of every class's accuracy."""
    return "mean_class_acc" if options.dataset in MEAN_CLASS_ACC else "acc1"


def subset(labels: np.ndarray, share: float, per_class: int, seed: int) -> np.ndarray:
    """Indices, in order, of `per_class` images of each class, or of a `share` of them (rounded, at least one)."""
    chosen = []
    for label, group in _shuffled(labels, seed):
        if per_class > len(group):
            raise ValueError(f"labels_per_class is {per_class}, but class {label} has {len(group)} images")
        chosen.append(group[: per_class or max(1, round(share * len(group)))])
    return np.sort(np.concatenate(chosen))


def hold_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out): of each class `share`, at least one image, none of a single one."""
    kept, held = [], []
    for _, group in _shuffled(labels, seed):
        count = min(max(1, round(share * len(group))), len(group) - 1)
        kept.append(group[count:])
        held.append(group[:count])
    if not any(map(len, held)):
        raise ValueError("holdout: no class has a second image that could be held out; say --holdout 0")
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def _shuffled(labels: np.ndarray, seed: int) -> list[tuple[int, np.ndarray]]:
    """Each class that there is, with its images in random order."""
    drawn = np.random.RandomState(seed)  # a legacy generator, because its stream is promised never to change
    return [(int(label), drawn.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)]


def take(source: Source, indices: np.ndarray) -> Source:
    """Some images of a source, as a source."""
    return replace(
        source,
        names=Names(source.names[index] for index in indices),
        read=functools.partial(_taken, source.read, indices),
        labels=None if source.labels is None else source.labels[indices],
        path=source.path and functools.partial(_taken, source.path, indices),
        class_pixels=None if source.class_pixels is None else source.class_pixels[indices],
        read_lazily=source.read_lazily and functools.partial(_taken, source.read_lazily, indices),
    )


def _taken(of_number: Callable[[int], T], indices: np.ndarray, index: int) -> T:
    return of_number(int(indices[index]))


def write_lists(splits: Splits, folder: Path, write: Callable[[Path, str], None]) -> None:
    """Write the names of the classes, and of the images of each part, into a run's folder with `write(path, text)`."""
    write(folder / CLASSES, "".join(f"{name}\n" for name in splits.train.classes or []))
    lists = {"train": splits.train, "choice": splits.choice, "test": splits.test}
    for name, source in lists.items():
        labels = [""] * len(source) if source.labels is None else [f"\t{label}" for label in source.labels]
        text = "".join(f"{path}{label}\n" for path, label in zip(source.names, labels, strict=True))
        write(folder / f"images_{name}.txt", text)


def _labels(source: Source) -> np.ndarray:
    assert source.labels is not None
    return source.labels


def _enough(classes: list[str], num_classes: int) -> list[str]:
    """The classes, with nameless ones up to the number asked for."""
    return classes + [str(label) for label in range(len(classes), num_classes)]


def _is_folder(options: ClassifierOptions) -> bool:
    return options.dataset == "folder" or (options.dataset == "auto" and os.path.isdir(options.data_path))


def _has_both(options: ClassifierOptions) -> bool:
    """Whether a folder of images has `test` beside its validation images."""
    if not _is_folder(options):
        return False
    there = [name for name in SPLIT_NAMES["val"] if os.path.isdir(os.path.join(options.data_path, name))]
    return len(there) > 1 and "test" in there


def _test_split(options: ClassifierOptions) -> str:
    return "test" if _has_both(options) else "val"


def _labelled(options: ClassifierOptions, split: str, classes: list[str] | None = None) -> Source:
    """A split with labels; with `classes`, its class folders are those, and each must be there."""
    chosen = classes if classes and _is_folder(options) else options.class_list
    source = open_source(
        options.dataset,
        options.data_path,
        split,
        in_chans=options.in_chans,
        class_list=chosen,
        value_range=options.value_range,
    )
    if source.labels is None:
        raise ValueError(f"a classifier needs labels, and the {split} images have none: give a folder for each class")
    if _is_folder(options) and not chosen:
        empty = class_folders_without_images(options.data_path, split)
        if empty:
            raise ValueError(f"class folders without images: {', '.join(empty[:5])}; remove them, or give a class_list")
    return source


def like(known: Source, other: Source) -> Source:
    """`other` with the class numbers of `known`: a class that it lacks must not shift the numbers of the others."""
    classes, labels = known.classes or [], _labels(other)
    if other.classes and other.classes != classes:
        foreign = [name for name in other.classes if name not in classes]
        if foreign:
            raise ValueError(f"images to judge by are of classes that training has not: {', '.join(foreign[:5])}")
        labels = np.array([classes.index(name) for name in other.classes])[labels]
    if labels.max() >= len(classes) or labels.min() < 0:
        wrong = labels.max() if labels.max() >= len(classes) else labels.min()
        raise ValueError(f"label {wrong} is outside the range of the {len(classes)} classes of the training images")
    return replace(other, labels=labels, classes=classes)
