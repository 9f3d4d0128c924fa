"""Compute features of a frozen encoder: one vector per image, and the labels.

The vector is the average of the patch tokens after the last norm, without masking. It is the default of all feature
evaluations of this project; linear probes can also use the class token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.loader import Allocate, Batch, EvalSamples, Source, empty, eval_batches, eval_transform
from options import ClassifierOptions, PretrainOptions


def encode_source(
    model: nn.Module,
    source: Source,
    *,
    device: torch.device | str,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    pool: str = "avg",
    **reading: Any,
) -> tuple[Tensor, Tensor | None]:
    """Encode images without masking. Unreadable images are left out, with a warning in the log.

    Args:
        model: Its `encode(images)` returns `[N, 1+L, D]`. It is set to eval mode, and back afterwards.
        source: The images.
        device: Device of the model.
        autocast: Context of the forward pass.
        pool: See `pooled`.
        reading: How images are preprocessed and loaded, see `load_pixels`.

    Returns:
        Features float32 `[n, D]`, and labels int64 `[n]` or None, on the CPU.
    """

    def features(images: Tensor) -> Tensor:
        with autocast():
            tokens = model.encode(images)  # type: ignore[operator]
        return pooled(tokens.float(), pool)

    was_training = model.training
    model.eval()
    try:
        return _vectors(features, source, device, **reading)
    finally:
        model.train(was_training)


def select_reading(options: PretrainOptions | ClassifierOptions) -> dict[str, Any]:
    """Return the arguments of `encode_source` that define how the images of a run are preprocessed and loaded."""
    names = ("input_size", "eval_crop", "mean", "std", "batch_size", "num_workers", "worker_timeout")
    return {name: getattr(options, name) for name in names}


def pooled(tokens: Tensor, pool: str) -> Tensor:
    """Pool tokens `[N, 1+L, D]` to `[N, D]`: "avg" of the patches or the class "token"; `[N, 2 D]` for "both"."""
    if pool == "both":
        return torch.cat([pooled(tokens, "avg"), pooled(tokens, "token")], dim=1)
    return tokens[:, 1:].mean(dim=1) if pool == "avg" else tokens[:, 0]


def interleaved(shares: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Merge the labelled features of W ranks, where rank r has images r, r + W, r + 2 W ..., in the order of images.

    If unreadable images are missing, the shares are concatenated instead.
    """
    total = sum(len(features) for features, _ in shares)
    order = torch.cat([torch.arange(rank, total, len(shares)) for rank in range(len(shares))])
    lengths = [len(range(rank, total, len(shares))) for rank in range(len(shares))]
    features = torch.cat([features for features, _ in shares])
    labels = torch.cat([labels for _, labels in shares if labels is not None])
    if lengths != [len(features) for features, _ in shares]:
        return features, labels
    back = order.argsort()
    return features[back], labels[back]


class FeatureSamples(Dataset):
    """Stored features, used as the samples of `Batches` instead of images; the same in every epoch."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, keys: Sequence[tuple[int, int]], allocate: Allocate = empty) -> Batch:
        """Select rows; `allocate` is not used, because features are not decoded by workers."""
        index = torch.tensor([index for _, index in keys])
        return Batch(self.features[index], self.labels[index], None, index)


def load_pixels(source: Source, **reading: Any) -> tuple[Tensor, Tensor | None]:
    """Return the normalised pixels and the labels, as `encode_source` returns features.

    Args:
        source: The images.
        reading: `input_size`, `eval_crop`, `mean` and `std`; `batch_size`, `num_workers`, `worker_timeout`; `indices`
            of the images, by default all.
    """
    return _vectors(lambda images: images.flatten(1), source, "cpu", **reading)


@torch.no_grad()
def _vectors(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    device: torch.device | str,
    *,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    eval_crop: str = "keep_size",
    **loading: Any,
) -> tuple[Tensor, Tensor | None]:
    samples = EvalSamples(source, eval_transform(input_size, eval_crop=eval_crop), mean=mean, std=std)
    vectors, labels = [], []
    on_gpu = torch.device(device).type == "cuda"
    for batch in eval_batches(samples, batch_size=batch_size, pin_memory=on_gpu, **loading):
        vectors.append(embed(batch.to(device).images).cpu())
        if batch.labels is not None:
            labels.append(batch.labels)
    return torch.cat(vectors), torch.cat(labels) if labels else None
