"""From a loss to an update: accumulation, loss scaling, clipping, and the refusal of anything that is not finite.

The decision whether an update may happen is made on the device, and nobody waits for it: a loss that is not finite
sends NaN into its gradients, DDP's sum carries that to every rank, the gradient norm shows it, and the fused optimizer
skips its own step. The counters are read at log steps.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RECENT_STEPS = 32  # how many micro-batches a dump can look back on
USUAL_STEPS = 20  # updates over which the norm of the gradient is averaged, and before which none is a spike


class Unstable(RuntimeError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class Stepper:
    """Call it with the loss of every micro-batch; it answers True when that ended an optimizer step.

    An update that would not be finite is left out: weights and optimizer state stay as they were, the step number and
    the learning rate go on, and `bad_steps` counts it. So is one whose gradient has more than `skip_spikes` times the
    usual norm, which is a running mean of those before it (0: none; not with fp16, whose scaler decides alone).
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
    ):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        assert not (fp16 and skip_spikes), "the scaler would not hear of it"
        self.accum, self.clip_grad, self.skip_spikes = accum, clip_grad, skip_spikes
        self.step = 0
        self._micro = 0
        self._seed, self._rank = seed, rank
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self._parameters[0].device
        self._scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self._decides_on_device = bool(optimizer.defaults.get("fused"))
        self.grad_norm = torch.zeros((), device=device)
        self._usual_norm = torch.zeros((), device=device)
        self._highest = torch.full((), -torch.inf, device=device)
        self._bad = torch.zeros(2, dtype=torch.int64, device=device)  # all, in a row
        self._recent: deque[tuple[int, dict[str, Tensor], Tensor]] = deque(maxlen=RECENT_STEPS)

    @property
    def lr(self) -> float:
        """The highest learning rate among the groups at the step last taken."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    @contextlib.contextmanager
    def micro_step(self) -> Iterator[None]:
        """Around forward and loss of one micro-batch: fixed device randomness (and NumPy's, of which mixup is made),
        gradients exchanged only at the last."""
        seed_micro_step(self._seed, self.step * self.accum + self._micro, self._rank)
        last = self._micro == self.accum - 1
        if isinstance(self.model, DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            yield

    def __call__(self, losses: Mapping[str, Tensor], index: Tensor) -> bool:
        """Back-propagate `losses["loss"]`; True when an update was due, made or refused. `index`: the samples."""
        loss = losses["loss"]
        self._highest = torch.fmax(self._highest, loss.detach().float())  # NaN is counted elsewhere
        self._recent.append((self.step, {name: value.detach() for name, value in losses.items()}, index))
        if self._micro == 0:
            self.optimizer.zero_grad(set_to_none=True)
        # A loss that is not finite must not hide behind finite gradients, on this rank or on another.
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
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_grad > 0:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad, self.grad_norm)
        bad = self._refused()
        if self._scaler.is_enabled():
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self._decides_on_device:
            # The switch that GradScaler itself throws: a fused step with found_inf = 1 changes nothing.
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bad:  # waits for the device; only for optimizers without a fused form
            self.optimizer.step()
        self._bad = torch.stack([self._bad[0] + bad, (self._bad[1] + 1) * bad])
        self.step += 1

    def _refused(self) -> Tensor:
        """Whether the update must not happen, on the device; the norm is the same on every rank."""
        bad, usual = ~torch.isfinite(self.grad_norm), self._usual_norm
        if self.skip_spikes:
            if self.step >= USUAL_STEPS:
                bad = bad | (self.grad_norm > self.skip_spikes * usual)
            mean = torch.where(usual > 0, usual.lerp(self.grad_norm.to(usual.dtype), 1 / USUAL_STEPS), self.grad_norm)
            self._usual_norm = torch.where(bad, usual, mean)
        return bad

    def highest_loss(self) -> float:
        """The highest loss of this process since the last call. Waits for the device."""
        highest = float(self._highest)
        self._highest = torch.full_like(self._highest, -torch.inf)
        return highest

    def bad_steps(self) -> tuple[int, int]:
        """How many updates were refused, in all and in a row up to now. Waits for the device."""
        total, in_a_row = self._bad.tolist()
        return total, in_a_row

    def recent(self) -> list[dict]:
        """The last micro-batches: step, named losses as numbers, sample indices. Waits for the device."""
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
        asked = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, now in zip(self.optimizer.param_groups, asked, strict=True):  # torch takes all of them from the file
            group.update({name: value for name, value in now.items() if name not in ("params", "lr")})
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])


def seed_micro_step(seed: int, micro_number: int, rank: int) -> None:
    """Make the random numbers of a run's `micro_number`-th micro-batch on a rank the same whenever it is worked on."""
    mixed = ((seed * 1_000_003 + micro_number) * 65_537 + rank) % 2**63
    torch.manual_seed(mixed)
    np.random.seed(mixed % 2**32)


def names_of_bad_losses(recent: Sequence[Mapping]) -> list[str]:
    """The losses of the newest micro-batches that are not finite, the parts before their sum."""
    bad: dict[str, None] = {}
    for entry in recent:
        for name, value in entry["losses"].items():
            if value != value or value in (float("inf"), float("-inf")):
                bad[name] = None
    return sorted(bad, key=lambda name: name == "loss")
