"""Distributed processes: rank and device of this process, and decisions of all processes together.

torchrun starts several processes (ranks), one per device; without it there is one. Common decisions (stop, save) are
made over a CPU channel with one small integer per step. The result is read one step later, so that no device waits for
it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from options.run import DEVICES

T = TypeVar("T")

CONTINUE, SAVE, STOP = 0, 1, 2  # requests of a rank at the end of a step; the highest one wins
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_AT_ONCE = 130  # a second Ctrl-C
LAUNCHERS = (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))


@dataclass(frozen=True)
class Processes:
    """The rank and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, on every rank (a new tensor if there are several)."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0 on every rank (any object; pickled between the processes of one run)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        if self.world_size == 1:
            return [value]
        boxes: list[T | None] = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return boxes  # type: ignore[return-value]


class NoDevice(ValueError):  # noqa: N818 - the name describes the error
    """The device is not available to this process, but perhaps to others."""


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises NoDevice if it is not available."""
    if not re.fullmatch(DEVICES, name):
        raise NoDevice(f"--device: expected auto, cpu, cuda, cuda:N or mps, found {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda"):
        if name != "cuda" and world_size() > 1:
            raise NoDevice(f"--device {name}: each of several processes takes its own GPU; use --device cuda")
        count, number = torch.cuda.device_count(), local_rank if name == "cuda" else int(name.partition(":")[2])
        if not torch.cuda.is_available() or number >= count:
            raise NoDevice(
                f"--device {name}: process {local_rank} of this machine has no GPU {number} (found {count}); "
                "use --device cpu"
            )
        return torch.device("cuda", number)
    if name == "mps" and not torch.backends.mps.is_available():
        raise NoDevice("--device mps: this machine has no Metal device; use --device cpu")
    return torch.device(name)


@contextlib.contextmanager
def start(device: str, timeout_minutes: float = 10.0) -> Iterator[Processes]:
    """Join the other processes if started by torchrun (NCCL between GPUs, otherwise gloo); leave at the end."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = pick_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not is_one_of_several():
        yield Processes(0, 1, 0, own)
        return
    if own.type == "mps" and int(os.environ["WORLD_SIZE"]) > 1:
        raise ValueError("several processes cannot share one Metal device; start one, or use --device cpu")
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, _old = _meeting_place(rank, processes, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=processes,
        timeout=timeout,
        device_id=own if own.type == "cuda" else None,
    )
    try:
        yield Processes(rank, processes, local_rank, own)
    finally:
        # After an error the others may never arrive; exiting lets the launcher stop them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _meeting_place(rank: int, processes: int, timeout: datetime.timedelta) -> tuple[dist.Store, dist.Store]:
    """Return a new store without entries of earlier attempts, and the store that contains its port.

    torchrun's store outlives the processes that it restarts, and addresses of exited processes in it prevent new ones
    from connecting (torch 2.14). Therefore rank 0 opens a new store and writes its port to the old one; a port that
    does not respond belongs to an earlier attempt. The caller keeps both stores open, because without torchrun rank 0
    is also the server of the old one.
    """
    old, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=processes, timeout=timeout))
    host = os.environ["MASTER_ADDR"]
    if rank == 0:
        new = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        old.set("nor-mae/port", str(new.port))
        return new, old
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(old.get("nor-mae/port"))
        try:
            with socket.create_connection((host, port), timeout=5):
                pass
            return dist.TCPStore(host, port, is_master=False, timeout=timeout), old
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class Agreement:
    """Compute the maximum over ranks of one integer per step; it is available one step later (one process: at once)."""

    def __init__(self, processes: Processes):
        self._alone = processes.world_size == 1
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, request: int) -> int:
        if self._alone:
            return request
        agreed = self.resolve()
        mine = torch.tensor([request])
        work = dist.all_reduce(mine, op=dist.ReduceOp.MAX, async_op=True)
        self._pending = (mine, work)
        return agreed

    def resolve(self) -> int:
        """Return the pending decision, if any. All ranks must call this at the same step."""
        if self._pending is None:
            return CONTINUE
        mine, work = self._pending
        work.wait()
        self._pending = None
        return int(mine.item())


class StopRequest:
    """Record SIGTERM, SIGUSR1 or Ctrl-C until the end of the step; a second Ctrl-C exits immediately."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> StopRequest:
        on_stop_signals(self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            os._exit(EXIT_AT_ONCE)  # the latest checkpoint is valid: it was written atomically
        self.signal = signal.Signals(number)


def on_stop_signals(act: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Call `act(number, frame)` on SIGTERM, SIGUSR1 and Ctrl-C; return the previous handlers."""
    return {number: signal.signal(number, act) or signal.SIG_DFL for number in STOP_SIGNALS}


def is_one_of_several() -> bool:
    """Return whether torchrun, or another launcher, has set the rank and the address of the main process."""
    return "RANK" in os.environ and "MASTER_ADDR" in os.environ


def world_size() -> int:
    """Return the number of processes that torchrun started (1 without it), known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_one_of_several() else 1


def launches() -> list[str]:
    """Return the job of this process, for each launcher that restarts commands automatically."""
    return [f"{job}={os.environ[job]}" for job, _ in LAUNCHERS if job in os.environ]


def is_restart(earlier: Sequence[str]) -> bool:
    """Return whether a launcher has restarted this process after one whose `launches` were `earlier`."""
    again = [job for job, count in LAUNCHERS if int(os.environ.get(count) or 0) > 0]
    return any(f"{job}={os.environ.get(job)}" in earlier for job in again)
