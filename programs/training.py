"""The training loop of all programs: train an epoch, run the tasks that are due, save; evaluate at the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from data.loader import Batches
from engine_pretrain import train_one_epoch
from util.run import Run
from util.tasks import EpochTask


def train_epochs(
    run: Run,
    objective: nn.Module,
    batches: Batches,
    tasks: Sequence[EpochTask] = (),
    *,
    after_update: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train all remaining epochs.

    Args:
        run: The run, after `run.prepare`, in its context (`with run:`).
        objective: Module that returns named losses for a batch.
        batches: This process's share of the training images.
        tasks: Tasks between epochs, in this order.
        after_update: Called after every optimizer step, before it is logged and saved.

    Returns:
        Entries of result.json.
    """

    def after_step() -> None:
        after_update()
        run.after_step()

    for epoch, done in run.epochs():
        train_one_epoch(
            objective,
            itertools.islice(batches.epoch(epoch, done), run.micro_batches_left),
            run.stepper,
            run.means,
            device=run.processes.device,
            autocast=run.autocast,
            note=run.records.note,
            after_step=after_step,
        )
        metrics: dict[str, float] = {}
        for task in tasks:
            if task.is_due(epoch):
                metrics |= task.after_epoch(epoch)
        run.end_epoch(**metrics)
    result: dict[str, Any] = {}
    for task in tasks:
        result |= task.at_end()
    return result
