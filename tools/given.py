"""What a user hands to a tool, made into what it works on: a run or checkpoint into a model, paths into images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import methods
from util.checkpoint import LAST
from util.distributed import pick_device


@dataclass(frozen=True)
class Trained:
    """A model in eval mode on its device, the options it was trained with, and where it came from."""

    model: nn.Module
    options: Mapping[str, Any]
    checkpoint: Path
    device: torch.device

    @property
    def run(self) -> Path:
        """The run's folder; for a checkpoint that lies alone, the folder it lies in."""
        folder = self.checkpoint.parent
        return folder.parent if folder.name == "checkpoints" else folder


def checkpoint_of(given: Path) -> Path:
    """The checkpoint meant by a path: the file itself, or the newest one of a run folder."""
    if given.is_dir():
        path = given / "checkpoints" / LAST
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
    return Trained(model.to(where).eval(), options, path, where)
