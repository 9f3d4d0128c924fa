"""Checkpoints that are whole or absent: written beside, flushed to disk, renamed; verified before they are believed.

A file is a plain `torch.save` archive of tensors, numbers, strings, lists and dicts, which `weights_only` loading reads
without running anything. The archive's own checksums are tested before loading, because `torch.load` accepts a flipped
bit and they do not.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import TEMPORARY, atomic_write, link
from options import OptionError, RunOptions

FORMAT = 1  # raised when a newer file can no longer be read by older code
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not fit."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically, and flush it to disk; OSError on failure."""
    with atomic_write(path, sync=True) as file:
        torch.save(dict(state), file)


def keep_previous(folder: Path) -> None:
    """Give `last.pth` the second name `previous.pth`, to resume from if its successor is damaged.

    A file system without hard links has the newest epoch file instead.
    """
    if (folder / LAST).exists():
        link(folder / LAST, folder / PREVIOUS, or_copy=False)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what an interrupted save left behind; returns the names."""
    leftovers = sorted(folder.glob(f".*{TEMPORARY}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def candidates(folder: Path) -> list[Path]:
    """The checkpoints a run may continue from, the newest first."""
    return [path for path in [folder / LAST, folder / PREVIOUS, *reversed(kept_epochs(folder))] if path.exists()]


def kept_epochs(folder: Path) -> list[Path]:
    """The files of epochs, the oldest first; beyond 9999 their numbers have another length."""
    return sorted(folder.glob("epoch-*.pth"), key=lambda path: (len(path.name), path.name))


def drop_old_epochs(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` files of epochs, as far as the file system lets us."""
    for path in kept_epochs(folder)[:-keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def verify(path: Path) -> None:
    """CheckpointError unless every byte of the archive agrees with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error or type(error).__name__})") from error
    except Exception as error:  # zlib and struct raise their own kinds on damaged headers
        raise CheckpointError(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged} does not match")


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint written by this project, on the CPU, verified. Nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    verify(path)
    state = _read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is no checkpoint of this project; to start from its weights use --init_from {path}"
        )
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}, this code reads up to {FORMAT}: update the code")
    return state


def _read(path: Path) -> Any:
    """Tensors and plain values only, and the harmless `argparse.Namespace` that MAE and the released NoR-MAE store."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = str(error).rpartition("WeightsUnpickler error:")[2]  # before it: advice to run the code
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = next((line for line in lines if "global" in line.lower()), "".join(lines[:1]))[:300]
        raise CheckpointError(
            f"{path} is no checkpoint, or holds more than tensors and plain values; nothing was loaded: {reason}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} could not be read as a checkpoint ({type(error).__name__}: {error})") from error


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The model's weights of any checkpoint file: ours, MAE's, the released NoR-MAE's, timm's, or safetensors."""
    return load_model(path)[0]


def load_model(path: str | Path, averaged: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's weights of any checkpoint file, as `load_weights`; and the run's options, if it is one of ours.

    `averaged` takes a run's moving average of the weights, where it kept one.
    """
    path = Path(path)
    if not path.is_file():
        inside = path / "checkpoints" / LAST
        hint = f"; a run's folder, whose newest checkpoint is {inside}" if inside.is_file() else ""
        raise CheckpointError(f"no checkpoint at {path}{hint}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), {}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file ({error})") from error
    if zipfile.is_zipfile(path):
        verify(path)
    state = _read(path)
    options = state["options"] if isinstance(state, dict) and {"format", "options"} <= set(state) else {}
    for key in (*(["ema"] if averaged else []), "model", "state_dict", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    weights = {
        name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor)
    }
    if not weights:
        raise CheckpointError(
            f"{path} holds no weights: found {_describe(state)}, expected tensors by name, or such under 'model'"
        )
    return weights, options


def options_of(path: str | Path, *names: str) -> dict[str, Any]:
    """Those of the named options that the run which wrote a checkpoint had; {} where it is not ours, or path is ""."""
    made_with = load_model(path)[1] if str(path) else {}
    return {name: made_with[name] for name in names if name in made_with}


def inherited(schema: type[RunOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the checkpoint named in `given` decides; {} for the weights of another project.

    Args:
        schema: the options of a program; `INHERITS` and `INHERITS_EVAL` list the names.
        given: option names and their values as typed.

    Where another number of channels is given, each channel gets the average mean and deviation of the encoder's.
    """
    if str(given.get("eval", "false")).lower() == "true":
        return options_of(to_judge(given), *schema.INHERITS_EVAL)
    own, wanted = options_of(given.get("init_from", ""), *schema.INHERITS), str(given.get("in_chans", ""))
    if wanted.isdecimal() and int(wanted) != own.get("in_chans", int(wanted)):
        own |= {name: [sum(own[name]) / len(own[name])] * int(wanted) for name in ("mean", "std") if own.get(name)}
    return own


def to_judge(given: Mapping[str, Any]) -> str:
    """The checkpoint that `--eval` means by the options given. OptionError where there is none."""
    named = given.get("resume", "auto")
    if named not in ("auto", ""):
        return str(named)
    if given.get("init_from"):
        return str(given["init_from"])
    last = Path(given.get("output_dir", "output")) / "checkpoints" / LAST
    if not last.is_file():
        raise OptionError(f"eval needs a checkpoint: there is no {last}; name one with --resume", "eval")
    return str(last)


def run_of(file: Path) -> Path:
    """The folder of a checkpoint's run; for a checkpoint that lies alone, the folder it lies in."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def _describe(state: object) -> str:
    if isinstance(state, dict):
        return f"a dict with {sorted(map(str, state))[:8]}"
    return f"a {type(state).__name__}"
