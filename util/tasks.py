"""Tasks between epochs: every program passes its list of tasks to the loop in programs/training.py.

Tasks do not change the training: they do not use the run's random generators, and restore the mode of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from util.run import Run


class EpochTask:
    """A task that all processes run together after every `every` epochs and after the last one; 0: never."""

    def __init__(self, run: Run, every: int):
        self.run, self.every = run, every

    def is_due(self, epoch: int) -> bool:
        """Return whether the task is due after `epoch`, counted from 0."""
        return self.every > 0 and ((epoch + 1) % self.every == 0 or epoch + 1 == self.run.options.epochs)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Run the task; return metrics for the line of the epoch in log.txt."""
        raise NotImplementedError

    def at_end(self) -> dict[str, Any]:
        """Finish after the last epoch; return entries of result.json."""
        return {}


class Pictures(EpochTask):
    """Images in `samples/` and TensorBoard, drawn by the main process.

    Args:
        name: Name of the images in TensorBoard.
        prefix: Prefix of the file names, followed by the number of the epoch.
        draw: Function that writes an image to a path and returns it as uint8 `[H, W, 3]`, or None if there is none.
    """

    def __init__(self, run: Run, every: int, *, name: str, prefix: str, draw: Callable[[Path], Tensor | None]):
        super().__init__(run, every)
        self.name, self.prefix, self.draw = name, prefix, draw

    def after_epoch(self, epoch: int) -> dict[str, float]:
        if self.run.log:
            path = self.run.folder / "samples" / f"{self.prefix}{epoch + 1:04d}.png"
            picture = self.draw(path)
            if picture is not None:
                self.run.log.picture(self.name, picture, epoch + 1)
        return {}
