"""Separation of different closest neighbours by an encoder: its tokens in a plane, and a score.

Figures 1 (bottom), 7 and 8 of the NoR-MAE paper. An image is encoded twice, once from its visible patches and once
from their closest neighbours (CNPs). The tokens of both are scaled to unit length, and plotted in the plane of their
first two principal components.

*Separation* is the share of the tokens' variance between groups, corrected for chance. A group is a CNP and the visible
patches whose closest neighbour it is, so every group has at least two members. With n tokens in k groups it is
1 - (within / (n - k)) / (total / (n - 1)): 1 if a patch and its CNP are encoded to the same vector and other CNPs are
not, 0 on average for random groups. It is computed in all dimensions, and also reported for the plane. The silhouette
score is not used: it compares only with the nearest other group, so it decreases with the number of groups and depends
on the patch size; its chance level is not 0; and its cost is quadratic in the number of tokens.

Neighbouring patches are similar before any training, in pixels and in position. Compare a trained model with one that
has random weights: the difference is the effect of training.

N images   V visible patches   D channels   n tokens   k groups
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from models_mae import take
from tools.figures.models import FigureModel
from tools.figures.style import BLUE, VERMILION, note, short_name
from tools.figures.subject import SPACES, Similarity, Subject

log = logging.getLogger(__name__)

PANEL = 2.35  # size of a panel in inches
WIDEST = 4  # maximum number of models in a row


@dataclass(frozen=True)
class Encoded:
    """Tokens of one image, encoded by one model, on the CPU."""

    visible: Tensor
    """Tokens `[V, D]` encoded from the visible patches, with unit length."""
    companions: Tensor
    """Tokens `[V, D]` encoded from their closest neighbours, one for each visible patch."""
    ids: Tensor
    """Patch index of each companion, `[V]`."""


def choose_similarity(subject: Subject) -> Similarity:
    """Return the default similarity, pixels, with which the neighbours do not depend on the models."""
    return subject.similarity or "pixels"


@torch.inference_mode()
def encode(subject: Subject, shown: FigureModel) -> list[Encoded]:
    """Encode the visible patches and the companions of every image."""
    similarity = choose_similarity(subject)
    chooser = subject.models[0] if similarity == "pixels" else shown
    companions_NL, _ = subject.neighbors(chooser, similarity)
    ids_keep = subject.masking.ids_keep
    ids = companions_NL.gather(1, ids_keep)
    tokens = shown.embed(shown.normalized(subject.pixels))[1]
    visible, companions = (
        F.normalize(shown.encode(take(tokens, chosen.to(tokens.device))).float(), dim=-1).cpu()
        for chosen in (ids_keep, ids)
    )
    return [Encoded(*parts) for parts in zip(visible, companions, ids, strict=True)]


def pca(features: Tensor, components: int = 2) -> tuple[Tensor, Tensor]:
    """Return coordinates `[n, components]` of features `[n, D]` on their principal axes, and the share of variance.

    Computed in float64; the sign of each axis is chosen so that its largest entry is positive.
    """
    centred = features.double() - features.double().mean(dim=0)
    variance, axes = torch.linalg.eigh(centred.T @ centred / (len(features) - 1))
    axes = axes.flip(1)[:, :components]
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    share = variance.flip(0)[:components].clamp(min=0) / variance.sum()
    return centred @ (axes * signs), share


def separation(features: Tensor, groups: Tensor) -> float:
    """Return the share of the variance of features `[n, D]` between groups `[n]`, corrected for chance."""
    x = features.double()
    names, group = groups.unique(return_inverse=True)
    n, k = len(x), len(names)
    if not 1 < k < n:
        raise ValueError(f"{n} tokens in {k} groups: separation needs two groups, and one that has two members")
    sums = torch.zeros(k, x.shape[1], dtype=x.dtype).index_add_(0, group, x)
    means = sums / group.bincount(minlength=k)[:, None]
    within = (x - means[group]).square().sum()
    total = (x - x.mean(dim=0)).square().sum()
    return float(1 - (within / (n - k)) / (total / (n - 1)))


def once(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """Return all visible tokens, then each companion once, and their groups."""
    _, group = encoded.ids.unique(return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
    return torch.cat([encoded.visible, encoded.companions[first]]), torch.cat([group, group[first]])


def panel(axis: Any, encoded: Encoded) -> str:
    """Plot the tokens of one image in a plane; return the scores as text."""
    features, groups = once(encoded)
    plane, share = pca(features)
    visible = len(encoded.visible)
    points, companions = plane[:visible], plane[visible:]
    dot = 26 * min(1.0, (49 / visible) ** 0.5)
    own = companions[groups[:visible]]
    axis.plot(
        torch.stack([points[:, 0], own[:, 0]]), torch.stack([points[:, 1], own[:, 1]]),
        color="0.6", linewidth=0.6 if visible < 200 else 0.25, zorder=1,
    )  # fmt: skip
    axis.scatter(*companions.T, s=dot, marker="s", color=BLUE, linewidth=0, zorder=2, label="closest neighbours (CNP)")
    axis.scatter(
        *points.T, s=dot, marker="o", facecolor="white", edgecolor=VERMILION, linewidth=0.9 if visible < 200 else 0.5,
        zorder=3, label="visible patches",
    )  # fmt: skip
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(True)
    words = f"separation {separation(features, groups):.3f}, in this plane {separation(plane, groups):.3f}"
    axis.set_xlabel(f"{words}\n{len(companions)} CNPs; the plane holds {share.sum():.0%} of the variance", fontsize=7)
    return words


def draw(container: Any, subject: Subject) -> None:
    """Draw the panels in a figure or a part of one: one row per image, one column per model."""
    models = subject.models
    if len(models) > WIDEST:
        raise ValueError(f"{len(models)} models do not fit side by side; at most {WIDEST}")
    axes = container.subplots(len(subject.pixels), len(models), squeeze=False)
    for column, shown in enumerate(models):
        for row, encoded in enumerate(encode(subject, shown)):
            words = panel(axes[row, column], encoded)
            log.info("%s, %s: %s", shown.label, subject.names[row], words)
        axes[0, column].set_title(f"{shown.label}\n{shown.about}", fontsize=7.5)
    for row, name in enumerate(subject.names):
        axes[row, 0].set_ylabel(short_name(name))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    container.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)


def compute_size(subject: Subject) -> tuple[float, float]:
    """Return the width and height in inches that `draw` needs."""
    return max(4.6, PANEL * len(subject.models) + 0.3), (PANEL + 0.25) * len(subject.pixels) + 0.6


def sentences(subject: Subject) -> list[str]:
    """Return a description of the panels."""
    similarity = choose_similarity(subject)
    each = "" if similarity == "pixels" or len(subject.models) == 1 else ", for each model its own"
    rows, columns = subject.grid
    return [
        f"Encoded tokens, unit length, principal components; {rows} x {columns} patches, {subject.mask_ratio:.0%} "
        f"hidden, same mask everywhere. Closest neighbours by {SPACES[similarity]}{each}, {subject.companions_note}.",
        "A line joins a patch and its CNP. Separation: share of the variance between groups (a CNP and its patches), "
        "corrected for chance: 1 apart, 0 chance.",
    ]


def separated(subject: Subject) -> Figure:
    """Draw Figures 7, 8 and 1 (bottom): tokens of visible patches and CNPs in a plane, by model, with separation."""
    width, height = compute_size(subject)
    figure = Figure(figsize=(width, height + 0.6), layout="constrained")
    draw(figure, subject)
    note(figure, sentences(subject), width)
    return figure
