"""The state of a run. Only this module writes and reads the dictionary of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from options import RunOptions, to_dict
from util import checkpoint
from util.distributed import Processes
from util.meters import Means
from util.stepper import Stepper

log = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """The content of a checkpoint: model and optimizer, the position in the data, and the records so far."""

    options: RunOptions
    data: str
    """Fingerprint of the training images."""
    amp: str
    processes: Processes
    model: nn.Module
    stepper: Stepper
    means: Means
    steps_per_epoch: int
    others: Mapping[str, Any]
    """Other objects with a state_dict, such as a moving average of the weights."""
    epoch: int = 0
    epoch_step: int = 0
    """Optimizer steps done in the current epoch."""
    best: dict[str, Any] = field(default_factory=dict)
    """Metric, value, epoch (from 0) and step of the best epoch so far; {} if there is none."""
    last: dict[str, Any] | None = None
    """Metrics of the last finished epoch."""
    problems: dict[str, str] = field(default_factory=dict)
    """Unreadable images and the reasons."""

    @property
    def is_best(self) -> bool:
        """Whether the epoch that has just ended is the best so far."""
        return self.epoch_step == 0 and bool(self.best) and _is_end_of_best(self.epoch, self.stepper.step, self.best)

    @property
    def cut_short(self) -> bool:
        """Whether the last epoch has ended before its last step, because `--steps` were done."""
        return self.stepper.step < self.epoch * self.steps_per_epoch

    def reopen_epoch(self) -> None:
        """Resume within an epoch that was cut short, because more steps are given now."""
        if self.best and self.best["epoch"] == self.epoch - 1:
            self.best = {"step": self.stepper.step, **self.best}  # older files lack it
        self.epoch -= 1
        self.epoch_step = self.stepper.step - self.epoch * self.steps_per_epoch
        log.info("epoch %d continues after %d of %d steps", self.epoch + 1, self.epoch_step, self.steps_per_epoch)

    def weights_dict(self) -> dict[str, Any]:
        """Return the part of `state_dict` from which a model can be built."""
        return {
            "program": self.options.PROGRAM,
            "format": checkpoint.FORMAT,
            "model": self.model.state_dict(),
            "options": to_dict(self.options),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint. All processes must call it together."""
        stepper = self.stepper.state_dict()
        return {
            **self.weights_dict(),
            "optimizer": stepper["optimizer"],
            "scaler": stepper["scaler"],
            "epoch": self.epoch,
            "step": stepper["step"],
            "bad": stepper["bad"],
            "usual_norm": stepper["usual_norm"],
            "sampler": {
                "epoch": self.epoch,
                "offset": self.epoch_step,
                "seed": self.options.seed,
                "world_size": self.processes.world_size,
                "batch": self.options.total_batch_size,
            },
            "means": self.means.state_dict() if self.epoch_step or self.cut_short else None,
            "best": self.best,
            "last": self.last,
            "problems": dict(self.problems),
            "data": self.data,
            "amp": self.amp,
            "versions": {"torch": str(torch.__version__)},
            **{name: part.state_dict() for name, part in self.others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], path: str) -> None:
        """Restore the state that `state_dict` returned, read from `path`.

        Raises:
            CheckpointError: The checkpoint is of another model, or within an epoch of other batches.
        """
        self._require_same_model(state, path)
        state = self._for_this_batch_size(state, path)
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(
            {
                "step": state["step"],
                "bad": state["bad"],
                "usual_norm": state.get("usual_norm", 0.0),  # not in older files
                "optimizer": state["optimizer"],
                "scaler": state["scaler"],
            }
        )
        for name, part in self.others.items():
            part.load_state_dict(state[name])
        self.epoch, self.epoch_step = state["epoch"], state["sampler"]["offset"]
        if state["means"]:
            self.means.load_state_dict(state["means"])
        self.best, self.last = state["best"], state.get("last")
        self.problems = dict(state["problems"])
        if (then := state["sampler"]["world_size"]) != self.processes.world_size:
            log.warning(
                "resuming with %d processes instead of %d: the order of images is unchanged, sums are rounded "
                "differently",
                self.processes.world_size,
                then,
            )
        if (amp := state.get("amp", self.amp)) != self.amp:  # `auto` depends on the device
            log.warning("resuming with precision %s instead of %s", precision_name(self.amp), precision_name(amp))
        log.info("resuming from %s: epoch %d, step %d", path, self.epoch + 1, self.stepper.step)

    def _require_same_model(self, state: Mapping[str, Any], path: str) -> None:
        if missing := [name for name in self.others if name not in state]:
            raise checkpoint.CheckpointError(f"{path} cannot be resumed: it lacks {', '.join(missing)}")
        own, theirs = (
            {name: value.shape for name, value in part.items()} for part in (self.model.state_dict(), state["model"])
        )
        if different := sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)):
            raise checkpoint.CheckpointError(f"{path} is of another model: {', '.join(different[:5])} differ")

    def _for_this_batch_size(self, state: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        """Return the state, with the step converted to another total_batch_size for the same number of images."""
        sampler, now = state["sampler"], self.options.total_batch_size
        if sampler["batch"] == now:
            return state
        if state["means"] and not sampler["offset"]:
            raise checkpoint.CheckpointError(
                f"{path}: --steps had cut the last epoch short, it continues only with total_batch_size "
                f"{sampler['batch']}, not {now}; resume the file of an earlier epoch"
            )
        offset = sampler["offset"] * sampler["batch"] // now
        step = state["epoch"] * self.steps_per_epoch + offset
        log.warning(
            "resuming with total_batch_size %d instead of %d: step %d becomes step %d",
            *(now, sampler["batch"], state["step"], step),
        )
        return {**state, "step": step, "sampler": {**sampler, "offset": offset}}


def is_of_best(state: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Return whether the content of a checkpoint was saved after the epoch that `best` records."""
    return state.get("best") == best and _is_end_of_best(state["epoch"], state["step"], best)


def _is_end_of_best(epoch: int, step: int, best: Mapping[str, Any]) -> bool:
    """Return whether `epoch` epochs were done at `step` when `best` was recorded; older files lack its step."""
    return best["epoch"] == epoch - 1 and best.get("step", step) == step


def precision_name(amp: str) -> str:
    return "full" if amp == "none" else amp
