"""Find image files, the folders of the splits, and the folders of the classes in a data folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.images import is_image_name

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
FILLERS = frozenset("set images image imgs img data split".split())  # ignored in names such as train_images, val-set
NOT_DATA = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found"))
MASK_FOLDERS = frozenset("mask masks annotation annotations label labels segmentation".split()) | frozenset(
    ("segmentationclass", "segmentationobject", "gtfine", "ground_truth", "groundtruth")
)
IMAGE_FOLDERS = frozenset(("image", "images", "imgs", "img", "jpegimages", "leftimg8bit"))
DEEPEST = 4  # maximum depth at which the folders of splits are searched


class NoSplit(ValueError):  # noqa: N818 - the name describes the error
    """The data set does not have the requested split, and is otherwise valid."""


def some(names: Sequence[str], limit: int = 5) -> str:
    """Format the first names of a list."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def counted(kinds: Counter[str]) -> list[str]:
    """Format how many there are of each kind, the most frequent first."""
    return [f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Content of a folder and its subfolders.

    names  images, sorted, relative to the folder, with / between folders
    other  number of files that are not images, by suffix
    runs   folders of training runs, which are left out
    masks  folders of masks beside a folder of images, which are left out
    """

    names: list[str] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    runs: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)

    def add(self, below: Found, prefix: str) -> None:
        """Add the contents of a folder, whose name with a / is `prefix`."""
        self.names += [prefix + name for name in below.names]
        self.other += below.other
        self.runs += [prefix + name for name in below.runs]
        self.masks += [prefix + name for name in below.masks]

    def left_out(self) -> list[str]:
        """Describe the files that are not used, one line each; empty if every file is an image."""
        lines = []
        if count := self.other.total():
            kinds = counted(self.other)
            lines.append(f"{count} files that are not images ({some(kinds, 8)})")
        if self.masks:
            lines.append(f"{len(self.masks)} folders of masks beside images ({some(self.masks)})")
        if self.runs:
            lines.append(f"{len(self.runs)} folders of training runs ({some(self.runs)})")
        return lines


def holds_run(folder: str) -> bool:
    """Return whether a folder is the output folder of a training run."""
    return os.path.isfile(os.path.join(folder, "options.yaml")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def walk(root: str) -> Found:
    """Find all images below `root`.

    Hidden files and folders, system folders (`__MACOSX`, `@eaDir`), folders of training runs, and folders of masks
    beside folders of images are left out. Links are followed. A broken link with the name of an image is included, so
    that it is reported when it is read.
    """
    found = Found()

    def visit(folder: str, prefix: str, above: frozenset[str]) -> None:
        inside = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    inside.append(entry.name)
                elif is_image_name(entry.name):
                    found.names.append(prefix + entry.name)
                else:
                    found.other[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
        masks = mask_folders(inside)
        found.masks += [prefix + name for name in sorted(masks)]
        for name in inside:
            path = os.path.join(folder, name)
            if name.lower() in NOT_DATA or name in masks:
                continue
            if holds_run(path):
                found.runs.append(prefix + name)
                continue
            real = os.path.realpath(path)
            if real not in above:  # a link to a parent folder would be an infinite loop
                visit(path, f"{prefix}{name}/", above | {real})

    visit(root, "", frozenset([os.path.realpath(root)]))
    found.names.sort()
    found.runs.sort()
    return found


def images_below(root: str) -> list[str]:
    """Return the sorted names of all images below `root`, relative to it; see `walk`."""
    return walk(root).names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a valid link to one."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def mask_folders(names: Iterable[str]) -> set[str]:
    """Return the subfolders that are named like masks, if another one is named like images."""
    names = list(names)
    beside = any(name.strip().lower() in IMAGE_FOLDERS for name in names)
    return {name for name in names if beside and name.strip().lower() in MASK_FOLDERS}


def visible_folders(folder: str) -> list[str]:
    """Return the names of the subfolders that may hold images, sorted."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
    masks = mask_folders(names)
    return sorted(
        name
        for name in names
        if name not in masks and name.lower() not in NOT_DATA and not holds_run(os.path.join(folder, name))
    )


def holds_images(folder: str) -> bool:
    """Return whether a folder directly contains images."""
    with os.scandir(folder) as entries:
        return any(is_image_name(entry.name) for entry in entries)


def describe_contents(folder: str) -> str:
    """Describe the content of a folder for an error message."""
    with os.scandir(folder) as entries:
        kinds = Counter("folders" if _is_folder(entry) else Path(entry.name).suffix or "files" for entry in entries)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())[:8]) or "nothing"


# ---- splits ----------------------------------------------------------------------------------------------------------


def split_named(name: str) -> tuple[str, bool]:
    """Return (split, exact) for a folder's name; ("", False) if it is not the name of a split.

    `Val ` and `validation` are exact; `train_images`, `val2017` and `Test-Set` are not.
    """
    plain = name.strip().lower()
    words = [word for word in re.split(r"[^a-z]+", plain) if word and word not in FILLERS]
    for split, known in SPLIT_WORDS.items():
        if plain in known:
            return split, True
        if len(words) == 1 and (words[0] in known or words[0] in {f"{word}set" for word in known}):
            return split, False
    return "", False


