"""Open image data: folders, list files, tar shards, torchvision and Hugging Face data sets, embedded digits.

Each of them is opened as a `Source`: names, labels if there are any, and a function that reads an image by its index.
All have random access, so that a run resumes exactly; streaming data sets are not supported for this reason. Ambiguous
cases (is this folder labelled?) are resolved by documented rules and logged, together with what was left out.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import glob
import hashlib
import importlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torchvision.datasets
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from data import scenes
from data.archives import find_shards, read_archive
from data.depth import with_range
from data.folders import (
    SPLIT_WORDS,
    Found,
    NoSplit,
    describe_contents,
    find_split_folder,
    holds_images,
    images_below,
    label_by_folder,
    match_classes,
    some,
    split_folders,
    split_named,
    visible_folders,
    walk,
)
from data.images import (
    HEIF,
    HEIF_EXTRA,
    PICTURE_MODES,
    BadImage,
    blamed_on,
    decode,
    is_image_name,
    picture_pixels,
    read_stored,
)
from data.labels import read_labels
from data.packs import Pack, is_pack, open_pack
from options import RunOptions, nearest

log = logging.getLogger(__name__)

IMAGENET100 = Path(__file__).resolve().parent.parent / "configs" / "imagenet100.txt"
CALTECH_TRAIN, CALTECH_TEST = 30, 50  # images of each class, as in the literature


class Names(Sequence[str]):
    """A sequence of strings in one block of bytes.

    Forked loader workers share the memory of the main process until it is written to. Reading a `str` changes its
    reference count, so each worker would copy a list of a million paths when it reads it. Two large buffers without
    pointers stay shared, and are smaller.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]])


@dataclass
class Source:
    """Images in a fixed order.

    names     path (relative to the data folder) or id of each image
    read      index of an image -> uint8 `[H, W, C]`, or a Pair with its mask; raises `data.images.BadImage`
    labels    int64 `[n]`, or None
    classes   names of the labels, or None
    selection sha256 of the class list or of the pack; or ""
    path      index of an image -> its file, if each image has its own file
    class_pixels int64 `[n, K]`, pixels of each class in each mask, if they were counted
    value_range lowest and highest value of files of more than 8 bits, which become 0 and 255; or ()
    read_lazily as `read`, but JPEG files may be returned as `data.images.Undecoded`; None if there are no files
    notes     messages for the user on how the images were found
    problem   reason why no classifier can be trained on the labels, or on images without labels; or ""
    """

    names: Sequence[str]
    read: Callable[[int], Any]
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    selection: str = ""
    path: Callable[[int], str] | None = None
    read_lazily: Callable[[int], Any] | None = None
    value_range: tuple[float, ...] = ()
    class_pixels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    problem: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of names, labels and class list. It does not depend on the location of the folder."""
        digest = hashlib.sha256(self.selection.encode())
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `open_source`."""

    dataset: str
    data_path: str
    split: str
    in_chans: int
    class_list: str | Sequence[str]
    known: Sequence[str] | None
    label_offset: int | None


