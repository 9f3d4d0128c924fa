"""Decide when a run saves and when it stops, equally in all processes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from data.loader import Batch
from options import RunOptions
from util.distributed import CONTINUE, SAVE, STOP, Agreement, Processes, StopRequest


class Decisions:
    """Decisions to save (minutes or steps have passed) and to stop (a process received a signal)."""

    def __init__(self, options: RunOptions, processes: Processes):
        self.options, self.processes = options, processes
        self._stop = StopRequest()
        self._agree = Agreement(processes)
        self._saved_at = time.monotonic()

    def listen(self) -> None:
        """Install the signal handlers."""
        self._stop.listen()
        self.saved()

    def saved(self) -> None:
        """Restart the time to the next save."""
        self._saved_at = time.monotonic()

    def after_step(self, step: int) -> int:
        """Return CONTINUE, SAVE or STOP (which includes a save). All processes call it after every optimizer step."""
        agreed = self._agree(STOP if self._stop.signal else SAVE if self._save_is_due() else CONTINUE)
        if agreed == CONTINUE and self.options.save_steps and step % self.options.save_steps == 0:
            return SAVE
        return agreed

    def _save_is_due(self) -> bool:
        minutes = self.options.save_minutes
        return self.processes.main and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def is_stop_requested(self) -> bool:
        """Return whether any process has received a signal. All processes must call it together."""
        request = STOP if self._stop.signal else CONTINUE
        return STOP in (self._agree.resolve(), self._agree(request), self._agree.resolve())

    def until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches until this process receives a signal."""
        for batch in batches:
            yield batch
            if self._stop.signal:
                return

    @property
    def reason(self) -> str:
        """Name of the signal that requested the stop."""
        return self._stop.signal.name if self._stop.signal else "another process's signal"