def split_folders(data_path: str) -> dict[str, str]:
    """Return the folder of each split that is directly in `data_path`.

    Raises:
        ValueError: Two folders name the same split and both hold images.
    """
    exact: dict[str, list[str]] = {}
    near: dict[str, list[str]] = {}
    for name in visible_folders(data_path):
        split, is_exact = split_named(name)
        if split and not _is_a_class(data_path, name):
            (exact if is_exact else near).setdefault(split, []).append(name)
    found = {}
    for split in SPLIT_WORDS:
        names = exact.get(split) or near.get(split, [])
        if len(names) > 1:
            names = [name for name in names if images_below(os.path.join(data_path, name))] or names[:1]
        if len(names) > 1 and split in exact:
            raise ValueError(
                f"{data_path} has several folders of {split} images: {', '.join(map(repr, names))}. Join or rename them"
            )
        if len(names) == 1:
            found[split] = names[0]
    return found


def _is_a_class(data_path: str, name: str) -> bool:
    """Return whether a folder named like a split is a class, such as the class "train" of CIFAR-100.

    It is a class if it and folders with other names beside it contain images.
    """
    if not holds_images(os.path.join(data_path, name)):
        return False
    beside = [other for other in visible_folders(data_path) if not split_named(other)[0]]
    return any(holds_images(os.path.join(data_path, other)) for other in beside)


def find_split_folder(data_path: str) -> str:
    """Return the folder that contains the folders of the splits: `data_path`, or the only folder in it, and so on."""
    folder = data_path
    for _ in range(DEEPEST):
        if split_folders(folder):
            return folder
        inside = visible_folders(folder)
        if len(inside) != 1 or holds_images(folder):
            break
        folder = os.path.join(folder, inside[0])
    return data_path


# ---- classes ---------------------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    """Normalise a class name for comparison: composed Unicode, without leading and trailing spaces."""
    return unicodedata.normalize("NFC", name).strip()


def match_classes(names: Iterable[str], classes: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Match names of folders or labels to known classes.

    The names are compared exactly, then in normalised form (see `normal`), then, if unambiguous, ignoring case.

    Returns:
        The class number of each name that matches, and the names that do not.

    Raises:
        ValueError: Two names match the same class.
    """
    names = list(names)
    numbers: dict[str, int] = {}
    forms: tuple[Callable[[str], str], ...] = (str, normal, lambda name: normal(name).casefold())
    for form in forms:
        known: dict[str, list[int]] = {}
        for number, name in enumerate(classes):
            known.setdefault(form(name), []).append(number)
        taken = set(numbers.values())
        left = [name for name in names if name not in numbers]
        counts = Counter(form(name) for name in left)
        for name in left:
            same = known.get(form(name), [])
            if len(same) == 1 and (form is normal or (counts[form(name)] == 1 and same[0] not in taken)):
                numbers[name] = same[0]
    by_number: dict[int, str] = {}
    for name, number in numbers.items():
        if number in by_number:
            raise ValueError(f"{_both(by_number[number], name)} are the same class name in other characters: join them")
        by_number[number] = name
    return numbers, [name for name in names if name not in numbers]


def require_distinct(classes: Sequence[str]) -> None:
    """Raise ValueError if two class names look the same."""
    seen: dict[str, str] = {}
    for name in classes:
        if (form := normal(name)) in seen:
            raise ValueError(
                f"the class folders {_both(seen[form], name)} have the same name in other characters: join or rename"
            )
        seen[form] = name


def _both(one: str, other: str) -> str:
    """Format two names that look the same, and describe their difference."""
    return f"{ascii(one)} and {ascii(other)}"


def common_folders(names: Sequence[str]) -> str:
    """Return the common prefix of folders after which each name has at least one more folder, such as `data/train/`."""
    shared = ""
    while names:
        parts = [name[len(shared) :].split("/", 2) for name in (names[0], names[-1])]  # the names are sorted
        if min(map(len, parts)) < 3 or parts[0][0] != parts[1][0]:
            break
        prefix = f"{shared}{parts[0][0]}/"
        if not all(name.startswith(prefix) and "/" in name[len(prefix) :] for name in names):
            break
        shared = prefix
    return shared


def label_by_folder(names: Sequence[str], known: Sequence[str] = ()) -> tuple[np.ndarray | None, list[str] | None, str]:
    """Label images by their folders, if every image is CLASS/IMAGE below a common prefix of folders.

    Args:
        names: Relative names of images, with / between folders.
        known: Known classes: a single folder is a class only if it has one of these names.

    Returns:
        The labels int64 `[n]` and the classes, or None and None; and the reason.
    """
    shared = common_folders(sorted(names))
    inner = [name[len(shared) :] for name in names]
    depths = {name.count("/") for name in inner}
    below = f" below {shared.rstrip('/')}" if shared else ""
    if depths == {1}:
        folders = [name.split("/")[0] for name in inner]
        classes = sorted(set(folders))
        if len(classes) > 1 or match_classes(classes, known)[0]:
            require_distinct(classes)
            number = {name: label for label, name in enumerate(classes)}
            labels = np.array([number[folder] for folder in folders], np.int64)
            return labels, classes, f"a folder for each class{below}"
        return None, None, f"all in one folder, {classes[0]}, which is not taken for a class"
    if depths == {0}:
        return None, None, "a flat folder"
    if 0 in depths:
        direct = sum("/" not in name for name in inner)
        outside = f"; {direct} images lie in no folder{below}"
    else:
        outside = "; --class_list names the folders that are classes"
    deep = f"images lie {min(depths)} to {max(depths)} folders deep{below}"
    return None, None, f"{deep}, so folders are not taken for classes{outside}"
