"""What a frozen encoder makes of a source of images: one vector for each, and the labels that go with them.

The vector is the average of the patch tokens after the last norm, without a mask: by it, and not by the class token,
all features in this project are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.data import EvalSamples, Source, eval_batches, eval_transform


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
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(features float32 `[n, D]`, labels int64 `[n]` or None) on the CPU, of all images or those of `indices`.

    `model.encode(images)` gives `[N, 1+L, D]`. The model is put into eval mode and back. Unreadable images are left
    out, with a warning in the log.
    """

    def average_token(images: Tensor) -> Tensor:
        with autocast():
            tokens = model.encode(images)  # type: ignore[operator]
        return tokens[:, 1:].float().mean(dim=1)

    was_training = model.training
    model.eval()
    try:
        return _vectors(average_token, source, input_size, mean, std, device, batch_size, num_workers, indices)
    finally:
        model.train(was_training)


def pixels_of_source(
    source: Source,
    *,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 64,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `encode_source`, with the normalised pixels themselves for features: what an encoder has to beat."""

    def flat(images: Tensor) -> Tensor:
        return images.flatten(1)

    return _vectors(flat, source, input_size, mean, std, "cpu", batch_size, num_workers, indices)


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
    indices: Sequence[int] | None,
) -> tuple[Tensor, Tensor | None]:
    samples = EvalSamples(source, eval_transform(input_size), mean=mean, std=std)
    vectors, labels = [], []
    for batch in eval_batches(
        samples,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
        indices=indices,
    ):
        vectors.append(embed(batch.to(device).images).cpu())
        if batch.labels is not None:
            labels.append(batch.labels)
    return torch.cat(vectors), torch.cat(labels) if labels else None
