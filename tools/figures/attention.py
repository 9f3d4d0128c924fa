"""Distance and entropy of each attention head, block by block.

*Distance* is the mean distance in pixels between a patch and the patches it attends to, weighted by attention, as in
Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; attention to the class token is left out and the rest
normalised to sum to one. *Entropy*, in bits, is that of a patch's attention over all tokens. If distance and entropy of
all heads are at the dashed lines of uniform attention, the model has not learned local attention.

N images   L patches   T tokens, of the class and patches   H heads
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tools.figures.models import FigureModel
from tools.figures.style import BLACK, MARKERS, from_zero, grid_lines, line_style, note
from tools.figures.subject import Subject

WIDTH = 7.0
PARTS = ("qkv", "q_norm", "k_norm", "num_heads", "scale")


def head_attention(block: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield the attention `[N, T, T]` of each head of a timm block, given the input `[N, T, D]` of the block.

    It computes one head at a time, because one head of 3,137 tokens needs 39 MB per image.
    """
    attention: Any = getattr(block, "attn", None)
    missing = [part for part in PARTS if not hasattr(attention, part)]
    if missing:
        raise ValueError(f"the attention of a {type(block).__name__} cannot be read: it has no {', '.join(missing)}")
    N, T, _ = x.shape
    qkv = attention.qkv(block.norm1(x)).reshape(N, T, 3, attention.num_heads, -1)
    for head in range(attention.num_heads):
        q, k = attention.q_norm(qkv[:, :, 0, head]), attention.k_norm(qkv[:, :, 1, head])
        yield (q @ k.transpose(1, 2) * attention.scale).float().softmax(dim=-1)


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Return the distances in pixels between the centres of all patches: `[L, L]`."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    middles = torch.stack([rows.flatten() * patch[0], columns.flatten() * patch[1]], dim=1).float()
    return torch.cdist(middles, middles)


@torch.inference_mode()
def distance_and_entropy(shown: FigureModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean attention distance in pixels and mean entropy in bits, each `[blocks, H]`."""
    between = patch_distances(shown.grid, shown.patch).to(shown.device)
    totals: list[Tensor] = []
    for image in shown.normalized(pixels).split(1):
        of_blocks, x = [], torch.empty(0)
        for block, output in shown.layers(image):
            if block is not None:
                of_heads = []
                for attention in head_attention(block, x):
                    rows = attention[0, shown.prefix :]
                    to_patches = rows[:, shown.prefix :]
                    distance = (to_patches * between).sum(dim=-1) / to_patches.sum(dim=-1)
                    bits = torch.special.entr(rows).sum(dim=-1) / math.log(2)
                    of_heads.append(torch.stack([distance.mean(), bits.mean()]))
                of_blocks.append(torch.stack(of_heads))
            x = output
        totals.append(torch.stack(of_blocks))
    distance, entropy = torch.stack(totals).mean(dim=0).cpu().unbind(dim=-1)
    return distance, entropy


def attention(subject: Subject) -> Figure:
    """Plot attention distance and entropy of every head by block, one colour per model."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axes = figure.subplots(1, 2)
    count = len(subject.models)
    for number, shown in enumerate(subject.models):
        measured = distance_and_entropy(shown, subject.pixels)
        tokens = shown.num_patches + shown.prefix
        uniform = (patch_distances(shown.grid, shown.patch).mean().item(), math.log2(tokens))
        for axis, values, bound in zip(axes, measured, uniform, strict=True):
            line = line_style(number)
            blocks = torch.arange(1, len(values) + 1) + (number - (count - 1) / 2) * 0.16
            spread = blocks[:, None].expand_as(values)
            axis.scatter(
                spread, values, s=11, marker=MARKERS[number % len(MARKERS)], facecolor="none",
                edgecolor=line["color"], linewidth=0.6, alpha=0.75,
            )  # fmt: skip
            axis.plot(blocks, values.mean(dim=1), label=f"{shown.label}, {shown.about}", **line)
            axis.axhline(bound, color=BLACK, linewidth=0.7, linestyle=(0, (6, 3)))
    for axis, title, unit in zip(axes, ("attention distance", "attention entropy"), ("pixels", "bits"), strict=True):
        axis.set(title=title, xlabel="block", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        from_zero(axis)
        grid_lines(axis)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 if count > 2 else count)
    note(
        figure,
        [
            f"Whole images, no mask; mean over {len(subject.pixels)} images. A marker is a head, the line their mean, "
            "the long-dashed line attention that is the same everywhere."
        ],
        WIDTH,
    )
    return figure
