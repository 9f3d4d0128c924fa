"""What a program trains: the parts that its run, `tools.doctor` and `tools.replay` have in common."""

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
    """A model, its training images and how they meet, before a run's folder is opened. Nothing is loaded or moved."""

    options: Any
    """The program's, with what the data decide, such as the number of classes."""
    processes: Processes
    source: Source
    """The training images."""
    model: Any
    """The module that a checkpoint holds, as it is initialised."""
    make_batches: Callable[[Processes], Batches]
    """A process's share of the training batches."""
    make_objective: Callable[[nn.Module], nn.Module]
    """From the model, or a wrapper of it, to the module that returns named losses for a batch."""
    make_optimizer: Callable[[torch.device], torch.optim.Optimizer]
    """For the model on its device."""
    image_bytes: int
    """Size of one sample as a worker process hands it over."""
    splits: Any = None
    """Training, validation and test images of the programs that evaluate."""

    @cached_property
    def batches(self) -> Batches:
        """The share of the process that plans."""
        return self.make_batches(self.processes)
