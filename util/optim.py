"""Optimizers, learning rates and the schedule, as in MAE, for all programs.

They are implemented with timm and torch. Pretraining: AdamW with betas (0.9, 0.95), no weight decay on biases and
norms. Fine-tuning: AdamW with (0.9, 0.999) and layer-wise learning rates. Linear probes: LARS. The schedule is a linear
warm-up and half a cosine per step; for segmentation a linear warm-up and polynomial decay.
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
    """Return `lr` if it is given, otherwise `blr` x `total_batch_size` / 256."""
    return lr if lr > 0 else blr * total_batch_size / 256


def adamw(
    groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.95), device: torch.device | None = None
) -> torch.optim.AdamW:
    """Create AdamW over `groups`; fused if the device supports it, which also lets it skip an update on the device."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=_fused(device))


def sgd(groups: list[dict], lr: float, device: torch.device | None = None) -> torch.optim.SGD:
    """Create SGD with momentum 0.9 over `groups`, fused as in `adamw`."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=_fused(device))
    for group in optimizer.param_groups:
        for parameter in group["params"]:  # a fused first step that is skipped would leave them uninitialised
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lars(model: nn.Module, lr: float, weight_decay: float) -> Lars:
    """Create LARS as in MAE: momentum 0.9, and learning rates of matrices, not of biases, scaled by 0.001 x their norm.

    Without weight decay, as in MAE's probes, the update equals MAE's. With weight decay it equals timm's, in which the
    norm that divides the update includes the decay.
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

    Vectors (biases and norms) and the parameters in the model's `no_weight_decay` are not decayed. MAE's list is empty:
    `cls_token` and `mask_token` are decayed. Models with `decays_vectors` have one group, and all parameters are
    decayed.
    """
    if getattr(model, "decays_vectors", False):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": weight_decay}]
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)


def restore_groups(optimizer: torch.optim.Optimizer, model: nn.Module, stored: Sequence[Mapping[str, Any]]) -> None:
    """Restore the parameter groups of a checkpoint from a version with a shorter `no_weight_decay` list.

    A resumed run then decays the same parameters until its end.

    Args:
        optimizer: Optimizer of `pretrain_groups`, still without state.
        stored: The parameter groups in the checkpoint.
    """
    sizes = [len(group["params"]) for group in stored]
    plain = param_groups_weight_decay(model, 1.0)
    if sizes != [len(group["params"]) for group in optimizer.param_groups] and sizes == [
        len(group["params"]) for group in plain
    ]:
        log.warning(
            "this run was started by an earlier version, which decays more parameters; this run keeps its parameter "
            "groups"
        )
        for group, earlier in zip(optimizer.param_groups, plain, strict=True):
            group["params"] = earlier["params"]


def finetune_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return parameter groups whose `lr_scale` is multiplied by `layer_decay` for each layer below the top.

    Biases, norms and position embeddings have no weight decay. The model defines the layers (`group_matcher`) and the
    parameters without weight decay (`no_weight_decay`), as in timm.
    """
    exempt = model.no_weight_decay()  # type: ignore[operator]
    return param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, epochs: float, warmup_epochs: float, steps_per_epoch: int, min_lr: float
) -> CosineLRScheduler:
    """Create MAE's schedule per optimizer step: linear warm-up from 0, then half a cosine down to `min_lr`.

    `epochs` and `warmup_epochs` need not be integers. Call `step_update(step)` before each step; steps are counted from
    0. The `lr_scale` of parameter groups is applied.
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
    """Create a schedule with a linear warm-up from 0, then decay to `min_lr` by (1 - fraction of steps) ** power.

    See `warmup_cosine` for its use.
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
