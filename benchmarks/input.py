"""Measure the images per second of the loader: the loaders of this project, and torchvision with Pillow.

    python -m benchmarks.input IMAGES                       # a folder or a list of images, as for training
    python -m benchmarks.input IMAGES --variants torchvision folder pack256 --num_workers 8

`NAME+plain` passes batches in new shared memory, as a DataLoader does, instead of `data.shared_buffers`.
`torchvision` is the baseline: an ImageFolder's loader, RandomResizedCrop, flip, ToTensor and Normalize, in a DataLoader
that returns floats. `pillow` is our loader without torchcodec, `folder` our loader, `region` the same with
--region_decode, `packN` a pack with short side N (`packN+region` with that option), `rawN` one of raw pixels. Our
loaders return bytes, which the device normalises. A small folder is read several times; files are in the page cache, so
the cost of the processor is measured and not that of the disk. With --num_workers 0 a single process loads, and its CPU
time is measured, which other programs disturb least.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import pil_loader

from benchmarks.measure import in_turn, parser, progress, publish, quartiles, spread, where
from data import decode, loader
from data.images import ASPECT_RATIOS
from data.loader import Batches, TrainSamples, pretrain_transform
from data.sources import Names, Source, open_source
from tools import pack
from tools.markdown import make_table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
USUAL = ("torchvision", "pillow", "folder", "region", "pack384", "pack256", "raw256")


class PlainDataset(Dataset):
    """What an ImageFolder with MAE's transforms does."""

    def __init__(self, paths: Sequence[str], input_size: int):
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    input_size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(pil_loader(self.paths[index])), 0


def torchvision_epochs(source: Source, given: argparse.Namespace) -> Callable[[], Iterator[Any]]:
    assert source.path is not None
    paths = [source.path(number % len(source)) for number in range(given.images)]
    loader = DataLoader(
        PlainDataset(paths, given.input_size),
        batch_size=given.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=given.num_workers,
        persistent_workers=given.num_workers > 0,
    )
    return lambda: iter(loader)


