"""Split labelled images into those that train a classifier, select its best epoch, and evaluate it.

Many published results select the best epoch on the test images, which is optimistically biased. Here the best epoch is
selected on other images if there are enough: on the split `val` if there is also a `test`, otherwise on a part of the
training images. If there is neither `val` nor `test`, a share of the images is held out for testing. Subsets contain
the same number or share of each class, and are fixed by a seed: a smaller subset is part of a larger one. With
`group_by`, images of one group (a film, a patient) are never on both sides of a split.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from data.files import write_text
from data.folders import NoSplit, match_classes, some
from data.sources import Names, Source, class_folders_without_images, open_split
from options import ClassifierOptions

log = logging.getLogger(__name__)

T = TypeVar("T")

TEST, VAL, HELD_OUT = "the test images", "the split val", "held-out training images"
CLASSES = "classes.txt"  # in a run folder: the name of each class, in the order of the logits
IMAGES = "images_{}.txt"  # in a run folder: the name and class number of each image that is used for {}
MEAN_CLASS_ACC = ("torch/oxford_iiit_pet", "torch/caltech101")  # the literature reports the mean accuracy per class
LEAST, LEAST_PER_CLASS = 20, 2  # minimum number of images on which the best epoch is selected
MOST = 4  # at most one in MOST images of a class is held out to reach that minimum


@dataclass(frozen=True)
class Splits:
    """Training images, images that select the best epoch with their description, and test images."""

    train: Source
    choice: Source
    chosen_on: str
    test: Source

    @property
    def classes(self) -> int:
        return len(self.train.classes or [])


def open_splits(options: ClassifierOptions) -> Splits:
    """Open the images that `options` name; classes have the same indices in all splits.

    Raises:
        ValueError: If the images cannot be used for training.
    """
    images = _training_images(options)
    classes = images.classes or []
    if options.num_classes and len(classes) > options.num_classes:
        raise ValueError(f"num_classes {options.num_classes}: the training images have labels 0 to {len(classes) - 1}")
    options = replace(options, value_range=images.value_range)  # of all splits
    check_groups(images, options.group_by)
    val, test = (_evaluation_images(options, split, images) for split in ("val", "test"))
    train = images
    if not val and not test:
        train, test = divide(images, options.test_share, options.subset_seed, options.group_by, "test_share")
    several = number_groups(train, options.group_by)
    small = subset(_labels(train), options.label_share, options.labels_per_class, options.subset_seed, several)
    _warn_of_split_folders(train, small, options, "label_share")
    train = take(train, small)
    train, choice, chosen_on = _choose(options, train, val, test)
    evaluated = test or val
    assert evaluated is not None
    if options.dataset.endswith(".txt") or options.data_path.endswith(".txt"):
        _warn_of_overlap(train, evaluated)
    counts = np.bincount(_labels(train), minlength=len(classes))
    each = " to ".join(str(count) for count in dict.fromkeys((counts.min(), counts.max())))
    log.info(
        "%d of %d labelled training images, %s of each of %d classes; best is chosen by %s on %d images (%s); "
        "%d test images",
        *(len(train), len(images), each, len(classes)),
        *(metric(options), len(choice), chosen_on, len(evaluated)),
    )
    return Splits(replace(train, classes=_extend_classes(classes, options.num_classes)), choice, chosen_on, evaluated)


def _choose(
    options: ClassifierOptions, train: Source, val: Source | None, test: Source | None
) -> tuple[Source, Source, str]:
    """Return (training images, images that select the best epoch, description of the latter)."""
    if val and test:
        return train, val, VAL
    if not options.holdout:
        evaluated = val or test
        assert evaluated is not None
        return train, evaluated, TEST
    least = least_held_out(len(train.classes or []))
    if val and round(options.holdout * len(train)) < least:
        log.warning(
            "holdout %g of %d training images is less than %d: best is chosen on the split val, which also evaluates "
            "and so flatters best (not last). A folder test beside val avoids that",
            *(options.holdout, len(train), least),
        )
        return train, val, TEST
    train, held = divide(train, options.holdout, options.subset_seed, options.group_by, "holdout")
    if len(held) < least:
        log.warning(
            "best is chosen on %d held-out images only: differences between epochs are mostly chance. Give validation "
            "images (a folder val), a larger --holdout, or read last",
            len(held),
        )
    return train, held, HELD_OUT


def least_held_out(classes: int) -> int:
    """Return the minimum number of images on which the best epoch should be selected."""
    return max(LEAST, LEAST_PER_CLASS * classes)


def divide(source: Source, share: float, seed: int, group_by: str, what: str) -> tuple[Source, Source]:
    """Split off a share of each class's images.

    Args:
        share: Share of each class; increased to `least_held_out` images in total if that takes at most a quarter of
            each class.
        group_by: See `number_groups`.
        what: The option that requests it, for messages.

    Returns:
        The remaining images, and the share.
    """
    labels, groups = _labels(source), number_groups(source, group_by)
    least = least_held_out(len(np.unique(labels)))
    try:
        kept, held = hold_out(labels, share, seed, least=least, groups=groups)
    except ValueError as error:
        advice = {"holdout": "; --holdout 0 sets none aside", "test_share": "; give validation images (a folder val)"}
        raise ValueError(f"{what}: {error}{advice.get(what, '')}") from error
    by_group = f" ({len(np.unique(groups[held]))} of {len(np.unique(groups))} groups)" if groups is not None else ""
    log.info("%s: %d of %d images are set aside%s, seed %d", what, len(held), len(source), by_group, seed)
    if groups is None:
        warn_of_split_folders(source.names, held, what, labels)
    return take(source, kept), take(source, held)


def open_test(options: ClassifierOptions, trained: list[str], run: Path | None = None) -> Source:
    """Open the test images only.

    Their classes have the indices of the `trained` classes with the same names, because a class may be missing here. If
    no name is the same, classes keep their own order, and a warning is logged.

    Raises:
        ValueError: Some names are the same and some are not, or none is and the number of classes differs.
    """
    trained = [_unescape(name) for name in trained]
    for split in ("test", "val"):
        try:
            test = open_split(options, split, known=trained or None, exact=True)
        except NoSplit:
            continue
        if test.labels is None:  # the folders may have other names
            test = open_split(options, split, exact=True)
        if test.labels is None:
            log.warning("the %s images have no labels (%s) and are not evaluated", split, test.problem)
            continue
        return _align_with_trained(options, test, trained, split)
    images = _align_with_trained(options, _training_images(options), trained, "test")
    drawn = divide(images, options.test_share, options.subset_seed, options.group_by, "test_share")[1]
    return leave_out_trained(run, images, drawn)


def _align_with_trained(options: ClassifierOptions, test: Source, trained: list[str], what: str) -> Source:
    """Return `test` with the class indices of `trained`, or unchanged if no class name is the same."""
    names = test.classes or []
    if not trained:
        return test
    if match_classes(names, trained)[0]:
        return align_classes(Source([], _nothing, np.empty(0, np.int64), trained), test, what)
    if max(len(names), options.num_classes) != len(trained):
        raise ValueError(
            f"the classifier has {len(trained)} classes, the data have {len(names)}, and no class name is the same: "
            f"the classifier has {some(trained)}; the data have {some(names)}. Rename the classes of the data to those "
            f"of the classifier, which {CLASSES} in its run folder lists"
        )
    pairs = [f"{name} = {other}" for name, other in zip(names, trained, strict=False)]
    log.warning(
        "no class of the %s images has the name of a class of the classifier, so classes are compared by number: %s. "
        "If they are not the same classes in this order, the accuracy is meaningless",
        *(what, some(pairs)),
    )
    return test


def leave_out_trained(run: Path | None, images: Source, drawn: Source) -> Source:
    """Return the test images among `images`, which have no split `test` or `val`.

    The lists in the run's folder show if other images are drawn now than in training, as from a folder that has
    changed, and if `images` are other data, which are all evaluated.

    Args:
        run: The folder of the evaluated run; None if it is not known.
        images: All images.
        drawn: The test images among them, drawn as in training.
    """
    train, choice, test = (_read_names(run, name) for name in ("train", "choice", "test"))
    names, used = list(images.names), train | choice
    if used and used.isdisjoint(names) and test.isdisjoint(names):
        log.info("all %d images are evaluated: the run was trained on images with other names", len(images))
        return images
    seen = len(used.intersection(drawn.names))
    if seen:
        log.warning(
            "%d of the %d test images have names of images that the run was trained on or its best epoch selected on: "
            "the data, or the options that draw test images, have changed since",
            *(seen, len(drawn)),
        )
        if test and test.issubset(names):
            drawn = take(images, np.flatnonzero([name in test for name in names]))
            log.warning("the %d images of the run's images_test.txt are evaluated instead", len(drawn))
    log.info(
        "%d of %d images are evaluated; the others may have been used for training. Of a folder `test`, all images are "
        "evaluated",
        *(len(drawn), len(images)),
    )
    return drawn


def _read_names(run: Path | None, name: str) -> set[str]:
    """Return the names in a list that `write_lists` wrote into the folder of a run; empty without it."""
    file = run and run / IMAGES.format(name)
    lines = _unescape(file.read_bytes().decode()).split("\n") if file and file.is_file() else []
    return {re.sub(r"\t[0-9]+$", "", line) for line in lines if line}


def _unescape(text: str) -> str:
    """Restore the bytes of file names that are not valid text, which `write_text` escapes."""
    return re.sub(r"\\udc([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)


def _nothing(index: int) -> None:
    raise IndexError(index)


def read_classes(folder: Path) -> list[str]:
    """Read the class names of a classifier from its run folder; an empty list if they are not stored."""
    file = folder / CLASSES
    # Not splitlines, which also splits at characters that may be part of a name, such as U+2028.
    return [name for name in file.read_text(encoding="utf-8").split("\n") if name] if file.is_file() else []


def metric(options: ClassifierOptions) -> str:
    """Return the metric of a data set: `acc1`, or `mean_class_acc`, the average of the accuracies of the classes."""
    return "mean_class_acc" if options.dataset.lower() in MEAN_CLASS_ACC else "acc1"


def subset(labels: np.ndarray, share: float, per_class: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Select `per_class` images of each class, or a `share` of them (rounded, at least one).

    Args:
        groups: Number of each image's group; complete groups are selected until each class has at least this many
            images.

    Returns:
        Indices, in order.
    """
    classes = _shuffled(labels, seed)
    wanted = {}
    for label, group in classes:
        if per_class > len(group):
            raise ValueError(f"labels_per_class is {per_class}, but class {label} has {len(group)} images")
        wanted[label] = per_class or max(1, round(share * len(group)))
    if groups is not None and (per_class or share < 1):
        return whole_groups(labels, groups, wanted, seed)
    return np.sort(np.concatenate([group[: wanted[label]] for label, group in classes]))