def open_source(
    dataset: str,
    data_path: str,
    split: str = "train",
    *,
    in_chans: int = 3,
    class_list: str | Sequence[str] = "",
    value_range: Sequence[float] = (),
    known: Sequence[str] | None = None,
    label_offset: int | None = None,
    exact: bool = False,
) -> Source:
    """Open the images of a split. docs/data.md lists what is accepted.

    Args:
        dataset: `auto` or one of the kinds below.
        data_path: Folder, file or name that is opened.
        split: `train`, `val` or `test`. Without validation images `val` is the test images, unless `exact` is set.
        in_chans: Channels of the images.
        class_list: Use these classes of a folder, labelled in this order: a file of folder names, one per line, the
            name `imagenet100`, or a sequence.
        known: Classes of the training images, to which folders of another split are matched by name.
        value_range: Scale of files of more than 8 bits; by default it is chosen from a sample, see `data.depth`.
        label_offset: Index of the first class in a list or in label files; None: 0.
        exact: Raise NoSplit if there are no validation images, even if there are test images.

    Raises:
        NoSplit: There are no images of this split.
        ValueError: The data cannot be used.

    dataset           data_path      what is read
    auto              anything       digits, a list (.txt), a tar shard (.tar), a pack or a folder, by data_path
    folder            DATA           DATA/train/<class>/*, DATA/<class>/*, or images in any other layout, unlabelled
    digits            -              scikit-learn's 1797 handwritten digits, 8 x 8 pixels
    scenes            -              generated scenes of data/scenes.py, 64 x 96 pixels, unlabelled
    LIST.txt          "" or DATA     one path per line, with or without a label; relative to DATA or to the list
    torch/cifar10 ... DATA           one of torchvision's data sets, already unpacked in DATA
    hfds/NAME         "" or a cache  a Hugging Face data set (package `datasets`), which is downloaded if necessary
    wds, wds/SHARDS   DATA           tar shards of WebDataset or of class folders; SHARDS may contain * and {00..99}
    pack              PACK           a pack created by tools.pack (`auto` recognises it)
    """
    dataset, data_path = os.path.expanduser(dataset), os.path.expanduser(data_path)
    if dataset == "auto":
        dataset, data_path = _guess(data_path)
    if class_list and dataset not in ("folder", "pack"):
        raise ValueError(f"class_list selects class folders and does not apply to dataset {dataset!r}")
    if label_offset is not None and not (dataset.endswith(".txt") or dataset.startswith("wds")):
        raise ValueError(f"label_offset is for numbers in lists and label files and does not apply to {dataset!r}")
    wanted = _Wanted(dataset, data_path, split, in_chans, class_list, known, label_offset)
    try:
        source = _open(wanted)
    except NoSplit as missing:
        if split != "val" or exact:
            raise
        try:
            source = _open(replace(wanted, split="test"))
        except NoSplit:
            raise missing from None
    if (
        dataset != "pack"
        and in_chans not in PICTURE_MODES
        and not any(name.lower().endswith((".npy", ".tif", ".tiff")) for name in source.names[:1000])
    ):
        raise ValueError(
            f"in_chans {in_chans} needs .npy arrays [H, W, {in_chans}] or TIFF files of {in_chans} bands; pictures "
            "give 1, 3 or 4 channels"
        )
    value_range = value_range or source.value_range
    return with_range(
        source, in_chans, value_range, report=split == "train", files=bool(source.read_lazily or source.path)
    )


def open_split(options: RunOptions, split: str, *, known: Sequence[str] | None = None, exact: bool = False) -> Source:
    """Open a split of the images that the options of a run name; see `open_source`."""
    names = ("in_chans", "class_list", "value_range", "label_offset")
    how: dict[str, Any] = {name: getattr(options, name) for name in names}
    return open_source(options.dataset, options.data_path, split, known=known, exact=exact, **how)


