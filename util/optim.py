"""Optimizer, learning rate and schedule, as MAE trains: one place for every front door.

timm and torch do the work; METHODS of MAE: AdamW with (0.9, 0.95), no decay on biases and norms, a linear warm-up and
half a cosine, per step.
"""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn


def absolute_lr(lr: float, blr: float, total_batch_size: int) -> float:
    """`lr` where it is given, else the base rate `blr` x images per step / 256."""
    return lr if lr > 0 else blr * total_batch_size / 256


def adamw(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.95), device: torch.device | None = None
) -> torch.optim.AdamW:
    """AdamW over `groups`; fused where the device can, which also lets it refuse an update by itself."""
    fused = device is None or device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights with decay, biases and norms without; `cls_token` and `mask_token` are decayed, as in MAE."""
    return param_groups_weight_decay(model, weight_decay)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, epochs: float, warmup_epochs: float, steps_per_epoch: int, min_lr: float
) -> CosineLRScheduler:
    """MAE's schedule per optimizer step: 0 to the group's rate over the warm-up, then half a cosine to `min_lr`.

    Call `step_update(step)` before the step of that number (from 0) is taken. Honours `lr_scale` of parameter groups.
    """
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    steps = round(epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, steps - warmup_steps),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
