"""Start real training processes quickly: each run is a fork of a server process that has imported everything.

A run is a real process, which a test can kill or send signals to. It starts in 0.1 seconds instead of 5.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import methods
import programs
from util import checkpoint

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([f"programs.{name}" for name in programs.PROGRAMS])

TINY = (
    "--data_path digits --input_size 8 --in_chans 1 --model mae_vit_tiny_patch2 --embed_dim 24 --depth 2 --num_heads 2 "
    "--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --norm_pix_loss --total_batch_size 256 --epochs 3 "
    "--warmup_epochs 1 --num_workers 0 --device cpu --log_every 1 --save_minutes 0"
).split()

TINY_CLASSIFIER = (
    "--data_path digits --input_size 8 --in_chans 1 --model mae_vit_tiny_patch2 --embed_dim 24 --depth 2 --num_heads 2 "
    "--total_batch_size 256 --epochs 3 --warmup_epochs 1 --num_workers 0 --device cpu --log_every 1 --save_minutes 0"
).split()
TINY_SEGMENTER = (
    "--input_size 16 --model mae_vit_tiny_patch4 --embed_dim 24 --depth 2 --num_heads 2 --total_batch_size 8 "
    "--epochs 3 --warmup_epochs 1 --lr 1e-3 --holdout 0.08 --eval_every 1 --num_workers 0 --device cpu --log_every 1 "
    "--save_minutes 0"
).split()
WITHOUT_RUNS = "NOR_MAE_TESTS_WITHOUT_RUNS"  # environment variable: skip tests that start training processes
LIGHT = ["--aa", "", *"--hflip 0 --min_scale 0.6 --reprob 0.25 --drop_path 0.1".split()]


def tiny_for(method: str) -> list[str]:
    """Return the options in `TINY` that the method has; for HOG targets, with a suitable patch size."""
    optional = {f"--{option.name}" for entry in methods.METHODS.values() for option in fields(entry.options)}
    optional -= {f"--{name}" for name in methods.own_options(method)}
    chosen, skipping = [], False
    for word in TINY:
        skipping = word in optional or (skipping and not word.startswith("--"))
        chosen += [] if skipping else [word]
    if method == "maskfeat":
        chosen += "--model mae_vit_tiny_patch8 --input_size 32".split()
    return chosen


SCRIPTS = {  # the first options of every run, by program
    "main_pretrain": TINY,
    "main_finetune": [*TINY_CLASSIFIER, *LIGHT],
    "main_linprobe": TINY_CLASSIFIER,
    "main_segment": TINY_SEGMENTER,
}


def _run(
    script: str, argv: list[str], stderr: str, environment: dict[str, str], fault: Callable[[], None] | None
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for loading workers, as without a forkserver
    main = importlib.import_module(script).main
    os.environ |= environment
    if fault is not None:
        fault()
    torch.set_num_threads(1)
    sys.stderr = open(stderr, "w", buffering=1)
    sys.exit(main(argv))


class Training:
    """One process that runs a program on the digits with a tiny model.

    Args:
        words: Arguments after the options of the tiny model.
        tiny: Whether to pass the options of the tiny model.
        environment: Environment variables, as torchrun sets them for one rank of several.
        fault: Function that is called in the process before the program starts, see tests/faults/inject.py.
    """

    def __init__(
        self,
        folder: Path,
        *words: object,
        script: str = "main_pretrain",
        tiny: bool = True,
        environment: dict[str, str] | None = None,
        fault: Callable[[], None] | None = None,
    ):
        if WITHOUT_RUNS in os.environ:
            pytest.skip("starts a training process")
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = environment or {}
        self._stderr = folder.parent / f"{folder.name}.stderr{environment.get('RANK', '')}"
        argv = [*(SCRIPTS[script] if tiny else ()), "--output_dir", str(folder), *map(str, words)]
        self._process = context.Process(target=_run, args=(script, argv, str(self._stderr), environment, fault))
        self._process.start()

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def workers(self) -> list[int]:
        """Return the process ids of the loading workers."""
        return children(self._process.pid)

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        """Wait until metrics.jsonl contains the step."""
        deadline = time.monotonic() + seconds
        while not any(line["step"] >= step for line in metrics(self.folder)):
            assert self._process.is_alive(), f"ended before step {step}: {self.stderr}"
            assert time.monotonic() < deadline, f"no step {step} after {seconds} s: {self.stderr}"
            time.sleep(0.002)

    def reaches(self, step: int) -> bool:
        """Wait until metrics.jsonl contains the step; return False if the process exits before."""
        while not any(line["step"] >= step for line in metrics(self.folder)):
            if self.is_over:
                return False
            time.sleep(0.002)
        return True

    @property
    def is_over(self) -> bool:
        return not self._process.is_alive()

    def wait(self, seconds: float = 300) -> int:
        """Wait for the process and return its exit code; negative for a signal."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds} s: {self.stderr}"
        return self._process.exitcode

    def kill_at(self, step: int) -> None:
        """Kill the process right after it has logged the step; on a busy machine the run may have finished before."""
        self.wait_for_step(step)
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        assert self.wait() in (-signal.SIGKILL, 0), self.stderr

    @property
    def stderr(self) -> str:
        """The output of the process on stderr."""
        return self._stderr.read_text() if self._stderr.exists() else ""


def start_ranks(
    count: int,
    folder: Path,
    *words: object,
    script: str = "main_pretrain",
    tiny: bool = True,
    faults: dict[int, Callable[[], None]] | None = None,
    more: dict[str, str] | None = None,
) -> list[Training]:
    """Start `count` processes that train together, as with torchrun.

    Args:
        faults: See `Training`, by rank.
        more: Environment variables for all processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), **(more or {})}
    ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [
        Training(folder, *words, script=script, tiny=tiny, environment=environment, fault=(faults or {}).get(rank))
        for rank, environment in enumerate(ranks)
    ]


def children(of: int) -> list[int]:
    """Return the process ids of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has just exited
            if int(path.read_text().rpartition(")")[2].split()[1]) == of:
                found.append(int(path.parent.name))
    return sorted(found)


def finish(
    folder: Path,
    *words: object,
    script: str = "main_pretrain",
    tiny: bool = True,
    fault: Callable[[], None] | None = None,
) -> str:
    """Run a program to the end, assert that it succeeds, and return its log."""
    training = Training(folder, *words, script=script, tiny=tiny, fault=fault)
    code = training.wait()
    assert code == 0, training.stderr
    return training.stderr


def metrics(folder: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of each step, as logged by the latest start of the run."""
    return {line["step"]: line["loss"] for line in metrics(folder)}


def final(folder: Path) -> dict:
    return checkpoint.load(folder / "checkpoints" / "last.pth")


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that weights, optimizer state and step of two runs are bit-exactly equal."""
    first, second = final(one), final(other)
    assert (first["epoch"], first["step"]) == (second["epoch"], second["step"])
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for index, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["optimizer"]["state"][index][name]), (index, name)
