"""A segmenter's objective for the epochs of `engine_pretrain`, its prediction for images of any size, its evaluation.

Figures come from one confusion matrix, counted on the device and summed over the processes: each pixel of each image
counts once.

N images   C channels   K classes   H W image, or its mask
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, EvalSamples, Source, eval_batches
from data.masks import IGNORE
from data.segment_augment import eval_transform
from options import SegmentOptions
from util.distributed import Processes
from util.overlay import overlay, shown, tile
from util.watch import contact_sheet, written

METRIC = "miou"
PICTURES = 6


class Objective(nn.Module):
    """`(images, masks) -> {"loss", "segmentation", "auxiliary"}`: cross-entropies averaged over all pixels.

    With `class_weights` each pixel counts with the weight of its class.
    loss = segmentation + weight x auxiliary. Masks are `[N, H, W]`, of the images' size; pixels of IGNORE count as 0.
    Where the loss is not finite, batch norm's running statistics stay as they were, as the weights will.
    """

    def __init__(self, model: nn.Module, *, auxiliary: float, class_weights: Sequence[float] | None = None):
        super().__init__()
        self.model, self.auxiliary = model, auxiliary
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, images: Tensor, masks: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        masks = masks.long()
        if self.class_weights is not None and self.class_weights.device != masks.device:
            self.class_weights = self.class_weights.to(masks.device)
        weights = self.class_weights
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        before = [buffer.clone() for buffer in statistics]
        segmentation, auxiliary = (cross_entropy(logits, masks, weights) for logits in self.model(images))
        loss = segmentation + self.auxiliary * auxiliary
        for buffer, value in zip(statistics, before, strict=True):
            # By way of `data`, since autograd guards them although the backward pass reads the batch's own statistics.
            buffer.data.copy_(torch.where(torch.isfinite(loss.detach()), buffer, value))
        return {"loss": loss, "segmentation": segmentation, "auxiliary": auxiliary}


def cross_entropy(logits: Tensor, masks: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy summed over the pixels that have a class, divided by the number of all pixels.

    Pixels of IGNORE count as 0 in the average, as in mmsegmentation (`avg_non_ignore=False`, its default). The loss of
    a batch is therefore the average of its images' losses, on any number of processes. With `weights_K` each pixel's
    term is multiplied by the weight of its class, as there.
    """
    logits = brought_to(logits, masks)
    return F.cross_entropy(logits, masks, weight=weights_K, ignore_index=IGNORE, reduction="sum") / masks.numel()


def brought_to(logits: Tensor, masks: Tensor) -> Tensor:
    """Logits at the rows and columns of masks."""
    return F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Windows:
    """How an image of any size is shown to a model that was trained on crops.

    crop    rows and columns of a window; None: the image is one window, padded to whole patches
    stride  pixels between two windows, down and across
    patch   side of a patch
    flip    look at the mirror image, too
    batch   windows at a time
    """

    crop: tuple[int, int] | None
    stride: tuple[int, int]
    patch: int
    flip: bool = False
    batch: int = 1


def short_side(options: SegmentOptions) -> int:
    """Pixels of the short side of an image that is judged."""
    return options.short_side or min(options.input_size)


def judged_images(options: SegmentOptions, source: Source) -> EvalSamples:
    """The images of a source as they are judged, with their masks."""
    return EvalSamples(source, eval_transform(short_side(options)), mean=options.mean, std=options.std)


