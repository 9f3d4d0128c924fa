"""Find the images and labels in tar archives.

The members of one sample share a key, as WebDataset defines it: the folder, and everything before the first dot of the
file's name. `a/000.jpg`, `a/000.cls` and `a/000.seg.png` are one sample; so are `s_1.000.jpg` and `s_1.001.jpg`, which
is seldom intended and refused if a label depends on it. Labels are found in this order:

    KEY.cls (KEY.class)   a number, or a class name
    KEY.json              {"label": ...}; also class, cls, category, target, class_id, label_id, class_index
    KEY.txt               a number, or a class name that several samples share; other texts are captions, not labels
    folders               CLASS/IMAGE, if no image has one of these files
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.folders import (
    NOT_DATA,
    SPLIT_WORDS,
    NoSplit,
    common_folders,
    counted,
    label_by_folder,
    mask_folders,
    some,
    split_named,
)
from data.images import is_image_name
from data.labels import Labels, read_labels, several

LABEL_FILES = ("cls", "json", "txt")  # in the order in which they are looked for
LABEL_EXTENSIONS = {"cls": "cls", "class": "cls", "cls.txt": "cls", "json": "json", "txt": "txt"}
JSON_KEYS = ("label", "class", "cls", "category", "target", "class_id", "label_id", "class_index")
# The middle part of names such as 000.seg.png, which are not the sample's image.
NOT_THE_IMAGE = frozenset(
    "seg segm segmentation semantic instance panoptic mask masks label labels annotation gt depth alpha normal normals "
    "edge edges flow thumb thumbnail".split()
)


@dataclass(slots=True)
class Member:
    """A file in a shard: which shard, its name there, where its bytes are, its key and its extension (lower case)."""

    shard: int
    name: str
    offset: int
    size: int
    key: str
    extension: str


@dataclass
class Archive:
    """The images of some shards, and their labels.

    notes    messages about what was left out
    problem  reason why no classifier can be trained on the labels, or ""
    """

    members: list[Member]
    labels: np.ndarray | None
    classes: list[str] | None
    why: str
    notes: list[str] = field(default_factory=list)
    problem: str = ""


@dataclass
class _Index:
    """The members of all shards that may be used, and messages about the shards."""

    images: list[Member] = field(default_factory=list)
    second_labels: list[tuple[Member, Member]] = field(default_factory=list)
    labels: dict[str, dict[str, Member]] = field(default_factory=lambda: {kind: {} for kind in LABEL_FILES})
    other: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def read_archive(
    shards: Sequence[str],
    split: str,
    *,
    named: bool = True,
    label_offset: int | None = None,
    known: Sequence[str] = (),
) -> Archive:
    """Index the images of a split in tar shards.

    Args:
        split: Used where the archives themselves hold folders of splits, such as train/ and val/.
        named: Whether the shards are named after the split; if not, they must hold its folder, or be training images.
        label_offset: Number of the first class.
        known: Classes of the training images.

    Raises:
        NoSplit: The archives hold no folder of this split.
        ValueError: The members are ambiguous, or labels are missing or invalid.
    """
    index = _read_headers(shards)
    index.images = _select_split(_without_masks(index), split, named)
    notes = index.notes
    if index.other:
        kinds = some(counted(index.other), 8)
        notes.append(f"left out: {index.other.total()} members that are not images ({kinds})")
    if not index.images:
        left = f"; {notes[0]}" if notes else ""
        raise ValueError(f"no images in the {len(shards)} tar shards {some(shards)}{left}")
    _require_one_image(index.images, shards, any(index.labels[kind] for kind in ("cls", "json")))
    for first, second in index.second_labels:
        raise ValueError(f"{shards[first.shard]}: {first.name} and {second.name} label the same image: remove one")
    keys = {member.key for member in index.images}
    kind = next((kind for kind in LABEL_FILES if keys & index.labels[kind].keys()), "")
    labels, how = _labels(index, kind, shards, label_offset) if kind else (None, "")
    if labels is None:
        notes += [how] if how else []
        numbers, classes, why = label_by_folder([member.name for member in index.images], known)
        why += f" of the archive; {kind} files hold no labels" if kind else ", no .cls, .json or .txt files"
        return Archive(index.images, numbers, classes, why, notes, "" if classes else why)
    others = {kind: found.keys() - keys for kind, found in index.labels.items()}
    if orphans := sorted(key.partition("/")[2] for key in others[kind]):
        notes.append(f"{len(orphans)} .{kind} files without an image ({some(orphans)})")
    if repeated := sum(count > 1 for count in Counter(key.partition("/")[2] for key in keys).values()):
        notes.append(f"{repeated} keys are in more than one shard: each is an image of its own")
    return Archive(index.images, labels.numbers, labels.classes, how, notes + labels.notes, labels.problem)


def _read_headers(shards: Sequence[str]) -> _Index:
    index = _Index()
    for number, shard in enumerate(shards):
        seen: dict[tuple[str, str], str] = {}
        files: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(shard, "r:") as archive:  # without compression, so that offsets are valid
                for entry in archive:
                    stored = files.get(entry.linkname) if entry.islnk() else entry if entry.isreg() else None
                    if stored is not None:
                        files[entry.name] = stored
                    name = entry.name.removeprefix("./")
                    *folders, base = name.split("/")
                    hidden = base.startswith(".") or any(part.startswith(".") for part in folders)
                    if entry.isdir() or hidden or any(part.lower() in NOT_DATA for part in folders):
                        continue
                    if stored is None:
                        index.other["links"] += 1
                        continue
                    stem, _, extension = base.partition(".")
                    key = f"{number}/{'/'.join([*folders, stem])}"
                    member = Member(number, name, stored.offset_data, stored.size, key, extension.lower())
                    if (key, member.extension) in seen:
                        both = f"{seen[key, member.extension]} and {name}"
                        raise ValueError(f"{shard} holds {both}: which of them is meant? Remove or rename one")
                    seen[key, member.extension] = name
                    _classify(index, member)
                if not _has_end(archive):
                    index.notes.append(
                        f"{shard} has no end-of-archive mark: if it was cut off, images at its end are left out"
                    )
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{shard} is not a complete, uncompressed tar file: {error}") from error
    return index


def _has_end(archive: tarfile.TarFile) -> bool:
    """Return whether zeros follow the last member that was read. Raises ReadError if anything else follows it.

    `tarfile` ends without an error at a damaged header, and at the end of the first of several joined archives.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    ended = False
    while block := archive.fileobj.read(tarfile.RECORDSIZE):
        if any(block):
            raise tarfile.ReadError(
                f"other bytes follow after {len(archive.getmembers())} members: it is damaged or cut off, or several "
                "archives were joined"
            )
        ended = True
    return ended


