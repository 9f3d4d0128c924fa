"""Checkpoints: written atomically, flushed to disk, verified before they are loaded.

A file is a `torch.save` archive of tensors, numbers, strings, lists and dicts, which can be loaded with `weights_only`,
so that no code is executed. The checksums of the archive are verified first, because `torch.load` does not detect bit
errors.
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
from data.sources import has_listed_classes
from options import OptionError, RunOptions

FORMAT = 1  # incremented when older code can no longer read newer files
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another program, or does not match the model."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically and flush it to disk. Raises OSError."""
    with atomic_write(path, sync=True) as file:
        try:
            torch.save(dict(state), file)
        except RuntimeError as error:  # torch raises it, about positions in the archive, after an OSError of `file`
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def keep_previous(folder: Path) -> None:
    """Create the link `previous.pth` to `last.pth`, from which a run resumes if the next `last.pth` is damaged.

    On a file system without hard links the latest epoch file is used instead.
    """
    if (folder / LAST).exists():
        link(folder / LAST, folder / PREVIOUS, or_copy=False)


def remove_leftovers(folder: Path) -> list[str]:
    """Delete temporary files of interrupted saves; return their names."""
    leftovers = sorted(folder.glob(f".*{TEMPORARY}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints that a run can resume from, latest first."""
    return [path for path in [folder / LAST, folder / PREVIOUS, *reversed(kept_epochs(folder))] if path.exists()]


def kept_epochs(folder: Path) -> list[Path]:
    """Return the epoch files, oldest first (numbers above 9999 are longer)."""
    return sorted(folder.glob("epoch-*.pth"), key=lambda path: (len(path.name), path.name))


def drop_old_epochs(folder: Path, keep: int) -> None:
    """Delete all but the latest `keep` epoch files; errors are ignored."""
    for path in kept_epochs(folder)[:-keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def verify(path: Path) -> None:
    """Raise CheckpointError unless all checksums of the archive match."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a valid checkpoint ({error or type(error).__name__})") from error
    except Exception as error:  # zlib and struct raise other types on damaged headers
        raise CheckpointError(f"{path} is not a valid checkpoint ({type(error).__name__}: {error})") from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} does not match")


def find_file(path: str | Path) -> Path:
    """Return the checkpoint file for a path: the file itself, or the latest checkpoint of a run folder.

    Raises CheckpointError if there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = path / "checkpoints" / LAST
        if not inside.is_file():
            raise CheckpointError(f"{path} contains no checkpoint: {inside} does not exist")
        return inside
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: it does not exist")
    return path


def load(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project (or the latest of a run folder) on the CPU, after verifying it.

    Nothing in the file is executed.
    """
    path = find_file(path)
    verify(path)
    state = _read(path)
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project; to initialise from its weights use --init_from {path}"
        )
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}, this code reads up to {FORMAT}: update the code")
    return state


def _read(path: Path) -> Any:
    """Read tensors and plain values, and `argparse.Namespace`, which MAE and the released NoR-MAE store."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error).rpartition("WeightsUnpickler error:")[2]  # before it: advice to run the code
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = next((line for line in lines if "global" in line.lower()), "".join(lines[:1]))[:300]
        raise CheckpointError(
            f"{path} is not a checkpoint, or contains more than tensors and plain values; nothing was loaded: {reason}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} could not be read as a checkpoint ({type(error).__name__}: {error})") from error


def find_program(state: Mapping[str, Any]) -> str:
    """Return the program that wrote a checkpoint: "pretrain", "finetune", "probe" or "segment".

    Earlier versions did not store it; then it is derived from the options that only one program has.
    """
    if "program" in state:
        return state["program"]
    own = {"method": "pretrain", "mixup": "finetune", "max_class_share": "segment"}
    return next((program for option, program in own.items() if option in state["options"]), "probe")


def program_at(path: str | Path) -> str:
    """Return the program that wrote a file; "" for the weights of another project."""
    return find_program(load(path)) if load_model(path)[1] else ""


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Load the model weights of a checkpoint of this project, MAE, the released NoR-MAE or timm, or of safetensors."""
    return load_model(path)[0]


def load_model(path: str | Path, averaged: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the model weights as `load_weights`, and the options of the run ({} for other projects).

    `averaged` selects the moving average of the weights, if the run has one.
    """
    path = find_file(path)
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
            f"{path} contains no weights: found {_describe(state)}, expected tensors by name, or under 'model'"
        )
    return weights, options


def load_options(path: str | Path, *names: str) -> dict[str, Any]:
    """Return the named options of the run that wrote a checkpoint; {} for other projects, or if path is ""."""
    made_with = load_model(path)[1] if str(path) else {}
    return {name: made_with[name] for name in names if name in made_with}


def inherited(schema: type[RunOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are inherited from the checkpoint named in `given`; {} for weights of another project.

    An evaluation also inherits the run's data; if other data are given, only the class list, if it selects folders of
    them. If another number of channels is given, the mean and deviation of each channel are the averages over the
    encoder's channels.

    Args:
        schema: The options of a program; `INHERITS` and `INHERITS_EVAL` list the names.
        given: Option names and their values as given on the command line.
    """
    if str(given.get("eval", "false")).lower() == "true":
        own = load_options(evaluated_checkpoint(given), *schema.INHERITS_EVAL, "data_path", "dataset", "class_list")
        if not {"data_path", "dataset"} & given.keys():
            return own
        names = set(schema.INHERITS_EVAL)
        folder = str(given.get("data_path", "")) if given.get("dataset", "auto") in ("auto", "folder") else ""
        if own.get("class_list") and "class_list" not in names and has_listed_classes(folder, own["class_list"]):
            names.add("class_list")
        return {name: value for name, value in own.items() if name in names}
    own, channels = load_options(given.get("init_from", ""), *schema.INHERITS), str(given.get("in_chans", ""))
    if channels.isdecimal() and int(channels) != own.get("in_chans", int(channels)):
        own |= {name: [sum(own[name]) / len(own[name])] * int(channels) for name in ("mean", "std") if own.get(name)}
    return own


def evaluated_checkpoint(given: Mapping[str, Any]) -> str:
    """Return the checkpoint that `--eval` evaluates. Raises OptionError if there is none."""
    named = given.get("resume", "auto")
    if named not in ("auto", ""):
        return str(find_file(named))
    if given.get("init_from"):
        return str(find_file(given["init_from"]))
    if not given.get("output_dir"):
        raise OptionError("eval needs a checkpoint or a run folder: name it with --resume", "eval")
    try:
        return str(find_file(given["output_dir"]))
    except CheckpointError as error:
        raise OptionError(f"eval needs a checkpoint: {error}; name one with --resume", "eval") from None


def find_run(file: Path) -> Path:
    """Return the run folder of a checkpoint; for a checkpoint outside a run, its folder."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def _describe(state: object) -> str:
    if isinstance(state, dict):
        return f"a dict with {sorted(map(str, state))[:8]}"
    return f"a {type(state).__name__}"
