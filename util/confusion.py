"""The confusion matrix of classes, and the metrics of a segmenter from it, with their table.

K classes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.masks import IGNORE

METRIC = "miou"


def confusion(masks: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Count pixels, or images, by true class and predicted class, int64 `[K, K]`; class IGNORE is not counted."""
    cells = classes**2
    cell = torch.where(masks == IGNORE, cells, masks * classes + predicted).flatten()
    # bincount and boolean indexing would synchronise a GPU, because the sizes of their results depend on the data.
    counts = torch.zeros(cells + 1, dtype=torch.int64, device=masks.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:cells].view(classes, classes)


def compute_metrics(confusion_KK: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Compute mean IoU, mean accuracy and pixel accuracy in percent, and IoU, accuracy and pixels `per_class`.

    A class that is neither in a mask nor predicted has no IoU and is left out of the mean; a class in no mask has no
    accuracy.
    """
    matrix = confusion_KK.cpu().double()
    right, true, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, accuracy = 100 * right / (true + predicted - right), 100 * right / true
    return {
        METRIC: float(iou.nanmean()),
        "mean_acc": float(accuracy.nanmean()),
        "pixel_acc": float(100 * right.sum() / true.sum()),
        "per_class": {
            name: {"iou": _number(iou[k]), "acc": _number(accuracy[k]), "pixels": int(true[k])}
            for k, name in enumerate(names)
        },
    }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def describe(metrics: Mapping[str, Any]) -> str:
    """Return the metrics of `evaluate` as text: `mIoU 33.54%, ...`."""
    names = {METRIC: "mIoU", "mean_acc": "mean accuracy", "pixel_acc": "pixel accuracy"}
    return ", ".join(f"{word} {metrics[name]:.2f}%" for name, word in names.items())


def table(metrics: Mapping[str, Any]) -> str:
    """Return a line for each class: its name, IoU, accuracy and share of the pixels."""
    rows = metrics["per_class"]
    pixels = max(1, sum(row["pixels"] for row in rows.values()))
    width = max(len("class"), *map(len, rows))
    lines = [f"{'class':<{width}}     IoU     acc  pixels"]
    for name, row in rows.items():
        iou, accuracy = ("     -" if row[key] is None else f"{row[key]:6.2f}" for key in ("iou", "acc"))
        lines.append(f"{name:<{width}}  {iou}  {accuracy}  {100 * row['pixels'] / pixels:5.2f}%")
    return "\n".join(lines)
