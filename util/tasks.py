"""Work between epochs: every program gives its list of tasks to the loop in programs/training.py.

No task changes what is trained: none uses the run's random numbers, and a model is put back into its mode.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from util.run import Run


class EpochTask:
    """Something to do after every `every` epochs and after the last one; 0: never. All processes do it together."""

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
    """Pictures in `samples/` and TensorBoard, drawn by the main process.

    Args:
        name: of the pictures in TensorBoard.
        prefix: of the files; the number of the epoch follows.
        draw: writes a picture to a path and returns it as uint8 `[H, W, 3]`; or returns None where there is none.
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