def our_epochs(source: Source, given: argparse.Namespace) -> Callable[[], Iterator[Any]]:
    repeated = Source(Names(str(number) for number in range(given.images)), functools.partial(_wrapped, source))
    patches = (given.input_size // 16) ** 2
    samples = TrainSamples(repeated, pretrain_transform(given.input_size), 0, (1, patches), mean=MEAN, std=STD)
    batches = Batches(samples, batch_size=given.batch_size, num_workers=given.num_workers)
    epochs = iter(range(2**31))
    return lambda: batches.epoch(next(epochs))


def _wrapped(source: Source, number: int) -> np.ndarray:
    return source.read(number % len(source))


def packed(source: Source, given: argparse.Namespace, name: str, folder: Path) -> tuple[Source, int]:
    """Create a pack of the images; return it and its bytes per image."""
    raw, size = name.startswith("raw"), name.removeprefix("raw").removeprefix("pack")
    words = ["--output", str(folder / name), "--size", size, "--split", "train", *(["--raw"] if raw else [])]
    if pack.main([given.data_path, *words]):
        raise ValueError(f"{given.data_path} cannot be packed")
    stored = sum(file.stat().st_size for file in (folder / name / "train").glob("shard-*.bin"))
    return open_source("pack", str(folder / name)), stored // len(source)


@contextlib.contextmanager
def without_torchcodec() -> Iterator[None]:
    """Return a context in which new workers decode with Pillow."""
    true = decode.torchcodec_jpeg
    decode.torchcodec_jpeg = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        decode.torchcodec_jpeg = true


@contextlib.contextmanager
def without_shelf() -> Iterator[None]:
    """Return a context in which new workers pass batches as a DataLoader does."""
    true = loader.SharedBuffers
    loader.SharedBuffers = lambda places: true(0)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        loader.SharedBuffers = true  # type: ignore[misc]


def measure(given: argparse.Namespace, say: Callable[[str], None] = progress) -> dict[str, Any]:
    """Return seconds per image by round, bytes per image of the packs, and differences from Pillow's pixels."""
    source = open_source("auto", given.data_path)
    if source.path is None:
        raise ValueError(f"{given.data_path} has no image files, which the baseline reads")
    turns: dict[str, Callable[[], float]] = {}
    bytes_each: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.variants:
            say(f"preparing {name}")
            region, lack = name.endswith("region"), decode.lacks_parts()
            if region and lack:
                say(f"left out: {lack}")
                continue
            images = source
            if name.startswith(("pack", "raw")):
                images, bytes_each[name] = packed(source, given, name.split("+")[0], Path(folder))
            if region:
                images = replace(images, read=images.read_lazily or images.read)
            switches = {"pillow": without_torchcodec, "plain": without_shelf}
            switch = switches.get(name.split("+")[-1], contextlib.nullcontext)
            start = (torchvision_epochs if name == "torchvision" else our_epochs)(images, given)
            turns[name] = functools.partial(seconds_per_image, start, given, switch)
            turns[name]()  # starts the workers, fills the page cache
        seconds = in_turn(turns, given.rounds, given.seed, say)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the plain DataLoader's handler takes workers that end for failures
    return {"seconds": seconds, "bytes_each": bytes_each, "pixels": pixel_difference(source, given.input_size)}


def seconds_per_image(
    start: Callable[[], Iterator[Any]], given: argparse.Namespace, switch: Callable[[], AbstractContextManager]
) -> float:
    clock = time.perf_counter if given.num_workers else time.process_time
    with switch():
        began, images = clock(), 0
        for _ in start():
            images += given.batch_size
        return (clock() - began) / images


def pixel_difference(source: Source, input_size: int, crops: int = 4) -> dict[str, float]:
    """Return the difference between our crops and Pillow's (0 to 255), over at most 64 images."""
    assert source.path is not None
    torch.manual_seed(0)
    means, most = [], 0.0
    for number in range(min(64, len(source))):
        theirs = pil_loader(source.path(number))
        ours = torch.from_numpy(source.read(number).copy()).permute(2, 0, 1)
        extent = torch.empty(1).expand(1, *ours.shape[1:])
        for _ in range(crops):
            box = transforms.RandomResizedCrop.get_params(extent, [0.2, 1.0], list(ASPECT_RATIOS))
            top, left, rows, columns = box
            cut = theirs.crop((left, top, left + columns, top + rows))
            expected = np.asarray(cut.resize((input_size, input_size), Image.Resampling.BICUBIC)).astype(int)
            part = ours[:, top : top + rows, left : left + columns]
            found = transforms.v2.functional.resize(
                part, [input_size, input_size], transforms.InterpolationMode.BICUBIC, antialias=True
            )
            difference = np.abs(found.permute(1, 2, 0).numpy() - expected)
            means.append(difference.mean())
            most = max(most, float(difference.max()))
    return {"mean": float(np.mean(means)), "worst_crop_mean": float(np.max(means)), "worst_pixel": most}


def markdown(result: Mapping[str, Any]) -> str:
    setting, seconds = result["setting"], result["seconds"]
    baseline = next(iter(seconds))
    rows = []
    for name, times in seconds.items():
        rate = quartiles([1 / each for each in times])
        ratio = "1" if name == baseline else spread(result["ratios"][f"{baseline}/{name}"], 2)
        size = result["bytes_each"].get(name)
        rows.append([name, spread(rate, 0), ratio, f"{size / 1000:.0f}" if size else "-"])
    pixels = result["pixels"]
    return (
        f"# Loading: {setting['input_size']} px crops, {setting['num_workers'] or 'no'} workers, "
        f"batch {setting['batch_size']}\n\n"
        f"{where(result['machine'])} {setting['images']} images a round, {setting['rounds']} rounds; medians, "
        "quartiles and ratios within a round. Crops of equal boxes differ from Pillow's by "
        f"{pixels['mean']:.3f} of 255 on average (worst crop "
        f"{pixels['worst_crop_mean']:.3f}, worst pixel {pixels['worst_pixel']:.0f}).\n\n"
        + make_table(["loader", "images / s", f"times {baseline}", "KB / image stored"], rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(
        __doc__,
        images=(1024, "images a round; files are read several times if there are fewer"),
        num_workers=(2, "loader processes"),
        batch_size=(64, "images a batch"),
        input_size=(224, "side of the crops"),
        rounds=(9, "how often every loader is timed"),
        seed=(0, "of the order of turns"),
    )
    made.add_argument("data_path", help="folder or list of images")
    made.add_argument("--variants", nargs="+", default=USUAL, metavar="NAME", help="the first is the baseline")
    given = made.parse_args(argv)
    setting = {name: value for name, value in vars(given).items() if name not in ("data_path", "output")}
    name = f"input_{given.num_workers}_workers"
    publish(name, measure(given), markdown, setting=setting, output=given.output)


if __name__ == "__main__":
    main()
