"""Optimizers, learning rates and the schedule, as in MAE, for all programs.

timm and torch do the work. Pretraining: AdamW with (0.9, 0.95), no decay on biases and norms. Fine-tuning: AdamW with
(0.9, 0.999), each layer at its own rate. Linear probes: LARS. A linear warm-up and half a cosine for all, per step; for
segmentation a power of what is left.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import nn

log = logging.getLogger(__name__)


def absolute_lr(lr: float, blr: float, total_batch_size: int) -> float:
    """Return `lr` if it is given, otherwise `blr` x images per step / 256."""
    return lr if lr > 0 else blr * total_batch_size / 256


def adamw(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.95), device: torch.device | None = None
) -> torch.optim.AdamW:
    """Create AdamW over `groups`; fused if the device supports it, which also lets it skip an update on the device."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=_fused(device))


def sgd(groups: list[dict], lr: float, device: torch.device | None = None) -> torch.optim.SGD:
    """Create SGD with momentum 0.9 over `groups`, fused as in `adamw`."""
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=_fused(device))


def lars(model: nn.Module, lr: float, weight_decay: float) -> Lars:
    """Create MAE's LARS: the rate of matrices is scaled by their norm times 0.001, that of biases is not; momentum 0.9.

    Without weight decay, as in MAE's probes, it is MAE's rule; with it timm's, whose norm includes the decay.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": weight_decay, "always_adapt": True},
        {"params": others, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)


def _fused(device: torch.device | None) -> bool:
    return device is None or device.type in ("cpu", "cuda")


def pretrain_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return one parameter group with weight decay and one without.

    Vectors (biases and norms) are not decayed, nor what the model's `no_weight_decay` names. That is nothing for MAE,
    which decays `cls_token` and `mask_token`. Models with `decays_vectors` have one group, in which all is decayed.
    """
    if getattr(model, "decays_vectors", False):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)


def restore_groups(optimizer: torch.optim.Optimizer, model: nn.Module, stored: Sequence[Mapping[str, Any]]) -> None:
    """Move parameters to the groups of a checkpoint that was written before `no_weight_decay` exempted some of them.

    Its run resumes as it was started: what was decayed is decayed until its end.

    Args:
        optimizer: of `pretrain_groups`, without a state yet.
        stored: the groups in the checkpoint.
    """
    sizes = [len(group["params"]) for group in stored]
    plain = param_groups_weight_decay(model, 1.0)
    if sizes != [len(group["params"]) for group in optimizer.param_groups] and sizes == [
        len(group["params"]) for group in plain
    ]:
        log.warning("this run was started by an earlier version, which decays more parameters; it resumes so")
        for group, earlier in zip(optimizer.param_groups, plain, strict=True):
            group["params"] = earlier["params"]


def finetune_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return parameter groups with an `lr_scale` that falls by `layer_decay` per layer from the top.

    Biases, norms and positions are not decayed. The model defines the layers (`group_matcher`) and the parameters that
    are never decayed (`no_weight_decay`), as in timm.
    """
    exempt = model.no_weight_decay()  # type: ignore[operator]
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, epochs: float, warmup_epochs: float, steps_per_epoch: int, min_lr: float
) -> CosineLRScheduler:
    """Make MAE's schedule per optimizer step: linear from 0 over the warm-up, then half a cosine down to `min_lr`.

    Neither length needs to be a whole number of steps. Call `step_update(step)` before the step of that number (from 0)
    is taken. Honours `lr_scale` of parameter groups.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    steps = epochs * steps_per_epoch
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, steps - warmup_steps),  # type: ignore[arg-type]  # 1, whose rate is constant, makes timm warn
        lr_min=min_lr,
        warmup_t=warmup_steps,  # type: ignore[arg-type]  # timm only compares and divides
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def warmup_poly(
    optimizer: torch.optim.Optimizer, *, steps: float, warmup_steps: float, power: float, min_lr: float
) -> PolyLRScheduler:
    """Set rates that rise from 0 during the warm-up, then fall to `min_lr` as (1 - share done) ** power.

    It is used as `warmup_cosine`.
    """
    return PolyLRScheduler(
        optimizer,
        t_initial=max(2, steps - warmup_steps),  # type: ignore[arg-type]  # 1, whose rate is constant, makes timm warn
        power=power,
        lr_min=min_lr,
        warmup_t=warmup_steps,  # type: ignore[arg-type]  # timm only compares and divides
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
