"""Optimizer steps: gradient accumulation, loss scaling, clipping, and skipping of non-finite updates.

Whether to apply an update is decided on the device, without synchronisation: a non-finite loss results in NaN
gradients, the all-reduce of DDP propagates them to every rank, the gradient norm detects them, and the fused optimizer
skips the step. The counters are read at log steps.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RECENT_STEPS = 32  # maximum number of micro-batches in a dump
USUAL_STEPS = 20  # updates over which the gradient norm is averaged; none of the first ones is a spike


class Unstable(RuntimeError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class Progress:
    """The progress of the training, for the schedules of a method."""

    step: int
    """Optimizer steps done so far, including skipped ones."""
    total_steps: int
    steps_per_epoch: int
    param_groups: list[dict[str, Any]]
    """The optimizer's parameter groups; a method with its own schedule of the weight decay writes to them."""

    @property
    def fraction(self) -> float:
        """Fraction of the training that is done, from 0 to 1."""
        return self.step / max(1, self.total_steps)

    @property
    def epoch(self) -> float:
        """Epochs done, as a float."""
        return self.step / max(1, self.steps_per_epoch)


class Hooks(Protocol):
    """Methods of a model that are called around an optimizer step; see `models_vit.Pretrainer`."""

    def before_step(self, progress: Progress) -> None: ...

    def adjust_gradients(self, progress: Progress) -> None: ...

    def after_update(self, taken: Tensor) -> None: ...


