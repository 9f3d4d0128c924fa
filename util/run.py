"""One run and its folder: start or continue, remember, save, stop, finish. Every front door uses it.

A run is a folder and a configuration. Started again with the same words it goes on from its newest whole checkpoint, at
the very step, and ends bit for bit where an uninterrupted run ends; with other words it refuses and shows what differs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.loader import Batch, Batches, NothingReadable, Samples, Source, allowed_bad, pixel_statistics
from options import RunOptions, resolve_batch, to_dict
from util import checkpoint, distributed, optim, precision
from util.compiler import compiles
from util.distributed import CONTINUE, SAVE, STOP, Agreement, NoDevice, Processes, StopRequest
from util.folder import AlreadyFinished, RunFolder, write_whole
from util.logging import RunLog, log_file, talk
from util.meters import Means
from util.stepper import Stepper, Unstable, names_of_bad_losses

log = logging.getLogger(__name__)

Options = TypeVar("Options", bound=RunOptions)

SAVE_TRIES = 3
SPIKE = 10  # times the usual loss, which is the median of that many lines of the log
USUAL_OF, USUAL_FROM = 50, 5
EXIT_DONE, EXIT_BAD_INPUT, EXIT_UNSTABLE, EXIT_CANNOT_SAVE, EXIT_INTERRUPTED = 0, 2, 3, 4, 75


class Interrupted(Exception):
    """A stop was asked for; everything is saved."""


class CannotSave(RuntimeError):
    """Saving failed too often in a row."""


class TooManyBadImages(ValueError):
    """More unreadable images than the run may replace."""


class Run:
    """The folder, the records and the state of one training run.

    Use: `run = Run(options, processes, source)`, then `run.prepare(...)`, `with run:`, loop over `run.epochs()`, call
    `run.after_step()` after every optimizer step and `run.end_epoch()` after every epoch, then `run.finish()`.
    """

    def __init__(self, options: RunOptions, processes: Processes, source: Source):
        """Look at the folder and decide how to begin. `source` holds the training images.

        AlreadyFinished when nothing is left to do; ValueError when the folder belongs to something else.
        """
        self.options, self.processes, self.source = options, processes, source
        self.amp = precision.resolve_amp(options.amp, processes.device)
        if options.skip_spikes and self.amp == "fp16":
            raise ValueError("--skip_spikes goes with bf16 and full precision, this device takes fp16: see --amp")
        self.autocast = precision.autocast(self.amp, processes.device)
        folder = RunFolder(options)
        self.folder, self.checkpoints, self._lock = folder.path, folder.checkpoints, folder.lock
        self.run_id = processes.broadcast(f"{int(time.time()):x}-{os.getpid():x}")
        self.best: dict[str, Any] = {}
        self.last: dict[str, Any] | None = None  # the figures of the newest finished epoch
        self.epoch, self._epoch_step = 0, 0
        self.log: RunLog | None = None
        self._file: logging.Handler | None = None
        self._problems: dict[str, str] = {}  # unreadable images and why
        self._listed = 0
        self._save_failures = 0
        self._losses: deque[float] = deque(maxlen=USUAL_OF)
        self._stop = StopRequest()
        self._agree = Agreement(processes)
        facts = {"run_id": self.run_id, "processes": processes.world_size, "device": str(processes.device)}
        self._start, self._start_state = self._together(lambda: folder.begin(source.fingerprint, **facts))

    def _together(self, begin: Callable[[], tuple[str, dict[str, Any] | None]]) -> tuple[str, dict[str, Any] | None]:
        """The main process looks and writes; all get the path it chose, or its error. The content stays where it is."""
        path, state, failure = "", None, None
        if self.processes.main:
            try:
                path, state = begin()
            except (ValueError, OSError, AlreadyFinished) as error:
                failure = error
        path, failure = self.processes.broadcast((path, failure))
        if failure is not None:
            raise failure
        return path, state

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
        """Make everything that a step needs, and restore it when the run goes on.

        The model is on its device. `schedule` is MAE's warm-up and cosine over `total_steps` unless given; these are
        all steps of all epochs unless the last epoch is cut short. `others` are further things with a state_dict to
        save and restore. Afterwards: `trained` (to be called in the loop), `stepper`, `means`.
        """
        options, processes = self.options, self.processes
        self.total_steps = total_steps or batches.steps_per_epoch * options.epochs
        self.model, self.batches, self.others = model, batches, others
        if options.compile and compiles(processes.device):
            model.compile()
        self.trained: nn.Module = model
        if processes.world_size > 1:
            ids = [processes.local_rank] if processes.device.type == "cuda" else None
            self.trained = DistributedDataParallel(model, device_ids=ids)
        self.stepper = Stepper(
            self.trained,
            optimizer,
            schedule or self._warmup_cosine(optimizer),
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
        if self._start:
            self._restore(self._start_state or checkpoint.load(self._start))
            self._start_state = None
            self._complete_best()

    def _warmup_cosine(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        return optim.warmup_cosine(
            optimizer,
            epochs=self.total_steps / self.batches.steps_per_epoch,
            warmup_epochs=self.options.warmup_epochs,
            steps_per_epoch=self.batches.steps_per_epoch,
            min_lr=self.options.min_lr,
        )

    @staticmethod
    def _precision(amp: str) -> str:
        return "full" if amp == "none" else amp

    def _fitting(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state; for batches of another size, at the step after as many images. CheckpointError if it fits not."""
        if lacks := [name for name in self.others if name not in state]:
            raise checkpoint.CheckpointError(f"{self._start} holds no {', '.join(lacks)} to go on with")
        own, theirs = (
            {name: value.shape for name, value in part.items()} for part in (self.model.state_dict(), state["model"])
        )
        if different := sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)):
            raise checkpoint.CheckpointError(f"{self._start} is of another model: {', '.join(different[:5])} differ")
        sampler, now = state["sampler"], self.options.total_batch_size
        if sampler["batch"] == now:
            return state
        offset = sampler["offset"] * sampler["batch"] // now
        step = state["epoch"] * self.batches.steps_per_epoch + offset
        log.warning("%d images a step, not %d: step %d counts as %d", now, sampler["batch"], state["step"], step)
        return {**state, "step": step, "sampler": {**sampler, "offset": offset}}

    def _restore(self, state: Mapping[str, Any]) -> None:
        state = self._fitting(state)
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(
            {
                "step": state["step"],
                "bad": state["bad"],
                "usual_norm": state.get("usual_norm", 0.0),  # older files have none
                "optimizer": state["optimizer"],
                "scaler": state["scaler"],
            }
        )
        for name, part in self.others.items():
            part.load_state_dict(state[name])
        self.epoch, self._epoch_step = state["epoch"], state["sampler"]["offset"]
        if state["means"]:
            self.means.load_state_dict(state["means"])
        self.best, self.last = state["best"], state.get("last")
        self._problems = dict(state["problems"])
        then = state["sampler"]["world_size"]
        if then != self.processes.world_size:
            log.warning(
                "going on with %d processes instead of %d: the order of images stays, sums are rounded otherwise",
                self.processes.world_size,
                then,
            )
        if (amp := state.get("amp", self.amp)) != self.amp:  # `auto` means another on another device
            log.warning("going on with precision %s instead of %s", self._precision(self.amp), self._precision(amp))
        log.info("going on from %s: epoch %d, step %d", self._start, self.epoch, self.stepper.step)

    def _complete_best(self) -> None:
        """A kill may have come when `last.pth` was written and not yet named `best.pth` too."""
        newest = self.checkpoints / checkpoint.LAST
        just_saved = self._epoch_step == 0 and self.best and self.best["epoch"] == self.epoch - 1
        if self.processes.main and just_saved and Path(self._start) == newest:
            _copy(newest, self.checkpoints / checkpoint.BEST)

    def _state(self) -> dict[str, Any]:
        stepper = self.stepper.state_dict()
        return {
            "format": checkpoint.FORMAT,
            "model": self.model.state_dict(),
            "optimizer": stepper["optimizer"],
            "scaler": stepper["scaler"],
            "epoch": self.epoch,
            "step": stepper["step"],
            "bad": stepper["bad"],
            "usual_norm": stepper["usual_norm"],
            "sampler": {
                "epoch": self.epoch,
                "offset": self._epoch_step,
                "seed": self.options.seed,
                "world_size": self.processes.world_size,
                "batch": self.options.total_batch_size,
            },
            "means": self.means.state_dict() if self._epoch_step else None,
            "best": self.best,
            "last": self.last,
            "problems": dict(self._problems),
            "options": to_dict(self.options),
            "data": self.source.fingerprint,
            "amp": self.amp,
            "versions": {"torch": str(torch.__version__)},
            **{name: part.state_dict() for name, part in self.others.items()},
        }

    def save(self, *also: str) -> None:
        """Write `last.pth`, and give it further names. All processes must call it together; one writes."""
        began = time.monotonic()
        self._exchange_problems()
        state = self._state()
        if not self.processes.main:
            return
        if self._lock.lost():
            raise CannotSave(f"another process has taken over {self.folder} while this one gave no sign of life")
        for attempt in range(SAVE_TRIES):
            try:
                checkpoint.keep_previous(self.checkpoints)
                checkpoint.save(self.checkpoints / checkpoint.LAST, state)
                for name in also:
                    _copy(self.checkpoints / checkpoint.LAST, self.checkpoints / name)
                self._save_failures = 0
                break
            except OSError as error:
                log.error("saving to %s failed (%s), try %d of %d", self.checkpoints, error, attempt + 1, SAVE_TRIES)
                if attempt + 1 < SAVE_TRIES:
                    time.sleep(0.2 * 4**attempt)
        else:
            self._save_failures += 1
            if self._save_failures > self.options.max_save_failures:
                raise CannotSave(f"{self._save_failures} saves in a row to {self.checkpoints} failed")
            log.error("not saved; the last good checkpoint stays, training goes on (%d in a row)", self._save_failures)
        self._saved_at = time.monotonic()
        self._save_seconds += self._saved_at - began

    def save_best(self, name: str, value: float) -> bool:
        """Keep this state as `best.pth`, with the next save, if `value` is the highest yet or equal to it.

        Among equal values the latest counts: on few images the first epoch, at a rate of almost 0, often ties.
        """
        if self.best and value < self.best["value"]:
            return False
        self.best = {"name": name, "value": value, "epoch": self.epoch}
        return True

    # ---- going on --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._open = ExitStack()
        self._open.callback(self._lock.release)
        self._stop.listen()
        self._saved_at = self._logged_at = self._began = time.monotonic()
        self._save_seconds = 0.0
        self._logged_step = self.stepper.step
        if self.processes.main:
            self._file = self._open.enter_context(log_file(self.folder / "train.log"))
            self._announce()
            self.log = RunLog(self.folder, self.run_id, step=self.stepper.step, total_steps=self.total_steps)
            self._open.callback(self.log.close)
        return self

    def _announce(self) -> None:
        """The arithmetic of the run, before it begins."""
        options, steps = self.options, self.batches.steps_per_epoch
        log.info("run %s in %s, on %s", self.run_id, self.folder, self.processes.device)
        log.info(
            "%d images: %d epochs x %d steps%s = %d updates",
            len(self.source),
            options.epochs,
            steps,
            "" if options.epochs * steps == self.total_steps else ", the last epoch cut short,",
            self.total_steps,
        )
        log.info(
            "%d images a step: %d at a time x %d accumulated x %d processes; learning rate %.3e, precision %s",
            options.total_batch_size,
            options.batch_size,
            options.accum_iter,
            self.processes.world_size,
            self.stepper.optimizer.defaults["lr"],
            self._precision(self.amp),
        )
        if options.warmup_epochs >= options.epochs:
            log.warning("the warm-up of %g epochs does not end within this run", options.warmup_epochs)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """The log's file has the last words, too, which the front door says on the terminal when it is closed."""
        unforeseen = isinstance(error, ValueError) and not isinstance(error, TooManyBadImages | NothingReadable)
        if error is not None and self._file is not None:
            self._file.handle(_last_words(error, None if unforeseen else ending_of(error)))
        self._open.close()
        if unforeseen:
            raise RuntimeError("a defect, not bad input: training itself met this error") from error

    def epochs(self) -> Iterator[tuple[int, int]]:
        """The epochs still to do, each with the optimizer steps already done in it."""
        while self.epoch < self.options.epochs:
            yield self.epoch, self._epoch_step

    @property
    def loop(self) -> dict[str, Any]:
        """What an epoch of training takes from a run, by the names of `engine_pretrain.train_one_epoch`."""
        return {
            "stepper": self.stepper,
            "means": self.means,
            "device": self.processes.device,
            "autocast": self.autocast,
            "note": self.note,
            "after_step": self.after_step,
        }

    def after_step(self) -> None:
        """Call after every optimizer step: log, save, stop when it is time. Interrupted when a stop was asked for."""
        step = self.stepper.step
        self._epoch_step += 1
        if step % self.options.log_every == 0:
            self._log_step()
        wanted = STOP if self._stop.signal else SAVE if self._save_is_due() else CONTINUE
        agreed = self._agree(wanted)
        if agreed != CONTINUE or (self.options.save_steps and step % self.options.save_steps == 0):
            self.save()
        self._leave_if(agreed == STOP)

    def _save_is_due(self) -> bool:
        minutes = self.options.save_minutes
        return self.processes.main and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation, cut short when this process is asked to stop. `leave_if_stopped` comes next."""
        for batch in batches:
            yield batch
            if self._stop.signal:
                return

    def leave_if_stopped(self) -> None:
        """After an evaluation: Interrupted when a stop was asked for; the same command begins the evaluation again."""
        stop = self._is_asked_to_stop()
        if stop and self.epoch < self.options.epochs:  # after the last epoch everything is saved
            self.save()
        self._leave_if(stop)

    def _is_asked_to_stop(self) -> bool:
        """Whether any process has got a signal by now; all must ask together."""
        mine = STOP if self._stop.signal else CONTINUE
        return STOP in (self._agree.settle(), self._agree(mine), self._agree.settle())

    def _leave_if(self, stop: bool) -> None:
        if stop and self._save_failures:
            raise CannotSave(f"stopped after step {self.stepper.step}, which could not be saved")
        if stop:
            name = self._stop.signal.name if self._stop.signal else "another process's signal"
            raise Interrupted(f"stopped by {name} after step {self.stepper.step}; the same command goes on from here")

    def _log_step(self) -> None:
        """The only place in the loop that waits for the device."""
        now = time.monotonic()
        seconds, steps = now - self._logged_at, self.stepper.step - self._logged_step
        values = self.means.recent()
        self._warn_of_spike(values["loss"])
        bad_total, bad_in_a_row = self.stepper.bad_steps()
        values |= {
            "lr": self.stepper.lr,
            "grad_norm": float(self.stepper.grad_norm),
            "images_per_s": steps * self.options.total_batch_size / seconds,
            "data_wait": min(1.0, self.batches.wait_seconds / seconds),
            "bad_steps": bad_total,
        }
        if self.processes.device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        if self.log:
            self.log.step(self.stepper.step, self.epoch, values)
        self._logged_at, self._logged_step = now, self.stepper.step
        self.batches.reset_wait()
        self._check(bad_in_a_row)

    def _warn_of_spike(self, mean: float) -> None:
        """Compare the highest loss since the last line with what the lines before said."""
        highest = self.stepper.highest_loss()
        usual = statistics.median(self._losses) if len(self._losses) >= USUAL_FROM else 0.0
        if 0 < SPIKE * usual < highest:
            log.warning(
                "step %d: a loss of %.4g since the last line, %.0f times the usual %.4g, gradient norm %.3g; if this "
                "stays, try a lower learning rate or --clip_grad",
                self.stepper.step,
                highest,
                highest / usual,
                usual,
                float(self.stepper.grad_norm),
            )
        if math.isfinite(mean):
            self._losses.append(mean)

    def _check(self, bad_in_a_row: int) -> None:
        """Unstable, with a dump, after too many refused updates in a row; TooManyBadImages after too many of those."""
        if bad_in_a_row >= self.options.max_bad_steps:
            raise Unstable(self._dump(bad_in_a_row))
        self._exchange_problems()

    def _dump(self, bad_in_a_row: int) -> str:
        """Write what is needed to look into it; answers what happened in a sentence."""
        recents = self.processes.gather(self.stepper.recent())
        step = self.stepper.step
        files = [[dict(entry, files=self._names(entry["index"])) for entry in r] for r in recents]
        bad = names_of_bad_losses([entry for r in recents for entry in r])
        what = f"the loss ({', '.join(bad)})" if bad else "the gradient (every loss is finite)"
        message = f"{bad_in_a_row} steps in a row up to step {step} had no finite update: {what} is not finite"
        if not bad and math.isfinite(float(self.stepper.grad_norm)):
            message = f"{bad_in_a_row} updates in a row up to step {step} were left out by --skip_spikes"
        if self.processes.main:
            path = self.folder / "debug" / f"bad-step-{step:08d}.json"
            record = {
                "step": step,
                "epoch": self.epoch,
                "seed": self.options.seed,
                "device": str(self.processes.device),
                "amp": self.amp,
                "not_finite": bad,
                "recent_by_process": files,
            }
            try:
                path.parent.mkdir(exist_ok=True)
                write_whole(path, json.dumps(_finite(record), indent=1))
                checkpoint.save(path.with_suffix(".pth"), self._state_of_one())
                message += f". The batches, their files and the weights are in {path.with_suffix('.*')}"
                message += f"; python -m tools.replay {path} finds where it began"
            except OSError as error:
                message += f". What is needed to look into it could not be written to {path.parent} ({error})"
        return message

    def _state_of_one(self) -> dict[str, Any]:
        return {"format": checkpoint.FORMAT, "model": self.model.state_dict(), "options": to_dict(self.options)}

    def _names(self, index: list[int]) -> list[str]:
        return [self.source.names[i] for i in index]

    def note(self, problems: list[tuple[str, str]]) -> None:
        """Images of this process that could not be read and were replaced."""
        self._problems.update(problems)

    def _exchange_problems(self) -> None:
        """Every process learns of every unreadable image; the main one lists them. TooManyBadImages past the limit."""
        before = len(self._problems)
        if self.processes.world_size > 1:
            for theirs in self.processes.gather(self._problems):
                self._problems.update(theirs)
        if not self._problems:
            return
        path = self.folder / "bad_images.txt"
        if self.processes.main and (before != len(self._problems) or len(self._problems) != self._listed):
            try:
                write_whole(path, "".join(f"{name}\t{why}\n" for name, why in sorted(self._problems.items())))
            except OSError as error:
                log.warning("cannot write %s (%s)", path, error)
            log.warning("%d unreadable images so far, replaced by others: see %s", len(self._problems), path)
        self._listed = len(self._problems)
        images = len(self.source)
        if len(self._problems) > allowed_bad(self.options.max_bad_fraction, images):
            first = "; ".join(f"{name} ({why})" for name, why in sorted(self._problems.items())[:5])
            raise TooManyBadImages(
                f"{len(self._problems)} of {images} images cannot be read, more than --max_bad_fraction "
                f"{self.options.max_bad_fraction:g} allows: {first}. All of them: {path}"
            )

    def end_epoch(self, **values: Any) -> None:
        """Record the epoch, begin the next, save. `values` go into its line of log.txt. Interrupted as after a step."""
        self._check(self.stepper.bad_steps()[1])
        overall = {f"train_{name}": value for name, value in self.means.overall().items()}
        self.last = {"epoch": self.epoch, "step": self.stepper.step, **overall, "train_lr": self.stepper.lr, **values}
        if self.log:
            self.log.epoch(self.last)
        self.epoch, self._epoch_step = self.epoch + 1, 0
        self.means.reset()
        also = []
        if self.epoch % self.options.save_every == 0 or self.epoch == self.options.epochs:
            also.append(f"epoch-{self.epoch:04d}.pth")
        if self.best and self.best["epoch"] == self.epoch - 1:
            also.append(checkpoint.BEST)
        self.save(*also)
        if self.processes.main:
            checkpoint.drop_old_epochs(self.checkpoints, self.options.keep)
        # A signal since the last step must be heard by all even when no step follows.
        self._leave_if(self._is_asked_to_stop() and self.epoch < self.options.epochs)

    def finish(self, **values: Any) -> None:
        """Write result.json, which exists only for a finished run. CannotSave where its end is not on the disk."""
        if not self.processes.main:
            return
        if self._save_failures:
            raise CannotSave(
                "training is done, but its end could not be saved: start again to go on from the last save"
            )
        result = {
            "run_id": self.run_id,
            "epochs": self.options.epochs,
            "steps": self.stepper.step,
            "images_seen": self.stepper.step * self.options.total_batch_size,
            "bad_steps": self.stepper.bad_steps()[0],
            "bad_images": len(self._problems),
            "seconds_since_start": time.monotonic() - self._began,
            "seconds_saving": self._save_seconds,
            "last": self.last,
            "best": self.best,
            **values,
        }
        try:
            write_whole(self.folder / "result.json", json.dumps(_finite(result), indent=1))
        except OSError as error:
            raise CannotSave(f"training is done, but result.json is not written ({error}): start again") from error
        log.info("finished: %s", self.folder / "result.json")


def _finite(value: Any) -> Any:
    """JSON has no NaN: written as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return value


