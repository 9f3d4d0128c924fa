"""Pictures of what a trained model sees.

    python tools/visualize.py reconstruction output/quickstart                      # on images of the run's own data
    python tools/visualize.py reconstruction output/tiny --images a.jpg b.jpg --output a_and_b.png
    python tools/visualize.py reconstruction MODEL.pth --images FOLDER --count 12

A subcommand is one function from a `Subject` (the model and some images, ready for it) to a figure, entered in
`PICTURES`; reading the checkpoint, the images and the flags is the same for all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # so that the file runs from any directory

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from tools import given
from tools.given import Trained

TITLES = {
    "original": "original",
    "masked": "what the encoder sees",
    "reconstruction": "reconstruction",
    "pasted": "reconstruction + visible",
}


@dataclass(frozen=True)
class Subject:
    """What a picture is made of: a trained model, images `[N, C, H, W]` normalised for it, their names, and a seed."""

    trained: Trained
    images: Tensor
    names: list[str]
    seed: int

    def noise(self) -> Tensor:
        """Noise `[N, L]` for the mask: the same for the same seed, on any device."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(self.images), self.trained.model.num_patches, generator=generator)

    def displayed(self, images: Tensor) -> np.ndarray:
        """Normalised images `[N, C, H, W]` as `[N, H, W, 3]` (or `[N, H, W]` in grey) between 0 and 1."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in self.trained.statistics)
        pixels = (images.float().cpu() * std + mean).clamp(0, 1)
        channels = pixels.shape[1]
        return pixels[:, 0].numpy() if channels < 3 else pixels[:, :3].movedim(1, -1).numpy()

    @property
    def channels_note(self) -> str:
        channels = self.images.shape[1]
        shown = {1: "", 2: "shown: the first of 2 channels", 3: ""}
        return shown.get(channels, f"shown: the first 3 of {channels} channels as red, green and blue")


def reconstruction(subject: Subject) -> Figure:
    """Per image a row: original, what the encoder sees, the prediction of every patch, and of the hidden ones only."""
    model, options = subject.trained.model, subject.trained.options
    with torch.inference_mode():
        pictures = model.reconstruct(subject.images, noise=subject.noise())
    rows, columns = len(subject.images), len(TITLES)
    height, width = subject.images.shape[-2:]
    figure = Figure(figsize=(1.9 * columns, 1.9 * rows * height / width + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, (name, title) in enumerate(TITLES.items()):
        for row, picture in enumerate(subject.displayed(pictures[name])):
            axis = axes[row, column]
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=9)
            if column == 0:
                axis.set_ylabel(Path(subject.names[row]).name[-24:], fontsize=6)
    notes = [f"{options['method']}, {options['model']}, {model.mask_ratio:.0%} of the patches hidden"]
    if model.norm_pix_loss:
        notes.append(
            "The model predicts each patch standardised; this is undone with the patch's true mean and deviation,\n"
            "so the brightness and contrast of hidden patches are given, and only their pattern is predicted."
        )
    notes += [subject.channels_note] if subject.channels_note else []
    figure.suptitle("\n".join(notes), fontsize=8)
    return figure


PICTURES: dict[str, Callable[[Subject], Figure]] = {"reconstruction": reconstruction}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pictures of what a trained model sees.")
    commands = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, function in PICTURES.items():
        command = commands.add_parser(name, help=(function.__doc__ or "").split("\n")[0])
        command.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
        told = "image files, a folder, or digits (default: the run's data)"
        command.add_argument("--images", nargs="+", default=[], metavar="PATH", help=told)
        command.add_argument("--count", type=int, default=6, help="how many images (default: 6)")
        command.add_argument("--seed", type=int, default=0, help="of the images' choice and the masks (default: 0)")
        command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
        command.add_argument("--output", type=Path, help=f"PNG, PDF or SVG (default: {name}.png in the run's folder)")
    words = parser.parse_args(argv)
    try:
        trained = given.load(words.model, words.device)
        images, names = given.images(trained, words.images, count=words.count, seed=words.seed)
        subject = Subject(trained, images, names, words.seed)
        output = words.output or trained.run / f"{words.picture}.png"
        output.parent.mkdir(parents=True, exist_ok=True)
        PICTURES[words.picture](subject).savefig(output, dpi=150)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"Written: {output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
