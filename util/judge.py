"""Looks at a run's model after its epochs, keeps the best, and reckons the last and the best at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.splits import TEST
from util import checkpoint
from util.run import Run

log = logging.getLogger(__name__)


class Judge:
    """Judges `model`: the one that is trained, or a moving average of it.

    `measure` answers its figures on the images that choose ("choice") or on those that judge ("test"), all processes
    together; `metric` is the figure that counts. `every` is the number of epochs between two looks.
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
        in_words: Callable[[Mapping[str, Any]], str],
    ):
        self.run, self.model, self.measure, self.in_words = run, model, measure, in_words
        self.metric, self.chosen_on, self.every = metric, chosen_on, every

    def _figures(self, images: str) -> dict[str, Any]:
        """What `measure` answers. A run that was asked to stop leaves: they may be of some of the images only."""
        figures = self.measure(images)
        self.run.leave_if_stopped()
        return figures

    def after(self, epoch: int) -> dict[str, float]:
        """The epoch's figures on the images that choose, where it is time for them; the best epoch is kept."""
        if (epoch + 1) % self.every and epoch + 1 < self.run.options.epochs:
            return {}
        figures = self._figures("choice")
        self.run.save_best(self.metric, figures[self.metric])
        group = "test" if self.chosen_on == TEST else "choice"
        return {f"{group}_{name}": value for name, value in figures.items() if isinstance(value, float)}

    def _weights_of(self, best: Path) -> dict[str, Tensor] | None:
        """None where the best epoch could not be saved: then there is no such file, or it is of an earlier epoch."""
        if best.is_file() and checkpoint.load(best)["epoch"] == self.run.best["epoch"] + 1:
            return checkpoint.load_model(best, averaged=True)[0]
        log.warning("the best epoch could not be saved when it was: the last is judged alone")
        return None

    def reckoning(self) -> dict[str, Any]:
        """The last and the best epoch on the test images, for result.json."""
        run = self.run
        accuracy = {"last": self._figures("test")}
        best = run.checkpoints / checkpoint.BEST
        weights = run.processes.broadcast(self._weights_of(best) if run.processes.main else None)
        if weights is not None:
            self.model.load_state_dict(weights)
            accuracy["best"] = self._figures("test")
        for name, figures in accuracy.items():
            log.info("%s epoch, %d test images: %s", name, figures["images"], self.in_words(figures))
        log.info("the best epoch, number %d, was chosen by %s on %s", run.best["epoch"], self.metric, self.chosen_on)
        return {"accuracy": accuracy, "metric": self.metric, "best_chosen_on": self.chosen_on}
