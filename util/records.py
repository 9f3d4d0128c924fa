"""The records of a run: log lines, metrics, unreadable images, dumps of bad updates, and the result."""

from __future__ import annotations

import datetime
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from data.files import write_json, write_text
from data.loader import Batches, Source, allowed_bad
from options import to_dict
from util import checkpoint
from util.exits import TooManyBadImages, log_record
from util.logging import RunLog, log_file
from util.state import TrainingState, precision_name
from util.stepper import Unstable, list_bad_losses

log = logging.getLogger(__name__)

SPIKE = 10  # a loss is reported above this multiple of the median of the last USUAL_OF logged losses
USUAL_OF, USUAL_FROM = 50, 5
SLOW = 60.0  # if the first log line takes longer than these seconds, the duration of the run is logged before it


class Records:
    """Write the records of a run. All processes call its methods together; the main process writes."""

    def __init__(self, folder: Path, run_id: str, source: Source, batches: Batches, state: TrainingState):
        self.folder, self.run_id, self.source, self.batches, self.state = folder, run_id, source, batches, state
        self.options, self.processes = state.options, state.processes
        self.log: RunLog | None = None
        self._file: logging.Handler | None = None
        self._losses: deque[float] = deque(maxlen=USUAL_OF)
        self._listed = 0  # unreadable images in bad_images.txt

    @property
    def _step(self) -> int:
        return self.state.stepper.step

    def open(self, stack: ExitStack, total_steps: int) -> None:
        """Open the files, which `stack` closes, and log the precision and device of the run."""
        self._began = self._logged_at = time.monotonic()
        self._logged_step = self._first_step = self._step
        self._first_step_at = self._began
        self._total_steps = total_steps
        if self.processes.main:
            self._file = stack.enter_context(log_file(self.folder / "train.log"))
            self._log_plan(total_steps)
            self.log = RunLog(
                self.folder,
                self.run_id,
                step=self._step,
                total_steps=total_steps,
                epochs=self.options.epochs,
                wandb_project=self.options.wandb,
                config=to_dict(self.options),
            )
            stack.callback(self.log.close)

    def _log_plan(self, total_steps: int) -> None:
        options, steps = self.options, self.batches.steps_per_epoch
        log.info("run %s in %s, on %s", self.run_id, self.folder, self.processes.device)
        log.info(
            "%d images: %d epochs x %d steps%s = %d updates",
            len(self.source),
            options.epochs,
            steps,
            "" if options.epochs * steps == total_steps else ", the last epoch cut short,",
            total_steps,
        )
        if left_out := len(self.source) - steps * options.total_batch_size:
            log.info(
                "%d of the images, chosen at random in each epoch, are not used because they do not fill a step",
                left_out,
            )
        log.info(
            "%d images per step: batch_size %d x accum_iter %d x %d processes; peak learning rate %.3e, precision %s",
            options.total_batch_size,
            options.batch_size,
            options.accum_iter,
            self.processes.world_size,
            self.state.stepper.optimizer.defaults["lr"],
            precision_name(self.state.amp),
        )
        if options.warmup_epochs >= options.epochs:
            log.warning("the warm-up of %g epochs does not end within this run", options.warmup_epochs)

    def write_error(self, error: BaseException) -> None:
        """Write the error that ended the run to train.log; the program writes it to the terminal."""
        if self.log is not None:
            self.log.failed = True
        if self._file is not None:
            self._file.handle(log_record(error))

    def after_step(self) -> None:
        """Log a step at the logging interval. The training loop synchronises the device only here."""
        if self.log:
            self.log.advance(self._step)
            self._announce_slow_steps()
        if self._step % self.options.log_every:
            return
        now, stepper = time.monotonic(), self.state.stepper
        seconds, steps = now - self._logged_at, self._step - self._logged_step
        values = self.state.means.recent()
        self._warn_of_spike(values["loss"])
        values |= {
            "lr": stepper.lr,
            "grad_norm": float(stepper.grad_norm),
            "images_per_s": steps * self.options.total_batch_size / seconds,
            "data_wait": min(1.0, self.batches.wait_seconds / seconds),
            "bad_steps": stepper.bad_steps()[0],
        }
        if self.processes.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if self.log:
            self.log.step(self._step, self.state.epoch, values)
        self._logged_at, self._logged_step = now, self._step
        self.batches.reset_wait()
        self.check()

    def _announce_slow_steps(self) -> None:
        """After two steps on a CPU, log the estimated duration of the run if the first log line will take long."""
        done = self._step - self._first_step
        if done == 1:
            self._first_step_at = time.monotonic()  # the first step includes starting workers and compiling
        if done != 2 or self.processes.device.type != "cpu":
            return
        seconds = time.monotonic() - self._first_step_at
        steps = self._total_steps - self._step
        if seconds * min(steps, self.options.log_every) > SLOW:
            left = datetime.timedelta(seconds=round(seconds * steps))
            log.info(
                "a step takes %.0f s: the remaining %d steps take about %s at this speed. Smaller images, larger "
                "patches or a smaller model are faster",
                seconds,
                steps,
                left,
            )

    def after_epoch(self, **values: Any) -> None:
        """Log an epoch; `values` are added to its line in log.txt."""
        state = self.state
        overall = {f"train_{name}": value for name, value in state.means.overall().items()}
        state.last = {"epoch": state.epoch, "step": self._step, **overall, "train_lr": state.stepper.lr, **values}
        if self.log:
            self.log.epoch(state.last)

    def write_result(self, **values: Any) -> None:
        """Write result.json, which exists only for a finished run."""
        result = {
            "run_id": self.run_id,
            "epochs": self.options.epochs,
            "steps": self._step,
            "images_seen": self._step * self.options.total_batch_size,
            "bad_steps": self.state.stepper.bad_steps()[0],
            "bad_images": len(self.state.problems),
            "seconds_since_start": time.monotonic() - self._began,
            "last": self.state.last,
            "best": self.state.best,
            **values,
        }
        write_json(self.folder / "result.json", finite_json(result))
        log.info("finished: %s", self.folder / "result.json")

    def _warn_of_spike(self, mean: float) -> None:
        """Warn if the highest loss since the last logged step is far above the losses logged before."""
        highest = self.state.stepper.highest_loss()
        usual = statistics.median(self._losses) if len(self._losses) >= USUAL_FROM else 0.0
        if 0 < SPIKE * usual < highest:
            log.warning(
                "step %d: a loss of %.4g since the last line, %.0f times the usual %.4g, gradient norm %.3g; if this "
                "persists, try a lower learning rate or --clip_grad",
                self._step,
                highest,
                highest / usual,
                usual,
                float(self.state.stepper.grad_norm),
            )
        if math.isfinite(mean):
            self._losses.append(mean)

    def check(self) -> None:
        """Stop a run that does not make progress.

        Raises:
            Unstable: Too many updates in a row were skipped; a dump of the last ones is written.
            TooManyBadImages: Too many images cannot be read.
        """
        bad_in_a_row = self.state.stepper.bad_steps()[1]
        if bad_in_a_row >= self.options.max_bad_steps:
            raise Unstable(self._dump(bad_in_a_row))
        self.exchange_problems()

    def _dump(self, bad_in_a_row: int) -> str:
        """Write the dump with which tools.replay repeats the last updates; return a message."""
        recents = self.processes.gather(self.state.stepper.recent())
        bad = list_bad_losses([entry for recent in recents for entry in recent])
        what = f"the loss ({', '.join(bad)})" if bad else "the gradient (every loss is finite)"
        message = f"{bad_in_a_row} steps in a row up to step {self._step} had no finite update: {what} is not finite"
        if not bad and math.isfinite(float(self.state.stepper.grad_norm)):
            message = f"{bad_in_a_row} updates in a row up to step {self._step} were skipped by --skip_spikes"
        if self.processes.main:
            path = self.folder / "debug" / f"bad-step-{self._step:08d}.json"
            record = {
                "step": self._step,
                "epoch": self.state.epoch,
                "seed": self.options.seed,
                "device": str(self.processes.device),
                "amp": self.state.amp,
                "not_finite": bad,
                "recent_by_process": [
                    [dict(entry, files=[self.source.names[i] for i in entry["index"]]) for entry in recent]
                    for recent in recents
                ],
            }
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, finite_json(record))
                checkpoint.save(path.with_suffix(".pth"), self.state.weights_dict())
                message += f". The batches, their files and the weights are in {path.with_suffix('.*')}"
                message += f"; python -m tools.replay {path} finds where it began"
            except OSError as error:
                message += f". The batches and weights could not be written to {path.parent} ({error})"
        return message

    def note(self, problems: Iterable[tuple[str, str]]) -> None:
        """Record images of this process that could not be read and were replaced."""
        self.state.problems.update(problems)

    def exchange_problems(self) -> None:
        """Share the unreadable images among the processes, and list them in bad_images.txt.

        Raises:
            TooManyBadImages: They are more than the run is allowed to replace.
        """
        problems = self.state.problems
        before = len(problems)
        if self.processes.world_size > 1:
            for gathered in self.processes.gather(problems):
                problems.update(gathered)
        if not problems:
            return
        path = self.folder / "bad_images.txt"
        if self.processes.main and (before != len(problems) or len(problems) != self._listed):
            try:
                write_text(path, "".join(f"{name}\t{why}\n" for name, why in sorted(problems.items())))
            except OSError as error:
                log.warning("cannot write %s (%s)", path, error)
            log.warning("%d unreadable images so far, replaced by others: see %s", len(problems), path)
        self._listed = len(problems)
        images = len(self.source)
        if len(problems) > allowed_bad(self.options.max_bad_fraction, images):
            first = "; ".join(f"{name} ({why})" for name, why in sorted(problems.items())[:5])
            raise TooManyBadImages(
                f"{len(problems)} of {images} images cannot be read, more than --max_bad_fraction "
                f"{self.options.max_bad_fraction:g} allows: {first}. All of them: {path}"
            )


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and infinity, which JSON does not support, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite_json(part) for part in value]
    return value
