"""One run and its folder: start or continue, remember, save, stop, finish. Every front door uses it.

A run is a folder and a configuration. Started again with the same words it goes on from its newest whole checkpoint, at
the very step, and ends bit for bit where an uninterrupted run ends; with other words it refuses and shows what differs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from util import checkpoint
from util.checkpoint import CheckpointError
from util.data import Batches, NothingReadable, Source, allowed_bad
from util.distributed import CONTINUE, SAVE, STOP, Agreement, Processes, StopRequest
from util.logging import RunLog, environment, log_file, talk
from util.meters import Means
from util.options import RunOptions, differences, to_dict
from util.stepper import Stepper, Unstable, names_of_bad_losses

log = logging.getLogger(__name__)

SAVE_TRIES = 3
EXIT_DONE, EXIT_BAD_INPUT, EXIT_UNSTABLE, EXIT_CANNOT_SAVE, EXIT_INTERRUPTED = 0, 2, 3, 4, 75
OURS = ("options.yaml", "environment.json", "train.log", "log.txt", "metrics.jsonl", "bad_images.txt", "result.json")
OUR_FOLDERS = ("checkpoints", "samples", "debug")


class Interrupted(Exception):
    """A stop was asked for; everything is saved."""


class AlreadyFinished(Exception):
    """This folder's run is complete."""


class CannotSave(RuntimeError):
    """Saving failed too often in a row."""


class TooManyBadImages(ValueError):
    """More unreadable images than the run may replace."""