class Stepper:
    """Back-propagate the loss of every micro-batch; return True if that completed an optimizer step.

    A non-finite update is skipped: weights, optimizer state and the running statistics of batch norms are unchanged,
    the step number and the learning rate advance, and `bad_steps` counts it. An update whose gradient norm exceeds
    `skip_spikes` times its running mean is skipped as well (0: no limit; not with fp16, where only the scaler decides).

    Args:
        hooks: Called around every step; `before_step` before the forward pass of its first micro-batch,
            `adjust_gradients` before the gradient norm is computed, `after_update` with a 0-d bool on the device.
        total_steps: Optimizer steps of the training, for `Progress`.
        steps_per_epoch: Optimizer steps of one epoch, for `Progress`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler,
        *,
        accum: int = 1,
        clip_grad: float = 0.0,
        skip_spikes: float = 0.0,
        fp16: bool = False,
        seed: int = 0,
        rank: int = 0,
        hooks: Hooks | None = None,
        total_steps: int = 1,
        steps_per_epoch: int = 1,
    ):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self._hooks, self._total_steps, self._steps_per_epoch = hooks, total_steps, steps_per_epoch
        self._statistics = running_statistics(model)
        self._statistics_before: list[Tensor] = []
        assert not (fp16 and skip_spikes), "the loss scaler would not be informed"
        self.accum, self.clip_grad, self.skip_spikes = accum, clip_grad, skip_spikes
        self.step = 0
        self._micro = 0
        self._seed, self._rank = seed, rank
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = next(model.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self._decides_on_device = bool(optimizer.defaults.get("fused"))
        self.grad_norm = torch.zeros((), device=device)
        self.taken = torch.ones((), dtype=torch.bool, device=device)  # whether the last update was applied
        self._usual_norm = torch.zeros((), device=device)
        self._highest = torch.full((), -torch.inf, device=device)
        self._bad = torch.zeros(2, dtype=torch.int64, device=device)  # skipped updates: total, consecutive
        self._recent: deque[tuple[int, dict[str, Tensor], Tensor]] = deque(maxlen=RECENT_STEPS)

    @property
    def lr(self) -> float:
        """The highest learning rate of all groups at the last step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Return a context for forward pass and loss of a micro-batch.

        The random generators of the device and of NumPy (used by mixup) are seeded. Gradients are all-reduced only in
        the last micro-batch of a step.
        """
        if self._micro == 0:
            self._statistics_before = [buffer.clone() for buffer in self._statistics]
            if self._hooks is not None:
                self._hooks.before_step(self.progress())
        seed_micro_step(self._seed, self.step * self.accum + self._micro, self._rank)
        last = self._micro == self.accum - 1
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield

    def __call__(self, losses: Mapping[str, Tensor], index: Tensor) -> bool:
        """Back-propagate `losses["loss"]`; return True if an update was due, applied or skipped.

        `index` contains the indices of the samples, for the dump.
        """
        loss = losses["loss"]
        self._highest = torch.fmax(self._highest, loss.detach().float())  # NaN is counted separately
        self._recent.append((self.step, {name: value.detach() for name, value in losses.items()}, index))
        if self._micro == 0:
            self.optimizer.zero_grad(set_to_none=True)
        # A non-finite loss on any rank must skip the update even if all gradients are finite.
        seed = torch.where(torch.isfinite(loss.detach()), 1.0 / self.accum, torch.nan).to(loss.dtype)
        self._scaler.scale(loss).backward(seed)
        self._micro += 1
        if self._micro < self.accum:
            return False
        self._micro = 0
        self._update()
        return True

    def _update(self) -> None:
        self.schedule.step_update(self.step)
        self._scaler.unscale_(self.optimizer)
        overflow = torch.zeros_like(self._bad[0], dtype=torch.bool)
        if self._hooks is not None:
            if self._scaler.is_enabled():  # which also skips for a gradient that is now removed
                overflow = ~torch.isfinite(torch.nn.utils.get_total_norm(self._gradients()))
            self._hooks.adjust_gradients(self.progress())
        self.grad_norm = torch.nn.utils.get_total_norm(self._gradients())
        if self.clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad, self.grad_norm)
        bad = self._refused() | overflow
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self._decides_on_device:
            # As in GradScaler: a fused step with found_inf = 1 changes nothing.
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad:  # synchronises; only for optimizers without a fused implementation
            self.optimizer.step()
        self._bad = torch.stack([self._bad[0] + bad, (self._bad[1] + 1) * bad])
        self.step += 1
        with torch.no_grad():
            for buffer, before in zip(self._statistics, self._statistics_before, strict=True):
                buffer.copy_(torch.where(bad, before, buffer))
        self.taken = ~bad
        if self._hooks is not None:
            self._hooks.after_update(self.taken)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def progress(self) -> Progress:
        return Progress(self.step, self._total_steps, self._steps_per_epoch, self.optimizer.param_groups)

    def _refused(self) -> Tensor:
        """Return whether to skip the update, as a tensor on the device; the norm is the same on every rank."""
        bad, usual = ~torch.isfinite(self.grad_norm), self._usual_norm
        if self.skip_spikes:
            if self.step >= USUAL_STEPS:
                bad = bad | (self.grad_norm > self.skip_spikes * usual)
            mean = torch.where(usual > 0, usual.lerp(self.grad_norm.to(usual.dtype), 1 / USUAL_STEPS), self.grad_norm)
            self._usual_norm = torch.where(bad, usual, mean)
        return bad

    def highest_loss(self) -> float:
        """Return the highest loss of this process since the last call. Synchronises the device."""
        highest = float(self._highest)
        self._highest = torch.full_like(self._highest, -torch.inf)
        return highest

    def bad_steps(self) -> tuple[int, int]:
        """Return the number of skipped updates, in total and the latest consecutive ones. Synchronises the device."""
        total, in_a_row = self._bad.tolist()
        return total, in_a_row

    def recent(self) -> list[dict]:
        """Return the last micro-batches: step, losses by name, sample indices. Synchronises the device."""
        return [
            {"step": step, "losses": {name: float(value) for name, value in losses.items()}, "index": index.tolist()}
            for step, losses, index in self._recent
        ]

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "bad": list(self.bad_steps()),
            "usual_norm": float(self._usual_norm),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.step = state["step"]
        self._bad = torch.tensor(state["bad"], dtype=torch.int64, device=self._bad.device)
        self._usual_norm = torch.tensor(state["usual_norm"], device=self._usual_norm.device)
        configured = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, configured, strict=True):  # torch loads the file's values
            group.update({name: value for name, value in now.items() if name not in ("params", "lr")})
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers that batch norms update in a forward pass."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def seed_micro_step(seed: int, micro_number: int, rank: int) -> None:
    """Seed the random numbers of a run's `micro_number`-th micro-batch on a rank."""
    mixed = ((seed * 1_000_003 + micro_number) * 65_537 + rank) % 2**63
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)


def list_bad_losses(recent: Sequence[Mapping]) -> list[str]:
    """Return the names of the non-finite losses of the latest micro-batches, parts before the total."""
    bad: dict[str, None] = {}
    for entry in recent:
        for name, value in entry["losses"].items():
            if value != value or value in (float("inf"), float("-inf")):
                bad[name] = None
    return sorted(bad, key=lambda name: name == "loss")
