"""What a user hands to a tool, made into what it works on: a run or checkpoint into a model, paths into images."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import methods
from util import checkpoint
from util.data import EvalSamples, eval_batches, pixel_statistics
from util.distributed import pick_device
from util.images import eval_transform, is_image_name, read_image
from util.sources import Source, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on its device, the options and updates it was trained with, and where it came from."""

    model: methods.MaskedAutoencoderViT
    options: Mapping[str, Any]
    updates: int
    checkpoint: Path
    device: torch.device

    @property
    def statistics(self) -> tuple[tuple[float, ...], ...]:
        """Mean and deviation of each channel that the model's images are normalised with."""
        return pixel_statistics(self.options["in_chans"], self.options["mean"], self.options["std"])

    @property
    def run(self) -> Path:
        """The run's folder; for a checkpoint that lies alone, the folder it lies in."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder


def checkpoint_of(given: Path) -> Path:
    """The checkpoint meant by a path: the file itself, or the newest one of a run folder."""
    if given.is_dir():
        path = given / "checkpoints" / checkpoint.LAST
        if not path.is_file():
            raise ValueError(f"{given} holds no checkpoint: there is no {path}")
        return path
    if not given.is_file():
        raise ValueError(f"{given} does not exist; give a run folder or a checkpoint")
    return given


def load(given: Path, device: str) -> Trained:
    """The trained model of a run folder or a checkpoint."""
    where = pick_device(device)
    path = checkpoint_of(given)
    model, options = methods.from_checkpoint(path)
    return Trained(model.to(where).eval(), options, checkpoint.load(path)["step"], path, where)


def source(trained: Trained, split: str, data_path: str = "") -> Source:
    """A split of the run's own data, or of another data path."""
    options = trained.options
    in_chans = options["in_chans"]
    if data_path:
        return open_source("auto", data_path, split, in_chans=in_chans)
    chosen = options["class_list"]
    return open_source(options["dataset"], options["data_path"], split, in_chans=in_chans, class_list=chosen)


def images(trained: Trained, paths: Sequence[str], *, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """`count` images `[N, C, H, W]`, cropped and normalised for the model, and their names.

    `paths` are image files, taken in order, or one folder (or `digits`), from which `count` are drawn. Without paths
    they are drawn from the run's own data: its validation split if it has one.
    """
    if count < 1:
        raise ValueError(f"count: must be at least 1, found {count}")
    files = [path for path in paths if Path(path).is_file() and is_image_name(Path(path).name)]
    in_chans = trained.options["in_chans"]
    if files:
        if len(files) != len(paths):
            others = ", ".join(path for path in paths if path not in files)
            raise ValueError(f"give image files, or one folder; no image file: {others}")
        found = Source(files, lambda index: read_image(files[index], in_chans))
    elif len(paths) > 1:
        raise ValueError(f"give image files, or one folder; found {', '.join(paths)}")
    else:
        found = _held_out(trained, paths[0] if paths else "")
    mean, std = trained.statistics
    samples = EvalSamples(found, eval_transform(trained.options["input_size"]), mean=mean, std=std)
    indices = list(range(len(found)))
    if not files:
        indices = random.Random(seed).sample(indices, min(count, len(indices)))
    batches = list(eval_batches(samples, batch_size=len(indices), indices=indices))
    for path, reason in batches[0].problems:
        log.warning("%s cannot be read: %s", path, reason)
    shown = batches[0].to(trained.device)
    return shown.images, [found.names[index] for index in shown.index.tolist()]


def _held_out(trained: Trained, data_path: str) -> Source:
    try:
        return source(trained, "val", data_path)
    except ValueError:  # no such split: then the images that it was trained on, or whatever lies there
        return source(trained, "train", data_path)
