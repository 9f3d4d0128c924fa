"""Tiny data for smoke tests: digits enlarged to 64 pixels as image folders, transfer sets in their own layouts.

torchvision knows the true files of CIFAR-10, CIFAR-100 and Flowers by their hashes and opens no others, so these three
are image folders here. The others lie as torchvision unpacks them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
CLASSES = 10
TRAIN, TEST = 4, 2  # images of each class
CALTECH = 31  # of a class: 30 to train on, as the literature takes them, and one to judge by


def pictures() -> list[list[Image.Image]]:
    """Of each digit, more images than any layout needs."""
    from sklearn.datasets import load_digits  # here, because it takes long to import

    digits = load_digits()
    found = []
    for digit in range(CLASSES):
        pixels = digits.images[digits.target == digit][:CALTECH]
        grey = np.round(pixels * (255 / 16)).astype(np.uint8)
        found.append([Image.fromarray(one).convert("RGB").resize((SIDE, SIDE)) for one in grey])
    return found


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def lines(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts))


def splits(images: list[list[Image.Image]]) -> list[tuple[str, int, int, Image.Image]]:
    """(train or test, class, number, image)."""
    return [
        ("train" if number < TRAIN else "test", digit, number, image)
        for digit, group in enumerate(images)
        for number, image in enumerate(group[: TRAIN + TEST])
    ]


def folders(root: Path, images: list[list[Image.Image]]) -> None:
    """train/CLASS/*.png and val/CLASS/*.png."""
    for split, digit, number, image in splits(images):
        save(image, root / ("train" if split == "train" else "val") / str(digit) / f"{number}.png")


def pets(root: Path, images: list[list[Image.Image]]) -> None:
    base, rows = root / "oxford-iiit-pet", splits(images)
    for split in ("train", "test"):
        named = [(f"breed_{digit}_{number}", digit) for where, digit, number, _ in rows if where == split]
        name = "trainval" if split == "train" else split
        lines(base / "annotations" / f"{name}.txt", [f"{name} {digit + 1} 1 1" for name, digit in named])
    for _, digit, number, image in rows:
        save(image, base / "images" / f"breed_{digit}_{number}.jpg")


def dtd(root: Path, images: list[list[Image.Image]]) -> None:
    base, rows = root / "dtd" / "dtd", splits(images)
    for split, wanted in {"train": range(TRAIN - 1), "val": (TRAIN - 1,), "test": range(TRAIN, TRAIN + TEST)}.items():
        names = [f"kind{digit}/kind{digit}_{number}.jpg" for _, digit, number, _ in rows if number in wanted]
        lines(base / "labels" / f"{split}1.txt", names)
    for _, digit, number, image in rows:
        save(image, base / "images" / f"kind{digit}" / f"kind{digit}_{number}.jpg")


def food(root: Path, images: list[list[Image.Image]]) -> None:
    base, rows = root / "food-101", splits(images)
    for split in ("train", "test"):
        named: dict[str, list[str]] = {}
        for where, digit, number, _ in rows:
            if where == split:
                named.setdefault(f"dish{digit}", []).append(f"dish{digit}/{number}")
        lines(base / "meta" / f"{split}.json", [json.dumps(named)])
    for _, digit, number, image in rows:
        save(image, base / "images" / f"dish{digit}" / f"{number}.jpg")


def aircraft(root: Path, images: list[list[Image.Image]]) -> None:
    base, rows = root / "fgvc-aircraft-2013b" / "data", splits(images)
    lines(base / "variants.txt", [f"type {digit}" for digit in range(CLASSES)])
    for split in ("train", "test"):
        named = [f"{digit}{number:03d} type {digit}" for where, digit, number, _ in rows if where == split]
        lines(base / f"images_variant_{'trainval' if split == 'train' else split}.txt", named)
    for _, digit, number, image in rows:
        save(image, base / "images" / f"{digit}{number:03d}.jpg")


def caltech(root: Path, images: list[list[Image.Image]]) -> None:
    base = root / "caltech101"
    for digit, group in enumerate(images):
        for number, image in enumerate(group[:CALTECH], start=1):
            save(image, base / "101_ObjectCategories" / f"thing{digit}" / f"image_{number:04d}.jpg")
    save(images[0][0], base / "101_ObjectCategories" / "BACKGROUND_Google" / "image_0001.jpg")
    (base / "Annotations").mkdir()


LAYOUTS: dict[str, Callable[[Path, list[list[Image.Image]]], None]] = {
    "torch/oxford_iiit_pet": pets,
    "torch/dtd": dtd,
    "torch/food101": food,
    "torch/caltech101": caltech,
    "torch/fgvc_aircraft": aircraft,
}


def write(root: Path, sets: Iterable[str]) -> None:
    """The digits as image folders in `root/digits`, each data set in a folder of its name; what is there stays.

    What is written is always the same, so that runs which it cut off go on.
    """
    missing = [(name, root / folder_of(name)) for name in ("", *sorted(sets)) if not (root / folder_of(name)).exists()]
    images = pictures() if missing else []
    for name, folder in missing:
        part = folder.with_name(f"{folder.name}.part")  # a name that only what is whole has
        shutil.rmtree(part, ignore_errors=True)
        LAYOUTS.get(name, folders)(part, images)
        part.rename(folder)


def folder_of(name: str) -> str:
    """The folder's name for a data set, or for the images to pretrain on, which have none."""
    return name.replace("/", "_") or "digits"
