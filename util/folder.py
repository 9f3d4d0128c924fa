"""A run's folder: whose it is, and from which checkpoint a run in it goes on. Decided before any work starts.

Started again with the same words a run goes on from its newest whole checkpoint; with other words it is refused, and
told what differs. Nothing that the project did not write itself is ever removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data.files import temporary_of, write_json, write_text
from options import RunOptions, differences, to_dict
from util import checkpoint, distributed
from util.checkpoint import CheckpointError
from util.lock import NAME as LOCK
from util.lock import RunLock
from util.logging import environment

log = logging.getLogger(__name__)

STARTS = "environment.json"
FILES = (
    *("options.yaml", STARTS, "train.log", "log.txt", "metrics.jsonl", "bad_images.txt", "result.json"),
    *("classes.txt", "images_*.txt", "events.out.tfevents.*", "knn.json", "report.html", "curves.png"),
)
FOLDERS = ("checkpoints", "samples", "debug", "figures")


class AlreadyFinished(Exception):
    """This folder's run is complete."""


class RunFolder:
    """The folder `options.output_dir` and the names in it. Only the main process uses the methods."""

    def __init__(self, options: RunOptions):
        self.options = options
        self.path = Path(options.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / "result.json"
        self.lock = RunLock(self.path)

    def begin(self, data: str, **facts: Any) -> tuple[str, dict[str, Any] | None]:
        """The checkpoint to go on from and its content, or ("", None) to begin anew.

        Afterwards the folder is ready, and locked. `data` identifies the training images, `facts` go into
        environment.json. AlreadyFinished when nothing is left to do; ValueError when the folder is not this run's, is
        in use, or cannot be used.
        """
        try:
            self._check()
            with contextlib.ExitStack() as undo:
                self._take(undo, data)
                start = self._begin(data, facts)
                undo.pop_all()
        except OSError as error:
            raise ValueError(f"--output_dir {self.path} cannot be read or written ({error.strerror})") from error
        return start

    def _take(self, undo: contextlib.ExitStack, data: str) -> None:
        """Lock the folder, which is made where there is none; `undo` leaves what was found."""
        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if new:
                undo.callback(self._remove_if_empty)
            undo.callback(self.lock.release)
            self.lock.acquire()
        except OSError as error:
            if not self.options.overwrite:
                self._look(data)  # a finished run needs no writing
            raise ValueError(f"--output_dir {self.path} cannot be made or written ({error.strerror})") from error

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _begin(self, data: str, facts: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
        earlier = self._earlier_starts()
        if self.options.overwrite and distributed.is_restart(earlier[-1].get("launches", []) if earlier else []):
            log.info("started again by the launcher: --overwrite has been done, and the run goes on")
        elif self.options.overwrite:
            self._clear()
            earlier = []
        chosen, state = self._look(data)
        self._prepare()
        start = {**facts, "launches": distributed.launches(), **environment()}
        write_json(self.path / STARTS, [*earlier, start])
        return str(chosen or ""), state

    def _look(self, data: str) -> tuple[Path | None, dict[str, Any] | None]:
        """As `_choose`; AlreadyFinished when nothing is left to do; ValueError when it is another run's."""
        chosen, state = self._choose()
        if state is not None:
            self._compare(state, data)
            if self.result.exists() and state["epoch"] >= self.options.epochs:
                raise AlreadyFinished(f"the run in {self.path} is finished ({self.result}); --overwrite starts it anew")
        return chosen, state

    def _earlier_starts(self) -> list[dict[str, Any]]:
        """What environment.json says of this run's earlier starts; nothing where a power cut has emptied it."""
        try:
            return list(json.loads((self.path / STARTS).read_text()))
        except (OSError, ValueError):
            return []

    def _check(self) -> None:
        """ValueError unless the folder is new, empty, or holds a run."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output_dir {self.path} is a file; name a folder")
        ours = (self.path / "options.yaml").exists() or checkpoint.candidates(self.checkpoints)
        found = self.path.iterdir() if self.path.is_dir() and not ours else []
        begun = (LOCK, temporary_of(Path("options.yaml")).name)  # all that a start that was killed may have left
        others = sorted(path.name for path in found if path.name not in begun)
        if others:
            raise ValueError(
                f"--output_dir {self.path} holds no run but other files ({', '.join(others[:5])}); "
                "name an empty or a new folder"
            )

    def _clear(self) -> None:
        """Remove what earlier runs wrote here, and nothing else."""
        for pattern in FILES:
            for path in self.path.glob(pattern):
                path.unlink()
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _choose(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest whole checkpoint, or the one named by --resume, and its content; (None, None) to begin anew."""
        found = checkpoint.candidates(self.checkpoints)
        if self.options.resume != "auto":
            named = Path(self.options.resume)
            if not named.is_file():
                there = ", ".join(str(path) for path in found) or "none"
                raise ValueError(f"--resume {named}: no such checkpoint; in this run's folder: {there}")
            if not found or named.resolve().parent == self.checkpoints.resolve():
                state = checkpoint.load(named)
                if "sampler" not in state:
                    raise ValueError(f"--resume {named}: it holds weights and no run to go on with; try --init_from")
                return named, state
            log.info("this run has checkpoints of its own and goes on from them, not from --resume %s", named)
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

    def _compare(self, state: Mapping[str, Any], data: str) -> None:
        """ValueError with a table when the checkpoint belongs to another configuration or other data."""
        changed = differences(type(self.options), state["options"], to_dict(self.options))
        refused = [d for d in changed if d.kind == "shape" or d.name not in self.options.allow_change]
        rows = [(d.name, repr(d.old), repr(d.new)) for d in refused]
        if state["data"] != data:
            rows.append(("data (files and labels)", state["data"][:12], data[:12]))
        if rows:
            width = max(len(name) for name, _, _ in rows)
            table = "".join(f"\n  {name:<{width}}  {old} -> {new}" for name, old, new in rows)
            excusable = all(d.kind != "shape" for d in refused) and len(rows) == len(refused)
            advice = f", or accept it with --allow_change {' '.join(d.name for d in refused)}" if excusable else ""
            raise ValueError(
                f"the run in {self.path} was made with something else (then -> now):{table}\n"
                f"Name another --output_dir, start anew with --overwrite{advice}."
            )
        for difference in changed:
            log.warning("going on with another %s: %r -> %r", difference.name, difference.old, difference.new)

    def _prepare(self) -> None:
        # First of all, because by this file a folder is known as a run's.
        write_text(self.path / "options.yaml", yaml.safe_dump(to_dict(self.options), sort_keys=False))
        self.result.unlink(missing_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        if not os.access(self.checkpoints, os.W_OK):
            raise ValueError(f"--output_dir {self.path} cannot be written")
        for name in checkpoint.remove_leftovers(self.checkpoints):
            log.info("removed %s, left behind by an interrupted save", name)