def _classify(index: _Index, member: Member) -> None:
    """Add a member to the images or the label files, or count it as left out."""
    extension = member.extension
    *middle, last = extension.split(".")
    if kind := LABEL_EXTENSIONS.get(extension) or (LABEL_EXTENSIONS[last] if last in ("cls", "class") else ""):
        first = index.labels[kind].setdefault(member.key, member)
        if first is not member:
            index.second_labels.append((first, member))
    elif not is_image_name(member.name.rpartition("/")[2]):
        index.other[f".{extension}" if extension else "without suffix"] += 1
    elif NOT_THE_IMAGE & set(middle):
        index.other[f".{extension}"] += 1
    else:
        index.images.append(member)


def _without_masks(index: _Index) -> list[Member]:
    """Return the images that are not in a folder of masks beside a folder of images."""
    inside: dict[str, set[str]] = {}
    for member in index.images:
        parts = member.name.split("/")[:-1]
        for depth, part in enumerate(parts):
            inside.setdefault("/".join(parts[:depth]), set()).add(part)
    masks = {f"{above}/{name}".lstrip("/") for above, names in inside.items() for name in mask_folders(names)}
    if not masks:
        return index.images
    kept = []
    for member in index.images:
        parts = member.name.split("/")[:-1]
        if any("/".join(parts[: depth + 1]) in masks for depth in range(len(parts))):
            index.other[f"masks in {some(sorted(masks))}"] += 1
        else:
            kept.append(member)
    return kept


def _select_split(images: list[Member], split: str, named: bool) -> list[Member]:
    """Return the images of the split's folder, where the archives hold a folder for each split; otherwise all."""
    names = sorted(member.name for member in images)
    shared = _all_share(names)
    tops = {name[len(shared) :].split("/")[0] for name in names if "/" in name[len(shared) :]}
    splits = {top: split_named(top)[0] for top in tops}
    if "train" not in splits.values() or not all(splits.values()) or len(splits) < 2:
        if named or split == "train":
            return images
        raise NoSplit(f"no {split} images: the archives are not named after it and hold no folders of splits")
    if split not in splits.values():
        raise NoSplit(f"no {split} images: the archives hold the folders {', '.join(sorted(tops))}")
    prefixes = tuple(f"{shared}{top}/" for top, name in splits.items() if name == split)
    return [member for member in images if member.name.startswith(prefixes)]


def _all_share(names: Sequence[str]) -> str:
    """Return the folders that all names share, without that of a split."""
    parts = common_folders(names).split("/")[:-1]
    kept = next((number for number, part in enumerate(parts) if split_named(part)[0]), len(parts))
    return "".join(f"{part}/" for part in parts[:kept])


def _require_one_image(images: Sequence[Member], shards: Sequence[str], labelled: bool) -> None:
    """Raise ValueError for two images of one key.

    Keys are needed only to find the label files of images. Without such files, several images of one type (IMG.1.jpg,
    IMG.2.jpg) are accepted.
    """
    first: dict[str, Member] = {}
    for member in images:
        other = first.setdefault(member.key, member)
        if other is member:
            continue
        suffixes = {each.extension.rpartition(".")[2] for each in (other, member)}
        if not labelled and len(suffixes) == 1:
            continue
        base = other.name.rpartition("/")[2]
        stem, suffix = os.path.splitext(base)
        renamed = f"Rename them, such as {stem.replace('.', '_')}{suffix}" if "." in stem else "Remove one of them"
        key = member.key.partition("/")[2]
        raise ValueError(
            f"{shards[member.shard]}: {other.name} and {member.name} have the same key {key!r} (everything before the "
            f"first dot of the name), so they would be one sample. {renamed}"
        )