@contextlib.contextmanager
def report_unreadable() -> Iterator[None]:
    """Convert the error of a file or folder that cannot be read to ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot read {error.filename or 'the data'}: {error.strerror or error}") from error


@report_unreadable()
def _open(wanted: _Wanted) -> Source:
    """Open exactly this split."""
    dataset, data_path, split, in_chans = wanted.dataset, wanted.data_path, wanted.split, wanted.in_chans
    kind, _, name = dataset.partition("/")
    if dataset == "folder":
        return _open_folder(wanted)
    if dataset == "digits":
        return _open_digits(split, in_chans)
    if dataset == "scenes":
        return _open_scenes(split, in_chans)
    if dataset.endswith(".txt"):
        return _open_list(wanted)
    if kind == "torch" and name:
        return _open_torchvision(name.lower(), data_path, split, in_chans)
    if kind == "hfds" and name:
        return _open_hugging_face(name, data_path, split, in_chans)
    if dataset == "pack":
        return _open_pack(data_path, split, in_chans, wanted.class_list)
    if kind == "wds":
        return _open_shards(wanted, name)
    if kind in ("hfids", "tfds"):
        raise ValueError(
            f"dataset {dataset!r} is a stream, which cannot be resumed at an exact image. Use hfds/NAME (Hugging Face, "
            "random access), wds (tar shards, indexed at the start) or a folder"
        )
    words = ["auto", "folder", "digits", "scenes", "wds", "pack", *(f"torch/{name}" for name in TORCHVISION)]
    hint = nearest(dataset, words)
    raise ValueError(
        f"unknown dataset {dataset!r}{hint and '; '}{hint} "
        "(auto, folder, digits, scenes, LIST.txt, torch/, hfds/, wds/, pack)"
    )


def official_split(dataset: str, split: str) -> str:
    """Return `train` or `val` for a public data set that has a training and a test split only.

    Raises:
        NoSplit: validation images are requested, which such a data set does not have.
    """
    if split == "train":
        return "train"
    if split == "test":
        return "val"
    raise NoSplit(f"no {split} images: {dataset} has a training and a test split")


def _guess(data_path: str) -> tuple[str, str]:
    """Return the dataset and data path for dataset "auto"."""
    if not data_path:
        raise ValueError("no data: give --data_path FOLDER (or the word `digits`)")
    if data_path in ("digits", "scenes"):
        return data_path, ""
    if data_path.endswith(".txt"):
        return data_path, ""
    if data_path.endswith(".tar"):
        return f"wds/{glob.escape(os.path.basename(data_path))}", os.path.dirname(data_path) or "."
    if any(is_pack(os.path.join(data_path, name)) for name in ("", "train", "val")):
        return "pack", data_path
    return "folder", data_path


def _log_source(source: Source, what: str, why: str) -> Source:
    """Log what was found, how it was read and what was left out; return the source."""
    labels = "no labels" if source.labels is None else f"{len(source.classes or [])} classes"
    log.info("data: %s: %d images, %s (%s)", what, len(source), labels, why)
    for note in source.notes:
        log.log(logging.WARNING if "left out" in note or HEIF_EXTRA in note else logging.INFO, "data: %s", note)
    return source


# --- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(wanted: _Wanted) -> Source:
    root, others = _split_folder(wanted.data_path, wanted.split)
    selection, class_list = "", wanted.class_list
    classes: list[str] | None = list(wanted.known or ())
    if class_list:
        classes, selection = read_class_list(class_list)
    if classes:
        strict = bool(class_list) and wanted.split == "train"
        found, labels, notes = _selected_classes(root, classes, strict=strict, others=bool(class_list))
        names, problem = found.names, ""
        if class_list:
            why = f"class list {class_list if isinstance(class_list, str) else 'as given'}, sha256 {selection}"
        else:
            why = "a folder for each class of the training images"
        if not names and not class_list:  # other names of folders, or no folders
            found = _walk_without(root, others)
            names, labels, classes, notes = found.names, None, None, []
            problem = why = f"no folder is named like a class of the training images, such as {wanted.known[0]}"  # type: ignore[index]
    else:
        found = _walk_without(root, others)
        names = found.names
        notes = []
        if names:
            labels, classes, why = label_by_folder(names)
            problem = "" if classes else why
            notes += _describe_names(classes or [])
    if not names:
        heif = f". {HEIF_EXTRA}" if any(found.other[suffix] for suffix in HEIF) else ""
        raise ValueError(
            f"no images in {root}: it holds {describe_contents(root)} (images are .jpg .png .tif .npy ...){heif}"
        )
    if heic := sum(found.other[suffix] for suffix in HEIF):
        notes.append(f"{heic} {HEIF_EXTRA}")
    notes = [f"left out: {line}" for line in found.left_out()] + notes
    compact = Names(names)
    read = functools.partial(_read_file, root, compact, wanted.in_chans)
    path = functools.partial(join_path, root, compact)
    lazily = functools.partial(read, lazy=True)
    source = Source(
        compact, read, labels, classes, selection, path, read_lazily=lazily, notes=tuple(notes), problem=problem
    )
    return _log_source(source, root, why)


def _split_folder(data_path: str, split: str) -> tuple[str, list[str]]:
    """Return the folder that holds `split`, and which of its folders are other splits.

    For "train" that is `data_path` itself when it has no folder of that name.
    """
    if not data_path:
        raise ValueError("no data: give --data_path FOLDER")
    if not os.path.isdir(data_path):
        raise ValueError(f"data_path {data_path} {_no_folder(data_path)}")
    above = find_split_folder(data_path)
    splits = split_folders(above)
    if split in splits:
        root = os.path.join(above, splits[split])
        inside = visible_folders(root)
        if len(inside) == 1 and split_named(inside[0]) == (split, True) and not holds_images(root):
            root = os.path.join(root, inside[0])  # a nested folder of the same name: train/train
        return root, []
    if split == "train" and "train" not in splits:
        others = sorted(splits.values())
        beside = set(visible_folders(above)) - set(others)
        if others and not beside and not holds_images(above):
            return data_path, []  # there are no other folders
        return above if others else data_path, others
    names = (*SPLIT_WORDS["val"], "test") if split == "val" else SPLIT_WORDS.get(split, (split,))
    held = describe_contents(data_path)
    raise NoSplit(f"no {split} images: {data_path} has no folder {' or '.join(names)}; it holds {held}")


def _no_folder(data_path: str) -> str:
    if not os.path.exists(data_path):
        return "does not exist"
    if data_path.lower().endswith((".zip", ".rar", ".7z", ".gz", ".tgz", ".bz2", ".xz", ".zst")):
        return "is a compressed archive: unpack it, or make an uncompressed .tar of it, which can be read in any order"
    return "is a file and not a folder (a list of images ends in .txt)"


def _walk_without(root: str, others: Sequence[str]) -> Found:
    """Find all images below `root` that are not in `others`, the folders of other splits."""
    found = walk(root)
    if others:
        found.names = [name for name in found.names if name.split("/")[0] not in others]
        log.warning("data: %s has no folder train; the folders of other splits (%s) are left out", root, some(others))
    return found


def _describe_names(classes: Sequence[str]) -> list[str]:
    """Describe unusual class names."""
    notes = []
    folded = collections.Counter(name.casefold() for name in classes)
    if twice := [name for name in classes if folded[name.casefold()] > 1]:
        notes.append(f"classes whose names differ in capitals alone: {some(twice)}")
    if named := [name for name in classes if split_named(name)[0]]:
        notes.append(f"the folders {some(named)} are used as classes, although they are named like splits")
    return notes


def class_folders_without_images(data_path: str, split: str) -> list[str]:
    """Return the folders of a split that look like classes but contain no image, as after an incomplete copy."""
    root, others = _split_folder(data_path, split)
    names = [name for name in visible_folders(root) if name not in others]
    found = {name: walk(os.path.join(root, name)) for name in names}
    return sorted(name for name, inside in found.items() if not inside.names and not inside.runs)


def _selected_classes(
    root: str, classes: list[str], *, strict: bool, others: bool
) -> tuple[Found, np.ndarray | None, list[str]]:
    """Find the images of these classes, in their order, below `root` or below the only folder in it, and so on.

    Args:
        strict: Raise ValueError if a class has no folder.
        others: Ignore folders of other classes; otherwise raise ValueError if they contain images.

    Returns:
        The files, the labels, and notes.
    """
    base, numbers, foreign = _find_class_folders(root, classes)
    prefix = "" if base == root else f"{os.path.relpath(base, root)}/"
    if strict and len(numbers) < len(classes):
        missing = [name for number, name in enumerate(classes) if number not in numbers.values()]
        raise ValueError(
            f"{len(missing)} of the {len(classes)} listed classes have no folder in {root}: {some(missing)}"
        )
    found, counts = Found(), []
    folder_of = {number: name for name, number in numbers.items()}
    for number in range(len(classes)):
        inside = walk(os.path.join(base, folder_of[number])) if number in folder_of else Found()
        found.add(inside, f"{prefix}{folder_of.get(number, '')}/")
        counts.append(len(inside.names))
    empty = [classes[number] for number, count in enumerate(counts) if not count]
    if strict and empty:
        raise ValueError(f"{len(empty)} of the {len(classes)} listed classes have no images in {root}: {some(empty)}")
    if numbers and not others:
        foreign = [name for name in foreign if images_below(os.path.join(base, name))]
        if foreign:
            raise ValueError(
                f"{base} has images of classes that the training images do not have: {some(foreign)}. Rename or remove "
                "these folders, or list the classes to use in a file and name it with --class_list"
            )
    notes = []
    if others and foreign:
        notes.append(f"left out: {len(foreign)} folders that the class list does not name ({some(foreign)})")
    if differing := [name for name, number in numbers.items() if name != classes[number]]:
        notes.append(f"folders that name a class in other characters: {some([ascii(name) for name in differing])}")
    return found, np.repeat(np.arange(len(classes)), counts), notes


def _find_class_folders(root: str, classes: list[str]) -> tuple[str, dict[str, int], list[str]]:
    """Return the folder that holds folders of these classes, their class numbers, and the other folders in it."""
    base = root
    while True:
        folders = visible_folders(base)
        numbers, foreign = match_classes(folders, classes)
        if numbers or len(folders) != 1 or holds_images(base):
            return base, numbers, foreign
        base = os.path.join(base, folders[0])


@report_unreadable()
def has_listed_classes(data_path: str, class_list: str) -> bool:
    """Return whether `class_list` can select the classes of the images that `--eval` evaluates.

    That is, `data_path` is a folder whose split `test` or `val` has a folder of a listed class; without these splits,
    one of every listed class. False if the list cannot be read.
    """
    if not os.path.isdir(data_path):
        return False
    try:
        classes = read_class_list(class_list)[0]
    except ValueError:
        return False
    for split in ("test", "val", "train"):
        with contextlib.suppress(NoSplit):
            numbers = _find_class_folders(_split_folder(data_path, split)[0], classes)[1]
            return len(numbers) >= (len(classes) if split == "train" else 1)
    return False


def read_class_list(class_list: str | Sequence[str]) -> tuple[list[str], str]:
    """Return the classes of a file, of the name `imagenet100` or of a sequence, and the sha256 of the list."""
    if isinstance(class_list, str):
        path = IMAGENET100 if class_list == "imagenet100" else Path(class_list)
        if not path.is_file():
            raise ValueError(f"class_list {class_list!r} is neither the word imagenet100 nor a file of folder names")
        classes = [line.strip() for line in _read_list(path).split("\n") if line.strip()]
    else:
        classes = list(class_list)
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    if twice or not classes:
        what = f"names {some(twice)} more than once" if twice else "is empty"
        raise ValueError(f"class_list {class_list!r} {what}")
    return classes, hashlib.sha256(os.fsencode("".join(f"{name}\n" for name in classes))).hexdigest()


def _read_list(path: Path) -> str:
    """Return the text of a list: UTF-8 with or without a byte order mark; file names in it may contain any bytes."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"cannot read the list {path}: {error.strerror}") from error


