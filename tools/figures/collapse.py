"""Feature collapse: similarity of the tokens of an image by depth, and effective rank of the features.

*Token similarity* is the mean cosine between two different patch tokens of an image: 1 means that every patch is
encoded to the same vector. *Effective rank* is exp of the entropy of the singular values, scaled to sum to one, of all
patch tokens minus their mean (Roy and Vetterli, "The effective rank", EUSIPCO 2007): 1 means a single direction; the
maximum, the number of channels, means that the variance is the same in all directions.

N images   L patches   D channels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tools.figures.models import FigureModel
from tools.figures.style import MARKERS, from_zero, grid_lines, line_style, note
from tools.figures.subject import Subject

WIDTH = 7.0


def token_similarity(tokens: Tensor) -> Tensor:
    """Return the mean cosine between two different tokens of each image: tokens `[N, L, D]` -> `[N]`.

    The squared norm of the sum of unit vectors equals the sum of all their cosines, so no L x L matrix is needed.
    """
    L = tokens.shape[1]
    unit = F.normalize(tokens.double(), dim=-1)
    everything = unit.sum(dim=1).square().sum(dim=-1)
    return (everything - unit.square().sum(dim=(1, 2))) / (L * (L - 1))


class Spread:
    """Running mean and covariance of vectors, in float64."""

    def __init__(self, channels: int):
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Add vectors `[n, D]`."""
        vectors = vectors.double().cpu()
        self.count += len(vectors)
        self.sum += vectors.sum(dim=0)
        self.products += vectors.T @ vectors

    @property
    def effective_rank(self) -> float:
        """Return exp of the entropy of the singular values; 1 for constant vectors."""
        mean = self.sum / self.count
        scatter = self.products - self.count * torch.outer(mean, mean)
        variances = torch.linalg.eigvalsh(scatter)
        noise = torch.finfo(torch.float64).eps * len(variances) * self.products.diagonal().sum()
        singular = torch.where(variances > noise, variances, 0.0).sqrt()
        if not singular.any():
            return 1.0
        return float(torch.special.entr(singular / singular.sum()).sum().exp())


@torch.inference_mode()
def measure(shown: FigureModel, pixels: Tensor, batch_size: int = 16) -> tuple[list[float], list[float]]:
    """Return token similarity and effective rank of the input of the first block and of the output of each block."""
    similarities: list[float] = []
    spreads: list[Spread] = []
    for images in shown.normalized(pixels).split(batch_size):
        for depth, (_, x) in enumerate(shown.layers(images)):
            if depth == len(spreads):
                similarities.append(0.0)
                spreads.append(Spread(x.shape[-1]))
            tokens = x[:, shown.prefix :]
            similarities[depth] += float(token_similarity(tokens).sum())
            spreads[depth].add(tokens.flatten(0, 1))
    return [total / len(pixels) for total in similarities], [spread.effective_rank for spread in spreads]


def collapse(subject: Subject) -> Figure:
    """Plot token similarity and effective rank by depth, one colour per model."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, shown in enumerate(subject.models):
        label = f"{shown.label}, {shown.about} ({shown.model.embed_dim} channels)"
        for axis, values in zip(axes, measure(shown, subject.pixels), strict=True):
            axis.plot(values, marker=MARKERS[number % len(MARKERS)], markersize=3, label=label, **line_style(number))
    axes[0].set(
        title="token similarity",
        ylabel="mean cosine of an image's patches",
        ylim=(min(0.0, axes[0].get_ylim()[0]), 1.02),
    )
    axes[1].set(title="effective rank", ylabel="dimensions")
    from_zero(axes[1])
    for axis in axes:
        axis.set_xlabel("depth: 0 is the input of the first block, b the output of block b")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid_lines(axis)
    columns = 1 if len(subject.models) > 1 else 2
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    L = subject.models[0].num_patches
    note(
        figure,
        [
            f"Patch tokens of {len(subject.pixels)} whole images, no mask. Effective rank: exp of the entropy of the "
            f"singular values, centred; {len(subject.pixels)} x {L:,} patches bound it too, where they are few."
        ],
        WIDTH,
    )
    return figure
