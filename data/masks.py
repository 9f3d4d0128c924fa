"""Open and check images with masks, which contain the class of every pixel.

    DATA/images/{train,val}/a.jpg       DATA/masks/{train,val}/a.png             with classes.txt, one name per line
    DATA/images/a.jpg                   DATA/masks/a.png                         a random share is held out for testing
    ADE/images/{training,validation}/   ADE/annotations/{training,validation}/   ADEChallengeData2016 as it is unpacked

A mask contains the class index of each pixel. It is a grey image of 1, 8 or 16 bits, an image with a palette (the
indices are used, not the colours), or a `.npy` array. `mask_values` maps other stored values, or colours, to classes.
EXIF orientation is applied to images and masks. Every mask is checked before training: invalid image-mask pairs are
reported by name, and values that contradict the class list are errors.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from data import scenes
from data.depth import with_range
from data.folders import describe_contents, images_below, some, split_named, visible_folders
from data.images import BadImage, Pair, blamed_on, read_orientation, read_stored
from data.mask_files import IGNORE, MOST_LISTED, Coding, read_mask
from data.sources import Names, Source, join_path, read_class_list, report_unreadable
from data.splits import (
    CLASSES,
    HELD_OUT,
    LEAST,
    TEST,
    VAL,
    Splits,
    leave_out_trained,
    number_groups,
    take,
    warn_of_split_folders,
    whole_groups,
)
from options import SegmentOptions

log = logging.getLogger(__name__)

ADE20K = Path(__file__).resolve().parent.parent / "configs" / "ade20k.txt"
MASK_FOLDERS = ("masks", "annotations")
WANTED = f"a folder images, and a folder {' or '.join(MASK_FOLDERS)}"
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif", ".npy")
REAL_AREA = (
    0.01  # share of all pixels; outlines drawn as "ignore" have about 5% (Pascal VOC), stray pixels far less than 1%
)


T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run, each of which checks its share of the masks."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: T, /) -> list[T]:
        """Return every process's value, in the order of ranks."""


# ---- one pair --------------------------------------------------------------------------------------------------------


def _read_pair(root: str, images: Sequence[str], masks: Sequence[str], coding: Coding, channels: int, n: int) -> Pair:
    image_HWC = read_stored(os.path.join(root, images[n]), channels)
    path = os.path.join(root, masks[n])
    numbers_HW, _ = read_mask(path, coding.colours)
    with blamed_on(path):
        mask_HW = coding.to_classes(numbers_HW)
        if mask_HW.shape != image_HWC.shape[:2]:
            raise ValueError(_other_size(mask_HW.shape, image_HWC.shape[:2], 1))
    return Pair(image_HWC, mask_HW)


def _other_size(mask: Sequence[int], image: Sequence[int], orientation: int) -> str:
    """Return the error message for a mask whose size differs from its image's; the latter is after EXIF orientation."""
    found = f"it has {mask[0]} x {mask[1]} pixels, and its image {image[0]} x {image[1]}"
    if orientation > 4 and tuple(mask) == tuple(image[::-1]):
        found += (
            f" after it is turned as its EXIF orientation tag ({orientation}) says, which is done wherever images are "
            "read. The mask lies as the pixels are stored: remove the tag from the image (exiftool -Orientation= FILE)"
        )
    return found


# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """Images and masks below `root`, in two folders with the same layout."""

    root: str
    masks: str
    coding: Coding
    names: list[str]
    channels: int
    selection: str
    value_range: list[float] = field(default_factory=list)
    """Value range of images of more than 8 bits; if empty, it is chosen when the first split is opened."""
    confirmed: bool = True
    """Whether the ignored value is set by the options."""

    def split(self, split: str) -> str:
        """Return the folder of a split's images, below `images`, ignoring case; "" if there is none.

        Test images without masks are ignored.

        Raises:
            ValueError: Other images have no masks, or two folders have the name of the split.
        """
        inside = visible_folders(os.path.join(self.root, "images"))
        names = [name for name in inside if split_named(name) == (split, True)]
        if len(names) > 1:
            both = ", ".join(f"images/{name}" for name in names)
            raise ValueError(f"{self.root} has several folders of {split} images: {both}. Join or rename them")
        if not names or os.path.isdir(os.path.join(self.root, self.masks, names[0])):
            return names[0] if names else ""
        if split != "test":
            raise ValueError(f"{self.root} has a folder images/{names[0]}, and no {self.masks}/{names[0]}")
        log.warning("the test images in %s/images/%s have no masks and are not used", self.root, names[0])
        return ""

    def open(self, inside: str) -> tuple[Source, Names]:
        """Open the pairs in `images/inside`; return them and the names of their masks."""
        images = _by_stem(os.path.join(self.root, "images", inside), "images")
        masks = _by_stem(os.path.join(self.root, self.masks, inside), "masks", MASK_SUFFIXES)
        alone = [name for stem, name in images.items() if stem not in masks]
        place = "/".join(filter(None, (self.masks, inside)))
        if alone:
            stem = os.path.splitext(alone[0])[0]
            raise ValueError(
                f"{len(alone)} of {len(images)} images in {self.root} have no mask: {some(alone)} "
                f"(there is no {place}/{stem}.png)"
            )
        if left := [name for stem, name in masks.items() if stem not in images]:
            log.warning("%d masks in %s/%s have no image and are left out: %s", len(left), self.root, place, some(left))
        order = sorted(images)
        image_names = Names(os.path.join("images", inside, images[stem]) for stem in order)
        mask_names = Names(os.path.join(self.masks, inside, masks[stem]) for stem in order)
        read = functools.partial(_read_pair, self.root, image_names, mask_names, self.coding, self.channels)
        path = functools.partial(join_path, self.root, image_names)
        source = Source(image_names, read, classes=self.names, selection=self.selection, path=path)
        first = not self.value_range
        source = with_range(source, self.channels, self.value_range, report=first or split_named(inside)[0] == "train")
        self.value_range[:] = source.value_range
        log.info("data: %s: %d images with masks", os.path.join(self.root, "images", inside), len(source))
        return source, mask_names