def _copy(path: Path, other: Path) -> None:
    """A second name for a file that is never written in place."""
    temporary = other.with_name(f".{other.name}{checkpoint.TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def resolve(options: Options) -> Options:
    """The same options with the batch, and the mean and deviation of the pixels, worked out."""
    mean, std = pixel_statistics(options.in_chans, options.mean, options.std)
    return replace(resolve_batch(options, distributed.world_size()), mean=mean, std=std)


def share_batches(options: RunOptions, samples: Samples, processes: Processes) -> Batches:
    """This process's share of the batches that the (resolved) options ask for."""
    return Batches(
        samples,
        batch_size=options.batch_size,
        accum=options.accum_iter,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=options.seed,
        num_workers=options.num_workers,
        pin_memory=options.pin_mem and processes.device.type == "cuda",
        worker_timeout=options.worker_timeout,
    )


def _stopped_early(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name} before the first step; nothing is lost")


def run_front_door(train: Callable[[Any], None], options: Any) -> int:
    """Call `train(options)`, log how it ended, and return the exit code.

    0 done (or nothing left to do), 2 bad input, 3 no finite updates, 4 checkpoints cannot be written, 75 stopped by a
    signal with everything saved, or before the first step ("requeue me"). A second Ctrl-C leaves at once with 130.
    Anything else is a defect and keeps its traceback. Signals mean to the caller afterwards what they meant before.
    """
    talk(main=int(os.environ.get("RANK", "0")) == 0, keep=True)
    before = distributed.on_stop_signals(_stopped_early)  # until a run begins and listens itself
    code = None
    try:
        code = _outcome(train, options)
    finally:
        for number, act in before.items():
            # Stopped, the process is about to end: another such signal must not become its exit code.
            ending = code == EXIT_INTERRUPTED and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else act)
    return code


