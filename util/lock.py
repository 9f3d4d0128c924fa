"""One run in a folder at a time: a file that names the process which trains there, and shows that it is alive.

A holder on this machine is asked for by its process id and the moment it was born, so a killed one never stands in the
way, nor does another that got its number. Of a holder on another machine only the file's time can be seen, which it
renews every few seconds: the newcomer watches the file for a while, and takes the folder over if nothing moves. No two
clocks are compared. A process that was taken for dead, and wakes up, finds the file changed before it saves.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "run.lock"
BEAT_SECONDS = 10.0  # between two signs of life
PATIENCE_SECONDS = 120.0  # without one, after which a holder on another machine counts as dead
LOOK_SECONDS = 0.5


class FolderInUse(ValueError):
    """Another living process trains in this folder."""


class RunLock:
    """The lock of one run folder. Held from `take` to `release`, or until the process ends, however it ends."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._handle: int | None = None
        self._released = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def take(self) -> None:
        """Make this process the holder. FolderInUse while another one lives; OSError where nothing can be written."""
        while not self._create():
            holder = _read(self.path)
            if holder is not None and self._is_dead(*holder):
                self._remove(holder[0])
        self._pulse.start()
        atexit.register(self.release)

    def _create(self) -> bool:
        with contextlib.suppress(FileExistsError):
            self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(self._handle, json.dumps(_here() | _process(os.getpid()) | {"since": _now()}).encode())
        return self._handle is not None

    def _is_dead(self, seen: os.stat_result, holder: Mapping[str, Any]) -> bool:
        """Whether the holder has ended. FolderInUse if it has not."""
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown machine')}"
        if _here().items() <= holder.items():
            if holder["pid"] == os.getpid() or _process(holder["pid"]).get("born") != holder["born"]:
                log.info("%s was held by %s, which has ended", self.path, who)
                return True
        else:
            log.warning("%s is held by %s: watching it for %g s", self.path, who, PATIENCE_SECONDS)
            if self._stays_still(seen):
                log.warning("no sign of life from %s: going on in its place", who)
                return True
        raise FolderInUse(
            f"the run in {self.path.parent} is being trained by {who}, since {holder.get('since', '?')}; stop that "
            f"process, wait for its end, or name another --output_dir (its lock is {self.path})"
        )

    def _stays_still(self, seen: os.stat_result) -> bool:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            now = _read(self.path)
            if now is None:
                return True
            if _moment(now[0]) != _moment(seen):
                return False
        return True

    def _remove(self, seen: os.stat_result) -> None:
        """Take a dead holder's file away, unless somebody else has done so already."""
        now = _read(self.path)
        if now is not None and _moment(now[0]) == _moment(seen):
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Through the own handle: a file that replaced ours never gets a sign of life from us."""
        assert self._handle is not None
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._handle)

    def lost(self) -> bool:
        """Whether another process has put its own file in the place of ours."""
        with contextlib.suppress(OSError):  # a file system that does not answer says nothing about others
            now = _read(self.path)
            return now is not None and self._handle is not None and not os.path.samestat(now[0], os.fstat(self._handle))
        return False

    def release(self) -> None:
        """Give the folder free; nothing happens where it is not held."""
        if self._handle is None:
            return
        self._released.set()
        if self._pulse.is_alive():
            self._pulse.join()
        if not self.lost():
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None
        atexit.unregister(self.release)


def _read(path: Path) -> tuple[os.stat_result, dict[str, Any]] | None:
    """The file's state and its words ({} while they are being written); None when there is no file."""
    try:
        with open(path) as file:  # opening asks a network file system for the newest state, a plain stat may not
            text = file.read()
            state = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    try:
        return state, dict(json.loads(text))
    except (ValueError, TypeError):
        return state, {}


def _moment(state: os.stat_result) -> tuple[int, int]:
    return state.st_ino, state.st_mtime_ns


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _here() -> dict[str, str]:
    """This machine, as long as it is not started anew, and the container in it: where a process id means something."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": platform.node(), "boot": boot, "processes": os.readlink("/proc/self/ns/pid")}
    return {"host": platform.node()}


def _process(pid: int) -> dict[str, Any]:
    """A living process: its number and when it was born, in ticks of its machine (0 where that is not told)."""
    if Path("/proc/self/stat").exists():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if words[0] not in "ZX":  # a dead process that nobody has asked about yet still has its number
                return {"pid": pid, "born": int(words[19])}
        return {}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return {}
    except PermissionError:
        pass
    return {"pid": pid, "born": 0}
