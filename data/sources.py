"""Where images come from: folders, list files, tar shards, torchvision's and Hugging Face's data sets, embedded digits.

Every store becomes the same thing, a `Source`: names, labels where there are any, and a function that reads one image
by its number. All are random access, so a run resumes exactly on any of them; streaming readers cannot do that and are
refused. What could be ambiguous (is this folder labelled?) is decided by a stated rule and said in the log.
"""

from __future__ import annotations

import collections
import functools
import glob
import hashlib
import importlib
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, overload

import numpy as np
import torchvision.datasets
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from data import scenes
from data.depth import with_range
from data.images import PICTURE_MODES, BadImage, blamed_on, decode, is_image_name, picture_pixels, read_stored
from data.packs import Pack, is_pack, open_pack

log = logging.getLogger(__name__)

IMAGENET100 = Path(__file__).resolve().parent.parent / "configs" / "imagenet100.txt"
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}  # in folders and shards
CALTECH_TRAIN, CALTECH_TEST = 30, 50  # images of each class, as the literature takes them
LARGEST_LABEL = 1_000_000  # of a list file's numbers: beyond it they are ids, not class numbers


class Names(Sequence[str]):
    """Many strings in one block of bytes.

    Loader workers are forked and share the main process's memory until somebody writes to it. Reading a `str` writes
    its reference count, so workers that walk through a list of a million paths copy all of it, each for itself. Two
    large objects without pointers inside stay shared, and are small.
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
    read      number of an image -> uint8 `[H, W, C]`, or a Pair with its mask; raises `data.images.BadImage`
    labels    int64 `[n]`, or None
    classes   the labels' names, or None
    selection sha256 of the class list that chose them, or of a pack; or ""
    path      number of an image -> its file, where each has one of its own
    class_pixels int64 `[n, K]`, pixels of each class in each mask, where they were counted
    value_range lowest and highest value that become 0 and 255, of files of more than 8 bits; ()
    read_lazily as `read`, but JPEG files may be returned as `data.images.Undecoded`; None where there are no files
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

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of names, labels and class list: the same wherever the folder lies, another if an image is added."""
        digest = hashlib.sha256(self.selection.encode())
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def open_source(
    dataset: str,
    data_path: str,
    split: str = "train",
    *,
    in_chans: int = 3,
    class_list: str | Sequence[str] = "",
    value_range: Sequence[float] = (),
) -> Source:
    """Open the images that `dataset` and `data_path` name; `split` is "train" or "val". Errors are ValueErrors.

    dataset           data_path      what is read
    auto              anything       digits, a list (.txt), a tar shard (.tar) or a folder, by the look of data_path
    folder            DATA           DATA/train/<class>/*, DATA/<class>/*, or images in any other order, unlabelled
    digits            -              scikit-learn's 1797 handwritten digits, 8 x 8 pixels
    scenes            -              generated scenes of data/scenes.py, 64 x 96 pixels, unlabelled
    LIST.txt          "" or DATA     a path a line, perhaps with a label; relative to DATA, or else to the list
    torch/cifar10 ... DATA           one of torchvision's data sets, already unpacked there
    hfds/NAME         "" or a cache  a Hugging Face data set (package `datasets`), which downloads what it lacks
    wds, wds/SHARDS   DATA           tar shards of WebDataset or of class folders; SHARDS may hold * and {00..99}
    pack              PACK           what tools.pack made (`auto` recognises it)

    `class_list` keeps these classes of a folder, labelled in that order: a file of folder names, one a line, the word
    `imagenet100`, or a sequence (such as the training split's `classes`). `value_range` scales files of more than 8
    bits; by default it is decided from a sample of them, see `data.depth`.
    """
    if dataset == "auto":
        dataset, data_path = _guess(data_path)
    if class_list and dataset not in ("folder", "pack"):
        raise ValueError(f"class_list chooses among class folders and does not apply to dataset {dataset!r}")
    kind, _, name = dataset.partition("/")
    if dataset == "folder":
        try:
            source = _open_folder(data_path, split, in_chans, class_list)
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
    elif dataset == "digits":
        source = _open_digits(split, in_chans)
    elif dataset == "scenes":
        source = _open_scenes(split, in_chans)
    elif dataset.endswith(".txt"):
        source = _open_list(dataset, data_path, split, in_chans)
    elif kind == "torch" and name:
        source = _open_torchvision(name.lower(), data_path, split, in_chans)
    elif kind == "hfds" and name:
        source = _open_hugging_face(name, data_path, split, in_chans)
    elif dataset == "pack":
        source = _open_pack(data_path, split, in_chans, class_list)
    elif kind == "wds":
        source = _open_shards(name, data_path, split, in_chans)
    elif kind in ("hfids", "tfds"):
        raise ValueError(
            f"dataset {dataset!r} is a stream, which cannot be resumed at an exact image. Use hfds/NAME (Hugging Face, "
            "random access), wds (tar shards, indexed at the start) or a folder"
        )
    else:
        known = ["auto", "folder", "digits", "scenes", "wds", "pack", *(f"torch/{name}" for name in TORCHVISION)]
        close = get_close_matches(dataset, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown dataset {dataset!r}{hint} (auto, folder, digits, scenes, LIST.txt, torch/, hfds/, wds/, pack)"
        )
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


