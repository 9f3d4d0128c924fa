"""Create tiny data for smoke tests: digits enlarged to 64 pixels, as image folders and in the layouts of transfer sets.

The layouts are those of torchvision. torchvision verifies the files of CIFAR-10, CIFAR-100 and Flowers by their hashes,
so a program that should read tiny files instead is started through this module:

    python -m tools.smoke_data main_finetune.py --dataset torch/cifar10 ...
"""

from __future__ import annotations

import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, CIFAR_SIDE = 64, 32
CLASSES = 10
TRAIN, TEST = 4, 2  # images of each class
CALTECH = 31  # per class: the usual 30 to train on, and one to test on


def pictures() -> list[list[Image.Image]]:
    """Return images of each digit, enough for every layout."""
    from sklearn.datasets import load_digits  # slow import

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
    """Return (train or test, class, number, image) of each image."""
    return [
        ("train" if number < TRAIN else "test", digit, number, image)
        for digit, group in enumerate(images)
        for number, image in enumerate(group[: TRAIN + TEST])
    ]


def folders(root: Path, images: list[list[Image.Image]]) -> None:
    """Write train/CLASS/*.png and val/CLASS/*.png."""
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


def cifar(root: Path, images: list[list[Image.Image]], folder: str, files: Sequence[str], meta: str, fine: str) -> None:
    """Write pickled batches: rows of red, then green, then blue pixels. Training images are split over `files`."""
    rows, base = splits(images), root / folder
    base.mkdir(parents=True)
    pixels = [np.asarray(image.resize((CIFAR_SIDE, CIFAR_SIDE))).transpose(2, 0, 1).ravel() for *_, image in rows]
    labels = f"{fine}labels"
    for split, names in (("train", files[:-1]), ("test", files[-1:])):
        chosen = [place for place, row in enumerate(rows) if row[0] == split]
        for part, name in enumerate(names):
            places = chosen[part :: len(names)]
            batch = {
                "data": np.stack([pixels[place] for place in places]),
                labels: [rows[place][1] for place in places],
            }
            (base / name).write_bytes(pickle.dumps(batch))
    (base / meta).write_bytes(pickle.dumps({f"{fine}label_names": [str(digit) for digit in range(CLASSES)]}))


def cifar10(root: Path, images: list[list[Image.Image]]) -> None:
    files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    cifar(root, images, "cifar-10-batches-py", files, "batches.meta", "")


def cifar100(root: Path, images: list[list[Image.Image]]) -> None:
    cifar(root, images, "cifar-100-python", ["train", "test"], "meta", "fine_")


def flowers(root: Path, images: list[list[Image.Image]]) -> None:
    from scipy.io import savemat  # comes with scikit-learn, as torchvision's reader needs it

    base, rows = root / "flowers-102", splits(images)
    for place, (*_, image) in enumerate(rows, start=1):
        save(image, base / "jpg" / f"image_{place:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[digit + 1 for _, digit, _, _ in rows]])})
    wanted = {"trnid": range(TRAIN - 1), "valid": (TRAIN - 1,), "tstid": range(TRAIN, TRAIN + TEST)}
    ids = {name: [[place for place, row in enumerate(rows, start=1) if row[2] in wanted[name]]] for name in wanted}
    savemat(base / "setid.mat", ids)


def ade20k(root: Path, images: list[list[Image.Image]]) -> None:
    """Write masks: 0 (ignored) in the first row, 1 for background, and an index per digit for ink."""
    base = root / "ADEChallengeData2016"
    for split, digit, number, image in splits(images):
        folder, prefix = {"train": ("training", "train"), "test": ("validation", "val")}[split]
        name = f"ADE_{prefix}_{digit}{number:07d}"
        mask = np.where(np.asarray(image.convert("L")) > 100, 2 + digit, 1).astype(np.uint8)
        mask[0] = 0
        save(image, base / "images" / folder / f"{name}.jpg")
        save(Image.fromarray(mask), base / "annotations" / folder / f"{name}.png")


LAYOUTS: dict[str, Callable[[Path, list[list[Image.Image]]], None]] = {
    "torch/cifar10": cifar10,
    "torch/cifar100": cifar100,
    "torch/flowers102": flowers,
    "torch/oxford_iiit_pet": pets,
    "torch/dtd": dtd,
    "torch/food101": food,
    "torch/caltech101": caltech,
    "torch/fgvc_aircraft": aircraft,
    "ade20k": ade20k,
}

KNOWN_BY_HASH = ("torch/cifar10", "torch/cifar100", "torch/flowers102")


def opener(dataset: str) -> tuple[str, ...]:
    """Return the arguments to put before a program's own so that it can open the tiny files of a data set."""
    return ("-m", "tools.smoke_data") if dataset in KNOWN_BY_HASH else ()


def forget_hashes() -> None:
    """Disable the hash checks of torchvision."""
    from torchvision.datasets import CIFAR10, CIFAR100, Flowers102

    for known in (CIFAR10, CIFAR100):
        known.train_list = [[name, None] for name, _ in known.train_list]
        known.test_list = [[name, None] for name, _ in known.test_list]
        known.meta = known.meta | {"md5": None}
    Flowers102._file_dict = {what: (name, None) for what, (name, _) in Flowers102._file_dict.items()}


def write(root: Path, sets: Iterable[str]) -> None:
    """Write the digits as image folders to `root/digits`, and each data set to a folder of its name.

    Existing folders are kept. The files are deterministic, so that interrupted runs can be resumed.
    """
    missing = [
        (name, root / data_folder(name)) for name in ("", *sorted(sets)) if not (root / data_folder(name)).exists()
    ]
    images = pictures() if missing else []
    for name, folder in missing:
        part = folder.with_name(f"{folder.name}.part")  # so that `folder` exists only when it is complete
        shutil.rmtree(part, ignore_errors=True)
        LAYOUTS[name](part, images) if name else folders(part, images)
        part.rename(folder)


def data_folder(name: str) -> str:
    """Return the folder of a data set, or of the pretraining images."""
    return name.replace("/", "_") or "digits"


def main(words: Sequence[str]) -> None:
    """Run a program of the project on tiny files."""
    forget_hashes()
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