def _outcome(train: Callable[[Any], None], options: Any) -> int:
    try:
        train(options)
    except Exception as error:
        if (ending := ending_of(error)) is None:
            raise
        # What is wrong for all, one process of each machine says; what is wrong for one alone, that one.
        of_all = isinstance(error, ValueError) and not isinstance(error, NoDevice | NothingReadable)
        if not of_all or int(os.environ.get("LOCAL_RANK", "0")) == 0:
            log.log(ending.level, "%s", ending.words)
        return ending.code
    return EXIT_DONE


class Ending(NamedTuple):
    """How a run may end before it is done: an exit code, and words of a level."""

    code: int
    level: int
    words: str


def ending_of(error: BaseException) -> Ending | None:
    """None for a defect, which keeps its traceback."""
    match error:
        case AlreadyFinished():
            return Ending(EXIT_DONE, logging.INFO, str(error))
        case Interrupted():
            return Ending(EXIT_INTERRUPTED, logging.INFO, str(error))
        case Unstable():
            return Ending(EXIT_UNSTABLE, logging.ERROR, str(error))
        case CannotSave():
            return Ending(EXIT_CANNOT_SAVE, logging.ERROR, str(error))
        case torch.OutOfMemoryError():
            what = str(error).split(". ")[0]
            advice = (
                "Give half the --batch_size and the same --total_batch_size: more is accumulated and the run goes on"
            )
            return Ending(EXIT_BAD_INPUT, logging.ERROR, f"error: {what}\n{advice}")
        case ValueError():
            return Ending(EXIT_BAD_INPUT, logging.ERROR, f"error: {error}")
    return None


def _last_words(error: BaseException, ending: Ending | None) -> logging.LogRecord:
    """A line for the log's file alone; of a defect, its traceback."""
    if ending is None:
        traceback = type(error), error, error.__traceback__
        return logging.LogRecord(__name__, logging.ERROR, __file__, 0, "a defect ended the run", (), traceback)
    return logging.LogRecord(__name__, ending.level, __file__, 0, ending.words, (), None)