def _guess(data_path: str) -> tuple[str, str]:
    """The dataset and data path that dataset "auto" stands for."""
    if not data_path:
        raise ValueError("no data: give --data_path FOLDER (or the word `digits`)")
    if data_path in ("digits", "scenes"):
        return data_path, ""
    if data_path.endswith(".txt"):
        return data_path, ""
    if data_path.endswith(".tar"):
        return f"wds/{os.path.basename(data_path)}", os.path.dirname(data_path) or "."
    if any(is_pack(os.path.join(data_path, name)) for name in ("", *SPLIT_NAMES)):
        return "pack", data_path
    return "folder", data_path


def _said(source: Source, what: str, why: str) -> Source:
    """The source, after a line in the log about what was found and how it was read."""
    labels = "no labels" if source.labels is None else f"{len(source.classes or [])} classes"
    log.info("data: %s: %d images, %s (%s)", what, len(source), labels, why)
    return source


# --- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(data_path: str, split: str, in_chans: int, class_list: str | Sequence[str]) -> Source:
    root = _split_folder(data_path, split)
    if class_list:
        classes, selection = read_class_list(class_list)
        names, labels = _selected_classes(root, classes)
        found: list[str] | None = classes
        why = f"class list {class_list if isinstance(class_list, str) else 'as given'}, sha256 {selection}"
    else:
        selection = ""
        names = sorted(images_below(root))
        if not names:
            raise ValueError(f"no images in {root}: it holds {contents_of(root)} (images are .jpg .png .tif .npy ...)")
        labels, found, why = label_by_folder(names)
    compact = Names(names)
    read = functools.partial(_read_file, root, compact, in_chans)
    path = functools.partial(_file, root, compact)
    lazily = functools.partial(read, lazy=True)
    return _said(Source(compact, read, labels, found, selection, path, lazily), root, why)


def _split_folder(data_path: str, split: str) -> str:
    """The folder that holds `split`; for "train" that is `data_path` itself when it has no folder of that name."""
    if not data_path:
        raise ValueError("no data: give --data_path FOLDER")
    if not os.path.isdir(data_path):
        file = "is a file and not a folder (a list of images ends in .txt)"
        raise ValueError(f"data_path {data_path} {file if os.path.exists(data_path) else 'does not exist'}")
    names = SPLIT_NAMES.get(split, (split,))
    for name in names:
        if os.path.isdir(os.path.join(data_path, name)) and not _is_a_class(data_path, name):
            return os.path.join(data_path, name)
    if split == "train":
        return data_path
    held = contents_of(data_path)
    raise ValueError(f"no {split} images: {data_path} has no folder {' or '.join(names)}; it holds {held}")


