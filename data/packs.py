"""Packs: the images of a split in a few large files, which are memory-mapped. Created by `tools.pack`.

    PACK/train/pack.json          source, recipe, classes, and the sha256 of every other file
               index.npy          one row per image: position, size if raw, label, size and time of its source file
               names.bin          names of the images, each terminated by a zero byte
               shard-00000.bin    concatenated images: image files, or raw uint8 pixels
               verified.json      the shards that were hashed, with their size and time

A pack is written shard by shard, each atomically, so that an interrupted packing can be resumed. A pack is verified
when it is opened: all hashes the first time on a disk, sizes and times of the files later.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.files import atomic_write, write_json
from data.images import PICTURE_MODES, BadImage, decode, shrink

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST, PLAN, INDEX, NAMES, VERIFIED = "pack.json", "unfinished.json", "index.npy", "names.bin", "verified.json"
ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u8"),
        ("rows", "<u4"),  # rows of raw pixels; 0 for an image file
        ("columns", "<u4"),
        ("label", "<i8"),  # -1 without labels
        ("source_bytes", "<u8"),  # size of the image's file; 0 if it has none
        ("source_time", "<i8"),
    ]
)


@dataclass(frozen=True)
class Recipe:
    """How images are stored.

    short_side  maximum pixels of the shorter side, to which larger images are resized; 0: sizes are unchanged
    quality     JPEG quality (4:2:0); 0: the image's file is copied, or stored without loss if it has none
    raw         store pixels instead of files: larger, but without decoding
    channels    channels of the pixels
    """

    short_side: int = 256
    quality: int = 90
    raw: bool = False
    channels: int = 3

    def __post_init__(self) -> None:
        if self.short_side < 0:
            raise ValueError(
                f"size is {self.short_side}; it must be the shorter side in pixels, or 0 for unchanged sizes"
            )
        if not 0 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; it must be 1 to 100 for JPEG, or 0 to copy the files")
        if not self.raw and not self.quality and self.short_side:
            raise ValueError(f"quality 0 copies the files, but size is {self.short_side}: also give size 0")
        if not self.raw and self.quality and self.channels not in (1, 3):
            raise ValueError(f"JPEG has 1 or 3 channels, not {self.channels}: pack them raw, or with size 0, quality 0")

    def store(self, array_HWC: np.ndarray, file: bytes | None) -> tuple[bytes, int, int]:
        """Return the bytes to store for an image, and its rows and columns (0 for an image file).

        The original file is stored if it is not larger than the JPEG file would be and has the same number of pixels.
        """
        if 0 < self.short_side < min(array_HWC.shape[:2]):
            array_HWC, file = shrink(array_HWC, self.short_side), None
        if self.raw:
            return array_HWC.tobytes(), *array_HWC.shape[:2]
        if file is not None and not self.quality:
            return file, 0, 0
        target = io.BytesIO()
        if self.channels not in PICTURE_MODES:
            np.save(target, array_HWC)
            return target.getvalue(), 0, 0
        picture = Image.fromarray(array_HWC.squeeze(-1) if self.channels == 1 else array_HWC)
        if self.quality:
            picture.save(target, "JPEG", quality=self.quality, subsampling="4:2:0")
        else:
            picture.save(target, "PNG")
        made = target.getvalue()
        return (made if file is None or len(made) < len(file) else file), 0, 0


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass
class Pack:
    """The verified images of one split."""

    folder: str
    manifest: dict[str, Any]
    index: np.ndarray
    names: list[str]

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.manifest["classes"] is None else self.index["label"].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the complete content."""
        return hashlib.sha256(json.dumps(self.manifest["files"], sort_keys=True).encode()).hexdigest()

    def reader(self, channels: int) -> Callable[..., np.ndarray]:
        """Return a function of an image's index that returns uint8 `[H, W, channels]`; raw pixels are not copied.

        It has the keyword argument `lazy`, see `data.images.decode`.
        """
        recipe = Recipe(**self.manifest["recipe"])
        if recipe.raw and recipe.channels != channels:
            raise ValueError(f"the pack {self.folder} holds raw images of {recipe.channels} channels, not {channels}")
        return functools.partial(_read, self.folder, self.index, channels)

    def touched(self) -> bool:
        """Return whether a folder of the source has changed since packing; a missing folder counts as unchanged."""
        return any(os.path.isdir(path) and os.stat(path).st_mtime_ns != then for path, then in self._folders())

    def _folders(self) -> Iterable[tuple[str, int]]:
        return (self.manifest["source"].get("folders") or {}).items()


