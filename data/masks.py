"""Images with masks that say the class of every pixel: where they come from, and whether they can be trained on.

    DATA/images/{train,val}/a.jpg       DATA/masks/{train,val}/a.png             with classes.txt, a name a line
    DATA/images/a.jpg                   DATA/masks/a.png                         a seeded slice is set aside to judge
    ADE/images/{training,validation}/   ADE/annotations/{training,validation}/   ADEChallengeData2016 as it is unpacked

A mask holds numbers of classes: a grey PNG of 8 or 16 bits, or one with a palette, of which the numbers count and not
the colours. Every mask is looked at before training: a pair that does not fit is told by name, not met at night.
"""

from __future__ import annotations

import functools
import io
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from data import scenes
from data.images import BadImage, Pair, blamed_on, read_image
from data.sources import Names, Source, contents_of, images_below, read_class_list
from data.splits import CLASSES, HELD_OUT, TEST, VAL, Splits, take
from options import SegmentOptions

log = logging.getLogger(__name__)

IGNORE = -1  # the class of pixels that count for nothing, in a mask that was read
ADE20K = Path(__file__).resolve().parent.parent / "configs" / "ade20k.txt"
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
MASK_FOLDERS = ("masks", "annotations")
WANTED = f"a folder images, and a folder {' or '.join(MASK_FOLDERS)}"
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")
GREY_PNG = b"\x89PNG\r\n\x1a\n", 0  # the first bytes, and the colour type
NUMBER_MODES = {"1": "1 bit", "L": "grey", "P": "palette", "I;16": "16 bit", "I;16B": "16 bit", "I": "16 bit"}


T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run, of which each checks its share of the masks."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: T, /) -> list[T]:
        """Return every process's value, in the order of ranks."""


@dataclass(frozen=True)
class Coding:
    """How the numbers of a mask's file are read: from 0 on, or from 1 on with `reduce_zero`, where 0 is no class."""

    classes: int
    ignore: int
    reduce_zero: bool

    def classes_of(self, numbers_HW: np.ndarray) -> np.ndarray:
        """int16 `[H, W]`, each pixel's class or IGNORE; ValueError for a number that is neither."""
        found_HW = numbers_HW.astype(np.int32) - self.reduce_zero
        found_HW[numbers_HW == self.ignore] = IGNORE
        low = IGNORE if self.reduce_zero else 0
        wrong = (found_HW != IGNORE) & ((found_HW < low) | (found_HW >= self.classes))
        if wrong.any():
            numbers = ", ".join(map(str, np.unique(numbers_HW[wrong])[:5]))
            first, last = int(self.reduce_zero), self.classes - 1 + self.reduce_zero
            raise ValueError(
                f"it holds {numbers}; the {self.classes} classes are {first} to {last}, and {self.ignore} is no class"
            )
        return found_HW.astype(np.int16)


# ---- one mask --------------------------------------------------------------------------------------------------------


def read_mask(path: str) -> tuple[np.ndarray, str]:
    """The numbers in a mask's file `[H, W]`, and what kind of file it is; raises `BadImage`."""
    with blamed_on(path):
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            kind = NUMBER_MODES.get(picture.mode)
            if kind is None:
                raise ValueError(
                    f"a picture in colour ({picture.mode}) where each pixel's class number belongs: store the numbers "
                    "as a grey PNG or one with a palette"
                )
            if picture.format == "JPEG":
                raise ValueError("a JPEG file, which changes the numbers a little: store masks as PNG")
            numbers_HW = np.asarray(picture)
        if kind == "1 bit":
            numbers_HW = numbers_HW.astype(np.uint8)
        elif kind == "grey" and (bits := _bits_of_grey_png(data)) < 8:
            numbers_HW = numbers_HW // (255 // (2**bits - 1))  # Pillow has spread 2 and 4 bits over 0 to 255
    return numbers_HW, kind


