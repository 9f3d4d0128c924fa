"""Write curves and images to TensorBoard and Weights & Biases, with the same names and steps.

Both packages are imported only if they are used.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from data.files import write_json

log = logging.getLogger(__name__)

WANDB_FILE = "wandb.json"


class Board(Protocol):
    """Interface of a logger of curves and images. Every method may fail, see `util.logging.RunLog`."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of the curves `GROUP/NAME`; all are in one group."""

    def picture(self, name: str, image_HWC: Tensor, step: int) -> None:
        """Add a uint8 image `[H, W, 3]`."""

    def close(self, failed: bool) -> None:
        """Write pending data and close the files or the connection; `failed`: the run ended with an error."""


class TensorBoard:
    """Event files in the run folder. Points that an earlier start wrote after `step` are hidden."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step or None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, name: str, image_HWC: Tensor, step: int) -> None:
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which is resumed if the run folder contains its id.

    Each group of curves has its own axis, `GROUP/step`, because groups have different units (updates, epochs), and
    because wandb's own step must not decrease, as it does when a run resumes from its last checkpoint.

    Args:
        folder: The run folder. The run's id is kept there in wandb.json, and wandb's files in `wandb/`.
        project: `PROJECT` or `ENTITY/PROJECT`.
        config: Options of the run.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        import wandb

        self._wandb: Any = wandb
        entity, _, name = project.rpartition("/")
        run_id = _stored_id(folder, project) or secrets.token_hex(8)
        self._run: Any = wandb.init(
            project=name,
            entity=entity or None,
            id=run_id,
            resume="allow",
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", finish_timeout=60),
        )
        write_json(folder / WANDB_FILE, {"project": project, "id": run_id})
        self._groups: set[str] = set()

    def _axis(self, name: str) -> str:
        """Return the name of the axis of a curve or image; define it at first use."""
        group, _, curve = name.partition("/")
        axis = f"{group}/step"
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(axis)
            self._run.define_metric(f"{group}/*" if curve else group, step_metric=axis)
        return axis

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if values:
            self._run.log({**values, self._axis(next(iter(values))): step})

    def picture(self, name: str, image_HWC: Tensor, step: int) -> None:
        self._run.log({name: self._wandb.Image(image_HWC.numpy()), self._axis(name): step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _stored_id(folder: Path, project: str) -> str:
    """Return the id of the run of this folder in a project; "" if there is none."""
    try:
        stored = json.loads((folder / WANDB_FILE).read_text(encoding="utf-8"))
        return stored["id"] if stored["project"] == project else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def open_boards(folder: Path, step: int, wandb_project: str, config: Mapping[str, Any]) -> dict[str, Board]:
    """Open TensorBoard and, if a project is given, Weights & Biases; return the boards by name.

    A board that cannot be opened is logged and left out.

    Args:
        folder: The run folder.
        step: Optimizer steps already done.
        wandb_project: Project of Weights & Biases; "": do not use it.
        config: Options of the run.
    """
    boards: dict[str, Board] = {}
    try:
        boards["TensorBoard"] = TensorBoard(folder, step)
    except Exception as error:  # not installed, or the folder is full
        log.warning("no TensorBoard curves (%s); metrics.jsonl has the same values", error)
    if wandb_project:
        try:
            boards["Weights & Biases"] = WeightsAndBiases(folder, wandb_project, config)
        except Exception as error:  # the server cannot be reached
            log.warning("no Weights & Biases curves (%s); metrics.jsonl has the same values", error)
    return boards