class Run:
    """The folder, the records and the state of one training run.

    Use: `run = Run(options, processes, data)`, then `run.attach(...)`, `with run:`, loop over `run.epochs()`, call
    `run.after_step()` after every optimizer step and `run.end_epoch()` after every epoch, then `run.finish()`.
    """

    def __init__(self, options: RunOptions, processes: Processes, source: Source):
        """Look at the folder and decide how to begin. `source` holds the training images.

        AlreadyFinished when nothing is left to do; ValueError when the folder belongs to something else.
        """
        self.options, self.processes, self.source = options, processes, source
        self.folder = Path(options.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.run_id = processes.broadcast(f"{int(time.time()):x}-{os.getpid():x}")
        self.best: dict[str, Any] = {}
        self.epoch, self._epoch_step = 0, 0
        self.log: RunLog | None = None
        self._loaded: dict[str, Any] | None = None  # by the main process, while it decided
        self._problems: dict[str, str] = {}  # unreadable images and why
        self._listed = 0
        self._save_failures = 0
        self._stop = StopRequest()
        self._agree = Agreement(processes)
        self._restored = self._together(self._decide)

    # ---- beginning -------------------------------------------------------------------------------------------------

    def _together(self, decide: Any) -> Any:
        """Let the main process look and write; all get its answer, or its error."""
        answer, failure = None, None
        if self.processes.main:
            try:
                answer = decide()
            except (ValueError, OSError, AlreadyFinished) as error:
                failure = error
        answer, failure = self.processes.broadcast((answer, failure))
        if failure is not None:
            raise failure
        return answer

    def _decide(self) -> str:
        """The checkpoint to continue from, or "" to begin anew; prepares the folder."""
        path, options = self.folder, self.options
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output_dir {path} is a file; name a folder")
        ours = (path / "options.yaml").exists() or checkpoint.candidates(self.checkpoints)
        if path.is_dir() and not ours and any(path.iterdir()):
            others = ", ".join(sorted(p.name for p in path.iterdir())[:5])
            raise ValueError(
                f"--output_dir {path} holds no run but other files ({others}); name an empty or a new folder"
            )
        if options.overwrite:
            self._clear()
        finished = path / "result.json"
        chosen, state = self._choose()
        if state is not None:
            self._compare(state)
            if finished.exists() and state["epoch"] >= options.epochs:
                raise AlreadyFinished(f"the run in {path} is finished ({finished}); --overwrite starts it anew")
        finished.unlink(missing_ok=True)
        for folder in (path, self.checkpoints):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--output_dir {path} cannot be made ({error.strerror})") from error
        if not os.access(self.checkpoints, os.W_OK):
            raise ValueError(f"--output_dir {path} cannot be written")
        for name in checkpoint.remove_leftovers(self.checkpoints):
            log.info("removed %s, left behind by an interrupted save", name)
        (path / "options.yaml").write_text(yaml.safe_dump(to_dict(options), sort_keys=False))
        self._record_environment()
        self._loaded = state
        return str(chosen or "")

    def _clear(self) -> None:
        """Remove what earlier runs wrote here, and nothing else."""
        for name in OURS:
            (self.folder / name).unlink(missing_ok=True)
        for name in OUR_FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()

    def _choose(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest whole checkpoint, or the one named by --resume, and its content; (None, None) to begin anew."""
        found = checkpoint.candidates(self.checkpoints)
        if self.options.resume != "auto":
            path = Path(self.options.resume)
            if not path.is_file():
                there = ", ".join(str(p) for p in found) or "none"
                raise ValueError(f"--resume {path}: no such checkpoint; in this run's folder: {there}")
            return path, checkpoint.load(path)
        damage: list[CheckpointError] = []
        for path in found:
            try:
                state = checkpoint.load(path)
                if damage:
                    log.warning("%s; going back to %s", "; ".join(map(str, damage)), path)
                return path, state
            except CheckpointError as error:
                damage.append(error)
        if damage:
            reasons = "; ".join(map(str, damage))
            raise CheckpointError(f"no checkpoint in {self.checkpoints} is usable: {reasons}. --overwrite starts anew")
        return None, None

    def _compare(self, state: Mapping[str, Any]) -> None:
        """ValueError with a table when the checkpoint belongs to another configuration or other data."""
        changed = differences(type(self.options), state["options"], to_dict(self.options))
        refused = [d for d in changed if d.kind == "shape" or d.name not in self.options.allow_change]
        rows = [(d.name, repr(d.old), repr(d.new)) for d in refused]
        if state["data"] != self.source.fingerprint:
            rows.append(("data (files and labels)", state["data"][:12], self.source.fingerprint[:12]))
        if rows:
            width = max(len(name) for name, _, _ in rows)
            table = "".join(f"\n  {name:<{width}}  {old} -> {new}" for name, old, new in rows)
            excusable = all(d.kind != "shape" for d in refused) and len(rows) == len(refused)
            advice = f", or accept it with --allow_change {' '.join(d.name for d in refused)}" if excusable else ""
            raise ValueError(
                f"the run in {self.folder} was made with something else (then -> now):{table}\n"
                f"Name another --output_dir, start anew with --overwrite{advice}."
            )
        for difference in changed:
            log.warning("going on with another %s: %r -> %r", difference.name, difference.old, difference.new)

    def _record_environment(self) -> None:
        path = self.folder / "environment.json"
        starts = json.loads(path.read_text()) if path.exists() else []
        now = {"run_id": self.run_id, "processes": self.processes.world_size, "device": str(self.processes.device)}
        path.write_text(json.dumps([*starts, now | environment()], indent=1))

    # ---- state -----------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, stepper: Stepper, means: Means, batches: Batches, **others: Any) -> None:
        """What is saved and restored: the bare model, the stepper, the epoch's means, `others` with a state_dict."""
        self.model, self.stepper, self.means, self.batches, self.others = model, stepper, means, batches, others
        if self._restored:
            self._restore(Path(self._restored))

    def _restore(self, path: Path) -> None:
        state = self._loaded or checkpoint.load(path)
        self._loaded = None
        self.model.load_state_dict(state["model"])
        self.stepper.load_state_dict(
            {"step": state["step"], "bad": state["bad"], "optimizer": state["optimizer"], "scaler": state["scaler"]}
        )
        for name, part in self.others.items():
            part.load_state_dict(state[name])
        self.epoch, self._epoch_step = state["epoch"], state["sampler"]["offset"]
        if state["means"]:
            self.means.load_state_dict(state["means"])
        self.best = state["best"]
        self._problems = dict(state["problems"])
        then = state["sampler"]["world_size"]
        if then != self.processes.world_size:
            log.warning(
                "going on with %d processes instead of %d: the order of images stays, sums are rounded otherwise",
                self.processes.world_size,
                then,
            )
        log.info("going on from %s: epoch %d, step %d", path, self.epoch, self.stepper.step)

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
            "sampler": {
                "epoch": self.epoch,
                "offset": self._epoch_step,
                "seed": self.options.seed,
                "world_size": self.processes.world_size,
                "batch": self.options.total_batch_size,
            },
            "means": self.means.state_dict() if self._epoch_step else None,
            "best": self.best,
            "problems": dict(self._problems),
            "options": to_dict(self.options),
            "data": self.source.fingerprint,
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
                time.sleep(0.2 * 4**attempt)
        else:
            self._save_failures += 1
            if self._save_failures > self.options.max_save_failures:
                raise CannotSave(f"{self._save_failures} saves in a row to {self.checkpoints} failed")
            log.error("not saved; the last good checkpoint stays, training goes on (%d in a row)", self._save_failures)
        self._saved_at = time.monotonic()
        self._save_seconds += self._saved_at - began

    def save_best(self, name: str, value: float) -> bool:
        """Keep this state as `best.pth` if `value` is the highest yet (with the epoch's save that follows)."""
        if self.best and value <= self.best["value"]:
            return False
        self.best = {"name": name, "value": value, "epoch": self.epoch}
        return True

    # ---- going on --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        self._open = ExitStack()
        self._stop.listen()
        self._saved_at = self._logged_at = self._began = time.monotonic()
        self._save_seconds = 0.0
        self._logged_step = self.stepper.step
        if self.processes.main:
            self._open.enter_context(log_file(self.folder / "train.log"))
            total = self.batches.steps_per_epoch * self.options.epochs
            self.log = RunLog(self.folder, self.run_id, step=self.stepper.step, total_steps=total)
            self._open.callback(self.log.close)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._open.close()
        if isinstance(error, ValueError) and not isinstance(error, TooManyBadImages | NothingReadable):
            raise RuntimeError("a defect, not bad input: training itself met this error") from error

    def epochs(self) -> Iterator[tuple[int, int]]:
        """The epochs still to do, each with the optimizer steps already done in it."""
        while self.epoch < self.options.epochs:
            yield self.epoch, self._epoch_step

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
        waited = time.monotonic() - self._saved_at
        return self.processes.main and waited > 60 * self.options.save_minutes

    def _leave_if(self, stop: bool) -> None:
        if stop:
            name = self._stop.signal.name if self._stop.signal else "another process's signal"
            raise Interrupted(f"stopped by {name} after step {self.stepper.step}; the same command goes on from here")

    def _log_step(self) -> None:
        """The only place in the loop that waits for the device."""
        now = time.monotonic()
        seconds, steps = now - self._logged_at, self.stepper.step - self._logged_step
        values = self.means.recent()
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
        if self.processes.main:
            folder = self.folder / "debug"
            folder.mkdir(exist_ok=True)
            path = folder / f"bad-step-{step:08d}.json"
            record = {
                "step": step,
                "epoch": self.epoch,
                "seed": self.options.seed,
                "not_finite": bad,
                "recent_by_process": files,
            }
            path.write_text(json.dumps(_finite(record), indent=1))
            checkpoint.save(path.with_suffix(".pth"), self._state_of_one())
            message += f". The batches, their files and the weights are in {path.with_suffix('.*')}"
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
                path.write_text("".join(f"{name}\t{why}\n" for name, why in sorted(self._problems.items())))
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
        stop = self._agree.settle() == STOP
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
            for path in sorted(self.checkpoints.glob("epoch-*.pth"))[: -self.options.keep]:
                path.unlink()
        # One more round, so that a signal during evaluation is heard by all even when no step follows.
        stop |= STOP in (self._agree(STOP if self._stop.signal else CONTINUE), self._agree.settle())
        self._leave_if(stop and self.epoch < self.options.epochs)

    def finish(self, **values: Any) -> None:
        """Write result.json, which exists only for a finished run."""
        if not self.processes.main:
            return
        result = {
            "run_id": self.run_id,
            "epochs": self.options.epochs,
            "steps": self.stepper.step,
            "images_seen": self.stepper.step * self.options.total_batch_size,
            "bad_steps": self.stepper.bad_steps()[0],
            "bad_images": len(self._problems),
            "seconds_since_start": time.monotonic() - self._began,
            "seconds_saving": self._save_seconds,
            "last": getattr(self, "last", None),
            "best": self.best,
            **values,
        }
        temporary = self.folder / ".result.json.tmp"
        temporary.write_text(json.dumps(_finite(result), indent=1))
        os.replace(temporary, self.folder / "result.json")
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


def run_front_door(train: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a front door and turn how it ended into words and an exit code.

    0 done (or nothing left to do), 2 bad input, 3 no finite updates, 4 checkpoints cannot be written, 75 stopped by a
    signal with everything saved ("requeue me"). A second Ctrl-C leaves at once with 130. Anything else is a defect and
    keeps its traceback.
    """
    talk(main=int(os.environ.get("RANK", "0")) == 0)
    try:
        train(argv)
    except AlreadyFinished as message:
        log.info("%s", message)
    except Interrupted as message:
        log.info("%s", message)
        return EXIT_INTERRUPTED
    except Unstable as error:
        log.error("%s", error)
        return EXIT_UNSTABLE
    except CannotSave as error:
        log.error("%s", error)
        return EXIT_CANNOT_SAVE
    except ValueError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            log.error("error: %s", error)
        return EXIT_BAD_INPUT
    return EXIT_DONE
