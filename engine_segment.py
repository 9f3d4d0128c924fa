"""The objective of a segmenter, for `engine_pretrain.train_one_epoch`, its evaluation, and its predictions.

Metrics are computed from one confusion matrix, which is counted on the device and summed over the processes: each pixel
of each image counts once.

N images   C channels   K classes   H W image, or its mask
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, EvalSamples, Source, eval_batches
from data.masks import IGNORE
from data.segment_augment import eval_transform
from options import SegmentOptions
from util.confusion import compute_metrics, confusion
from util.distributed import Processes
from util.overlay import to_rgb
from util.windows import Windows, predict

PICTURES = 6


class Objective(nn.Module):
    """`(images, masks) -> {"loss", "segmentation", "auxiliary"}`: cross-entropies averaged over all pixels.

    loss = segmentation + weight x auxiliary. Masks are `[N, H, W]`, with the size of the images; the loss of IGNORE
    pixels is 0. With `class_weights` the loss of each pixel is multiplied by the weight of its class.
    """

    def __init__(self, model: nn.Module, *, auxiliary: float, class_weights: Sequence[float] | None = None):
        super().__init__()
        self.model, self.auxiliary = model, auxiliary
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, images: Tensor, masks: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        masks = masks.long()
        segmentation, auxiliary = (cross_entropy(logits, masks, self.class_weights) for logits in self.model(images))
        loss = segmentation + self.auxiliary * auxiliary
        return {"loss": loss, "segmentation": segmentation, "auxiliary": auxiliary}


def cross_entropy(logits: Tensor, masks: Tensor, weights_K: Tensor | None = None) -> Tensor:
    """Compute the cross-entropy summed over the pixels that have a class, divided by the number of all pixels.

    The loss of IGNORE pixels is 0 and included in the average, as in mmsegmentation (`avg_non_ignore=False`, the
    default). The loss of a batch is therefore the average of the losses of its images, for any number of processes.
    With `weights_K` the loss of each pixel is multiplied by the weight of its class, also as in mmsegmentation.
    """
    logits = brought_to(logits, masks)
    return F.cross_entropy(logits, masks, weight=weights_K, ignore_index=IGNORE, reduction="sum") / masks.numel()


def brought_to(logits: Tensor, masks: Tensor) -> Tensor:
    """Resize logits to the rows and columns of masks."""
    return F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)


def short_side(options: SegmentOptions) -> int:
    """Return the short side of evaluated images, in pixels."""
    return options.short_side or min(options.input_size)


def evaluation_samples(options: SegmentOptions, source: Source) -> EvalSamples:
    """Return the images of a source, resized for evaluation, with their masks."""
    return EvalSamples(source, eval_transform(short_side(options)), mean=options.mean, std=options.std)


def make_windows(options: SegmentOptions, patch: int) -> Windows:
    """Return the sliding windows for a model with this patch size."""
    rows, columns = options.input_size
    stride = (options.stride, options.stride) if options.stride else (max(1, rows * 2 // 3), max(1, columns * 2 // 3))
    return Windows(
        (rows, columns) if options.window == "slide" else None, stride, patch, options.flip, options.batch_size
    )


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
    """Return the metrics over all pixels of all processes, by class name, and the number of `images`.

    Logits are resized to the size of the mask, which may differ from that of the resized image.
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
    return compute_metrics(processes.sum(matrix_KK), names) | {"images": int(processes.sum(images))}


def same_statistics(model: nn.Module, processes: Processes) -> None:
    """Copy the running statistics of the main process, which are saved in checkpoints, to every process."""
    if processes.world_size == 1:
        return
    buffers = processes.broadcast({name: buffer.cpu() for name, buffer in model.named_buffers()})
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


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
    """Return the image `[3, H, W]` between 0 and 1, the mask and the prediction of each index, on the CPU."""
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
        made.append((to_rgb(image_CHW, samples.mean, samples.std), batch.labels[0].cpu(), classes_HW))
    model.train(was_training)
    return made