def windows_of(options: SegmentOptions, patch: int) -> Windows:
    """How a model with patches of so many pixels looks at them."""
    rows, columns = options.input_size
    stride = (options.stride, options.stride) if options.stride else (max(1, rows * 2 // 3), max(1, columns * 2 // 3))
    return Windows(
        (rows, columns) if options.window == "slide" else None, stride, patch, options.flip, options.batch_size
    )


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin that cover `length` pixels, the last one at the end."""
    count = math.ceil(max(0, length - crop) / stride) + 1
    return [min(number * stride, max(0, length - crop)) for number in range(count)]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, windows: Windows, size: Sequence[int] | None = None) -> Tensor:
    """Compute the scores `[N, K, *size]` of the classes at each pixel; the highest score is the prediction.

    Scores are logits, averaged over the windows that contain a pixel. With `flip` they are probabilities, averaged over
    the image and its mirror image, as in mmsegmentation.

    Args:
        model: returns logits at any resolution as the first of its outputs.
        images: normalised, `[N, C, H, W]`; where smaller than a window, they are padded with the mean colour on the
            right and below.
        windows: how the images are cut into the inputs of the model.
        size: rows and columns to which logits are resized, before they become probabilities; default: H, W.
    """
    if windows.flip:
        once = replace(windows, flip=False)
        straight, mirrored = (predict(model, shown, once, size).softmax(dim=1) for shown in (images, images.flip(-1)))
        return (straight + mirrored.flip(-1)) / 2
    height, width = images.shape[-2:]
    patch = windows.patch
    crop = windows.crop or (math.ceil(height / patch) * patch, math.ceil(width / patch) * patch)
    images = F.pad(images, (0, max(0, crop[1] - width), 0, max(0, crop[0] - height)))
    rows, columns = (starts(length, *how) for length, *how in zip(images.shape[-2:], crop, windows.stride, strict=True))
    places = [(top, left) for top in rows for left in columns]
    total, seen = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for first in range(0, len(places), windows.batch):
        group = places[first : first + windows.batch]
        shown = torch.cat([images[..., top : top + crop[0], left : left + crop[1]] for top, left in group])
        logits = F.interpolate(model(shown)[0].float(), size=crop, mode="bilinear", align_corners=False)
        if not total.ndim:
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
        for (top, left), of_window in zip(group, logits.chunk(len(group)), strict=True):
            total[..., top : top + crop[0], left : left + crop[1]] += of_window
            seen[top : top + crop[0], left : left + crop[1]] += 1
    logits = (total / seen)[..., :height, :width]
    if size is None or tuple(size) == (height, width):
        return logits
    return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)


def confusion(masks: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Pixels `[K, K]` by true class and predicted one; those of `IGNORE` are in no cell."""
    cells = classes**2
    cell = torch.where(masks == IGNORE, cells, masks * classes + predicted).flatten()
    # Not bincount, nor an index of those that count: on a GPU their sizes are waited for.
    counts = torch.zeros(cells + 1, dtype=torch.int64, device=masks.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[:cells].view(classes, classes)


def figures_of(confusion_KK: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Mean IoU, mean accuracy and pixel accuracy in percent; `per_class`: the IoU and accuracy of each, and its pixels.

    A class that is neither in a mask nor predicted has no IoU, and is in no mean; one in no mask has no accuracy.
    """
    matrix = confusion_KK.cpu().double()
    right, true, said = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, accuracy = 100 * right / (true + said - right), 100 * right / true
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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    names: Sequence[str],
    windows: Windows,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Any]:
    """`figures_of` all pixels of all processes' batches, by the classes' names, and the number of `images`.

    Logits are brought to the size of the mask, which may be another than that of the image it belongs to.
    """
    was_training = model.training
    model.eval()
    same_statistics(model, processes)
    device, classes = processes.device, len(names)
    matrix_KK = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    images = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device)
        assert batch.labels is not None
        masks = batch.labels.long()
        with autocast():
            scores = predict(model, batch.images, windows, masks.shape[-2:])
        matrix_KK += confusion(masks, scores.argmax(dim=1), classes)
        images += len(batch)
    model.train(was_training)
    return figures_of(processes.sum(matrix_KK), names) | {"images": int(processes.sum(images))}


def same_statistics(model: nn.Module, processes: Processes) -> None:
    """Every process judges by the main one's running means and variances, which are what a checkpoint holds."""
    if processes.world_size == 1:
        return
    theirs = processes.broadcast({name: buffer.cpu() for name, buffer in model.named_buffers()})
    for name, buffer in model.named_buffers():
        buffer.copy_(theirs[name])


def describe(figures: Mapping[str, Any]) -> str:
    """Return the metrics of `evaluate` as text: `mIoU 33.54%, ...`."""
    names = {METRIC: "mIoU", "mean_acc": "mean accuracy", "pixel_acc": "pixel accuracy"}
    return ", ".join(f"{word} {figures[name]:.2f}%" for name, word in names.items())


def table(figures: Mapping[str, Any]) -> str:
    """Each class's name, IoU, accuracy and share of the pixels, a line each."""
    rows = figures["per_class"]
    pixels = max(1, sum(row["pixels"] for row in rows.values()))
    width = max(len("class"), *map(len, rows))
    lines = [f"{'class':<{width}}     IoU     acc  pixels"]
    for name, row in rows.items():
        iou, accuracy = ("     -" if row[key] is None else f"{row[key]:6.2f}" for key in ("iou", "acc"))
        lines.append(f"{name:<{width}}  {iou}  {accuracy}  {100 * row['pixels'] / pixels:5.2f}%")
    return "\n".join(lines)


@torch.no_grad()
def predicted_masks(
    model: nn.Module,
    samples: EvalSamples,
    index: Sequence[int],
    *,
    windows: Windows,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of some images: a picture `[3, H, W]` between 0 and 1, the true mask and the predicted one; on the CPU."""
    was_training = model.training
    model.eval()
    made = []
    for batch in eval_batches(samples, batch_size=1, indices=index):
        batch = batch.to(device)
        assert batch.labels is not None
        with autocast():
            scores = predict(model, batch.images, windows, batch.labels.shape[-2:])
        classes_HW = scores.argmax(dim=1)[0].cpu()
        image_CHW = brought_to(batch.images, batch.labels)[0]
        made.append((shown(image_CHW, samples.mean, samples.std), batch.labels[0].cpu(), classes_HW))
    model.train(was_training)
    return made


def picture(made: Sequence[tuple[Tensor, Tensor, Tensor]], classes: int, path: Path) -> Tensor:
    """A sheet of images, true and predicted masks, written to `path` and answered as uint8 `[H, W, 3]`."""
    columns = [
        [tile(each) for each in (image, overlay(image, true, classes), overlay(image, predicted, classes))]
        for image, true, predicted in made
    ]
    rows = [torch.stack(row) for row in zip(*columns, strict=True)]
    sheet = contact_sheet(rows, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return written(sheet, "rows: image, mask, predicted mask; black is no class", path)