def _bits_of_grey_png(data: bytes) -> int:
    """Bits of a pixel that a grey PNG's header tells; 8 for any other file."""
    start, colour_type = GREY_PNG
    return data[24] if data.startswith(start) and data[25] == colour_type else 8


def _read_pair(root: str, images: Sequence[str], masks: Sequence[str], coding: Coding, channels: int, n: int) -> Pair:
    image_HWC = read_image(os.path.join(root, images[n]), channels)
    path = os.path.join(root, masks[n])
    numbers_HW, _ = read_mask(path)
    with blamed_on(path):
        mask_HW = coding.classes_of(numbers_HW)
        if mask_HW.shape != image_HWC.shape[:2]:
            raise ValueError(_other_size(mask_HW.shape, image_HWC.shape[:2]))
    return Pair(image_HWC, mask_HW)


def _other_size(mask: Sequence[int], image: Sequence[int]) -> str:
    return f"it has {mask[0]} x {mask[1]} pixels, and its image {image[0]} x {image[1]}"


# ---- folders ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """Images and masks that lie below `root`, in two folders of the same inside."""

    root: str
    masks: str
    coding: Coding
    names: list[str]
    channels: int
    selection: str

    def split(self, split: str) -> str:
        """The folder of a split's images, below `images`; "" where there is none. Test images may have no masks: then
        they judge nothing. ValueError for others without."""
        for name in SPLITS[split]:
            images, masks = (os.path.isdir(os.path.join(self.root, kind, name)) for kind in ("images", self.masks))
            if images and masks:
                return name
            if images and split != "test":
                raise ValueError(f"{self.root} has a folder images/{name}, and no {self.masks}/{name}")
        return ""

    def open(self, inside: str) -> tuple[Source, Names]:
        """The pairs in `images/inside`, and the names of their masks."""
        images = _by_stem(os.path.join(self.root, "images", inside), "images")
        masks = _by_stem(os.path.join(self.root, self.masks, inside), "masks", MASK_SUFFIXES)
        alone = [name for stem, name in images.items() if stem not in masks]
        place = "/".join(filter(None, (self.masks, inside)))
        if alone:
            stem = os.path.splitext(alone[0])[0]
            raise ValueError(
                f"{len(alone)} of {len(images)} images in {self.root} have no mask: {_some(alone)} "
                f"(there is no {place}/{stem}.png)"
            )
        if left := [name for stem, name in masks.items() if stem not in images]:
            log.warning(
                "%d masks in %s/%s have no image and are left out: %s", len(left), self.root, place, _some(left)
            )
        order = sorted(images)
        image_names = Names(os.path.join("images", inside, images[stem]) for stem in order)
        mask_names = Names(os.path.join(self.masks, inside, masks[stem]) for stem in order)
        read = functools.partial(_read_pair, self.root, image_names, mask_names, self.coding, self.channels)
        path = functools.partial(_path, self.root, image_names)
        source = Source(image_names, read, classes=self.names, selection=self.selection, path=path)
        log.info("data: %s: %d images with masks", os.path.join(self.root, "images", inside), len(source))
        return source, mask_names


def _path(root: str, names: Sequence[str], index: int) -> str:
    return os.path.join(root, names[index])


