"""Similarity of patches and their closest neighbours: a histogram over any number of images.

Figure 3 of the NoR-MAE paper. The result depends on the crop (patches of a small crop have less contrast) and on what
is compared, so the figure states both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from data.images import Transform, eval_transform, pretrain_transform
from data.loader import EvalSamples, Sample, eval_batches, mix
from data.sources import Source
from tools.figures.models import FigureModel
from tools.figures.style import BLACK, COLORS, VERMILION, grid_lines, note
from tools.figures.subject import SPACES, Similarity, highest_similarity

WIDTH = 7.0
BINS = 200
ALIKE = 0.99


@dataclass
class Histogram:
    """Histogram of similarities from -1 to 1, with exact mean, minimum and maximum."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    total: float = 0.0
    alike: int = 0
    low: float = np.inf
    high: float = -np.inf

    def add(self, similarities: Tensor) -> None:
        """Add similarities; rounding errors above 1 are allowed."""
        values = similarities.double().flatten().cpu().numpy()
        self.counts += np.histogram(values.clip(-1, 1), bins=BINS, range=(-1, 1))[0]
        self.total += float(values.sum())
        self.alike += int((values >= ALIKE).sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))

    @property
    def size(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        return self.total / self.size

    @property
    def share_alike(self) -> float:
        """Return the share of similarities that are at least ALIKE."""
        return self.alike / self.size

    def __str__(self) -> str:
        return (
            f"mean {self.mean:.3f}, range {self.low:.3f} to {self.high:.4f}, "
            f"share >= {ALIKE} {self.share_alike:.3f}, {self.size:,} patches"
        )


class RandomCrops(EvalSamples):
    """Random crops as in pretraining, seeded by the seed and the index of the image."""

    def __init__(self, source: Source, transform: Transform, *, mean: Sequence[float], std: Sequence[float], seed: int):
        super().__init__(source, transform, mean=mean, std=std)
        self.seed = seed

    def __getitem__(self, index: int) -> Sample:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, index))
            return super().__getitem__(index)


CROPS: dict[str, str] = {
    "centre": "centre crop: short side resized to 8/7 of the input size",
    "random": "random crop of 20 to 100% of the image's area, mirrored half of the time",
}


def crops(source: Source, shown: FigureModel, crop: str, seed: int) -> EvalSamples:
    """Return the images with the preprocessing of the model."""
    (mean, std), size = shown.statistics, shown.size[1:]
    if crop == "random":
        return RandomCrops(source, pretrain_transform(size), mean=mean, std=std, seed=seed)
    return EvalSamples(source, eval_transform(size), mean=mean, std=std)


def stream(
    shown: FigureModel,
    samples: EvalSamples,
    numbers: Sequence[int],
    batch_size: int = 32,
    num_workers: int = 0,
    progress: Callable[..., Iterator] = tqdm,
) -> dict[Similarity, Histogram]:
    """Compute one histogram per kind of comparison, over the images with these indices."""
    found = {similarity: Histogram() for similarity in SPACES}
    batches = eval_batches(samples, batch_size=batch_size, num_workers=num_workers, indices=numbers)
    with torch.inference_mode():
        for batch in progress(batches, total=-(-len(numbers) // batch_size), unit="batch", desc="similarities"):
            images = batch.to(shown.device).images
            for similarity, histogram in found.items():
                histogram.add(highest_similarity(shown, images, similarity))
    return found


def similarity(shown: FigureModel, found: dict[Similarity, Histogram], crop: str) -> Figure:
    """Draw Figure 3: the similarity of patches and their closest neighbours, for pixels and for embeddings."""
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    axes = figure.subplots(1, len(found), sharex=True, sharey=True)
    edges = np.linspace(-1, 1, BINS + 1)
    lowest = min(histogram.low for histogram in found.values())
    for number, (axis, (name, histogram)) in enumerate(zip(axes, found.items(), strict=True)):
        share = 100 * histogram.counts / histogram.size
        axis.stairs(share, edges, fill=True, color=COLORS[number], alpha=0.45)
        axis.stairs(share, edges, color=COLORS[number], linewidth=0.9)
        axis.axvline(histogram.mean, color=BLACK, linewidth=1, linestyle="--")
        axis.axvline(ALIKE, color=VERMILION, linewidth=0.9, linestyle=":")
        axis.set_title(SPACES[name])
        axis.text(
            0.04,
            0.96,
            f"mean {histogram.mean:.3f} (dashed)\nrange {histogram.low:.3f} to {histogram.high:.4f}\n"
            f"{histogram.share_alike:.1%} are ≥ {ALIKE} (dotted)",
            transform=axis.transAxes,
            va="top",
            fontsize=7,
        )
        grid_lines(axis)
    axes[0].set_xlim(np.floor(10 * lowest) / 10, 1.01)
    figure.supxlabel("cosine similarity of a patch with its closest neighbour", fontsize=8)
    axes[0].set_ylabel("% of patches, bins of 0.01")
    rows, columns = shown.grid
    size = next(iter(found.values())).size
    images = f"{size // shown.num_patches:,} images of {rows} x {columns} patches, {size:,} in all"
    note(figure, [f"{shown.label} ({shown.about}): {images}; {CROPS[crop]}."], WIDTH)
    return figure