def class_folders_without_images(data_path: str, split: str) -> list[str]:
    """Folders of a split that look like classes and hold no image: most often a copy that was cut short."""
    root = _split_folder(data_path, split)
    with os.scandir(root) as entries:
        folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(entry.name for entry in folders if not images_below(entry.path))


def _is_a_class(data_path: str, name: str) -> bool:
    """Whether a folder named like a split is a class (CIFAR-100 has a "train"): it and others beside it hold images."""
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    with os.scandir(data_path) as entries:
        beside = [entry.path for entry in entries if entry.name not in splits and entry.is_dir()]
    return _holds_images(os.path.join(data_path, name)) and any(_holds_images(folder) for folder in beside)


def _holds_images(folder: str) -> bool:
    with os.scandir(folder) as entries:
        return any(is_image_name(entry.name) for entry in entries)


def images_below(root: str) -> list[str]:
    """Names of all image files below `root`, relative to it, with / between folders. Hidden names are skipped, links
    followed (a link that leads nowhere counts as an image: it is reported when it is read)."""
    found: list[str] = []

    def visit(folder: str, prefix: str, above: frozenset[str]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    real = os.path.realpath(entry.path)
                    if real not in above:  # a link back to a folder on the way here would never end
                        visit(entry.path, f"{prefix}{entry.name}/", above | {real})
                elif is_image_name(entry.name):
                    found.append(prefix + entry.name)

    visit(root, "", frozenset([os.path.realpath(root)]))
    return found


def label_by_folder(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None, str]:
    """(labels, classes, the reading in words) of relative names: labelled exactly if every image is CLASS/IMAGE."""
    depths = {name.count("/") for name in names}
    if depths == {1}:
        folders = [name.split("/")[0] for name in names]
        classes = sorted(set(folders))
        number = {name: label for label, name in enumerate(classes)}
        if len(classes) > 1:
            return np.array([number[folder] for folder in folders], np.int64), classes, "a folder for each class"
        return None, None, f"all in one folder, {classes[0]}, which is not taken for a class"
    if depths == {0}:
        return None, None, "a flat folder"
    return None, None, f"images lie {min(depths)} to {max(depths)} folders deep, so folders are not taken for classes"


def _selected_classes(root: str, classes: list[str]) -> tuple[list[str], np.ndarray | None]:
    missing = [name for name in classes if not os.path.isdir(os.path.join(root, name))]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(classes)} listed classes have no folder in {root}: {_some(missing)}"
        )
    images = [[f"{name}/{image}" for image in sorted(images_below(os.path.join(root, name)))] for name in classes]
    empty = [name for name, inside in zip(classes, images, strict=True) if not inside]
    if empty:
        raise ValueError(f"{len(empty)} of the {len(classes)} listed classes have no images in {root}: {_some(empty)}")
    labels = np.repeat(np.arange(len(classes)), [len(inside) for inside in images])
    return [name for inside in images for name in inside], labels


def read_class_list(class_list: str | Sequence[str]) -> tuple[list[str], str]:
    """(classes, sha256 of them one a line) of a file, of the word `imagenet100`, or of a sequence of names."""
    if isinstance(class_list, str):
        path = IMAGENET100 if class_list == "imagenet100" else Path(class_list)
        if not path.is_file():
            raise ValueError(f"class_list {class_list!r} is neither the word imagenet100 nor a file of folder names")
        classes = [line.strip() for line in _text_of(path).splitlines() if line.strip()]
    else:
        classes = list(class_list)
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    if twice or not classes:
        what = f"names {_some(twice)} more than once" if twice else "is empty"
        raise ValueError(f"class_list {class_list!r} {what}")
    return classes, hashlib.sha256(os.fsencode("".join(f"{name}\n" for name in classes))).hexdigest()