def _read(folder: str, index: np.ndarray, channels: int, number: int, lazy: bool = False) -> np.ndarray:
    shard, offset, size, rows, columns = index[number].item()[:5]
    name = f"{folder}/{shard_name(shard)}[{number}]"
    try:
        stored = _mapped(os.path.join(folder, shard_name(shard)))[offset : offset + size]
    except (OSError, ValueError) as error:
        raise BadImage(name, str(error)) from error
    if len(stored) != size:
        raise BadImage(name, "the shard is shorter than it was")
    return stored.reshape(rows, columns, channels) if rows else decode(stored.tobytes(), channels, name, lazy=lazy)


@functools.cache  # one memory map per shard and process
def _mapped(path: str) -> np.ndarray:
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def is_pack(folder: str | Path) -> bool:
    """Return whether `folder` contains a pack of a split, complete or not."""
    return os.path.isfile(os.path.join(folder, MANIFEST)) or os.path.isfile(os.path.join(folder, PLAN))


def open_pack(folder: str | Path) -> Pack:
    """Open the pack in `folder`. Raises ValueError unless it is complete, unchanged and of this version."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    found, lost = {}, []
    for name, file in manifest["files"].items():
        try:
            state = (folder / name).stat()
        except OSError:
            lost.append(f"{name} is missing")
            continue
        found[name] = [state.st_size, state.st_mtime_ns]
        if state.st_size != file["bytes"]:
            lost.append(f"{name} has {state.st_size} bytes, not {file['bytes']}")
    if not lost:
        lost = _changed(folder, manifest["files"], found)
    if lost:
        more = f"; and {len(lost) - 5} more files" if len(lost) > 5 else ""
        raise ValueError(
            f"the pack {folder} has changed since it was created: {'; '.join(lost[:5])}{more}. Create or copy it again"
        )
    names = (folder / NAMES).read_bytes().split(b"\0")[:-1]
    return Pack(str(folder), manifest, np.load(folder / INDEX), [os.fsdecode(name) for name in names])


def read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise ValueError(f"the pack {folder} is incomplete: run the command that created it again to resume")
        raise ValueError(f"{folder} is not a pack: it has no {MANIFEST}")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}). Create or copy the pack again") from error
    if version != VERSION:
        raise ValueError(f"the pack {folder} is of version {version}, but this program reads version {VERSION}")
    return manifest


def _changed(folder: Path, files: dict[str, dict], found: dict[str, list[int]]) -> list[str]:
    """Describe the files whose hash is wrong. Files with the size and time of an earlier check are not hashed again."""
    try:
        verified = json.loads((folder / VERIFIED).read_text())
    except (OSError, ValueError):
        verified = {}
    unsure = [name for name in files if verified.get(name) != found[name]]
    if not unsure:
        return []
    size = sum(files[name]["bytes"] for name in unsure)
    log.info("data: verifying %d files (%.1f GB) of the pack %s, once on this disk", len(unsure), size / 1e9, folder)
    with ThreadPoolExecutor() as threads:
        hashes = dict(zip(unsure, threads.map(lambda name: sha256(folder / name), unsure), strict=True))
    wrong = [
        f"{name} has sha256 {hashes[name][:12]}, not {files[name]['sha256'][:12]}"
        for name in unsure
        if hashes[name] != files[name]["sha256"]
    ]
    if not wrong:
        try:
            write_json(folder / VERIFIED, found)
        except OSError as error:
            log.info("data: %s cannot be written (%s): the pack is verified at every start", folder / VERIFIED, error)
    return wrong


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass
class Packing:
    """Create a pack from images read by `read(number)`; `path(number)` is the image's file, if it has one."""

    folder: Path
    recipe: Recipe
    shard_images: int
    names: Sequence[str]
    labels: np.ndarray | None
    read: Callable[[int], np.ndarray]
    path: Callable[[int], str] | None

    @property
    def shards(self) -> int:
        return -(-len(self.names) // self.shard_images)

    def shard_indices(self, shard: int) -> range:
        return range(shard * self.shard_images, min((shard + 1) * self.shard_images, len(self.names)))

    def _note(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def missing(self) -> list[int]:
        """Return the incomplete shards: those without a note, or whose size differs from it."""

        def done(shard: int) -> bool:
            file = self.folder / shard_name(shard)
            try:
                return json.loads(self._note(shard).read_text())["bytes"] == file.stat().st_size
            except (OSError, ValueError, KeyError):
                return False

        return [shard for shard in range(self.shards) if not done(shard)]

    def write(self, shard: int) -> int:
        """Write a shard, verify it, and write its note. Return its number of images, including unreadable ones."""
        rows, problems, offset = [], [], 0
        with atomic_write(self.folder / shard_name(shard), sync=True) as target:
            for image in self.shard_indices(shard):
                try:
                    stored, height, width, size, time = self._stored(image)
                except BadImage as error:
                    problems.append([self.names[image], error.reason])
                    continue
                target.write(stored)
                label = -1 if self.labels is None else int(self.labels[image])
                rows.append([image, shard, offset, len(stored), height, width, label, size, time])
                offset += len(stored)
        self._read_back(rows)
        note = {"bytes": offset, "sha256": sha256(self.folder / shard_name(shard)), "rows": rows, "left_out": problems}
        write_json(self._note(shard), note)
        return len(self.shard_indices(shard))

    def _stored(self, image: int) -> tuple[bytes, int, int, int, int]:
        size = time = 0
        file = None
        if self.path is not None:
            path = self.path(image)
            try:
                state = os.stat(path)
                size, time = state.st_size, state.st_mtime_ns
                file = None if self.recipe.raw else Path(path).read_bytes()
            except OSError as error:
                raise BadImage(path, error.strerror or str(error)) from error
        return *self.recipe.store(self.read(image), file), size, time

    def _read_back(self, rows: list[list[int]]) -> None:
        """Raise OSError unless every image of the shard can be read from disk."""
        index = np.array([tuple(row[1:]) for row in rows], ROW)
        for number in range(len(rows)):
            try:
                _read(str(self.folder), index, self.recipe.channels, number)
            except BadImage as error:
                raise OSError(f"{error.path}, just written, cannot be read back: {error.reason}") from error
        _mapped.cache_clear()  # else each written shard stays mapped

    def _notes(self) -> list[dict[str, Any]]:
        return [json.loads(self._note(shard).read_text()) for shard in range(self.shards)]

    def left_out(self) -> list[list[str]]:
        """Return (name, reason) of unreadable images."""
        return [problem for note in self._notes() for problem in note["left_out"]]

    def finish(self, source: dict[str, Any], classes: list[str] | None) -> None:
        """Merge the notes of all shards into the index and pack.json. `classes`: names of the labels, or None."""
        notes = self._notes()
        rows = [row for note in notes for row in note["rows"]]
        np.save(self.folder / INDEX, np.array([tuple(row[1:]) for row in rows], ROW))
        kept = (os.fsencode(self.names[row[0]]) + b"\0" for row in rows)
        (self.folder / NAMES).write_bytes(b"".join(kept))
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": sha256(self.folder / name)}
            for name in (INDEX, NAMES)
        }
        files |= {
            shard_name(number): {"bytes": note["bytes"], "sha256": note["sha256"]} for number, note in enumerate(notes)
        }
        manifest = {
            "version": VERSION,
            "images": len(rows),
            "classes": classes,
            "recipe": asdict(self.recipe),
            "source": source,
            "left_out": self.left_out(),
            "files": files,
        }
        write_json(self.folder / MANIFEST, manifest)
        (self.folder / PLAN).unlink()
        for shard in range(self.shards):
            self._note(shard).unlink()
