"""Resolve the precision of a run from the device and `--amp`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch


def resolve_amp(amp: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 on GPUs that support it, fp16 on other GPUs, else `none`.

    Raises:
        ValueError: If the device does not support the precision.
    """
    if amp == "auto":
        if device.type != "cuda":
            return "none"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a CUDA device, this run is on {device.type}; use --amp bf16 or --amp none")
    return amp


def autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that creates autocast contexts for the resolved precision `none`, `bf16` or `fp16`."""
    dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
