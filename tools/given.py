"""Load the model and data of the run or checkpoint that is the argument of a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import methods
from data.loader import pixel_statistics
from data.sources import Source, open_source
from models_vit import Pretrainer
from util import checkpoint
from util.distributed import pick_device


@dataclass(frozen=True)
class Trained:
    """A trained model in eval mode, with its options, number of updates, checkpoint and device."""

    model: Pretrainer
    options: Mapping[str, Any]
    updates: int
    checkpoint: Path
    device: torch.device

    @property
    def statistics(self) -> tuple[tuple[float, ...], ...]:
        """Mean and standard deviation of each channel for normalisation."""
        return pixel_statistics(self.options["in_chans"], self.options["mean"], self.options["std"])

    @property
    def run(self) -> Path:
        return checkpoint.find_run(self.checkpoint)


def load(given: Path, device: str) -> Trained:
    """Load the trained model of a run folder or a checkpoint."""
    where = pick_device(device)
    path = checkpoint.find_file(given)
    model, options = methods.from_checkpoint(path)
    return Trained(model.to(where).eval(), options, checkpoint.load(path)["step"], path, where)


def source(trained: Trained, split: str, data_path: str = "", known: Sequence[str] | None = None) -> Source:
    """Open a split of the run's own data, or of another data path.

    Args:
        known: Classes of the training images, if another split is opened.
    """
    options = trained.options
    how: dict[str, Any] = {
        "in_chans": options["in_chans"],
        "value_range": options.get("value_range", ()),
        "known": known,
    }
    if data_path:
        return open_source("auto", data_path, split, **how)
    how |= {"class_list": options["class_list"], "label_offset": options.get("label_offset")}
    return open_source(options["dataset"], options["data_path"], split, **how)
