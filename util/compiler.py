"""Check whether `torch.compile` works here: it needs a C++ compiler for a CPU, Triton and a C compiler for a GPU."""

from __future__ import annotations

import logging

import torch

from data.decode import first_line

log = logging.getLogger(__name__)


def compiles(device: torch.device) -> bool:
    """Return whether models can be compiled for the device; if not, the reason is logged."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        log.warning(
            "--compile: torch.compile does not work on this machine (%s); training continues without it, which is "
            "slower",
            first_line(error),
        )
        return False
    return True