# ---- labels ----------------------------------------------------------------------------------------------------------


def _labels(index: _Index, kind: str, shards: Sequence[str], label_offset: int | None) -> tuple[Labels | None, str]:
    """Return the images' labels and where they were found, or None and the reason why there are none."""
    files = index.labels[kind]
    texts = _read_texts({member.key: files[member.key] for member in index.images if member.key in files}, shards)
    where = f".{kind} files"
    if kind == "json":
        key, values = _json_labels(texts, files)
        if not key:
            return None, f"{len(files)} .json files without a label ({', '.join(JSON_KEYS)})"
        texts, where = values, f'"{key}" in .json files'
    elif kind == "txt":
        distinct = set(texts.values())
        numbers = all(text.isdecimal() for text in distinct)
        if not numbers and (2 * len(distinct) > len(texts) or any("\n" in text for text in distinct)):
            return None, f"{len(files)} .txt files with captions"
    without = [member.name for member in index.images if member.key not in texts]
    if without:
        raise ValueError(
            f"{len(without)} of {len(index.images)} images in the shards have no .{kind} file: {some(without)}"
        )
    labels = read_labels([texts[member.key] for member in index.images], where, label_offset)
    return labels, f"labels from {where}"


def _read_texts(files: dict[str, Member], shards: Sequence[str]) -> dict[str, str]:
    """Return the text of each file, by key."""
    texts = {}
    by_shard: dict[int, list[Member]] = {}
    for member in files.values():
        by_shard.setdefault(member.shard, []).append(member)
    for number, members in by_shard.items():
        with open(shards[number], "rb") as shard:
            for member in members:
                shard.seek(member.offset)
                texts[member.key] = shard.read(member.size).decode("utf-8-sig", errors="replace").strip()
    return texts


def _json_labels(texts: dict[str, str], files: dict[str, Member]) -> tuple[str, dict[str, str]]:
    """Return (the name of the label field, the label of each key); ("", {}) if the files contain no label."""
    read: dict[str, dict[str, Any]] = {}
    for key, text in texts.items():
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{files[key].name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            return "", {}
        read[key] = value
        if len(read) == 16 and not any(name in each for name in JSON_KEYS for each in read.values()):
            return "", {}
    name = next((name for name in JSON_KEYS if any(name in each for each in read.values())), "")
    labels = {}
    for key, value in read.items() if name else ():
        if name not in value:
            continue
        label = value[name]
        if isinstance(label, list | tuple):
            raise ValueError(f'{files[key].name}: "{name}" is a list, {several(str(label))}')
        if isinstance(label, bool | dict) or label is None:
            raise ValueError(f'{files[key].name}: "{name}" is {label!r}, which is no class')
        labels[key] = str(label)
    return name, labels


# ---- shards ----------------------------------------------------------------------------------------------------------


def find_shards(pattern: str, data_path: str, split: str) -> tuple[list[str], bool]:
    """Find the split's tar files below `data_path`, among those that match `pattern` (with * and {000..123}).

    A shard belongs to the split that it, or its folder, is named after. If no shard is named after the split, the
    shards without a split in their names are returned: training images, or archives that contain a folder for each
    split. Shards that match a given pattern are training images, whatever their names.

    Returns:
        The files, sorted, and whether they are named after the split.
    """
    if not os.path.isdir(data_path):
        raise ValueError(f"wds needs --data_path: the folder of the tar shards, found {data_path!r}")
    folder = glob.escape(data_path)
    if pattern:
        found = [path for each in _braces(pattern) for path in glob.glob(os.path.join(folder, each))]
    else:
        found = [*glob.glob(os.path.join(folder, "*.tar")), *glob.glob(os.path.join(folder, "*", "*.tar"))]
        found = [
            path for path in found if os.path.dirname(path) == data_path.rstrip("/") or _read_split(path, data_path)
        ]
    if not found:
        raise ValueError(f"no {pattern or '.tar'} files in {data_path}; --data_path must be the folder of the shards")
    ours = [path for path in found if _read_split(path, data_path) == split]
    named = bool(ours)
    if not ours:
        ours = [path for path in found if (pattern and split == "train") or not _read_split(path, data_path)]
    if not ours:
        among = f"among {len(found)} named {pattern or '*.tar'}: {some(found)}"
        raise (NoSplit if split != "train" else ValueError)(f"no {split} shards in {data_path} {among}")
    return sorted(ours), named


def _read_split(path: str, data_path: str) -> str:
    """Return the split that a shard or its folder is named after; "" where there is none."""
    words = re.split(r"[^a-z]+", os.path.relpath(path, data_path).lower())
    return next((split for split, names in SPLIT_WORDS.items() if not set(names).isdisjoint(words)), "")


def _braces(pattern: str) -> list[str]:
    """Expand `a-{008..010}.tar` to a-008.tar, a-009.tar, a-010.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [each for number in numbers for each in _braces(pattern[: found.start()] + number + pattern[found.end() :])]
