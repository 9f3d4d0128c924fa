"""Compute features of a frozen encoder: one vector per image, and the labels.

The vector is the average of the patch tokens after the last norm, without masking. All feature evaluations of this
project use it instead of the class token, which linear probes can also select.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data.loader import (
    WORKER_TIMEOUT,
    Allocate,
    Batch,
    EvalSamples,
    Source,
    empty,
    eval_batches,
    eval_transform,
)


def encode_source(
    model: nn.Module,
    source: Source,
    *,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int = 64,
    num_workers: int = 0,
    worker_timeout: float = WORKER_TIMEOUT,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    indices: Sequence[int] | None = None,
    pool: str = "avg",
    eval_crop: str = "keep_size",
) -> tuple[Tensor, Tensor | None]:
    """(features float32 `[n, D]`, labels int64 `[n]` or None) on the CPU, of all images or those of `indices`.

    `model.encode(images)` gives `[N, 1+L, D]`; `pool` as in `pooled`, `eval_crop` as in `eval_transform`. The
    model is put into eval mode and back.
    Unreadable images are left out, with a warning in the log.
    """

    def features(images: Tensor) -> Tensor:
        with autocast():
            tokens = model.encode(images)  # type: ignore[operator]
        return pooled(tokens.float(), pool)

    was_training = model.training
    model.eval()
    try:
        return _vectors(
            features, source, input_size, mean, std, device, batch_size, num_workers, worker_timeout, indices, eval_crop
        )
    finally:
        model.train(was_training)


def pooled(tokens: Tensor, pool: str) -> Tensor:
    """One vector `[N, D]` of tokens `[N, 1+L, D]`: "avg" of the patches, the class "token"; `[N, 2 D]` for "both"."""
    if pool == "both":
        return torch.cat([pooled(tokens, "avg"), pooled(tokens, "token")], dim=1)
    return tokens[:, 1:].mean(dim=1) if pool == "avg" else tokens[:, 0]


def interleaved(shares: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Shares of labelled features, rank r's of images r, r + W, r + 2 W ... of W ranks, as one in the images' order.

    Where unreadable images are missing the shares stand one after the other.
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
    """Stored features in the place of images, for `Batches`: the same in every epoch."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, keys: Sequence[tuple[int, int]], allocate: Allocate = empty) -> Batch:
        """Select rows; `allocate` is not used, because features are not decoded by workers."""
        index = torch.tensor([index for _, index in keys])
        return Batch(self.features[index], self.labels[index], None, index)


def pixels_of_source(
    source: Source,
    *,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    eval_crop: str = "keep_size",
) -> tuple[Tensor, Tensor | None]:
    """As `encode_source`, with the normalised pixels themselves for features: what an encoder has to beat."""

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1)

    return _vectors(
        flat, source, input_size, mean, std, "cpu", batch_size, num_workers, WORKER_TIMEOUT, indices, eval_crop
    )


@torch.no_grad()
def _vectors(
    embed: Callable[[Tensor], Tensor],
    source: Source,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
    worker_timeout: float,
    indices: Sequence[int] | None,
    eval_crop: str,
) -> tuple[Tensor, Tensor | None]:
    samples = EvalSamples(source, eval_transform(input_size, eval_crop=eval_crop), mean=mean, std=std)
    vectors, labels = [], []
    for batch in eval_batches(
        samples,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
        worker_timeout=worker_timeout,
        indices=indices,
    ):
        vectors.append(embed(batch.to(device).images).cpu())
        if batch.labels is not None:
            labels.append(batch.labels)
    return torch.cat(vectors), torch.cat(labels) if labels else None
