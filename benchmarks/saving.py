"""Measure the cost of saving: a checkpoint written as in a run, and the same bytes written at once.

    python -m benchmarks.saving                      # ViT-Tiny with the published decoder, to where temporary files go
    python -m benchmarks.saving --folder /mnt/network --device cuda --batch_size 256

A checkpoint contains weights and both moments of AdamW; it is flushed to the disk and renamed, and its predecessor gets
a second name. Training waits for it. The share of the training time assumes a checkpoint every `save_minutes` (default)
or after every epoch of ImageNet-1K, if that is shorter at the speed of the step measured here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import in_turn, parser, progress, publish, quartiles, spread, where
from benchmarks.step import OurStep, Setting
from options import PretrainOptions
from tools.markdown import make_table
from util import checkpoint

IMAGENET_IMAGES = 1_281_167


def measure_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_at_once(content: bytes, path: Path) -> None:
    """Write the bytes and flush them to disk, the lower bound for a checkpoint."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def measure(given: argparse.Namespace, say: Callable[[str], None] = progress) -> dict[str, Any]:
    """Return seconds of a save, of the plain bytes and of a step, by round, and the shares of a training."""
    torch.set_num_threads(given.threads)
    setting = Setting(size=given.size, batch_size=given.batch_size, device=given.device, threads=given.threads)
    step = OurStep(setting, "nor_mae", compiled=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(given.batch_size, 3, setting.input_size, setting.input_size, generator=generator)
    noise = torch.rand(given.batch_size, 1, setting.patches, generator=generator)
    images, noise = images.to(given.device), noise.to(given.device)

    def train() -> None:
        step(images, noise)
        step.stepper.bad_steps()  # waits for the device

    def save() -> None:
        state = {"format": checkpoint.FORMAT, "model": step.model.state_dict(), **step.stepper.state_dict()}
        checkpoint.keep_previous(folder)
        checkpoint.save(folder / checkpoint.LAST, state)

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        train()
        save()
        content = (folder / checkpoint.LAST).read_bytes()
        seconds = in_turn(
            {
                "step": lambda: measure_seconds(train),
                "save": lambda: measure_seconds(save),
                "bytes": lambda: measure_seconds(lambda: write_at_once(content, folder / "plain")),
            },
            given.rounds,
            0,
            say,
        )
    images_per_second = given.batch_size / quartiles(seconds["step"])["median"]
    epoch = IMAGENET_IMAGES / images_per_second
    between = min(60 * PretrainOptions.save_minutes, epoch)
    each = quartiles(seconds["save"])["median"]
    return {
        "megabytes": len(content) / 1e6,
        "seconds": seconds,
        "images_per_second": images_per_second,
        "seconds_of_an_epoch": epoch,
        "seconds_between_saves": between,
        "share_of_training": each / (between + each),
    }


def markdown(result: Mapping[str, Any]) -> str:
    seconds = {name: quartiles(values) for name, values in result["seconds"].items()}
    rows = [
        ("a checkpoint, as a run writes it", spread(seconds["save"]), spread(result["ratios"]["save/bytes"], 2)),
        ("the same bytes at once", spread(seconds["bytes"]), "1"),
    ]
    return (
        f"# Saving: ViT-{result['setting']['size'].capitalize()}/16, {result['megabytes']:.1f} MB\n\n"
        f"{where(result['machine'])} {result['setting']['rounds']} rounds; medians and quartiles.\n\n"
        + make_table(("what is written", "seconds", "ratio"), rows)
        + f"\nA step of {result['setting']['batch_size']} images takes {spread(seconds['step'])} s here "
        f"({result['images_per_second']:.0f} images / s), so an epoch of ImageNet-1K "
        f"{result['seconds_of_an_epoch'] / 60:.0f} minutes. Saved every {result['seconds_between_saves'] / 60:.1f} "
        f"minutes, saving is {100 * result['share_of_training']:.3f}% of the training.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    words = parser(
        __doc__,
        batch_size=(32, "images of the step that is measured beside it"),
        threads=(1, "of the processor"),
        rounds=(9, "how often each is measured"),
    )
    words.add_argument("--size", default="tiny", help="of the encoder: tiny, small, base, large or huge")
    words.add_argument("--device", default="cpu", help="where the step is made")
    words.add_argument("--folder", type=Path, help="where to write; None: the folder for temporary files")
    given = words.parse_args(argv)
    setting = {name: getattr(given, name) for name in ("size", "batch_size", "device", "threads", "rounds")}
    publish(f"saving_{given.device}_{given.size}", measure(given), markdown, setting=setting, output=given.output)


if __name__ == "__main__":
    main()