def _by_stem(folder: str, what: str, suffixes: tuple[str, ...] = ()) -> dict[str, str]:
    """Files below a folder by their name without suffix. ValueError for two of a name, and where there is none."""
    found: dict[str, str] = {}
    for name in sorted(images_below(folder)):
        stem, suffix = os.path.splitext(name)
        if suffixes and suffix.lower() not in suffixes:
            raise ValueError(f"{folder}/{name} cannot be a mask: masks are {', '.join(suffixes)} files")
        if stem in found:
            raise ValueError(f"{folder} holds {found[stem]} and {name}: which of them is meant?")
        found[stem] = name
    if not found:
        raise ValueError(f"no {what} in {folder}: it holds {contents_of(folder)}")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _open_folder(options: SegmentOptions) -> _Folder:
    root, ade = options.data_path, options.dataset == "ade20k"
    if not os.path.isdir(root):
        wrong = f"data_path {root} {'is a file' if os.path.exists(root) else 'does not exist'}" if root else "no data"
        raise ValueError(f"{wrong}: give --data_path FOLDER with {WANTED} in it (or the word `scenes`)")
    if ade and os.path.isdir(inside := os.path.join(root, "ADEChallengeData2016")):
        root = inside
    there = [name for name in MASK_FOLDERS if os.path.isdir(os.path.join(root, name))]
    if len(there) != 1 or not os.path.isdir(os.path.join(root, "images")):
        raise ValueError(f"{root} must hold {WANTED}; it holds {contents_of(root)} ({_some(sorted(os.listdir(root)))})")
    listed = options.class_list or (str(ADE20K) if ade else os.path.join(root, CLASSES))
    if not os.path.isfile(listed):
        raise ValueError(
            f"{listed} does not exist: give --class_list FILE, a class's name a line in the order of the masks' numbers"
        )
    names, digest = read_class_list(listed)
    coding = Coding(len(names), options.ignore_label, ade or options.reduce_zero_label)
    if 0 <= (number := coding.ignore - coding.reduce_zero) < len(names):
        raise ValueError(f"ignore_label {coding.ignore} is the number of the class {names[number]}: name another")
    return _Folder(root, there[0], coding, names, options.in_chans, f"{digest} {coding}")


# ---- before training -------------------------------------------------------------------------------------------------


