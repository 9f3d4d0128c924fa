"""Check whether `torch.compile` works here: it needs a C++ compiler for a CPU, Triton and a C compiler for a GPU."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)


def compiles(device: torch.device) -> bool:
    """Return whether models can be compiled for the device; if not, the reason is logged."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("compile: this machine cannot (%s); steps are taken as they are, which is slower", lines[0])
        return False
    return True