def _read_file(root: str, names: Sequence[str], in_chans: int, index: int, lazy: bool = False) -> np.ndarray:
    return read_stored(join_path(root, names, index), in_chans, lazy=lazy)


def join_path(root: str, names: Sequence[str], index: int) -> str:
    """Return the path of an image below the folder `root`."""
    return os.path.join(root, names[index])


# --- list files -------------------------------------------------------------------------------------------------------


def _open_list(wanted: _Wanted) -> Source:
    """Open a text file with one image path per line, optionally followed by a tab or spaces and a label.

    The val split of `lists/train.txt` is `lists/val.txt`.
    """
    path = _find_list(Path(wanted.dataset), wanted.split)
    if not path.is_file():
        raise ValueError(f"the list of images {path} does not exist")
    root = wanted.data_path or str(path.parent)
    rows = [_path_and_label(line) for line in _read_list(path).split("\n") if line.strip()]
    if not rows:
        raise ValueError(f"the list of images {path} is empty")
    names = Names(name for name, _ in rows)
    if not any(os.path.exists(os.path.join(root, name)) for name in names[:16]):
        comma = " (a label is separated by a tab or spaces, not by a comma)" if "," in names[0] else ""
        raise ValueError(f"{path}: none of the first images exists, such as {os.path.join(root, names[0])}{comma}")
    if not is_image_name(os.path.basename(names[0])) and not os.path.exists(os.path.join(root, names[0])):
        raise ValueError(f"{path}: the first line is not the path of an image, found {names[0]!r}: remove a heading")
    labels, classes, problem, notes = None, None, "the list has no labels", []
    given = [label for _, label in rows if label is not None]
    if given and len(given) < len(rows):
        first = next(number for number, (_, label) in enumerate(rows, start=1) if label is None)
        raise ValueError(f"{path}: {len(given)} of {len(rows)} images have a label, number {first} has none")
    if given:
        found = read_labels(given, str(path), wanted.label_offset)
        labels, classes, problem, notes = found.numbers, found.classes, found.problem, found.notes
    notes += _repeated(path, root, rows)
    read = functools.partial(_read_file, root, names, wanted.in_chans)
    path_of, lazily = functools.partial(join_path, root, names), functools.partial(read, lazy=True)
    source = Source(names, read, labels, classes, path=path_of, read_lazily=lazily, notes=tuple(notes), problem=problem)
    return _log_source(source, str(path), f"paths relative to {root}")