def _text_of(path: Path) -> str:
    """A list's text: UTF-8, perhaps with a mark at its beginning; names of files in it may hold any bytes."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ValueError(f"cannot read the list {path}: {error.strerror}") from error


def _read_file(root: str, names: Sequence[str], in_chans: int, index: int, lazy: bool = False) -> np.ndarray:
    return read_stored(_file(root, names, index), in_chans, lazy=lazy)


def _file(root: str, names: Sequence[str], index: int) -> str:
    return os.path.join(root, names[index])


def contents_of(folder: str) -> str:
    """What lies in a folder, for an error message."""
    with os.scandir(folder) as entries:
        kinds = collections.Counter(
            "folders" if entry.is_dir() else Path(entry.name).suffix or "files" for entry in entries
        )
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())[:8]) or "nothing"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --- list files -------------------------------------------------------------------------------------------------------


def _open_list(list_path: str, data_path: str, split: str, in_chans: int) -> Source:
    """A text file with an image's path a line, perhaps followed by a tab or spaces and a label (a number or a word).

    The val split of `lists/train.txt` is `lists/val.txt`.
    """
    path = Path(list_path)
    if split != "train":
        path = path.with_name(path.name.replace("train", split))
        if path == Path(list_path):
            raise ValueError(f"no {split} images: {list_path} has no `train` in its name to be replaced by `{split}`")
    if not path.is_file():
        raise ValueError(f"the list of images {path} does not exist")
    root = data_path or str(path.parent)
    rows = [_path_and_label(line) for line in _text_of(path).split("\n") if line.strip()]
    if not rows:
        raise ValueError(f"the list of images {path} is empty")
    names = Names(name for name, _ in rows)
    if not any(os.path.exists(os.path.join(root, name)) for name in names[:16]):
        raise ValueError(f"{path}: none of the first images exists, such as {os.path.join(root, names[0])}")
    labels, classes = _list_labels(path, [label for _, label in rows])
    read = functools.partial(_read_file, root, names, in_chans)
    path_of, lazily = functools.partial(_file, root, names), functools.partial(read, lazy=True)
    source = Source(names, read, labels, classes, path=path_of, read_lazily=lazily)
    return _said(source, str(path), f"paths relative to {root}")


def _path_and_label(line: str) -> tuple[str, str | None]:
    """Split a list's line. Spaces may also be part of a path: a line that ends like an image's name has no label."""
    if "\t" in line:
        path, label = line.rsplit("\t", 1)
        return path.strip(), label.strip()
    line = line.strip()
    parts = line.rsplit(None, 1)
    if len(parts) == 1 or is_image_name(os.path.basename(line)):
        return line, None
    return parts[0], parts[1]


def _list_labels(path: Path, words: list[str | None]) -> tuple[np.ndarray | None, list[str] | None]:
    """Numbers stand for themselves, other words are numbered in alphabetical order."""
    given = [word for word in words if word is not None]
    if not given:
        return None, None
    if len(given) < len(words):
        raise ValueError(
            f"{path}: {len(given)} of {len(words)} images have a label, number {words.index(None) + 1} has none"
        )
    if all(word.isdecimal() for word in given):
        labels = np.array([int(word) for word in given], np.int64)
        if labels.max() > LARGEST_LABEL:
            raise ValueError(f"{path}: label {labels.max()} is too large for the number of a class")
        return labels, [str(label) for label in range(labels.max() + 1)]
    classes = sorted(set(given))
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[word] for word in given], np.int64), classes


# --- packs ------------------------------------------------------------------------------------------------------------


def _open_pack(data_path: str, split: str, in_chans: int, class_list: str | Sequence[str]) -> Source:
    """`data_path` holds a pack for each split; or is one, of the training images."""
    folder = data_path if split == "train" and is_pack(data_path) else os.path.join(data_path, split)
    if not is_pack(folder):
        raise ValueError(f"no {split} images: {folder} holds no pack made by tools.pack")
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
    return _said(source, f"pack {folder}", f"{size}, {what}")


def _same_source(pack: Pack) -> None:
    """ValueError, saying what differs, when the images that the pack was made of are no longer the same files."""
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
        different = f"{len(added)} images were added ({_some(added)}), {len(gone)} are gone ({_some(gone)})"
        different = different if added or gone else "classes or labels are others"
    raise ValueError(
        f"{made['data_path']} is not as it was when the pack {pack.folder} was made of it: {different}. Pack it anew, "
        f"or let the pack stand on its own: python -m tools.pack --detach {pack.folder}"
    )


# --- embedded and public data sets ------------------------------------------------------------------------------------


def _open_digits(split: str, in_chans: int) -> Source:
    """scikit-learn's handwritten digits; "val" is a quarter of each digit's images, drawn with seed 0."""
    from sklearn.datasets import load_digits  # here, because it takes longer to import than all else in this file

    if split not in SPLIT_NAMES:
        raise ValueError(f"the digits have the splits train and val, not {split!r}")
    digits = load_digits()
    drawn = np.random.RandomState(0)  # a legacy generator, because its stream is promised never to change
    groups = [drawn.permutation(np.flatnonzero(digits.target == digit)) for digit in range(10)]
    held_out = np.concatenate([group[: len(group) // 4] for group in groups])
    chosen = np.sort(held_out) if split == "val" else np.setdiff1d(np.arange(len(digits.target)), held_out)
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    names = [f"digits/{number:04d}" for number in chosen]
    labels = digits.target[chosen].astype(np.int64)
    classes = [str(digit) for digit in range(10)]
    source = Source(Names(names), functools.partial(_read_digit, images, in_chans), labels, classes)
    return _said(source, "digits", f"{split} split of scikit-learn's handwritten digits")


def _open_scenes(split: str, in_chans: int) -> Source:
    if split not in scenes.SIZES:
        raise ValueError(f"the scenes have the splits train and val, not {split!r}")
    names = Names(f"scenes/{split}/{number:04d}" for number in range(scenes.SIZES[split]))
    source = Source(names, functools.partial(scenes.image, split, in_chans))
    return _said(source, "scenes", f"{split} split of the generated scenes")


def _read_digit(images: np.ndarray, in_chans: int, index: int) -> np.ndarray:
    return picture_pixels(Image.fromarray(images[index]), in_chans)


_TRAIN_FLAG: dict[str, list[dict[str, Any]]] = {"train": [{"train": True}], "val": [{"train": False}]}
_TRAIN_TEST: dict[str, list[dict[str, Any]]] = {"train": [{"split": "train"}], "val": [{"split": "test"}]}
_TRAINVAL_TEST: dict[str, list[dict[str, Any]]] = {"train": [{"split": "trainval"}], "val": [{"split": "test"}]}
_BOTH_TEST: dict[str, list[dict[str, Any]]] = _TRAIN_TEST | {"train": [{"split": "train"}, {"split": "val"}]}


def _with(splits: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, list[dict[str, Any]]]:
    """The same splits, asked for with something that torchvision would otherwise settle unsaid."""
    return {split: [ask | more for ask in asks] for split, asks in splits.items()}


# name: (torchvision class, what each of our splits asks of it: the splits that the literature uses)
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
    "caltech101": ("Caltech101", {"train": [{}], "val": [{}]}),  # it has no splits of its own: see _caltech101_split
}


def _open_torchvision(name: str, data_path: str, split: str, in_chans: int) -> Source:
    if name not in TORCHVISION:
        close = get_close_matches(name, TORCHVISION, n=1)
        hint = f"; did you mean torch/{close[0]}?" if close else ""
        raise ValueError(f"unknown torchvision data set {name!r}{hint} (known: {', '.join(TORCHVISION)})")
    class_name, splits = TORCHVISION[name]
    if split not in splits:
        raise ValueError(f"torch/{name} has the splits {' and '.join(splits)}, not {split!r}")
    if not data_path:
        raise ValueError(f"torch/{name} needs --data_path: the folder that torchvision unpacked it in")
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
    return _said(Source(names, read, labels, classes), f"torch/{name} in {data_path}", asked)


def _caltech101_split(labels: np.ndarray, classes: list[str], split: str) -> tuple[np.ndarray, str]:
    """(indices of the split, what it is in words): 30 images of each class to train on, at most 50 others to judge.

    Each class is drawn by its own name, so that one that is missing or longer changes nothing for the others.
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
    """A torchvision data set's labels without decoding an image; their attribute has four names."""
    found = next(getattr(dataset, name) for name in ("targets", "labels", "_labels", "y") if hasattr(dataset, name))
    labels = np.asarray(found).astype(np.int64)
    return labels[:, 0] if labels.ndim == 2 else labels  # QMNIST's rows start with the digit