def hold_out(
    labels: np.ndarray, share: float, seed: int, *, least: int = 0, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out `share` of each class, at least one image; none of a class with a single image.

    Args:
        least: Minimum number of images in total; to reach it, up to a quarter of each class is held out.
        groups: Number of each image's group; complete groups are held out.

    Returns:
        Indices to train on and indices held out, in order.
    """
    classes = _shuffled(labels, seed)
    each = -(-least // len(classes))
    wanted = {}
    for label, group in classes:
        count = max(1, round(share * len(group)), min(each, len(group) // MOST))
        wanted[label] = min(count, len(group) - 1)
    if not any(wanted.values()):
        raise ValueError("no class has a second image that could be set aside")
    if groups is None:
        held = np.sort(np.concatenate([group[: wanted[label]] for label, group in classes]))
    else:
        held = whole_groups(labels, groups, wanted, seed, keep=True)
        if not len(held):
            raise ValueError(
                f"no group can be held out: there are {len(np.unique(groups))} groups, and every class must keep one"
            )
    return np.setdiff1d(np.arange(len(labels)), held), held


def whole_groups(
    labels: np.ndarray, groups: np.ndarray, wanted: dict[int, int], seed: int, keep: bool = False
) -> np.ndarray:
    """Select complete groups, in random order, if they contain a class with fewer than `wanted` selected images.

    Args:
        keep: Leave at least one image of every class unselected.
    """
    left = {label: int((labels == label).sum()) for label in wanted}
    missing, chosen = dict(wanted), []
    order = np.random.RandomState(seed).permutation(np.unique(groups))
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    for group in order.tolist():
        counts = {
            int(label): int(count)
            for label, count in zip(*np.unique(labels[members[group]], return_counts=True), strict=True)
        }
        if not any(missing[label] > 0 for label in counts):
            continue
        if keep and any(left[label] <= count for label, count in counts.items()):
            continue
        chosen.append(members[group])
        for label, count in counts.items():
            missing[label] -= count
            left[label] -= count
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def number_groups(source: Source, group_by: str) -> np.ndarray | None:
    """Number the groups of a source's images.

    Args:
        group_by: `folder`, the folder of an image; or a regular expression with one group, which is searched
            in the image's name; "" for no groups.

    Returns:
        The number of each image's group, or None without groups.
    """
    if not group_by:
        return None
    names = source.names
    if group_by == "folder":
        keys: list[str] = [os.path.dirname(name) for name in names]
    else:
        try:
            pattern = re.compile(group_by)
        except re.error as error:
            raise ValueError(
                f"group_by {group_by!r} is neither the word folder nor a regular expression: {error}"
            ) from error
        if pattern.groups != 1:
            raise ValueError(f"group_by {group_by!r} has {pattern.groups} groups in parentheses; one names the group")
        found = [pattern.search(name) for name in names]
        without = [name for name, match in zip(names, found, strict=True) if match is None or match[1] is None]
        if without:
            raise ValueError(
                f"group_by {group_by!r} is not found in {len(without)} of {len(names)} names, such as {without[0]}"
            )
        keys = [match[1] for match in found if match]
    return np.unique(np.array(keys), return_inverse=True)[1].astype(np.int64)


def check_groups(source: Source, group_by: str) -> None:
    """Log the number of groups. Raises ValueError if every class is one group, so that no class can be split."""
    groups = number_groups(source, group_by)
    if groups is None:
        return
    count, labels = len(np.unique(groups)), source.labels
    log.info("group_by %s: %d images in %d groups", group_by, len(source), count)
    if count == 1 or (
        labels is not None and count == len(np.unique(labels)) == len(set(zip(labels, groups, strict=True)))
    ):
        what = "every class is one group" if count > 1 else "all images are in one group"
        raise ValueError(
            f"group_by {group_by}: {what}, which cannot be on one side alone. Give a regular expression with one group "
            f"for names such as {source.names[0]}, e.g. --group_by '([^/]+)_[0-9]+'"
        )


def warn_of_split_folders(
    names: Sequence[str], chosen: np.ndarray, what: str, labels: np.ndarray | None = None
) -> None:
    """Log a warning if a random split puts images of one folder on both sides, unless folders are classes."""
    folders, number = np.unique([os.path.dirname(name) for name in names], return_inverse=True)
    if labels is not None and len(folders) <= len(np.unique(labels)):
        return
    total, held = np.bincount(number), np.bincount(number[chosen], minlength=len(folders))
    real = [place for place, folder in enumerate(folders.tolist()) if folder and not folder.endswith(".tar")]
    both = [str(folders[place]) for place in real if 0 < held[place] < total[place]]
    if both and len(real) > 1:
        log.warning(
            "%s: images of %d of %d folders are on both sides, such as %s. If a folder holds frames of one film or "
            "images of one patient, --group_by folder keeps it on one side",
            *(what, len(both), len(real), both[0]),
        )


def _warn_of_split_folders(train: Source, chosen: np.ndarray, options: ClassifierOptions, what: str) -> None:
    if not options.group_by and len(chosen) < len(train):
        warn_of_split_folders(train.names, chosen, what, _labels(train))


def _warn_of_overlap(train: Source, other: Source) -> None:
    """Log a warning with the number of images that are listed for both training and evaluation."""
    trained = set(_files(train))
    both = [name for name, file in zip(other.names, _files(other), strict=True) if file in trained]
    if both:
        log.warning("%d of %d test images are also training images: %s", len(both), len(other), some(both))


def _files(source: Source) -> list[str]:
    """Return the file of each image of a list, in normalised form: a list may name ./a.jpg, a.jpg or /data/a.jpg."""
    assert source.path is not None
    return [os.path.normpath(source.path(index)) for index in range(len(source))]


def _shuffled(labels: np.ndarray, seed: int) -> list[tuple[int, np.ndarray]]:
    """Yield each class with its images in random order."""
    drawn = np.random.RandomState(seed)  # a legacy generator, whose stream is guaranteed not to change
    return [(int(label), drawn.permutation(np.flatnonzero(labels == label))) for label in np.unique(labels)]


def take(source: Source, indices: np.ndarray) -> Source:
    """Return a source with the images `indices`."""
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


def write_lists(splits: Splits, folder: Path) -> None:
    """Write the names of the classes, and of the images of each split, into a run folder."""
    write_text(folder / CLASSES, "".join(f"{name}\n" for name in splits.train.classes or []))
    lists = {"train": splits.train, "choice": splits.choice, "test": splits.test}
    for name, source in lists.items():
        labels = [""] * len(source) if source.labels is None else [f"\t{label}" for label in source.labels]
        text = "".join(f"{path}{label}\n" for path, label in zip(source.names, labels, strict=True))
        write_text(folder / IMAGES.format(name), text)


def _labels(source: Source) -> np.ndarray:
    assert source.labels is not None
    return source.labels


def _extend_classes(classes: list[str], num_classes: int) -> list[str]:
    """Return the class names, extended by unnamed classes to the requested number."""
    return classes + [str(label) for label in range(len(classes), num_classes)]


def _is_folder(options: ClassifierOptions) -> bool:
    return options.dataset == "folder" or (options.dataset == "auto" and os.path.isdir(options.data_path))


def _training_images(options: ClassifierOptions) -> Source:
    """Open the training images. Raises ValueError if they have no valid labels."""
    source = open_split(options, "train")
    if source.problem or source.labels is None:
        reason = source.problem or "the data set has none"
        raise ValueError(f"a classifier needs labels, and the training images have none that it can learn: {reason}")
    if _is_folder(options) and not options.class_list:
        empty = class_folders_without_images(options.data_path, "train")
        if empty:
            raise ValueError(f"class folders without images: {some(empty)}; remove them, or give a class_list")
    return source


def _evaluation_images(options: ClassifierOptions, split: str, train: Source) -> Source | None:
    """Open the split with the class indices of `train`; None if there is no such split, or it has no labels."""
    try:
        source = open_split(options, split, known=train.classes, exact=True)
    except NoSplit:
        return None
    if source.labels is None:
        log.warning("the %d %s images have no labels (%s) and are not used", len(source), split, source.problem)
        return None
    return align_classes(train, source, split)


def align_classes(known: Source, other: Source, what: str = "validation") -> Source:
    """Return `other` with the class indices of `known`; classes may be missing in `other`.

    Args:
        what: Description of `other`, for messages.

    Raises:
        ValueError: `other` has classes that `known` does not have.
    """
    classes, labels = known.classes or [], _labels(other)
    if other.classes and other.classes != classes:
        numbers, foreign = match_classes(other.classes, classes)
        counts = np.bincount(labels, minlength=len(other.classes))
        foreign = [name for name in foreign if counts[other.classes.index(name)]]
        if foreign:
            raise ValueError(
                f"the {what} images are of classes that the training images do not have: {some(foreign)}. Rename these "
                "classes to those of the training images, or leave their images out (a file of the folders to use is "
                "named with --class_list)"
            )
        labels = np.array([numbers.get(name, -1) for name in other.classes])[labels]
    if labels.max() >= len(classes) or labels.min() < 0:
        wrong = labels.max() if labels.max() >= len(classes) else labels.min()
        raise ValueError(f"label {wrong} is outside the range of the {len(classes)} classes of the training images")
    absent = [classes[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if absent:
        log.warning(
            "%d of %d classes have no %s images, so nothing evaluates them: %s",
            *(len(absent), len(classes), what, some(absent)),
        )
    return replace(other, labels=labels, classes=classes)
