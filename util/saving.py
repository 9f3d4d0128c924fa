"""Write the checkpoint files of a run with retries, link kept epochs and the best epoch, and delete old files."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from data.files import link
from options import RunOptions
from util import checkpoint
from util.exits import CannotSave
from util.folder import RunFolder

log = logging.getLogger(__name__)

SAVE_TRIES = 3


class Saver:
    """Write the checkpoints of a run, in the main process only."""

    def __init__(self, folder: RunFolder, options: RunOptions):
        self.folder, self.options = folder, options
        self.failures = 0  # saves in a row that failed
        self.seconds = 0.0  # spent in `save`

    def save(self, state: Mapping[str, Any], *also: str) -> None:
        """Write `last.pth`, and link it to the names `also`.

        Raises:
            CannotSave: Too many saves in a row failed, or another process has acquired the folder.
        """
        began = time.monotonic()
        if self.folder.lock.lost():
            raise CannotSave(f"another process has acquired {self.folder.path}; this one stops without saving")
        checkpoints = self.folder.checkpoints
        for attempt in range(SAVE_TRIES):
            try:
                checkpoint.keep_previous(checkpoints)
                checkpoint.save(checkpoints / checkpoint.LAST, state)
                for name in also:
                    link(checkpoints / checkpoint.LAST, checkpoints / name, or_copy=True)
                self.failures = 0
                break
            except OSError as error:
                log.error("saving to %s failed (%s), try %d of %d", checkpoints, error, attempt + 1, SAVE_TRIES)
                if attempt + 1 < SAVE_TRIES:
                    time.sleep(0.2 * 4**attempt)
        else:
            self.failures += 1
            if self.failures > self.options.max_save_failures:
                raise CannotSave(f"{self.failures} saves in a row to {checkpoints} failed")
            log.error("not saved; training continues with the last checkpoint on disk (%d in a row)", self.failures)
        self.seconds += time.monotonic() - began

    def save_epoch(self, state: Mapping[str, Any], *, is_best: bool) -> None:
        """Write `last.pth` after an epoch, and link it as a kept epoch and as the best epoch if it is one."""
        epoch, also = state["epoch"], []
        if epoch % self.options.save_every == 0 or epoch == self.options.epochs:
            also.append(f"epoch-{epoch:04d}.pth")
        if is_best:
            also.append(checkpoint.BEST)
        self.save(state, *also)
        checkpoint.drop_old_epochs(self.folder.checkpoints, self.options.keep)