def _read_torchvision(dataset: Any, names: Sequence[str], in_chans: int, index: int) -> np.ndarray:
    with blamed_on(names[index]):
        return picture_pixels(dataset[index][0], in_chans)


def _open_hugging_face(name: str, cache: str, split: str, in_chans: int) -> Source:
    """`datasets.load_dataset(name)`: its first image column, and its first class column where there is one."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"hfds/{name} needs an optional package: pip install -r requirements/data.txt") from error
    try:
        available = datasets.get_dataset_split_names(name, cache_dir=cache or None)
        theirs = next((word for word in SPLIT_NAMES.get(split, (split,)) if word in available), None)
        if theirs is None:
            raise ValueError(f"it has the splits {', '.join(available)} and none of them is for {split}")
        table = datasets.load_dataset(name, split=theirs, cache_dir=cache or None)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a set that is a program, which is not run
        raise ValueError(f"hfds/{name} cannot be opened: {error}") from error
    image_key = next((key for key, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    label_key = next((key for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image_key is None:
        raise ValueError(f"hfds/{name} has no column of images, only {', '.join(table.features)}")
    labels = np.array(table[label_key][:], np.int64) if label_key else None
    classes = list(table.features[label_key].names) if label_key else None
    names = Names(f"{name}/{theirs}/{index:06d}" for index in range(len(table)))
    table = table.cast_column(image_key, datasets.Image(decode=False)).select_columns(image_key)
    read = functools.partial(_read_hugging_face, table, image_key, names, in_chans)
    source = Source(names, read, labels, classes, read_lazily=functools.partial(read, lazy=True))
    return _said(source, f"hfds/{name}", f"split {theirs}")


def _read_hugging_face(
    table: Any, image_key: str, names: Sequence[str], in_chans: int, index: int, lazy: bool = False
) -> np.ndarray:
    with blamed_on(names[index]):
        image = table[index][image_key]
        if image["bytes"] is None:
            return read_stored(image["path"], in_chans, lazy=lazy)
        return decode(image["bytes"], in_chans, names[index], lazy=lazy)


# --- tar shards -------------------------------------------------------------------------------------------------------


def _open_shards(pattern: str, data_path: str, split: str, in_chans: int) -> Source:
    """Tar files as random-access stores: their headers are read once, images by their offset afterwards.

    Labels are WebDataset's (`KEY.cls` beside `KEY.jpg`), or class folders inside the archives.
    """
    shards = _find_shards(pattern, data_path, split)
    log.info("data: indexing %d tar shards in %s", len(shards), data_path)
    members, labels_of = _index(shards)
    names = [member.name for member in members]
    if not names:
        raise ValueError(f"no images in the {len(shards)} tar shards of {data_path} ({_some(shards)})")
    labels, classes, why = _shard_labels(members, labels_of) if labels_of else label_by_folder(names)
    compact = Names(f"{os.path.basename(shards[member.shard])}/{member.name}" for member in members)
    places = np.array([(member.shard, member.offset, member.size) for member in members], np.int64)
    read = functools.partial(_read_member, shards, places, compact, in_chans)
    source = Source(compact, read, labels, classes, read_lazily=functools.partial(read, lazy=True))
    return _said(source, f"{len(shards)} tar shards in {data_path}", why)


@dataclass(slots=True)
class _Member:
    """An image in a shard: which shard, its name there, where its bytes are, and what it shares with its label."""

    shard: int
    name: str
    offset: int
    size: int
    key: str


def _index(shards: Sequence[str]) -> tuple[list[_Member], dict[str, int]]:
    """All images of the shards, and the labels by key."""
    members: list[_Member] = []
    labels_of: dict[str, int] = {}
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, "r:") as archive:  # no decompression: only then is an image where its offset says
                for entry in archive:
                    folder, slash, base = entry.name.removeprefix("./").rpartition("/")
                    key = f"{number}/{folder}/{base.split('.')[0]}"
                    if entry.isreg() and base.endswith(".cls"):
                        labels_of[key] = _class_number(archive, entry, shard)
                    elif entry.isreg() and is_image_name(base):
                        members.append(_Member(number, folder + slash + base, entry.offset_data, entry.size, key))
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{shard} is not a whole, uncompressed tar file: {error}") from error
    return members, labels_of


def _class_number(archive: tarfile.TarFile, entry: tarfile.TarInfo, shard: str) -> int:
    file = archive.extractfile(entry)
    text = file.read().decode(errors="replace").strip() if file else ""
    if not text.isdecimal():
        raise ValueError(f"{shard}: {entry.name} holds {text[:40]!r} where the number of a class belongs")
    return int(text)


def _shard_labels(members: Sequence[_Member], labels_of: dict[str, int]) -> tuple[np.ndarray, list[str], str]:
    without = [member.name for member in members if member.key not in labels_of]
    if without:
        raise ValueError(f"{len(without)} of {len(members)} images in the shards have no .cls file: {_some(without)}")
    labels = np.array([labels_of[member.key] for member in members], np.int64)
    return labels, [str(label) for label in range(labels.max() + 1)], "labels from .cls files"


def _find_shards(pattern: str, data_path: str, split: str) -> list[str]:
    """The split's tar files below `data_path`, among those that match `pattern` (with * and {000..123}) if given.

    A shard is of the split that it, or its folder, is named after. Where none is of the training set, that is the
    shards that name no split, or whatever a pattern asked for.
    """
    if not os.path.isdir(data_path):
        raise ValueError(f"wds needs --data_path: the folder of the tar shards ({data_path!r} is none)")
    if pattern:
        found = [path for each in _braces(pattern) for path in glob.glob(os.path.join(data_path, each))]
    else:
        found = glob.glob(os.path.join(data_path, "*.tar"))
        for name in SPLIT_NAMES.get(split, (split,)):
            found += glob.glob(os.path.join(data_path, name, "*.tar"))
    others = [name for key, names in SPLIT_NAMES.items() if key != split for name in names]
    ours = [path for path in found if _mentions(path, data_path, SPLIT_NAMES.get(split, (split,)))]
    if not ours and split == "train":
        ours = [path for path in found if pattern or not _mentions(path, data_path, others)]
    if not ours:
        raise ValueError(
            f"no {split} shards in {data_path} among {len(found)} named {pattern or '*.tar'}: {_some(found)}"
        )
    return sorted(ours)


def _mentions(path: str, data_path: str, words: Iterable[str]) -> bool:
    return any(word in re.split(r"[^a-z]+", os.path.relpath(path, data_path).lower()) for word in words)


def _braces(pattern: str) -> list[str]:
    """`a-{008..010}.tar` -> a-008.tar, a-009.tar, a-010.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [each for number in numbers for each in _braces(pattern[: found.start()] + number + pattern[found.end() :])]


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
