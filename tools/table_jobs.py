"""The jobs of a table: each done once, what it needs before it, several at a time, for as long as is allowed.

A job is a program of the project. One that was stopped has saved and goes on where it was, so that stopping all of
them, by a signal or because the time is up, costs nothing but the wait.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

PROJECT = Path(__file__).resolve().parent.parent
INTERRUPTED = 75  # the front doors' exit code for "stopped by a signal, everything saved"
PRELOAD = [
    "programs.pretrain",
    "programs.finetune",
    "programs.segment",
    "benchmarks.bill",
    "tools.tables",
    "torch.utils.tensorboard",
]
LOOK = 0.05  # seconds between two looks at what is running
TAIL = 10  # lines of a failed program's output that are shown


@dataclass(frozen=True)
class Job:
    """A program of the project and its words; `done` exists when it is finished."""

    words: tuple[str, ...]
    done: Path
    after: tuple[Path, ...] = ()
    """What must be done before."""


def command(job: Job, nproc: int) -> list[str]:
    """The command that a reader can paste, in the project's folder."""
    if nproc > 1 and job.words[0].startswith("main_"):
        return ["torchrun", "--standalone", "--nproc_per_node", str(nproc), *job.words]
    return ["python", *job.words]


class Program(Protocol):
    """A program that was started."""

    def code(self) -> int | None:
        """Its exit code; None while it is running."""

    def send(self, number: int) -> None:
        """Give it a signal."""


class Process:
    """A command in a process of its own. It writes to the file `said`, or where this process writes."""

    def __init__(self, words: Sequence[str], said: Path | None):
        programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        with _opened(said) as file:
            self._process = subprocess.Popen(
                [*programs[words[0]], *words[1:]], cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT if file else None
            )

    def code(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)


class Fork:
    """The same as a fork of a process that has imported everything: it saves the seconds that tiny runs mostly take."""

    def __init__(self, words: Sequence[str], said: Path | None):
        assert words[0] == "python"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only get in each other's way
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(target=run_program, args=(words[1:], said))
        self._process.start()

    def code(self) -> int | None:
        return self._process.exitcode

    def send(self, number: int) -> None:
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._process.pid, number)


def run_program(words: Sequence[str], said: Path | None = None) -> None:
    """Become one of the project's programs."""
    with _opened(said) as file:
        if file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    os.chdir(PROJECT)
    become(words)


def become(words: Sequence[str]) -> None:
    """Run `FILE.py ...` or `-m MODULE ...` in this process, as `python` would."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _opened(path: Path | None) -> contextlib.AbstractContextManager[IO[str] | None]:
    """The file to add to; None where there is none."""
    if path is None:
        return contextlib.nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Stop:
    """Whether a stop was asked for, by a signal or because the time is up; programs are told once."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds if seconds else float("inf")
        self.asked = self._told = False

    def by_signal(self, number: int, frame: object) -> None:
        self.asked = True
        self._told |= number == signal.SIGINT  # Ctrl-C reaches them from the terminal

    def tell(self, running: Sequence[Program]) -> None:
        """Ask what is running to save and end, if it is time and was not done before."""
        if not self.asked and time.monotonic() > self.deadline:
            say("the time is up: what runs is asked to save and to end")
            self.asked = True
        if self.asked and not self._told:
            self._told = True
            for program in running:
                program.send(signal.SIGTERM)


@contextlib.contextmanager
def _heard(stop: Stop) -> Iterator[None]:
    before = {number: signal.signal(number, stop.by_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    jobs: Sequence[Job],
    root: Path,
    *,
    start: Callable[[Sequence[str], Path | None], Program] = Process,
    nproc: int = 1,
    at_once: int = 1,
    minutes: float = 0,
) -> int:
    """Do what is not done yet; a job that fails costs only those that need it. Answers the exit code.

    `at_once` of them run side by side and write to `root/logs`. After `minutes` (0: never) they are asked to save and
    end.
    """
    waiting = [job for job in jobs if not job.done.exists()]
    for job in jobs:
        if job not in waiting:
            say(f"{_title(job, jobs, root)}: finished before")
    running: dict[Job, Program] = {}
    failed: list[Job] = []
    stop = Stop(60 * minutes)
    with _heard(stop):
        while waiting or running:
            for job in [] if stop.asked else list(waiting):
                missing = {path for path in job.after if not path.exists()}
                if missing - {other.done for other in (*waiting, *running)}:
                    say(f"{_title(job, jobs, root)}: left out, because what it needs failed")
                    waiting.remove(job)
                    failed.append(job)
                elif not missing and len(running) < at_once:
                    words = command(job, nproc)
                    say(f"{_title(job, jobs, root)}\n  {shlex.join(words)}")
                    waiting.remove(job)
                    running[job] = start(words, _said(job, root) if at_once > 1 else None)
            stop.tell(list(running.values()))
            ended = {job: code for job, program in running.items() if (code := program.code()) is not None}
            for job, code in ended.items():
                del running[job]
                stop.asked |= code == INTERRUPTED
                if not job.done.exists() and not stop.asked:
                    end = _tail(_said(job, root)) if at_once > 1 else ""
                    say(f"{_title(job, jobs, root)}: failed with exit code {code}{end}")
                    failed.append(job)
            if stop.asked and not running:
                break
            if not ended:
                time.sleep(LOOK)
    if stop.asked and not all(job.done.exists() for job in jobs):
        say("stopped; the same command goes on from here")
        return INTERRUPTED
    if failed:
        say(f"{len(failed)} of {len(jobs)} jobs failed: the same command tries them again")
    return 1 if failed else 0


def _title(job: Job, jobs: Sequence[Job], root: Path) -> str:
    return f"[{jobs.index(job) + 1} of {len(jobs)}] {_name(job, root)}"


def _name(job: Job, root: Path) -> Path:
    """The run's folder inside `root`; of a job without one, its file."""
    return (job.done.parent if job.done.name == "result.json" else job.done).relative_to(root)


def _said(job: Job, root: Path) -> Path:
    return root / "logs" / f"{'-'.join(_name(job, root).parts)}.txt"


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-TAIL:]
    return f". The end of {path}:\n" + "\n".join(f"  {line}" for line in lines)
