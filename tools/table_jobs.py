"""Run the jobs of a table: each once, after its dependencies, several in parallel, within a time limit.

A job is a program of the project. A stopped job saves a checkpoint and resumes later, so no work is lost if all jobs
are stopped by a signal or at the time limit.
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
INTERRUPTED = 75  # exit code of the programs for "stopped by a signal, everything saved"
PRELOAD = [
    "programs.pretrain",
    "programs.finetune",
    "programs.segment",
    "benchmarks.bill",
    "tools.tables",
    "torch.utils.tensorboard",
]
LOOK = 0.05  # seconds between two checks of running jobs
TAIL = 10  # lines of output shown for a failed program


@dataclass(frozen=True)
class Job:
    """A program of the project and its arguments; the file `done` exists when it is finished."""

    words: tuple[str, ...]
    done: Path
    after: tuple[Path, ...] = ()
    """Files that must exist first: results of other jobs."""


def command(job: Job, nproc: int) -> list[str]:
    """Return the shell command, relative to the project folder."""
    if nproc > 1 and job.words[0].startswith("main_"):
        return ["torchrun", "--standalone", "--nproc_per_node", str(nproc), *job.words]
    return ["python", *job.words]


class Program(Protocol):
    """A started program."""

    def code(self) -> int | None:
        """Return the exit code, or None while it is running."""

    def send(self, number: int) -> None:
        """Send a signal."""


class Process:
    """A command in its own process. Its output is written to the given file, or to that of this process."""

    def __init__(self, words: Sequence[str], output: Path | None):
        programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        with _opened(output) as file:
            self._process = subprocess.Popen(
                [*programs[words[0]], *words[1:]], cwd=PROJECT, stdout=file, stderr=subprocess.STDOUT if file else None
            )

    def code(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        self._process.send_signal(number)


class Fork:
    """The same in a fork of a process that has imported everything, which is much faster for tiny runs."""

    def __init__(self, words: Sequence[str], output: Path | None):
        assert words[0] == "python"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower with several threads
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(target=run_program, args=(words[1:], output))
        self._process.start()

    def code(self) -> int | None:
        return self._process.exitcode

    def send(self, number: int) -> None:
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just exited
            os.kill(self._process.pid, number)


def run_program(words: Sequence[str], output: Path | None = None) -> None:
    """Run a program of the project in this process, and exit."""
    with _opened(output) as file:
        if file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    os.chdir(PROJECT)
    become(words)


def become(words: Sequence[str]) -> None:
    """Run `FILE.py ...` or `-m MODULE ...` in this process, like `python`."""
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _opened(path: Path | None) -> contextlib.AbstractContextManager[IO[str] | None]:
    """Open the file for appending; return None without a file."""
    if path is None:
        return contextlib.nullcontext()
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Stop:
    """Track whether a stop was requested by a signal or by the time limit; programs are notified once."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds if seconds else float("inf")
        self.asked = self._told = False

    def by_signal(self, number: int, frame: object) -> None:
        self.asked = True
        self._told |= number == signal.SIGINT  # the terminal sends Ctrl-C to them too

    def tell(self, running: Sequence[Program]) -> None:
        """Ask running jobs, once, to save and exit if a stop was requested or the time limit is reached."""
        if not self.asked and time.monotonic() > self.deadline:
            say("time limit reached: running jobs save and exit")
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
    """Run the jobs that are not finished and return the exit code; a failed job only stops those that depend on it.

    Up to `at_once` jobs run in parallel, with logs in `root/logs`. After `minutes` (0: no limit) they save and exit.
    """
    waiting = [job for job in jobs if not job.done.exists()]
    for job in jobs:
        if job not in waiting:
            say(f"{_title(job, jobs, root)}: already finished")
    running: dict[Job, Program] = {}
    failed: list[Job] = []
    stop = Stop(60 * minutes)
    with _heard(stop):
        while waiting or running:
            for job in [] if stop.asked or len(running) >= at_once else list(waiting):
                missing = {path for path in job.after if not path.exists()}
                if missing - {other.done for other in (*waiting, *running)}:
                    say(f"{_title(job, jobs, root)}: skipped, because a job that it needs failed")
                    waiting.remove(job)
                    failed.append(job)
                elif not missing and len(running) < at_once:
                    words = command(job, nproc)
                    say(f"{_title(job, jobs, root)}\n  {shlex.join(words)}")
                    waiting.remove(job)
                    running[job] = start(words, _log_path(job, root) if at_once > 1 else None)
            stop.tell(list(running.values()))
            exited = {job: code for job, program in running.items() if (code := program.code()) is not None}
            for job, code in exited.items():
                del running[job]
                stop.asked |= code == INTERRUPTED
                if not job.done.exists() and not stop.asked:
                    end = _tail(_log_path(job, root)) if at_once > 1 else ""
                    say(f"{_title(job, jobs, root)}: failed with exit code {code}{end}")
                    failed.append(job)
            if stop.asked and not running:
                break
            if not exited:
                time.sleep(LOOK)
    if stop.asked and not all(job.done.exists() for job in jobs):
        say("stopped; run the same command again to resume")
        return INTERRUPTED
    if failed:
        say(f"{len(failed)} of {len(jobs)} jobs failed: run the same command again to retry")
    return 1 if failed else 0


def _title(job: Job, jobs: Sequence[Job], root: Path) -> str:
    return f"[{jobs.index(job) + 1} of {len(jobs)}] {_name(job, root)}"


def _name(job: Job, root: Path) -> Path:
    """Return the path of the run folder relative to `root`; for a job without run folder, that of its file."""
    return (job.done.parent if job.done.name == "result.json" else job.done).relative_to(root)


def _log_path(job: Job, root: Path) -> Path:
    return root / "logs" / f"{'-'.join(_name(job, root).parts)}.txt"


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-TAIL:]
    return f". The end of {path}:\n" + "\n".join(f"  {line}" for line in lines)