def _find_list(path: Path, split: str) -> Path:
    """Return the list of another split: the training list's name with `train` replaced."""
    if split == "train":
        return path
    word = next((word for word in ("training", "train", "Train", "TRAIN") if word in path.name), "")
    if not word:
        raise NoSplit(f"no {split} images: {path} has no `train` in its name to be replaced by `{split}`")
    candidates = [path.with_name(path.name.replace(word, other)) for other in SPLIT_WORDS.get(split, (split,))]
    candidates += [path.with_name(path.name.replace(word, split.capitalize()))]
    found = next((other for other in candidates if other.is_file()), None)
    if found is None:
        raise NoSplit(f"no {split} images: there is no list {candidates[0]}")
    return found


def _repeated(path: Path, root: str, rows: Sequence[tuple[str, str | None]]) -> list[str]:
    """Describe how often images are repeated in a list; raise ValueError if one has two labels."""
    labels: dict[str, str | None] = {}
    repeated = 0
    for name, label in rows:
        file = os.path.normpath(os.path.join(root, name))  # ./a.jpg and a.jpg are one image
        if file not in labels:
            labels[file] = label
            continue
        repeated += 1
        if labels[file] != label:
            raise ValueError(
                f"{path}: {name} is listed with the labels {labels[file]!r} and {label!r}; an image has one class"
            )
    return [f"{repeated} of {len(rows)} lines repeat an image"] if repeated else []


