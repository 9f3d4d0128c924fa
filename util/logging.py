"""Logging of a run: text, JSON lines and curves. Failing to log never stops a run."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from util.boards import Board, open_boards

log = logging.getLogger(__name__)

DECODERS = ("pillow", "torchcodec", "nvidia-nvimgcodec-cu13")  # packages; the last two may be missing


class _AboveTheBar(logging.StreamHandler):
    """Write lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _Kept(logging.Handler):
    """Keep lines that are logged before the run folder is known."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def log_to_terminal(main: bool, *, keep: bool = False) -> None:
    """Log to the terminal: everything from the main process, warnings from the others.

    `keep` also stores the lines for the next `log_file`.
    """
    handler = _AboveTheBar()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    kept = [_Kept()] if keep else [other for other in root.handlers if isinstance(other, _Kept)]
    root.handlers = [handler, *kept]
    root.setLevel(logging.INFO if main else logging.WARNING)
    logging.captureWarnings(True)
    threading.excepthook = _thread_ended


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Log the end of a thread that cannot write (usually TensorBoard's); other exceptions are bugs."""
    if isinstance(ended.exc_value, OSError):
        log.warning("%s cannot write (%s)", ended.thread.name if ended.thread else "a thread", ended.exc_value)
    else:
        threading.__excepthook__(ended)


class _Careful(logging.FileHandler):
    """A log file handler whose errors do not stop the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's own name)
        pass


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[logging.Handler]:
    """Also write log lines, with their time, to `path`, first those kept by `log_to_terminal`; return the handler."""
    handler: logging.Handler
    try:
        handler = _Careful(path, encoding="utf-8", errors="backslashreplace")  # file names may contain any bytes
    except OSError as error:
        log.warning("cannot write %s (%s); training continues", path, error)
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for kept in [other for other in root.handlers if isinstance(other, _Kept)]:
        root.removeHandler(kept)
        for record in kept.records:
            handler.handle(record)
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


SECONDS_BETWEEN_LINES = 3.0


class JsonLines:
    """Append one JSON object per line; non-finite numbers become null. An error is logged once."""

    def __init__(self, path: Path):
        self.path = path
        self._failed = False
        _drop_partial_line(path)

    def write(self, values: Mapping[str, Any]) -> None:
        line = json.dumps({name: _plain(value) for name, value in values.items()}) + "\n"
        try:
            if self._failed:
                _drop_partial_line(self.path)
            with open(self.path, "a") as file:
                file.write(line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s (%s); training continues", self.path, error)
            self._failed = True


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _drop_partial_line(path: Path) -> None:
    """Remove the incomplete last line that a killed process or a full disk may have left."""
    with contextlib.suppress(OSError), open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class RunLog:
    """Log files of a run folder; for the main process only.

    All records are written to the files. The terminal shows a progress bar, and text at most every
    `SECONDS_BETWEEN_LINES`, so that a run of many short epochs does not fill the screen.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        *,
        step: int,
        total_steps: int,
        epochs: int = 0,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self.run_id, self.total_steps, self.epochs = run_id, total_steps, epochs
        self.failed = False
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._epochs = JsonLines(folder / "log.txt")
        self._boards = open_boards(folder, step, wandb_project, config or {})
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            dynamic_ncols=True,
            disable=None,
            bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._line_at = -math.inf
        self._first_step = step
        self._began = datetime.datetime.now()

    def step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log a step: a JSON line, curves, and the progress bar or a line of text."""
        self._metrics.write({"run_id": self.run_id, "step": step, "epoch": epoch, **values})
        self.scalars("train", values, step)
        if not self._bar.disable:
            speed = f", {values['images_per_s']:.0f} images/s" if "images_per_s" in values else ""
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}{speed}", refresh=False)
        elif self._line_is_due(step):
            shown = ", ".join(f"{name} {_short(name, value)}" for name, value in values.items() if name != "data_wait")
            where = f"epoch {self._number(epoch)} step {step}/{self.total_steps}"
            log.info("%s: %s, eta %s", where, shown, self._eta(step))

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        self._bar.update(step - self._bar.n)

    def _line_is_due(self, step: int) -> bool:
        """Return whether a line may be printed: after some seconds without one, and at the end of the training."""
        now = time.monotonic()
        if now - self._line_at < SECONDS_BETWEEN_LINES and step < self.total_steps:
            return False
        self._line_at = now
        return True

    def _number(self, epoch: int) -> str:
        """Format the number of an epoch, from 1, and the number of epochs."""
        return f"{epoch + 1}/{self.epochs}" if self.epochs else str(epoch + 1)

    def _eta(self, step: int) -> str:
        done = max(1, step - self._first_step)
        left = (datetime.datetime.now() - self._began) / done * (self.total_steps - step)
        return str(left).split(".")[0]

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Log an epoch: a line in log.txt, and points of the curves over epochs."""
        self._epochs.write({"run_id": self.run_id, **values})
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        self.scalars("epoch", numbers, values["epoch"])
        shown = ", ".join(f"{name} {_short(name, value)}" for name, value in numbers.items())
        evaluated = any("acc" in name or "miou" in name.lower() for name in numbers)
        if evaluated or self._line_is_due(values["step"]):
            log.info("epoch %s: %s", self._number(values["epoch"]), shown)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Add points to the curves `group/name`; names may not contain spaces and signs."""
        plain = {re.sub(r"[^\w.-]+", "_", name).strip("_"): value for name, value in values.items()}
        points = {f"{group}/{name}": value for name, value in plain.items()}
        self._show(lambda board: board.scalars(points, step))

    def picture(self, name: str, image_HWC: Tensor, step: int) -> None:
        """Add a uint8 image `[H, W, 3]`."""
        self._show(lambda board: board.picture(name, image_HWC, step))

    def _show(self, write: Callable[[Board], None]) -> None:
        for name, board in list(self._boards.items()):
            try:
                write(board)
            except Exception as error:  # a full disk or a failed writer thread must not stop a run
                log.warning("cannot write to %s (%s): no further curves, metrics.jsonl is complete", name, error)
                del self._boards[name]

    def close(self) -> None:
        """Close the progress bar and the boards, which show the run as failed if `failed` is set."""
        self._bar.close()
        self._show(lambda board: board.close(self.failed))


def _short(name: str, value: float) -> str:
    if "lr" in name.split("_"):
        return f"{value:.3e}"
    return f"{value:.4g}"


def environment() -> dict[str, Any]:
    """Return the machine, versions and commit of this process."""
    import platform

    import numpy
    import timm
    import torchvision

    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "pid": os.getpid(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "commit": read_commit(Path(__file__).resolve().parent.parent),
        "versions": versions(torch=torch, torchvision=torchvision, timm=timm, numpy=numpy) | installed(*DECODERS),
        "processor": processor(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def read_commit(checkout: Path, digits: int = 40) -> str:
    """Return the commit of a checkout, marked if files differ from it; an empty string if git does not know it."""
    import subprocess

    git = ["git", "describe", "--always", "--dirty", f"--abbrev={digits}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(git, cwd=checkout, capture_output=True, text=True, timeout=10).stdout.strip()
    return ""


def processor() -> str:
    """Return the name of the processor; on Linux it is read from /proc/cpuinfo."""
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages, without importing them."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def versions(**modules: Any) -> dict[str, str]:
    return {name: str(module.__version__) for name, module in modules.items()}
