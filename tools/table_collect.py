"""Collect the results of a table in one small folder.

`table_NAME.json` contains the details, curves and results of the runs of each row and seed. The folder also contains
the report and, on request, the pretrained model of the first seed of each row in half precision, which `--init_from`
and all tools can read. The JSON file contains no paths of the machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.files import write_json
from tools.card import MACHINE
from tools.records import read_records
from tools.table_report import Line, Runs, find_seeds, read_fingerprint
from util import checkpoint

FACTS = ("started", "device", "gpus", "cpu_threads", "processes", "python", "versions", "commit")


def collect(folder: Path, report: Path, title: str, lines: Sequence[Line], models: bool) -> None:
    """Write the folder. `report` is the Markdown file; its plot is in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for line in lines:
        row: dict[str, Any] = {"row": line.labels, "published": line.paper}
        place = line.place
        if not line.values:
            row["state"] = line.state
        elif isinstance(place, Runs):
            seeds, parts = find_seeds(place), {"finetuning": place.finetuning}
            parts |= {} if place.scratch else {"pretraining": place.pretraining}
            row["seeds"] = {seed: {part: run(runs / seed) for part, runs in parts.items()} for seed in seeds}
            if models and not place.scratch:
                halve(place.pretraining / seeds[0] / "checkpoints" / checkpoint.LAST, folder / f"{line.name}.pth")
        else:
            row |= {"value": line.mean} | line.facts
        rows.append(row)
    write_json(folder / f"{report.stem}.json", {"title": title, "rows": rows})
    for path in (report, report.with_suffix(".png")):
        shutil.copyfile(path, folder / path.name)


def run(folder: Path) -> dict[str, Any]:
    """Return the details, curves (values of each metric by epoch) and result of a finished run."""
    options = yaml.safe_load((folder / "options.yaml").read_text())
    starts = json.loads((folder / "environment.json").read_text())
    epochs = read_records(folder / "log.txt", "epoch")
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch))
    return {
        "options": {name: value for name, value in options.items() if name not in MACHINE | {"init_from"}},
        "data": read_fingerprint(folder),
        "starts": [{name: start[name] for name in FACTS if name in start} for start in starts],
        "curve": {name: [_short(epoch.get(name)) for epoch in epochs] for name in names},
        "result": json.loads((folder / "result.json").read_text()),
    }


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def halve(source: Path, path: Path) -> None:
    """Write the model of a checkpoint in half precision, with its options and without optimizer state."""
    state = checkpoint.load(source)
    model: Mapping[str, Any] = state["model"]
    halved = {name: value.half() if value.is_floating_point() else value for name, value in model.items()}
    kept = {name: state[name] for name in ("format", "options", "data", "epoch", "step")}
    checkpoint.save(path, kept | {"model": halved})
