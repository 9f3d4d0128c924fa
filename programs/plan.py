"""The parts of a training run that the program, `tools.doctor` and `tools.replay` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from data.loader import Batches, Source
from util.distributed import Processes


@dataclass(frozen=True)
class Plan:
    """Model, training images and objective of a run, before its folder is opened.

    No checkpoint is loaded, and the model is not moved to the device.
    """

    options: Any
    """Options of the program, completed with values that depend on the data, such as the number of classes."""
    processes: Processes
    source: Source
    """The training images."""
    model: Any
    """The model that checkpoints contain, initialised."""
    make_batches: Callable[[Processes], Batches]
    """Function that returns a process's share of the training batches."""
    make_objective: Callable[[nn.Module], nn.Module]
    """Function from the model, or a wrapper of it, to the module that returns named losses for a batch."""
    make_optimizer: Callable[[torch.device], torch.optim.Optimizer]
    """Function that creates the optimizer when the model is on its device."""
    image_bytes: int
    """Bytes of one sample that a worker process returns."""
    splits: Any = None
    """Training, validation and test images of the programs that evaluate."""

    @cached_property
    def batches(self) -> Batches:
        """Return the training batches of this process."""
        return self.make_batches(self.processes)
