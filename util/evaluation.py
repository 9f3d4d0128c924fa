"""Evaluation between epochs: the best epoch is kept, and the last and the best are evaluated on the test images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.splits import TEST
from util import checkpoint
from util.run import Run
from util.state import is_of_best
from util.tasks import EpochTask

log = logging.getLogger(__name__)


class Evaluation(EpochTask):
    """Evaluates a model between epochs.

    Args:
        run: the run that trains.
        model: the trained model, or a moving average of it.
        measure: computes metrics on the validation images ("choice") or the test images ("test"); called by all
            processes together.
        metric: the metric that the best epoch is chosen by.
        chosen_on: a description of the validation images.
        every: epochs between evaluations.
        describe: metrics as text.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        measure: Callable[[str], dict[str, Any]],
        *,
        metric: str,
        chosen_on: str,
        every: int,
        describe: Callable[[Mapping[str, Any]], str],
    ):
        super().__init__(run, every)
        self.model, self.measure, self.describe = model, measure, describe
        self.metric, self.chosen_on = metric, chosen_on
        self._of_last_epoch: dict[str, Any] | None = None  # its metrics on the test images, if they are known

    def _measure(self, images: str) -> dict[str, Any]:
        """Return what `measure` computes; raise Interrupted if a stop was requested, as some images may be missing."""
        metrics = self.measure(images)
        self.run.leave_if_stopped()
        return metrics

    def after_epoch(self, epoch: int) -> dict[str, float]:
        metrics = self._measure("choice")
        if self.chosen_on == TEST and epoch + 1 == self.run.options.epochs:
            self._of_last_epoch = dict(metrics)
        self.run.record_best(self.metric, metrics[self.metric])
        group = "test" if self.chosen_on == TEST else "val"
        return {f"{group}_{name}": value for name, value in metrics.items() if isinstance(value, float)}

    def _best_weights(self, best: Path) -> dict[str, Tensor] | None:
        """Return the weights of the best epoch, or None if they were not saved."""
        if best.is_file():
            state = checkpoint.load(best)
            if is_of_best(state, self.run.state.best):
                return state.get("ema") or state["model"]
        log.warning("%s is not of the best epoch, or missing: only the last epoch is evaluated", best)
        return None

    def at_end(self) -> dict[str, Any]:
        """Evaluate the last and the best epoch on the test images, each only if this was not done before."""
        run = self.run
        accuracy = {"last": self._of_last_epoch or self._measure("test")}
        if run.state.is_best:
            accuracy["best"] = dict(accuracy["last"])
        else:
            weights = self._best_weights(run.checkpoints / checkpoint.BEST) if run.processes.main else None
            weights = run.processes.broadcast(weights)
            if weights is not None:
                self.model.load_state_dict(weights)
                accuracy["best"] = self._measure("test")
        confusion: dict[str, Any] = {}
        for name, metrics in accuracy.items():
            matrix = metrics.pop("confusion", None)
            if matrix is not None and name == "last":
                names = list(self.run.source.classes or map(str, range(len(matrix))))
                confusion = {"confusion": {"classes": names, "matrix": matrix}}
            log.info("%s epoch, %d test images: %s", name, metrics["images"], self.describe(metrics))
        best = run.state.best["epoch"]
        log.info("the best epoch, epoch %d, was chosen by %s on %s", best + 1, self.metric, self.chosen_on)
        return {"accuracy": accuracy, "metric": self.metric, "best_chosen_on": self.chosen_on, **confusion}
