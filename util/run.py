"""A run and its folder: start or resume, train, save, stop, finish. All programs use it.

Re-running the same command resumes from the latest valid checkpoint, at the exact step, and the result is bit-exactly
that of an uninterrupted run. Another configuration is refused, with a table of the differences.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch, Batches, EvalSamples, Samples, Source, eval_batches, pixel_statistics
from options import RunOptions, default_folder, resolve_batch
from util import checkpoint, distributed, optim, precision
from util.compiler import compiles
from util.decisions import Decisions
from util.distributed import CONTINUE, STOP, Processes
from util.exits import CannotSave, Interrupted, is_bug
from util.folder import AlreadyFinished, RunFolder, given_steps
from util.logging import RunLog
from util.meters import Means
from util.records import Records
from util.saving import Saver
from util.state import TrainingState
from util.stepper import Stepper

Options = TypeVar("Options", bound=RunOptions)
Result = TypeVar("Result")

log = logging.getLogger(__name__)


class Run:
    """One training run.

    Use: `run = Run(options, processes, source)`, then `run.prepare(...)`, `with run:`, loop over `run.epochs()`, call
    `run.after_step()` after every optimizer step and `run.end_epoch()` after every epoch, then `run.finish()`.
    """

    def __init__(self, options: RunOptions, processes: Processes, source: Source):
        """Acquire the run's folder and find the checkpoint to resume from; no file is changed before `with run:`.

        Args:
            options: Resolved options, see `resolve`.
            processes: The processes that train together.
            source: The training images.

        Raises:
            AlreadyFinished: The run in the folder is already finished.
            ValueError: The folder is not of this run.
        """
        self.options, self.processes, self.source = options, processes, source
        self.amp = precision.resolve_amp(options.amp, processes.device)
        if options.skip_spikes and self.amp == "fp16":
            raise ValueError("--skip_spikes works with bf16 and full precision; this device uses fp16: see --amp")
        self.autocast = precision.autocast(self.amp, processes.device)
        folder = RunFolder(options)
        self.folder, self.checkpoints = folder.path, folder.checkpoints
        self.run_id = processes.broadcast(f"{int(time.time()):x}-{os.getpid():x}")
        self._run_folder = folder
        self._saver = Saver(folder, options)
        self._decisions = Decisions(options, processes)
        found = self._in_main(lambda: folder.find_start(source.fingerprint))
        start, self._start_state = found or ("", None)  # only the main process has the content
        self._start: str = processes.broadcast(start)

    def _in_main(self, act: Callable[[], Result]) -> Result | None:
        """Call `act` in the main process, which returns its result, the others None; all processes raise its error."""
        result, failure = None, None
        if self.processes.main:
            try:
                result = act()
            except (ValueError, OSError, AlreadyFinished) as error:
                failure = error
        failure = self.processes.broadcast(failure)
        if failure is not None:
            raise failure
        return result

    # ---- state -----------------------------------------------------------------------------------------------------

    def prepare(
        self,
        model: nn.Module,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        schedule: Scheduler | None = None,
        total_steps: int = 0,
        **others: Any,
    ) -> None:
        """Create everything that a step needs, and restore its state if the run resumes.

        This sets the attributes `trained` (the model to call in the loop), `stepper`, `means` and `state`.

        Args:
            model: The model, on its device.
            batches: This process's batches.
            optimizer: Optimizer of the parameters of `model`.
            schedule: Schedule of the learning rate; default: MAE's warm-up and half cosine over `total_steps`.
            total_steps: Optimizer steps of the run; default: all steps of all epochs.
            others: Other objects with a state_dict to save and restore.
        """
        options, processes = self.options, self.processes
        stored = (self._start_state or checkpoint.load(self._start)) if self._start else None
        self._start_state = None
        if stored:
            optim.restore_groups(optimizer, model, stored["optimizer"]["param_groups"])
        self.total_steps = total_steps or batches.steps_per_epoch * options.epochs
        if options.compile and compiles(processes.device):
            model.compile()
        self.trained: nn.Module = model
        if processes.world_size > 1:
            ids = [processes.local_rank] if processes.device.type == "cuda" else None
            self.trained = DistributedDataParallel(model, device_ids=ids)
        self.stepper = Stepper(
            self.trained,
            optimizer,
            schedule or self._warmup_cosine(optimizer, batches.steps_per_epoch),
            accum=options.accum_iter,
            clip_grad=options.clip_grad,
            skip_spikes=options.skip_spikes,
            fp16=self.amp == "fp16",
            seed=options.seed,
            rank=processes.rank,
            hooks=cast(Any, model) if hasattr(model, "before_step") else None,
            total_steps=self.total_steps,
            steps_per_epoch=batches.steps_per_epoch,
        )
        self.means = Means(processes)
        self.state = TrainingState(
            options,
            self.source.fingerprint,
            self.amp,
            processes,
            model,
            self.stepper,
            self.means,
            batches.steps_per_epoch,
            others,
        )
        self.records = Records(self.folder, self.run_id, self.source, batches, self.state)
        if stored:
            self.state.load_state_dict(stored, self._start)
            self._require_steps_left(batches.steps_per_epoch)
            self._starts_at_best = self.state.is_best
            if self.state.cut_short and self.stepper.step < self.total_steps:
                self.state.reopen_epoch()

    def _require_steps_left(self, steps_per_epoch: int) -> None:
        """Raise ValueError if the run resumes beyond its end, because fewer epochs or steps are given than before."""
        step, total = self.stepper.step, self.total_steps
        if step <= total:
            return
        name = "steps" if given_steps(self.options) else "epochs"
        files = checkpoint.kept_epochs(Path(self._start).parent)
        earlier = [path for path in files if int(path.stem.removeprefix("epoch-")) * steps_per_epoch <= total]
        advice = f"resume an earlier file, --resume {earlier[-1]}, or " if earlier else ""
        asked = f"the {total} steps of --{name} {getattr(self.options, name)}"
        raise ValueError(f"{self._start}: step {step} is beyond {asked}: {advice}give more {name}")

    def _warmup_cosine(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
        return optim.warmup_cosine(
            optimizer,
            epochs=self.total_steps / steps_per_epoch,
            warmup_epochs=self.options.warmup_epochs,
            steps_per_epoch=steps_per_epoch,
            min_lr=self.options.min_lr,
        )

    def save(self) -> None:
        """Write `last.pth`. All processes call this together; the main process writes."""
        self.records.exchange_problems()
        state = self.state.state_dict()
        if self.processes.main:
            self._saver.save(state)
        self._decisions.saved()

    def record_best(self, name: str, value: float) -> None:
        """Record this epoch as the best if `value` is at least the highest so far; `end_epoch` then writes best.pth.

        Among equal values the latest is the best: with few images, the first epoch, with a learning rate near 0, often
        ties with later ones.
        """
        if not self.state.best or value >= self.state.best["value"]:
            self.state.best = {"name": name, "value": value, "epoch": self.state.epoch, "step": self.stepper.step}

    # ---- training --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        with ExitStack() as undo:
            undo.callback(self._run_folder.leave)
            self._in_main(self._begin)
            self._open = undo.pop_all()
        if self.processes.main:
            self._open.callback(self._record_end, time.monotonic(), time.process_time())
        self._decisions.listen()
        self.records.open(self._open, self.total_steps)
        return self

    def _begin(self) -> None:
        """Change the files of the folder, now that nothing can refuse the start any more."""
        facts = {"run_id": self.run_id, "processes": self.processes.world_size, "device": str(self.processes.device)}
        self._run_folder.begin(self.source.fingerprint, **facts)
        if self._start:
            self._run_folder.adopt(Path(self._start), self.state.best, is_best=self._starts_at_best)

    def _record_end(self, began: float, cpu_began: float) -> None:
        """Add the wall-clock and CPU seconds of this start, since the given times, to environment.json."""
        try:
            self._run_folder.record_end(seconds=time.monotonic() - began, cpu_seconds=time.process_time() - cpu_began)
        except OSError as error:
            log.warning("the time of this start is not recorded (%s)", error)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.records.write_error(error)
        self._open.close()
        if is_bug(error):
            raise RuntimeError("a bug, not wrong input: training itself raised this error") from error

    @property
    def log(self) -> RunLog | None:
        """The log of metrics and images; None except in the main process."""
        return self.records.log

    def epochs(self) -> Iterator[tuple[int, int]]:
        """Yield the remaining epochs, each with the number of optimizer steps already done in it."""
        while self.state.epoch < self.options.epochs:
            yield self.state.epoch, self.state.epoch_step

    @property
    def micro_batches_left(self) -> int:
        """Return the number of micro-batches that this process still trains on."""
        return (self.total_steps - self.stepper.step) * self.options.accum_iter

    def after_step(self) -> None:
        """Log, save and stop if it is due. Call this after every optimizer step.

        Raises:
            Interrupted: A stop was requested.
        """
        self.state.epoch_step += 1
        self.records.after_step()
        decision = self._decisions.after_step(self.stepper.step)
        if decision != CONTINUE:
            self.save()
        self._stop_if(decision == STOP)

    def until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an evaluation until this process receives a signal. Call `leave_if_stopped` after it."""
        return self._decisions.until_stopped(batches)

    def leave_if_stopped(self) -> None:
        """Stop after an evaluation if a stop was requested; re-running the command repeats the evaluation.

        Raises:
            Interrupted: A stop was requested.
        """
        stop = self._decisions.is_stop_requested()
        if stop and self.state.epoch < self.options.epochs:  # after the last epoch everything is saved
            self.save()
        self._stop_if(stop)

    def _stop_if(self, stop: bool) -> None:
        if stop and self._saver.failures:
            raise CannotSave(f"stopped after step {self.stepper.step}, which could not be saved")
        if stop:
            reason = self._decisions.reason
            raise Interrupted(f"stopped by {reason} after step {self.stepper.step}; the same command resumes from here")

    def end_epoch(self, **values: Any) -> None:
        """Log the epoch with `values`, start the next one and save.

        Raises:
            Interrupted: A stop was requested.
        """
        self.records.check()
        self.records.after_epoch(**values)
        self.state.epoch, self.state.epoch_step = self.state.epoch + 1, 0
        if not self.state.cut_short:  # if it was, later starts may add steps to it
            self.means.reset()
        state = self.state.state_dict()
        if self.processes.main:
            self._saver.save_epoch(state, is_best=self.state.is_best)
        self._decisions.saved()
        # A signal since the last step must reach all processes even if no step follows.
        self._stop_if(self._decisions.is_stop_requested() and self.state.epoch < self.options.epochs)

    def finish(self, **values: Any) -> None:
        """Write result.json with `values`.

        Raises:
            CannotSave: The last checkpoint could not be written.
        """
        if not self.processes.main:
            return
        if self._saver.failures:
            raise CannotSave(
                "training is done, but its end could not be saved: run the same command to resume from the last save"
            )
        try:
            self.records.write_result(seconds_saving=self._saver.seconds, **values)
        except OSError as error:
            raise CannotSave(
                f"training is complete, but result.json could not be written ({error}): run the same command again"
            ) from error


