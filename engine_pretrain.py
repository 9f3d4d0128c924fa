"""Train one epoch of any objective that returns named losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from data.loader import Batch
from util.meters import Means
from util.stepper import Stepper


def train_one_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    stepper: Stepper,
    means: Means,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    note: Callable[[list[tuple[str, str]]], None],
    after_step: Callable[[], None],
) -> None:
    """Train on every batch once, and add the named losses to `means`.

    `model(images, labels, noise=noise)` returns a dict of scalars with `loss`. `note` is called with unreadable images,
    `after_step` after each optimizer step. The device is not synchronised.
    """
    model.train()
    for batch in batches:
        batch = batch.to(device)
        with stepper.micro_step():
            with autocast():
                losses = model(batch.images, batch.labels, noise=batch.noise)
            stepped = stepper(losses, batch.index)
        means.add(losses, weight=len(batch))
        if batch.problems:
            note(batch.problems)
        if stepped:
            after_step()
