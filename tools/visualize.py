"""Draw the paper's figures, and others for evaluating a small ViT.

    python -m tools.visualize neighbors                                     # embedded photos, untrained ViT-Tiny
    python -m tools.visualize similarity output/tiny --images IMAGENET      # streamed over a folder
    python -m tools.visualize separation output/mae output/nor mae_vit_tiny_patch16 --images a.jpg b.jpg
    python -m tools.visualize reconstruction output/tiny --output picture.pdf

A model is a run folder, a checkpoint, a model's name (random weights), or NAME=FILE (`tools/figures/models.py`).
Figures are written as PNG and SVG and added to TensorBoard: in the folder `figures` of the run if one run is shown,
otherwise in `output/figures`. To add a figure, add a file to `tools/figures` and an entry to `PICTURES`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure

from options.schema import read
from tools.command import reports_errors, require_at_least
from tools.figures import models, similarity, style
from tools.figures.attention import attention
from tools.figures.collapse import collapse
from tools.figures.figure1 import figure1
from tools.figures.figure9 import figure9
from tools.figures.models import FigureModel
from tools.figures.neighbors import closeup, neighbors
from tools.figures.reconstruction import reconstruction
from tools.figures.relations import relations
from tools.figures.separation import separated
from tools.figures.subject import Similarity, Subject, chosen, open_images, read_images
from util.logging import log_to_terminal

FRESH = "mae_vit_tiny_patch16"


@dataclass(frozen=True)
class Picture:
    """A figure of a subject, and its default number of images."""

    draw: Callable[[Subject], Figure]
    count: int


PICTURES = {
    "figure1": Picture(figure1, 1),
    "neighbors": Picture(neighbors, 2),
    "closeup": Picture(closeup, 2),
    "separation": Picture(separated, 2),
    "reconstruction": Picture(reconstruction, 4),
    "attention": Picture(attention, 16),
    "collapse": Picture(collapse, 32),
}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="A model is: RUN_FOLDER, CHECKPOINT, NAME or NAME=WEIGHTS_FILE."
    )
    commands = result.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def command(name: str, function: Callable) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").split("\n")[0]
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument(
            "--output", type=Path, nargs="+", default=[], metavar="FILE",
            help=f"files to write, .png, .svg or .pdf (default: {name}.png and .svg in `figures/` in the run folder, "
            "or in `output/figures/`)",
        )  # fmt: skip
        made.add_argument("--no_tensorboard", action="store_true", help="do not add the figure to TensorBoard")
        return made

    def add_models(made: argparse.ArgumentParser, count: int | None) -> None:
        made.add_argument("models", nargs="*", default=[FRESH], metavar="MODEL", help=f"(default: a fresh {FRESH})")
        what = "image files; or a folder, a list, `digits`; or `photos`, two that come with scikit-learn"
        default = "(default: the run's held-out images; without a run, the photos)"
        made.add_argument("--images", nargs="+", default=[], metavar="PATH", help=f"{what} {default}")
        how_many = "all of them" if count is None else count
        made.add_argument(
            "--count", type=int, help=f"how many of a folder's images, drawn by the seed (default: {how_many})"
        )
        made.add_argument("--seed", type=int, default=0, help="seed of masks, random weights and selected images")
        made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
        made.add_argument("--input_size", help="pixels, as 224 or 160x96 (default: the model's own)")

    for name, picture in PICTURES.items():
        made = command(name, picture.draw)
        add_models(made, picture.count)
        if name in ("figure1", "neighbors", "separation", "reconstruction"):
            made.add_argument(
                "--mask_ratio", type=float, help="share of masked patches (default: the first model's, or 0.75)"
            )
        if name in ("figure1", "neighbors", "closeup", "separation"):
            text = "what is compared to find neighbours (default: embed_pos; pixels where models are compared)"
            made.add_argument("--similarity", choices=get_args(Similarity), help=text)
            released = "closest neighbours, or the selection of the released code (default: closest)"
            made.add_argument("--cnp", choices=["closest", "released"], default="closest", help=released)
        if name == "reconstruction":
            text = "models given as NAME=FILE were trained with normalised patches"
            made.add_argument("--norm_pix_loss", action="store_true", help=text)
    made = command("similarity", similarity.similarity)
    add_models(made, None)
    made.add_argument("--crop", choices=list(similarity.CROPS), default="centre", help="(default: centre)")
    made.add_argument("--batch_size", type=int, default=32)
    made.add_argument("--num_workers", type=int, default=0, help="processes that read images (default: 0)")
    made = command("relations", relations)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    made = command("figure9", figure9)
    made.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs or checkpoints of main_segment.py")
    made.add_argument("--count", type=int, default=4, help="how many of the test images (default: 4)")
    made.add_argument("--seed", type=int, default=0, help="seed of the selected images")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    made.add_argument("--data_path", default="", help="folder of images and masks (default: that of the run)")
    return result


def load_models(words: argparse.Namespace) -> list[FigureModel]:
    """Load the models. Raises ValueError if they differ in image size or channels."""
    norm_pix_loss = getattr(words, "norm_pix_loss", False)
    size = read(words.input_size, tuple[int, int], "--input_size") if words.input_size else None
    how = {"device": words.device, "seed": words.seed, "input_size": size, "norm_pix_loss": norm_pix_loss}
    found = [models.load(word, **how) for word in words.models]
    sizes = {shown.size for shown in found}
    if len(sizes) > 1:
        listed = ", ".join(f"{shown.label} {' x '.join(map(str, shown.size))}" for shown in found)
        raise ValueError(f"models side by side take the same images; found {listed} (--input_size changes a size)")
    return found


def choose_mask_ratio(words: argparse.Namespace, found: Sequence[FigureModel]) -> float:
    """Return the mask ratio given by the user, or that of the first model.

    Raises:
        ValueError: The given ratio is not between 0 and 1.
    """
    given = getattr(words, "mask_ratio", None)
    if given is not None and not 0 < given < 1:
        raise ValueError(f"--mask_ratio: must be more than 0 and less than 1, found {given:g}")
    return getattr(found[0].model, "mask_ratio", 0.75) if given is None else given


def draw_subject(words: argparse.Namespace, found: Sequence[FigureModel]) -> Figure:
    """Draw a figure of models and images."""
    picture = PICTURES[words.picture]
    source, listed = open_images(words.images, found)
    numbers = chosen(source, words.count or (None if listed else picture.count), words.seed)
    pixels, names = read_images(source, found[0].size, numbers)
    subject = Subject(
        found,
        pixels,
        names,
        seed=words.seed,
        mask_ratio=choose_mask_ratio(words, found),
        similarity=getattr(words, "similarity", None),
        cnp=getattr(words, "cnp", "closest"),
    )
    return picture.draw(subject)


def draw_stream(words: argparse.Namespace, found: Sequence[FigureModel]) -> Figure:
    """Draw the histogram of similarities, and print its statistics."""
    if len(found) > 1:
        raise ValueError("the histogram shows one model")
    shown, (source, _) = found[0], open_images(words.images, found)
    numbers = chosen(source, words.count, words.seed)
    samples = similarity.crops(source, shown, words.crop, words.seed)
    histograms = similarity.stream(shown, samples, numbers, words.batch_size, words.num_workers)
    for name, histogram in histograms.items():
        sys.stdout.write(f"{name:<10}{histogram}\n")
    return similarity.similarity(shown, histograms, words.crop)


def draw(words: argparse.Namespace) -> list[Path]:
    """Draw the requested figure; return the written files."""
    home, updates = Path("output") / "figures", 0
    for path in words.output:
        style.check_format(path)  # before any work is done
    with style.house_style():
        if words.picture == "relations":
            figure = relations(words.runs)
        elif words.picture == "figure9":
            how = {"count": words.count, "seed": words.seed, "device": words.device, "data_path": words.data_path}
            figure = figure9(words.runs, **how)
        else:
            found = load_models(words)
            figure = (draw_stream if words.picture == "similarity" else draw_subject)(words, found)
            origin = found[0].origin
            if len(found) == 1 and origin is not None:
                home, updates = origin.run / "figures", origin.updates
        written = words.output or [home / f"{words.picture}.{kind}" for kind in ("png", "svg")]
        for path in written:
            style.save(figure, path)
        if not words.no_tensorboard:
            style.to_tensorboard(figure, written[0].parent, f"figures/{written[0].stem}", updates)
    return written


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    words = parser().parse_args(argv)
    least = {"count": 1, "batch_size": 1, "num_workers": 0}
    require_at_least(words, **{name: least[name] for name in least if getattr(words, name, None) is not None})
    log_to_terminal(main=True)
    written = draw(words)
    sys.stdout.write(f"Written: {', '.join(map(str, written))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
