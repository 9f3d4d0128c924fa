"""Closest neighbour patches: arrows to them, shared neighbours, and an image of these patches only.

Figures 1 (top), 2 and 4 of Meng et al., "Closest Neighbors are Harmful for Lightweight Masked Auto-encoders", CVPR
2025. The companion (CNP) of a visible patch is the one of its 3, 5 or 8 neighbours with the highest cosine similarity.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from models_nor_mae import neighbor_similarities
from tools.figures.style import BLACK, BLUE, VERMILION, note, picture, short_name
from tools.figures.subject import SPACES, Similarity, Subject, compared, only_patches

WIDTH = 7.0
FINE = 28  # with more columns of patches, borders of arrows and companions would hide the patches and are left out
COLUMNS = ("input", "visible patches", "their closest neighbours", "these neighbours alone")


def choose_similarity(subject: Subject) -> Similarity:
    """Return the default similarity, that of the released program."""
    return subject.similarity or "embed_pos"


def frame(patch: int, columns: int, size: tuple[int, int]) -> Rectangle:
    """Return a rectangle just inside the border of a patch."""
    row, column = divmod(patch, columns)
    height, width = size
    inset = 0.04 * width
    return Rectangle((column * width + inset, row * height + inset), width - 2 * inset, height - 2 * inset, fill=False)


def outline_companions(axis: Any, companions: Sequence[int], columns: int, size: tuple[int, int]) -> None:
    """Draw borders: thick and solid for shared companions; thin and dashed for others if patches are large enough."""
    pointers, thin = Counter(companions), min(1.0, 14 / columns)
    shared = [frame(patch, columns, size) for patch, count in pointers.items() if count > 1]
    alone = [frame(patch, columns, size) for patch, count in pointers.items() if count == 1]
    if columns <= FINE:
        dashes: dict[str, Any] = {"edgecolor": BLUE, "linewidth": 0.9 * thin, "linestyle": (0, (2, 1))}
        axis.add_collection(PatchCollection(alone, facecolor="none", path_effects=_cased(1.7 * thin), **dashes))
    solid: dict[str, Any] = {"edgecolor": VERMILION, "linewidth": 1.8 * thin}
    axis.add_collection(PatchCollection(shared, facecolor="none", path_effects=_cased(2.8 * thin), **solid))


def _cased(width: float) -> list[withStroke]:
    """Return a white outline, which makes lines visible on patches of the same brightness."""
    return [withStroke(linewidth=width, foreground="white")]


def arrows(axis: Any, starts: Sequence[int], ends: Sequence[int], columns: int, size: tuple[int, int]) -> None:
    """Draw arrows from the centre of each patch to the centre of its companion."""
    height, width = size
    (y, x), (to_y, to_x) = (np.divmod(np.asarray(patches), columns) for patches in (starts, ends))
    axis.quiver(
        (x + 0.5) * width,
        (y + 0.5) * height,
        (to_x - x) * width,
        (to_y - y) * height,
        angles="xy",
        scale_units="xy",
        scale=1,
        units="xy",
        width=(0.09 if columns <= FINE else 0.18) * width,
        headwidth=4.5,
        headlength=4.5,
        headaxislength=4,
        color=BLACK,
        edgecolor="white",
        linewidth=0.35 if columns <= FINE else 0,
        zorder=3,
    )


def summary(visible: Sequence[int], companions: Sequence[int], similarities: Sequence[float]) -> str:
    """Return statistics of the arrows of one image."""
    pointed = Counter(companions)
    shared = sum(pointers > 1 for pointers in pointed.values())
    own = len(set(companions) & set(visible))
    return (
        f"{len(visible)} patches, {len(pointed)} distinct neighbours\n"
        f"{shared} of them shared, {own} themselves visible\nmean cosine {np.mean(similarities):.3f}"
    )


def draw(container: Any, subject: Subject) -> None:
    """Draw the panels in a figure or a part of one, one row per image."""
    shown, (rows, columns) = subject.only, subject.grid
    photographs = subject.photographs
    height, width = photographs.shape[1:3]
    size = (height // rows, width // columns)
    companions, similarities = subject.neighbors(shown, choose_similarity(subject))
    axes = container.subplots(len(photographs), len(COLUMNS), squeeze=False)
    for number, photograph in enumerate(photographs):
        visible = sorted(subject.masking.ids_keep[number].tolist())
        theirs = companions[number][visible].tolist()
        panels = axes[number]
        picture(panels[0], photograph)
        picture(panels[1], only_patches(photograph, visible, subject.grid))
        both = only_patches(photograph, [*visible, *theirs], subject.grid)
        picture(panels[2], 0.5 * both + 0.5)
        outline_companions(panels[2], theirs, columns, size)
        arrows(panels[2], visible, theirs, columns, size)
        picture(panels[3], only_patches(photograph, theirs, subject.grid))
        outline_companions(panels[3], theirs, columns, size)
        panels[0].set_ylabel(short_name(subject.names[number]))
        panels[2].set_xlabel(summary(visible, theirs, similarities[number][visible].tolist()), fontsize=6.5)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title)


def compute_height(subject: Subject) -> float:
    """Return the height in inches that `draw` needs at full width."""
    height, width = subject.pixels.shape[-2:]
    return len(subject.pixels) * (WIDTH / len(COLUMNS) * height / width + 0.45) + 0.2


def sentences(subject: Subject) -> list[str]:
    """Return a description of the panels."""
    shown, (rows, columns) = subject.only, subject.grid
    of_one = "; thin dashed: of one" if columns <= FINE else ""
    return [
        f"{shown.label} ({shown.about}): {rows} x {columns} patches, {subject.mask_ratio:.0%} hidden.",
        f"Compared: {SPACES[choose_similarity(subject)]}, {subject.companions_note}.",
        f"Thick solid border: the neighbour of several visible patches{of_one}.",
        *subject.channels_note,
    ]


def neighbors(subject: Subject) -> Figure:
    """Draw Figures 1 (top) and 4: input, visible patches, arrows to their closest neighbours, and these alone."""
    figure = Figure(figsize=(WIDTH, compute_height(subject) + 0.5), layout="compressed")
    draw(figure, subject)
    note(figure, sentences(subject), WIDTH)
    return figure


def shared_pair(companions: Sequence[int], columns: int) -> tuple[int, int, int]:
    """Return a companion of many patches, and two of these with maximum distance; ties go to the lowest index."""
    pointers: dict[int, list[int]] = {}
    for patch, companion in enumerate(companions):
        pointers.setdefault(companion, []).append(patch)
    companion, pointing = max(pointers.items(), key=lambda item: (len(item[1]), -item[0]))
    if len(pointing) < 2:
        raise ValueError("no two patches of this image share a closest neighbour; show another image")

    def distance(pair: tuple[int, int]) -> int:
        (y, x), (other_y, other_x) = divmod(pair[0], columns), divmod(pair[1], columns)
        return (y - other_y) ** 2 + (x - other_x) ** 2

    one, other = max(itertools.combinations(pointing, 2), key=distance)
    return companion, one, other


def closeup(subject: Subject) -> Figure:
    """Draw Figure 2: a patch and the similarity of its neighbours; two patches with the same closest neighbour."""
    shown, (rows, columns) = subject.only, subject.grid
    photographs = subject.photographs
    height, width = photographs.shape[1:3]
    size = (height // rows, width // columns)
    companions, _ = subject.neighbors(shown, choose_similarity(subject))
    around, table = neighbor_similarities(
        compared(shown, shown.normalized(subject.pixels), choose_similarity(subject)), shown.grid, "natural"
    )
    panel = WIDTH / 3
    figure = Figure(figsize=(WIDTH, len(photographs) * (panel * height / width + 0.02) + 0.55), layout="compressed")
    axes = figure.subplots(len(photographs), 3, squeeze=False)
    for number, photograph in enumerate(photographs):
        shared, one, other = shared_pair(companions[number].tolist(), columns)
        row, column = divmod(shared, columns)
        top, left = max(0, min(row - 3, rows - 7)), max(0, min(column - 3, columns - 7))
        bottom, right = min(rows, top + 7), min(columns, left + 7)
        whole, *close = axes[number]
        picture(whole, photograph)
        whole.set_ylabel(short_name(subject.names[number]))
        region = Rectangle(
            (left * size[1], top * size[0]), (right - left) * size[1], (bottom - top) * size[0], fill=False
        )
        region.set(edgecolor="white", linewidth=1.6, path_effects=[withStroke(linewidth=2.8, foreground=BLACK)])
        whole.add_patch(region)
        for axis, patch in zip(close, (one, other), strict=True):
            picture(axis, photograph)
            axis.set(xlim=(left * size[1], right * size[1]), ylim=(bottom * size[0], top * size[0]))
            for marked, color, around_it in ((shared, VERMILION, "white"), (patch, "white", BLACK)):
                border = frame(marked, columns, size)
                border.set(edgecolor=color, linewidth=2.2, path_effects=[withStroke(linewidth=4, foreground=around_it)])
                axis.add_patch(border)
            for neighbor, cosine in zip(table[patch].tolist(), around[number, patch].tolist(), strict=True):
                if neighbor == rows * columns:  # outside the image
                    continue
                y, x = divmod(neighbor, columns)
                text = axis.text((x + 0.5) * size[1], (y + 0.5) * size[0], f"{cosine:.3f}".replace("0.", "."))
                text.set(ha="center", va="center", fontsize=7, color="white", clip_on=True)
                text.set_path_effects([withStroke(linewidth=1.8, foreground=BLACK)])
                text.set_fontweight("bold" if neighbor == shared else "normal")
    for axis, title in zip(
        axes[0], ("input", "a patch and its neighbours", "another that shares the closest"), strict=True
    ):
        axis.set_title(title)
    note(
        figure,
        [
            f"{shown.label} ({shown.about}). White border: the patch; numbers: cosine similarity of its neighbours; "
            "orange border: the closest neighbour (bold), the same for both.",
            f"Compared: {SPACES[choose_similarity(subject)]}.",
        ],
        WIDTH,
    )
    return figure