def _path_and_label(line: str) -> tuple[str, str | None]:
    """Split a line of a list. Spaces may be part of a path: a line that ends with the name of an image has no label."""
    if "\t" in line:
        path, label = line.rsplit("\t", 1)
        return path.strip(), label.strip()
    line = line.strip()
    parts = line.rsplit(None, 1)
    if len(parts) == 1 or is_image_name(os.path.basename(line)):
        return line, None
    return parts[0], parts[1]


# --- packs ------------------------------------------------------------------------------------------------------------


def _open_pack(data_path: str, split: str, in_chans: int, class_list: str | Sequence[str]) -> Source:
    """Open the pack of a split in `data_path`, or `data_path` itself if it is a pack of the training images."""
    folder = data_path if split == "train" and is_pack(data_path) else os.path.join(data_path, split)
    if not is_pack(folder):
        raise NoSplit(f"no {split} images: {folder} contains no pack made by tools.pack")
    pack = open_pack(folder)
    if class_list and read_class_list(class_list)[0] != pack.manifest["classes"]:
        raise ValueError(f"the pack {folder} has other classes than class_list: give class_list when packing")
    if pack.touched():
        _same_source(pack)
    recipe = pack.manifest["recipe"]
    size = f"short side {recipe['short_side']}" if recipe["short_side"] else "original size"
    what = "raw pixels" if recipe["raw"] else f"JPEG quality {recipe['quality']}" if recipe["quality"] else "own files"
    read = pack.reader(in_chans)
    source = Source(
        Names(pack.names),
        read,
        pack.labels,
        pack.manifest["classes"],
        selection=pack.fingerprint,
        read_lazily=functools.partial(read, lazy=True),
        value_range=tuple(pack.manifest["source"].get("value_range", ())),
    )
    return _log_source(source, f"pack {folder}", f"{size}, {what}")


def _same_source(pack: Pack) -> None:
    """Raise ValueError with the differences if the files that a pack was made from have changed."""
    made = pack.manifest["source"]
    try:
        now = open_source(
            made["dataset"],
            made["data_path"],
            made["split"],
            in_chans=pack.manifest["recipe"]["channels"],
            class_list=made["class_list"],
            value_range=made.get("value_range", ()),
        )
    except ValueError as error:
        different = str(error)
    else:
        if now.fingerprint == made["fingerprint"]:
            return
        packed = {*pack.names, *(name for name, _ in pack.manifest["left_out"])}
        added, gone = sorted(set(now.names) - packed), sorted(packed - set(now.names))
        different = f"{len(added)} images were added ({some(added)}), {len(gone)} are gone ({some(gone)})"
        different = different if added or gone else "classes or labels have changed"
    raise ValueError(
        f"{made['data_path']} has changed since the pack {pack.folder} was created from it: {different}. Pack again, "
        f"or make the pack independent of it: python -m tools.pack --detach {pack.folder}"
    )


# --- embedded and public data sets ------------------------------------------------------------------------------------