def _check(folder: _Folder, source: Source, masks: Names, processes: Processes, threads: int) -> None:
    """ValueError that names masks which cannot be trained on; every process looks at its share of them."""
    mine = range(processes.rank, len(source), processes.world_size)

    def look(index: int) -> tuple[str, str, list[int]]:
        path = os.path.join(folder.root, masks[index])
        try:
            numbers_HW, kind = read_mask(path)
            classes_HW = folder.coding.classes_of(numbers_HW)
            size = _size(os.path.join(folder.root, source.names[index]))
            if size not in (None, classes_HW.shape):
                raise ValueError(_other_size(classes_HW.shape, size))
        except BadImage as error:
            return f"{masks[index]}: {error.reason}", "", []
        except ValueError as error:
            return f"{masks[index]}: {error}", "", []
        return "", kind, (np.flatnonzero(np.bincount((classes_HW - IGNORE).ravel())) + IGNORE).tolist()

    with ThreadPoolExecutor(max(1, threads)) as pool:  # decoding lets go of Python's lock
        found = [each for share in processes.gather(list(pool.map(look, mine))) for each in share]
    if problems := sorted(problem for problem, _, _ in found if problem):
        raise ValueError(
            f"{len(problems)} of {len(source)} masks in {folder.root} cannot be trained on: {'; '.join(problems[:5])}"
        )
    kinds = Counter(kind for _, kind, _ in found)
    log.info("masks: %s", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    if kinds["palette"]:
        log.info("masks with a palette: the numbers count, not the colours")
    seen = {number for _, _, numbers in found for number in numbers}
    if not seen - {IGNORE}:
        raise ValueError(f"not one pixel of the {len(source)} masks in {folder.root} has a class")
    if never := [name for number, name in enumerate(folder.names) if number not in seen]:
        log.warning("%d of %d classes are in none of these masks: %s", len(never), len(folder.names), _some(never))


def _size(path: str) -> tuple[int, int] | None:
    """Rows and columns of an image, from its header; None where that cannot be read, which reading it will tell."""
    try:
        if path.lower().endswith(".npy"):
            rows, columns = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
            return rows, columns
        with Image.open(path) as picture:
            return picture.height, picture.width
    except Exception:  # whatever a broken file does
        return None


# ---- scenes ----------------------------------------------------------------------------------------------------------


def _open_scenes(split: str, channels: int) -> Source:
    names = Names(f"scenes/{split}/{number:04d}" for number in range(scenes.SIZES[split]))
    return Source(names, functools.partial(_read_scene, split, channels), classes=list(scenes.CLASSES))


def _read_scene(split: str, channels: int, index: int) -> Pair:
    _, mask_HW = scenes.scene(split, index)
    return Pair(scenes.image(split, channels, index), mask_HW.astype(np.int16))


# ---- splits ----------------------------------------------------------------------------------------------------------


def open_splits(options: SegmentOptions, processes: Processes) -> Splits:
    """Pairs to train on, those that choose the best epoch, and those that judge. ValueError for all that cannot be.

    Without a split to judge, `test_share` of all images judge. A split `val` beside `test` chooses; else `holdout` of
    the training images, or with 0 of them the test images themselves.
    """
    if _is_scenes(options):
        whole, test, choice = (_open_scenes(split, options.in_chans) for split in ("train", "val", "val"))
        both = False
    else:
        whole, choice, test, both = _open_pairs(options, processes)
    _settled_classes(options, whole)
    train, chosen_on = whole, VAL
    if not both and options.holdout:
        train, choice = _slice(whole, options.holdout, options.subset_seed, "holdout")
        chosen_on = HELD_OUT
    elif not both:
        choice, chosen_on = test, TEST
    if options.label_share < 1:
        _, train = _slice(train, options.label_share, options.subset_seed, "label_share")
    log.info(
        "%d training images of %d classes; best is chosen on %d images (%s); %d test images",
        *(len(train), len(whole.classes or []), len(choice), chosen_on, len(test)),
    )
    return Splits(train, choice, chosen_on, test)


def open_test(options: SegmentOptions, processes: Processes) -> Source:
    """The pairs that judge, alone."""
    if _is_scenes(options):
        return _open_scenes("val", options.in_chans)
    folder = _open_folder(options)
    judging = folder.split("test") or folder.split("val")
    if judging:
        return _opened(folder, judging, options, processes)
    return _slice(_whole(folder, options, processes), options.test_share, options.subset_seed, "test_share")[1]


def _is_scenes(options: SegmentOptions) -> bool:
    return options.dataset == "scenes" or (options.dataset == "auto" and options.data_path == "scenes")


def _opened(folder: _Folder, inside: str, options: SegmentOptions, processes: Processes) -> Source:
    source, masks = folder.open(inside)
    if options.check_masks:
        _check(folder, source, masks, processes, options.num_workers)
    return source


def _whole(folder: _Folder, options: SegmentOptions, processes: Processes) -> Source:
    return _opened(folder, folder.split("train"), options, processes)


def _open_pairs(options: SegmentOptions, processes: Processes) -> tuple[Source, Source, Source, bool]:
    """(train, choice, test, whether choice is a split of its own) of a folder."""
    folder = _open_folder(options)
    val, test = folder.split("val"), folder.split("test")
    if (val or test) and not folder.split("train"):
        raise ValueError(f"{folder.root} has {val or test} images with masks, and none in a folder train beside them")
    train = _whole(folder, options, processes)
    if not val and not test:
        train, judging = _slice(train, options.test_share, options.subset_seed, "test_share")
        return train, judging, judging, False
    judging = _opened(folder, test or val, options, processes)
    choosing = _opened(folder, val, options, processes) if val and test else judging
    return train, choosing, judging, bool(val and test)


def _slice(source: Source, share: float, seed: int, what: str) -> tuple[Source, Source]:
    """(what is left, a share of the images): at least one image each. ValueError where there are not two."""
    if len(source) < 2:
        raise ValueError(f"{what}: there is {len(source)} image, which cannot be in two parts")
    count = min(max(1, round(share * len(source))), len(source) - 1)
    order = np.random.RandomState(seed).permutation(len(source))  # a legacy generator: its stream never changes
    return take(source, np.sort(order[count:])), take(source, np.sort(order[:count]))


def _settled_classes(options: SegmentOptions, source: Source) -> None:
    classes = len(source.classes or [])
    if options.num_classes not in (0, classes):
        raise ValueError(f"num_classes {options.num_classes}: the class list has {classes}; leave it out")
