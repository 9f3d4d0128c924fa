"""Allow only one run in a folder at a time, by a file lock (flock) on `run.lock`, which also contains the holder.

The kernel releases the lock when the process exits for any reason, so a killed run never blocks its restart. NFS,
Lustre and CephFS share the lock among machines. If a mount keeps locks local to each machine, `lost` detects before
every save that another machine has acquired the folder too.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import secrets
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

NAME = "run.lock"
WAIT_SECONDS = 5.0  # a killed process may need some time to release its GPU before the kernel closes its files


class FolderInUse(ValueError):
    """Another process trains in this folder."""


class RunLock:
    """The lock of one run folder, held from `acquire` to `release` or until the process ends."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._token = ""
        self._lock = FileLock(self.path, thread_local=False, on_acquired=self._write_holder)

    def acquire(self) -> None:
        """Lock the folder for this process.

        Raises:
            FolderInUse: another process holds the lock.
            OSError: the lock file cannot be written.
        """
        try:
            self._lock.acquire(timeout=WAIT_SECONDS)
        except Timeout:
            holder = _read(self.path)
            raise FolderInUse(
                f"the run in {self.path.parent} is being trained by process {holder.get('pid', '?')} on "
                f"{holder.get('host', 'an unknown machine')} since {holder.get('since', '?')}; stop that process, wait "
                f"for it to end, or choose another --output_dir (lock file: {self.path})"
            ) from None
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            log.warning("%s: this file system has no file locks; do not start a second run here", self.path.parent)
        atexit.register(self.release)

    def _write_holder(self, handle: int) -> None:
        self._token = secrets.token_hex(8)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": platform.node(), "since": since, "token": self._token}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)

    def lost(self) -> bool:
        """Return whether another process has overwritten the lock file; False if the file is missing."""
        holder = _read(self.path) if self._token else {}
        return bool(holder) and holder.get("token") != self._token

    def release(self) -> None:
        """Unlock the folder and remove the lock file, if the lock is held."""
        if self._lock.is_locked:
            if not self.lost():
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)  # before unlocking: a process that has opened it tries again
            self._lock.release()
        self._token = ""
        atexit.unregister(self.release)


def _read(path: Path) -> dict[str, Any]:
    """Return the holder that a lock file names, or {} if there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