def _open_digits(split: str, in_chans: int) -> Source:
    """Open scikit-learn's handwritten digits; "val" is a quarter of the images of each digit, drawn with seed 0."""
    from sklearn.datasets import load_digits  # imported here because this is slow

    split = official_split("digits", split)
    digits = load_digits()
    drawn = np.random.RandomState(0)  # a legacy generator, whose stream is guaranteed not to change
    groups = [drawn.permutation(np.flatnonzero(digits.target == digit)) for digit in range(10)]
    held_out = np.concatenate([group[: len(group) // 4] for group in groups])
    chosen = np.sort(held_out) if split == "val" else np.setdiff1d(np.arange(len(digits.target)), held_out)
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    names = [f"digits/{number:04d}" for number in chosen]
    labels = digits.target[chosen].astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    source = Source(Names(names), functools.partial(_read_digit, images, in_chans), labels, classes)
    return _log_source(source, "digits", f"{split} split of scikit-learn's handwritten digits")


def _open_scenes(split: str, in_chans: int) -> Source:
    split = official_split("scenes", split)
    names = Names(f"scenes/{split}/{number:04d}" for number in range(scenes.SIZES[split]))
    source = Source(names, functools.partial(scenes.image, split, in_chans))
    return _log_source(source, "scenes", f"{split} split of the generated scenes")


def _read_digit(images: np.ndarray, in_chans: int, index: int) -> np.ndarray:
    return picture_pixels(Image.fromarray(images[index]), in_chans)


_TRAIN_FLAG: dict[str, list[dict[str, Any]]] = {"train": [{"train": True}], "val": [{"train": False}]}
_TRAIN_TEST: dict[str, list[dict[str, Any]]] = {"train": [{"split": "train"}], "val": [{"split": "test"}]}
_TRAINVAL_TEST: dict[str, list[dict[str, Any]]] = {"train": [{"split": "trainval"}], "val": [{"split": "test"}]}
_BOTH_TEST: dict[str, list[dict[str, Any]]] = _TRAIN_TEST | {"train": [{"split": "train"}, {"split": "val"}]}


def _with(splits: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, list[dict[str, Any]]]:
    """Add arguments to the splits, which make torchvision's defaults explicit."""
    return {split: [ask | more for ask in asks] for split, asks in splits.items()}


# name: (torchvision class, arguments for each split, as used in the literature)
TORCHVISION: dict[str, tuple[str, dict[str, list[dict[str, Any]]]]] = {
    "cifar10": ("CIFAR10", _TRAIN_FLAG),
    "cifar100": ("CIFAR100", _TRAIN_FLAG),
    "mnist": ("MNIST", _TRAIN_FLAG),
    "fashion_mnist": ("FashionMNIST", _TRAIN_FLAG),
    "kmnist": ("KMNIST", _TRAIN_FLAG),
    "qmnist": ("QMNIST", {"train": [{"what": "train"}], "val": [{"what": "test"}]}),
    "svhn": ("SVHN", _TRAIN_TEST),
    "stl10": ("STL10", _TRAIN_TEST),
    "flowers102": ("Flowers102", _BOTH_TEST),
    "oxford_iiit_pet": ("OxfordIIITPet", _TRAINVAL_TEST),
    "dtd": ("DTD", _with(_BOTH_TEST, partition=1)),
    "food101": ("Food101", _TRAIN_TEST),
    "fgvc_aircraft": ("FGVCAircraft", _with(_TRAINVAL_TEST, annotation_level="variant")),
    "caltech101": ("Caltech101", {"train": [{}], "val": [{}]}),  # it has no splits: see _caltech101_split
}


def _open_torchvision(name: str, data_path: str, split: str, in_chans: int) -> Source:
    if name not in TORCHVISION:
        hint = nearest(f"torch/{name}", (f"torch/{known}" for known in TORCHVISION))
        known = ", ".join(TORCHVISION)
        raise ValueError(f"unknown torchvision data set {name!r}{hint and '; '}{hint} (known: {known})")
    class_name, splits = TORCHVISION[name]
    split = official_split(f"torch/{name}", split)
    if not data_path:
        raise ValueError(f"torch/{name} needs --data_path: the folder into which torchvision unpacked it")
    maker = getattr(torchvision.datasets, class_name)
    try:
        parts = [maker(root=data_path, download=False, **ask) for ask in splits[split]]
    except (RuntimeError, OSError, ImportError) as error:
        raise ValueError(
            f"torch/{name} cannot be opened in {data_path}: {error}. To fetch it: "
            f'python -c "from torchvision.datasets import {class_name} as D; D({data_path!r}, download=True)"'
        ) from error
    images: Dataset = ConcatDataset(parts)
    asked = f"{split}: {splits[split]}"
    labels = np.concatenate([_torchvision_labels(part) for part in parts])
    classes = next((list(getattr(parts[0], key)) for key in ("classes", "categories") if hasattr(parts[0], key)), None)
    classes = classes or [str(label) for label in range(labels.max() + 1)]
    names = Names(f"{name}/{split}/{index:06d}" for index in range(len(labels)))
    if name == "caltech101":
        chosen, asked = _caltech101_split(labels, classes, split)
        images, labels = Subset(images, chosen.tolist()), labels[chosen]
        numbers = parts[0].index
        names = Names(f"{classes[label]}/image_{numbers[i]:04d}.jpg" for i, label in zip(chosen, labels, strict=True))
    read = functools.partial(_read_torchvision, images, names, in_chans)
    return _log_source(Source(names, read, labels, classes), f"torch/{name} in {data_path}", asked)


def _caltech101_split(labels: np.ndarray, classes: list[str], split: str) -> tuple[np.ndarray, str]:
    """Return (indices, description) of a split: 30 images per class for training, at most 50 others for testing.

    Each class is drawn with a seed computed from its name, so that changes of other classes have no effect.
    """
    chosen = []
    for label, name in enumerate(classes):
        group = np.flatnonzero(labels == label)
        if len(group) <= CALTECH_TRAIN:
            raise ValueError(f"torch/caltech101: {len(group)} images of {name}; training alone takes {CALTECH_TRAIN}")
        order = np.random.RandomState(zlib.crc32(name.encode())).permutation(group)
        end = CALTECH_TRAIN + CALTECH_TEST
        chosen.append(order[:CALTECH_TRAIN] if split == "train" else order[CALTECH_TRAIN:end])
    rule = f"{CALTECH_TRAIN} images of each class" if split == "train" else f"at most {CALTECH_TEST} others of each"
    return np.sort(np.concatenate(chosen)), f"{split}: {rule}, drawn with a fixed seed"


def _torchvision_labels(dataset: Any) -> np.ndarray:
    """Return the labels of a torchvision data set without decoding images; the attribute has one of four names."""
    found = next(getattr(dataset, name) for name in ("targets", "labels", "_labels", "y") if hasattr(dataset, name))
    labels = np.asarray(found).astype(np.int64)
    return labels[:, 0] if labels.ndim == 2 else labels  # in QMNIST the first column is the digit


def _read_torchvision(dataset: Any, names: Sequence[str], in_chans: int, index: int) -> np.ndarray:
    with blamed_on(names[index]):
        return picture_pixels(dataset[index][0], in_chans)


def _open_hugging_face(name: str, cache: str, split: str, in_chans: int) -> Source:
    """Open `datasets.load_dataset(name)`: its first image column, and its first class column if there is one."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"hfds/{name} needs an optional package: pip install -r requirements/data.txt") from error
    try:
        available = datasets.get_dataset_split_names(name, cache_dir=cache or None)
        name_of_split = next((word for word in SPLIT_WORDS.get(split, (split,)) if word in available), None)
        if name_of_split is None:
            splits = f"it has the splits {', '.join(available)} and none of them is for {split}"
            raise NoSplit(f"no {split} images in hfds/{name}: {splits}")
        table = datasets.load_dataset(name, split=name_of_split, cache_dir=cache or None)
    except NoSplit:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: data set scripts are not supported
        raise ValueError(f"hfds/{name} cannot be opened: {error}") from error
    image_key = next((key for key, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    label_key = next((key for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image_key is None:
        raise ValueError(f"hfds/{name} has no column of images, only {', '.join(table.features)}")
    labels = np.array(table[label_key][:], np.int64) if label_key else None
    problem = "" if label_key else f"no column is a ClassLabel: {', '.join(table.features)}"
    if labels is not None and (unlabelled := int((labels < 0).sum())):
        problem, labels = f"{unlabelled} of {len(labels)} images have the label -1, which means no label", None
    classes = list(table.features[label_key].names) if labels is not None else None
    names = Names(f"{name}/{name_of_split}/{index:06d}" for index in range(len(table)))
    table = table.cast_column(image_key, datasets.Image(decode=False)).select_columns(image_key)
    read = functools.partial(_read_hugging_face, table, image_key, names, in_chans)
    source = Source(names, read, labels, classes, read_lazily=functools.partial(read, lazy=True), problem=problem)
    return _log_source(source, f"hfds/{name}", f"split {name_of_split}")


def _read_hugging_face(
    table: Any, image_key: str, names: Sequence[str], in_chans: int, index: int, lazy: bool = False
) -> np.ndarray:
    with blamed_on(names[index]):
        image = table[index][image_key]
        if image["bytes"] is None:
            return read_stored(image["path"], in_chans, lazy=lazy)
        return decode(image["bytes"], in_chans, names[index], lazy=lazy)


# --- tar shards -------------------------------------------------------------------------------------------------------


def _open_shards(wanted: _Wanted, pattern: str) -> Source:
    """Open tar files with random access: the headers are read once, then images are read by their offset."""
    data_path = wanted.data_path
    shards, named = find_shards(pattern, data_path, wanted.split)
    log.info("data: indexing %d tar shards in %s", len(shards), data_path)
    try:
        found = read_archive(
            shards, wanted.split, named=named, label_offset=wanted.label_offset, known=wanted.known or ()
        )
    except NoSplit as error:
        raise NoSplit(f"no {wanted.split} shards in {data_path}; {error}") from error
    members = found.members
    compact = Names(f"{os.path.basename(shards[member.shard])}/{member.name}" for member in members)
    places = np.array([(member.shard, member.offset, member.size) for member in members], np.int64)
    read = functools.partial(_read_member, shards, places, compact, wanted.in_chans)
    source = Source(
        compact,
        read,
        found.labels,
        found.classes,
        read_lazily=functools.partial(read, lazy=True),
        notes=tuple(found.notes),
        problem=found.problem,
    )
    return _log_source(source, f"{len(shards)} tar shards in {data_path}", found.why)


def _read_member(
    shards: list[str], places: np.ndarray, names: Sequence[str], in_chans: int, index: int, lazy: bool = False
) -> np.ndarray:
    shard, offset, size = places[index]
    try:
        with open(shards[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise BadImage(names[index], error.strerror or str(error)) from error
    return decode(data, in_chans, names[index], lazy=lazy)