def resolve(options: Options) -> Options:
    """Return the options with the batch sizes, the mean and deviation of the pixels and the run folder resolved."""
    folder = options.output_dir or default_folder(options)
    mean, std = pixel_statistics(options.in_chans, options.mean, options.std)
    return replace(resolve_batch(options, distributed.world_size()), mean=mean, std=std, output_dir=folder)


def share_batches(options: RunOptions, samples: Samples, processes: Processes) -> Batches:
    """Return this process's batches for the resolved options."""
    return Batches(
        samples,
        batch_size=options.batch_size,
        accum=options.accum_iter,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=options.seed,
        **_loading(options, processes),
    )


def eval_share(options: RunOptions, samples: EvalSamples, processes: Processes, batch_size: int) -> Iterator[Batch]:
    """Return this process's share of the samples in batches of `batch_size`; each sample is in one share."""
    indices = range(processes.rank, len(samples), processes.world_size)
    return eval_batches(samples, batch_size=batch_size, indices=indices, **_loading(options, processes))


def _loading(options: RunOptions, processes: Processes) -> dict[str, Any]:
    """Return the arguments of loaders that the options and the device determine."""
    pin_memory = options.pin_mem and processes.device.type == "cuda"
    return {
        "num_workers": options.num_workers,
        "pin_memory": pin_memory,
        "worker_timeout": options.worker_timeout,
    }
