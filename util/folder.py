"""Prepare the folder of a run, and select the checkpoint from which the run resumes, before any work starts.

Re-running the same command resumes from the latest valid checkpoint. A command with other options is refused, with a
table of the differences; a refused command changes nothing. Only files written by this project are ever removed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.files import link, temporary_path, write_json, write_text
from options import RunOptions, differences, to_dict
from util import checkpoint, distributed
from util.boards import WANDB_FILE
from util.checkpoint import CheckpointError
from util.lock import NAME as LOCK
from util.lock import RunLock
from util.logging import environment
from util.state import is_of_best

log = logging.getLogger(__name__)

STARTS = "environment.json"
CURVES = ("log.txt", "metrics.jsonl", "events.out.tfevents.*")
FILES = (
    *("options.yaml", STARTS, "train.log", *CURVES, "bad_images.txt", "result.json"),
    *("classes.txt", "images_*.txt", WANDB_FILE, "knn.json", "knn-*.json", "report.html", "curves.png"),
)
FOLDERS = ("checkpoints", "samples", "debug", "figures", "wandb")


class AlreadyFinished(Exception):
    """The run in this folder is complete."""


class RunFolder:
    """The folder `options.output_dir` and its contents. Its methods are for the main process only."""

    def __init__(self, options: RunOptions):
        self.options = options
        self.path = Path(options.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / "result.json"
        self.lock = RunLock(self.path)
        self._created = False  # by this start

    def find_start(self, data: str) -> tuple[str, dict[str, Any] | None]:
        """Lock the folder and find the checkpoint to resume from; files are changed only by `begin`.

        Args:
            data: Fingerprint of the training images.

        Returns:
            The path and content of the checkpoint to resume from, or ("", None) for a new run.

        Raises:
            AlreadyFinished: the run in the folder is complete.
            ValueError: the folder belongs to another run, is in use, or cannot be written.
        """
        try:
            self._check()
            with contextlib.ExitStack() as undo:
                self._take(undo, data)
                chosen, state = self._look(data)
                undo.pop_all()
        except OSError as error:
            raise self._unusable(error) from error
        return str(chosen or ""), state

    def begin(self, data: str, **facts: Any) -> None:
        """Write options.yaml and a new entry of environment.json, and remove what belongs to earlier runs.

        Args:
            data: Fingerprint of the training images.
            facts: Added to environment.json.

        Raises:
            ValueError: the folder cannot be written.
        """
        try:
            if self.checkpoints.exists() and not os.access(self.checkpoints, os.W_OK):
                raise ValueError(f"--output_dir {self.path} cannot be written")
            if self._overwrites:
                self._clear()
            elif self.options.overwrite:
                log.info("restarted by the launcher: --overwrite was applied at the first start, resuming")
            earlier = self._earlier_starts()
            self._drop_curves_of_another_run(data, earlier)
            # First, because this file marks the folder as that of a run.
            write_text(self.path / "options.yaml", yaml.safe_dump(to_dict(self.options), sort_keys=False))
            self.checkpoints.mkdir(exist_ok=True)
            for name in checkpoint.remove_leftovers(self.checkpoints):
                log.info("removed %s, left behind by an interrupted save", name)
            start = {**facts, "data": data, "launches": distributed.launches(), **environment()}
            write_json(self.path / STARTS, [*earlier, start])
            self.result.unlink(missing_ok=True)
        except OSError as error:
            raise self._unusable(error) from error

    def adopt(self, start: Path, best: Mapping[str, Any], *, is_best: bool) -> None:
        """Link the checkpoint that the run resumes from to `last.pth`, and that of its best epoch to `best.pth`.

        Args:
            start: The checkpoint that the run resumes from.
            best: The best epoch that it records; {} if there is none.
            is_best: Whether it was written after this epoch itself.

        Raises:
            ValueError: the folder cannot be written.
        """
        last, kept = self.checkpoints / checkpoint.LAST, self.checkpoints / checkpoint.BEST
        try:
            if start != last:
                link(start.resolve(), last, or_copy=True)
            found = start if is_best else _find_best(best, kept, start.parent)
            if found and found != kept:
                link(found.resolve(), kept, or_copy=True)
            elif not found and kept.exists():
                kept.unlink()
                log.warning("removed %s: it is not of the best epoch that %s records", kept, start)
        except OSError as error:
            raise self._unusable(error) from error

    def _drop_curves_of_another_run(self, data: str, earlier: Sequence[Mapping[str, Any]]) -> None:
        """Remove the curves of earlier starts that saved no checkpoint, if these had other options or data."""
        file = self.path / "options.yaml"
        if not file.exists() or checkpoint.candidates(self.checkpoints):
            return
        try:
            then = yaml.safe_load(file.read_text())
        except (ValueError, yaml.YAMLError):  # after a power cut
            then = None
        changed = [d.name for d in differences(type(self.options), then or {}, to_dict(self.options))]
        if earlier and earlier[-1].get("data", data) != data:
            changed.append("data (files and labels)")
        for path in [path for pattern in CURVES for path in self.path.glob(pattern)] if changed else []:
            path.unlink()
            log.warning("removed %s of an earlier start, not saved, with another %s", path.name, ", ".join(changed))

    def _unusable(self, error: OSError) -> ValueError:
        return ValueError(f"--output_dir {self.path} cannot be read or written ({error.strerror})")

    def _take(self, undo: contextlib.ExitStack, data: str) -> None:
        """Create the folder if it does not exist, and lock it; `undo` restores the previous state."""
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if new:
                self._created = True
                atexit.register(self.leave)
            undo.callback(self.leave)
            self.lock.acquire()
        except OSError as error:
            if not self.options.overwrite:
                self._look(data)  # a finished run is recognised without writing
            raise ValueError(f"--output_dir {self.path} cannot be created or written ({error.strerror})") from error

    def leave(self) -> None:
        """Unlock the folder, and remove it if this start has created it and nothing is in it."""
        self.lock.release()
        if self._created:
            atexit.unregister(self.leave)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    @functools.cached_property
    def _overwrites(self) -> bool:
        """Whether --overwrite applies: not when a launcher restarts the command by itself."""
        starts = self._earlier_starts()
        return self.options.overwrite and not distributed.is_restart(starts[-1].get("launches", []) if starts else [])

    def _look(self, data: str) -> tuple[Path | None, dict[str, Any] | None]:
        """Return `_choose()`; raise AlreadyFinished or, for a checkpoint of another run, ValueError."""
        if self.result.exists() and not self._overwrites and not checkpoint.candidates(self.checkpoints):
            raise ValueError(
                f"the run in {self.path} is finished ({self.result}), but its checkpoints are gone: use another "
                "--output_dir, or start from scratch with --overwrite"
            )
        chosen, state = self._choose()
        if state is not None:
            self._compare(state, data)
            if self.result.exists() and self._is_complete(state):
                raise AlreadyFinished(
                    f"the run in {self.path} is finished ({self.result}); --overwrite starts it from scratch"
                )
        return chosen, state

    def _is_complete(self, state: Mapping[str, Any]) -> bool:
        """Return whether no steps of the run are left after a checkpoint; False if that is not known yet."""
        if steps := given_steps(self.options):
            return state["step"] == steps
        # The last epoch of a run by --steps may have been cut short.
        return state["epoch"] == self.options.epochs and not state["options"].get("steps", 0)

    def _earlier_starts(self) -> list[dict[str, Any]]:
        """Return the earlier starts in environment.json; an unreadable file (after a power cut) counts as empty."""
        try:
            return list(json.loads((self.path / STARTS).read_text()))
        except (OSError, ValueError):
            return []

    def record_end(self, **facts: float) -> None:
        """Add facts to the current start in environment.json; starts that were killed lack them."""
        if starts := self._earlier_starts():
            write_json(self.path / STARTS, [*starts[:-1], starts[-1] | facts])

    def _check(self) -> None:
        """Raise ValueError unless the folder is new, empty, or contains a run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output_dir {self.path} is a file; give a folder")
        ours = (self.path / "options.yaml").exists() or checkpoint.candidates(self.checkpoints)
        found = self.path.iterdir() if self.path.is_dir() and not ours else []
        leftovers = (LOCK, temporary_path(Path("options.yaml")).name)  # of a start that was killed early
        others = sorted(path.name for path in found if path.name not in leftovers)
        if others:
            raise ValueError(
                f"--output_dir {self.path} is not empty and does not contain a run ({', '.join(others[:5])}); "
                "give an empty or a new folder"
            )

    def _clear(self) -> None:
        """Remove the files of earlier runs, and nothing else."""
        for pattern in FILES:
            for path in self.path.glob(pattern):
                path.unlink()
        for name in FOLDERS:
            folder = self.path / name
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not folder.is_symlink():  # a link to another disk stays
                folder.rmdir()

    def _choose(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Return the checkpoint to resume from (--resume, or the latest valid one) and its content, or (None, None)."""
        found = [] if self._overwrites else checkpoint.candidates(self.checkpoints)
        if self.options.resume != "auto":
            try:
                named = checkpoint.find_file(self.options.resume)
            except CheckpointError as error:
                available = f"; {self.path} has: {', '.join(map(str, found))}" if found else ""
                raise ValueError(f"--resume: {error}{available}") from None
            if not found or named.resolve().parent == self.checkpoints.resolve():
                state = checkpoint.load(named)
                if "sampler" not in state:
                    raise ValueError(
                        f"--resume {named}: the checkpoint contains only weights, no training state; use --init_from"
                    )
                return named, state
            log.info("resuming from the checkpoints in the run folder, not from --resume %s", named)
        damage: list[CheckpointError] = []
        for path in found:
            try:
                state = checkpoint.load(path)
                if damage:
                    log.warning("%s; using %s instead", "; ".join(map(str, damage)), path)
                return path, state
            except CheckpointError as error:
                damage.append(error)
        if damage:
            reasons = "; ".join(map(str, damage))
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints} is valid: {reasons}. --overwrite starts from scratch"
            )
        return None, None

    def _compare(self, state: Mapping[str, Any], data: str) -> None:
        """Raise ValueError with a table of differences if the checkpoint has other options or other data."""
        now = to_dict(self.options)
        derived = ("epochs",) if given_steps(self.options) else ()
        changed = [d for d in differences(type(self.options), state["options"], now) if d.name not in derived]
        refused = [d for d in changed if d.kind == "shape" or d.name not in self.options.allow_change]
        rows = [(d.name, repr(d.old), repr(d.new)) for d in refused]
        if state["data"] != data:
            rows.append(("data (files and labels)", state["data"][:12], data[:12]))
        if rows:
            width = max(len(name) for name, _, _ in rows)
            table = "".join(f"\n  {name:<{width}}  {old} -> {new}" for name, old, new in rows)
            excusable = all(d.kind != "shape" for d in refused) and len(rows) == len(refused)
            advice = f", or accept it with --allow_change {' '.join(d.name for d in changed)}" if excusable else ""
            raise ValueError(
                f"the run in {self.path} has other options or data (then -> now):{table}\n"
                f"Use another --output_dir, start from scratch with --overwrite{advice}."
            )
        for difference in changed:
            log.warning("resuming with another %s: %r -> %r", difference.name, difference.old, difference.new)


def given_steps(options: RunOptions) -> int:
    """Return the option `steps`, from which the epochs are derived; 0: as given by `epochs`."""
    return getattr(options, "steps", 0)


def _find_best(best: Mapping[str, Any], kept: Path, folder: Path) -> Path | None:
    """Return the checkpoint of the epoch `best`: the file `kept`, or one in `folder`; None if neither is."""
    if not best:
        return None
    for path in (kept, folder / checkpoint.BEST, folder / f"epoch-{best['epoch'] + 1:04d}.pth"):
        with contextlib.suppress(CheckpointError):  # missing or damaged
            if is_of_best(checkpoint.load(path), best):
                return path
    return None