def _by_stem(folder: str, what: str, suffixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the files below a folder by name without suffix. Raises ValueError for duplicates or an empty folder."""
    found: dict[str, str] = {}
    for name in sorted(images_below(folder)):
        stem, suffix = os.path.splitext(name)
        if suffixes and suffix.lower() not in suffixes:
            jpeg = "; JPEG changes the numbers at every edge" if suffix.lower() in (".jpg", ".jpeg") else ""
            raise ValueError(f"{folder}/{name} cannot be a mask: masks are {', '.join(suffixes)} files{jpeg}")
        if stem in found:
            raise ValueError(f"{folder} holds two files of one name, {found[stem]} and {name}: remove or rename one")
        found[stem] = name
    if not found:
        raise ValueError(f"no {what} in {folder}: it holds {describe_contents(folder)}")
    return found


def _open_folder(options: SegmentOptions) -> _Folder:
    root, ade = options.data_path, options.dataset == "ade20k"
    if not os.path.isdir(root):
        wrong = f"data_path {root} {'is a file' if os.path.exists(root) else 'does not exist'}" if root else "no data"
        raise ValueError(f"{wrong}: give --data_path FOLDER with {WANTED} in it (or the word `scenes`)")
    if ade and os.path.isdir(inside := os.path.join(root, "ADEChallengeData2016")):
        root = inside
    found = [name for name in MASK_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if len(found) != 1 or not os.path.isdir(os.path.join(root, "images")):
        raise ValueError(
            f"{root} must hold {WANTED}; it holds {describe_contents(root)} ({some(sorted(os.listdir(root)))})"
        )
    listed = options.class_list or (str(ADE20K) if ade else os.path.join(root, CLASSES))
    if not os.path.isfile(listed):
        raise ValueError(
            f"{listed} does not exist: give --class_list FILE with one class name per line, in the order of the values "
            "in the masks"
        )
    names, digest = read_class_list(listed)
    if len(names) < 2:
        raise ValueError(
            f"{listed} lists only the class {names[0]}, so every pixel would belong to it: also list the rest, for "
            f"example background (0) and {names[0]} (1)"
        )
    coding = Coding.of(options, len(names))
    if not coding.values and 0 <= (number := coding.ignore - coding.reduce_zero) < len(names):
        raise ValueError(f"ignore_label {coding.ignore} is the number of the class {names[number]}: name another")
    mapped = f" {coding.values}" if coding.values else ""
    confirmed = ade or options.ignore_label is not None
    selection = f"{digest} {coding}{mapped}"
    return _Folder(root, found[0], coding, names, options.in_chans, selection, [*options.value_range], confirmed)


# ---- before training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """The result of checking one mask."""

    problem: str = ""
    kind: str = ""
    orientation: int = 1
    """EXIF orientation of the image."""
    values: dict[int, int] = field(default_factory=dict)
    """Number of pixels of each stored value."""


def _look(folder: _Folder, image: str, mask: str) -> _Look:
    """Check one mask, and the size of its image."""
    path = os.path.join(folder.root, mask)
    kind, orientation, values = "", 1, {}
    try:
        numbers_HW, kind = read_mask(path, folder.coding.colours)
        if numbers_HW.dtype in (np.uint8, np.uint16):
            counts = np.bincount(numbers_HW.ravel())
            stored = np.flatnonzero(counts)
            counts = counts[stored]
        else:
            stored, counts = np.unique(numbers_HW, return_counts=True)
        values = dict(zip(stored.tolist(), counts.tolist(), strict=True))
        folder.coding.to_classes(stored[None])
        rows, columns, orientation = _size(os.path.join(folder.root, image)) or (*numbers_HW.shape, 1)
        if (rows, columns) != numbers_HW.shape:
            raise ValueError(_other_size(numbers_HW.shape, (rows, columns), orientation))
    except BadImage as error:
        return _Look(f"{mask}: {error.reason}", kind, orientation, values)
    except ValueError as error:
        return _Look(f"{mask}: {error}", kind, orientation, values)
    return _Look("", kind, orientation, values)


def _check(
    folder: _Folder, source: Source, masks: Names, processes: Processes, threads: int, train: bool
) -> np.ndarray:
    """Check every mask; each process checks its share.

    Returns:
        int64 `[n, K]`, the pixels of each class in each mask.

    Raises:
        ValueError: If masks are invalid, or their values contradict the class list.
    """
    share = range(processes.rank, len(source), processes.world_size)
    with ThreadPoolExecutor(max(1, threads)) as pool:  # decoding releases the GIL
        found = list(pool.map(lambda n: (n, _look(folder, source.names[n], masks[n])), share))
    looks = [look for _, look in sorted(sum(processes.gather(found), []), key=lambda each: each[0])]
    total = Counter[int]()
    for look in looks:
        total.update(look.values)
    if problems := sorted(look.problem for look in looks if look.problem):
        raise ValueError(
            f"{len(problems)} of {len(source)} masks in {folder.root} cannot be trained on: {'; '.join(problems[:5])}"
            f"{_mapping_hint(folder.coding, total)}"
        )
    _report(folder, looks, total)
    known = sorted(total)
    class_of = dict(zip(known, folder.coding.to_classes(np.array([known], np.int32))[0].tolist(), strict=True))
    pixels = np.zeros((len(looks), len(folder.names)), np.int64)
    for row, look in zip(pixels, looks, strict=True):
        for value, count in look.values.items():
            if class_of[value] != IGNORE:
                row[class_of[value]] += count
    _require_classes(folder, len(source), pixels.sum(axis=0), total, train)
    return pixels


def _report(folder: _Folder, looks: Sequence[_Look], total: Counter[int]) -> None:
    """Log the values in the masks."""
    kinds = Counter(look.kind for look in looks)
    sum_ = total.total()
    shares = [
        f"{folder.coding.show(value)} {100 * count / sum_:.1f}%{' (ignored)' * (value == folder.coding.ignore)}"
        for value, count in total.most_common()
    ]
    log.info(
        "masks: %s; values: %s",
        ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        some(shares, MOST_LISTED),
    )
    if kinds["palette"]:
        log.info("masks with a palette: the indices are used, not the colours")
    if turned := sum(look.orientation > 1 for look in looks):
        log.warning(
            "masks: %d of %d images have an EXIF orientation tag and are turned as it says; their masks are taken to "
            "lie as viewers show the images",
            *(turned, len(looks)),
        )


def _require_classes(folder: _Folder, masks: int, pixels_K: np.ndarray, total: Counter[int], train: bool) -> None:
    """Raise ValueError if the values of training masks contradict the class list."""
    coding, names = folder.coding, folder.names
    if not pixels_K.any():
        raise ValueError(f"not one pixel of the {masks} masks in {folder.root} has a class")
    never = [number for number, count in enumerate(pixels_K) if not count]
    if not never:
        return
    ignored = total[coding.ignore] / total.total()
    missing = f"{names[never[0]]} (value {coding.describe_class(never[0])})"
    advice = (
        f"{coding.ignore} fills {100 * ignored:.1f}% of the mask pixels and is ignored, while the class {missing} is "
        f"in none of the {masks} masks in {folder.root}. If {coding.ignore} stands for that class, store "
        f"{coding.describe_class(never[0])} in its place"
    )
    stored = sorted({*total, coding.ignore})
    if len(stored) == len(names):
        advice += f", or give --mask_values {','.join(map(coding.show, stored))}"
    advice += f", or name the value that is really ignored with --ignore_label ({coding.ignore} if it is this one)"
    if train and len(never) == len(names) - 1:
        only = names[int(pixels_K.argmax())]
        raise ValueError(
            f"every pixel of the {masks} training masks in {folder.root} that has a class is {only}: nothing can be "
            f"learned. {advice if ignored else 'Are the others stored under these numbers?'}"
        )
    if train and ignored >= REAL_AREA and not folder.confirmed:
        raise ValueError(advice)
    named = some([names[number] for number in never])
    log.warning("%d of %d classes are in none of these %d masks: %s", len(never), len(names), masks, named)


def _mapping_hint(coding: Coding, total: Counter[int]) -> str:
    """Return which option maps the values found to the classes; "" if that is unknown."""
    stored = sorted(total)
    if coding.values or not 2 <= len(stored) <= 256:
        return ""
    listed = ", ".join(map(str, stored[:MOST_LISTED])) + " ..." * (len(stored) > MOST_LISTED)
    hint = f". All masks together hold the values {listed}"
    if len(stored) == coding.classes:
        hint += f": as many as there are classes. --mask_values {','.join(map(str, stored))} maps them in this order"
    elif len(stored) == coding.classes + 1 and coding.ignore in stored:
        listed = ",".join(str(value) for value in stored if value != coding.ignore)
        hint += f": with {coding.ignore} ignored, --mask_values {listed} maps them in this order"
    elif len(stored) > coding.classes:
        hint += f", and {coding.classes} classes are listed"
    return hint


def _size(path: str) -> tuple[int, int, int] | None:
    """Return rows and columns of an image after EXIF orientation, and the orientation, from its header.

    None if the header cannot be read; this is reported when the image is read.
    """
    try:
        if path.lower().endswith(".npy"):
            rows, columns = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return rows, columns, 1
        with Image.open(path) as picture:
            rows, columns, orientation = picture.height, picture.width, read_orientation(picture)
            return (columns, rows, orientation) if orientation > 4 else (rows, columns, orientation)
    except Exception:  # broken files raise many types of errors
        return None


# ---- scenes ----------------------------------------------------------------------------------------------------------


def _open_scenes(split: str, channels: int) -> Source:
    names = Names(f"scenes/{split}/{number:04d}" for number in range(scenes.SIZES[split]))
    return Source(names, functools.partial(_read_scene, split, channels), classes=list(scenes.CLASSES))


def _read_scene(split: str, channels: int, index: int) -> Pair:
    _, mask_HW = scenes.scene(split, index)
    return Pair(scenes.image(split, channels, index), mask_HW.astype(np.int16))


# ---- splits ----------------------------------------------------------------------------------------------------------


@report_unreadable()
def open_splits(options: SegmentOptions, processes: Processes) -> Splits:
    """Return pairs for training, for selecting the best epoch, and for testing. Raises ValueError if impossible.

    Without a test split, `test_share` of all images are held out. The best epoch is selected on `val` if there is also
    a `test`, otherwise on `holdout` of the training images, or with holdout 0 on the test images.
    """
    if _is_scenes(options):
        pairs, test, choice = (_open_scenes(split, options.in_chans) for split in ("train", "val", "val"))
        both = False
    else:
        pairs, choice, test, both = _open_pairs(options, processes)
    _check_classes(options, pairs)
    train, chosen_on = pairs, VAL
    if not both and options.holdout:
        train, choice = _slice(pairs, options.holdout, options, "holdout")
        chosen_on = HELD_OUT
    elif not both:
        choice, chosen_on = test, TEST
    if options.label_share < 1:
        _, train = _slice(train, options.label_share, options, "label_share")
    if len(choice) < LEAST:
        log.warning("best is chosen on %d images only: differences between epochs are mostly chance", len(choice))
    log.info(
        "%d training images of %d classes; best is chosen on %d images (%s); %d test images",
        *(len(train), len(pairs.classes or []), len(choice), chosen_on, len(test)),
    )
    return Splits(train, choice, chosen_on, test)


@report_unreadable()
def open_test(options: SegmentOptions, processes: Processes, run: Path | None = None) -> Source:
    """Return the test pairs only; see `data.splits.leave_out_trained` for `run`."""
    if _is_scenes(options):
        return _open_scenes("val", options.in_chans)
    folder = _open_folder(options)
    evaluated = folder.split("test") or folder.split("val")
    if evaluated:
        return _opened(folder, evaluated, options, processes)
    pairs = _whole(folder, options, processes)
    return leave_out_trained(run, pairs, _slice(pairs, options.test_share, options, "test_share")[1])


def _is_scenes(options: SegmentOptions) -> bool:
    return options.dataset == "scenes" or (options.dataset == "auto" and options.data_path == "scenes")


def _opened(folder: _Folder, inside: str, options: SegmentOptions, processes: Processes) -> Source:
    source, masks = folder.open(inside)
    if options.check_masks:
        train = split_named(inside)[0] in ("", "train") and not options.eval
        pixels = _check(folder, source, masks, processes, options.num_workers, train)
        source = replace(source, class_pixels=pixels)
    return source


def _whole(folder: _Folder, options: SegmentOptions, processes: Processes) -> Source:
    return _opened(folder, folder.split("train"), options, processes)


def _open_pairs(options: SegmentOptions, processes: Processes) -> tuple[Source, Source, Source, bool]:
    """Return training, selection and test pairs of a folder, and whether the selection pairs are their own split."""
    folder = _open_folder(options)
    val, test = folder.split("val"), folder.split("test")
    if (val or test) and not folder.split("train"):
        raise ValueError(f"{folder.root} has {val or test} images with masks, and none in a folder train beside them")
    train = _whole(folder, options, processes)
    if not val and not test:
        train, evaluated = _slice(train, options.test_share, options, "test_share")
        return train, evaluated, evaluated, False
    evaluated = _opened(folder, test or val, options, processes)
    selection = _opened(folder, val, options, processes) if val and test else evaluated
    return train, selection, evaluated, bool(val and test)


def _slice(source: Source, share: float, options: SegmentOptions, what: str) -> tuple[Source, Source]:
    """Return (remaining images, a share of the images): at least one image each, and complete groups with `group_by`.

    Raises:
        ValueError: There are not two images, or not two groups.
    """
    if len(source) < 2:
        raise ValueError(f"{what}: there is {len(source)} image, which cannot be in two parts")
    count = min(max(1, round(share * len(source))), len(source) - 1)
    if (groups := number_groups(source, options.group_by)) is not None:
        chosen = whole_groups(np.zeros(len(source), np.int64), groups, {0: count}, options.subset_seed, keep=True)
        if not len(chosen):
            raise ValueError(f"{what}: all {len(source)} images are of one group ({options.group_by})")
    else:
        order = np.random.RandomState(options.subset_seed).permutation(len(source))  # its stream never changes
        chosen = np.sort(order[:count])
        warn_of_split_folders(source.names, chosen, what)
    return take(source, np.setdiff1d(np.arange(len(source)), chosen)), take(source, chosen)


def _check_classes(options: SegmentOptions, source: Source) -> None:
    classes = len(source.classes or [])
    if options.num_classes not in (0, classes):
        raise ValueError(f"num_classes {options.num_classes}: the class list has {classes}; leave it out")
