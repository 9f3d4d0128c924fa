"""Choose the number of CPU threads of a training."""

from __future__ import annotations

import logging
import os

import torch
from torch import nn

log = logging.getLogger(__name__)

SMALL = 1_000_000  # parameters; operations of smaller models are too short for several threads


def choose_threads(model: nn.Module, device: torch.device) -> None:
    """Use one thread for a small model on a CPU, unless OMP_NUM_THREADS is set; log the number.

    With several threads, small operations are dominated by synchronisation, and the threads compete with the loading
    workers: a model of 0.1 M parameters is ten times slower on two cores.
    """
    if device.type != "cpu":
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if "OMP_NUM_THREADS" in os.environ:
        reason = "OMP_NUM_THREADS"
    elif parameters < SMALL:
        torch.set_num_threads(1)
        reason = f"a model of {parameters / 1e6:.2f} M parameters; set OMP_NUM_THREADS to change it"
    else:
        reason = "torch's default; set OMP_NUM_THREADS to change it"
    log.info("CPU threads: %d (%s)", torch.get_num_threads(), reason)
