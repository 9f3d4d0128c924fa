"""What runs did: a table of their figures and their training curves, from the run folders alone.

    python tools/report.py output/quickstart                     # report.md and curves.png in that folder
    python tools/report.py output/mae output/nor --output report   # two runs side by side, into the folder `report`

It reads options.yaml, log.txt, metrics.jsonl, result.json and, where tools/knn.py was run, knn.json. A run that is
still going on, or was cut off, is reported as far as it came. Updates and images seen stand beside every figure,
because runs that saw different amounts of data cannot be compared by their figures alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, told apart by colour-blind readers; the dashes tell them apart in grey.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]

TITLES = {
    "train_loss": "loss: reconstruction + weighted terms",
    "train_reconstruction": "reconstruction loss",
    "train_neighbor": "neighbour term, unweighted",
    "knn_acc1": "k nearest neighbours, accuracy in %",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
    "data_wait": "share of time spent waiting for data",
}
STEP_CURVES = ("lr", "grad_norm", "images_per_s", "data_wait")
NO_CURVE = ("run_id", "epoch", "step", "train_lr")


@dataclass(frozen=True)
class RunRecords:
    """One run folder as read: records of epochs and of steps, each once and in order."""

    name: str
    options: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    knn: Mapping[str, Any] | None

    def last(self, key: str) -> float | None:
        """The newest value of an epoch's figure."""
        values = [record[key] for record in self.epochs if _is_number(record.get(key))]
        return values[-1] if values else None

    @property
    def updates(self) -> int:
        return max((record["step"] for record in [*self.epochs, *self.steps]), default=0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """The JSON lines of a file, one for each value of `key`, in its order.

    A resumed run writes again what it computed again: the later line counts. A last line that was cut off does not.
    """
    if not path.exists():
        return []
    found: dict[Any, dict[str, Any]] = {}
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        found[record[key]] = record
    return [found[value] for value in sorted(found)]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def read_run(folder: Path) -> RunRecords:
    """Everything the report needs of one run folder; ValueError if it is none."""
    if not (folder / "options.yaml").exists():
        raise ValueError(f"{folder} is not a run folder: it has no options.yaml")
    return RunRecords(
        name=folder.resolve().name,
        options=yaml.safe_load((folder / "options.yaml").read_text()) or {},
        epochs=read_records(folder / "log.txt", "epoch"),
        steps=read_records(folder / "metrics.jsonl", "step"),
        result=_read_json(folder / "result.json"),
        knn=_read_json(folder / "knn.json"),
    )


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def row(run: RunRecords) -> dict[str, str]:
    """The run's line of the table."""
    options = run.options
    done = f"{len(run.epochs)} of {options.get('epochs', '?')}"
    knn = [record["knn_acc1"] for record in run.epochs if _is_number(record.get("knn_acc1"))]
    speeds = sorted(record["images_per_s"] for record in run.steps if _is_number(record.get("images_per_s")))
    losses = [name for name in (run.epochs[-1] if run.epochs else {}) if name.startswith("train_")]
    cells = {
        "run": run.name,
        "method": str(options.get("method", "")),
        "model": str(options.get("model", "")),
        "epochs": done if run.result is not None else f"{done}, unfinished",
        "updates": f"{run.updates:,}",
        "images seen": f"{run.updates * int(options.get('total_batch_size') or 0):,}",
        "learning rate": _number(max((r["lr"] for r in run.steps if _is_number(r.get("lr"))), default=None), ".2e"),
    }
    for name in losses:
        if name not in NO_CURVE:
            cells[f"last {name.removeprefix('train_')}"] = _number(run.last(name), ".4g")
    if knn:
        cells |= {"last kNN %": f"{knn[-1]:.2f}", "best kNN %": f"{max(knn):.2f}"}
    if speeds:
        cells["images/s (median)"] = f"{speeds[len(speeds) // 2]:.0f}"
    return cells


def table(runs: Sequence[RunRecords]) -> str:
    """Markdown: one line a run; one figure a line where there is a single run."""
    rows = [row(run) for run in runs]
    columns = list(dict.fromkeys(name for cells in rows for name in cells))
    if len(runs) == 1:
        lines = ["| | |", "|---|---|", *(f"| {name} | {rows[0][name]} |" for name in columns)]
    else:
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cells.get(name, "") for name in columns) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def knn_table(knn: Mapping[str, Any]) -> str:
    """Markdown of what tools/knn.py measured."""
    lines = ["| features | accuracy % |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in knn["accuracy"].items()]
    return "\n".join(lines) + f"\n\n{knn['protocol']}\n"


def curves(runs: Sequence[RunRecords]) -> Figure:
    """One panel a figure, all runs in each: means of epochs first, then what was logged at steps."""
    of_epochs = [
        name
        for name in dict.fromkeys(name for run in runs for record in run.epochs for name in record)
        if name not in NO_CURVE and any(run.last(name) is not None for run in runs)
    ]
    steps = [record for run in runs for record in run.steps]
    of_steps = [name for name in STEP_CURVES if any(_is_number(record.get(name)) for record in steps)]
    panels = [(name, "epochs") for name in of_epochs if name not in of_steps] + [(name, "steps") for name in of_steps]
    if not panels:
        raise ValueError(f"no curves to draw: {', '.join(run.name for run in runs)} logged nothing yet")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, records) in zip(axes, panels, strict=False):
        for number, run in enumerate(runs):
            shown = [r for r in (run.epochs if records == "epochs" else run.steps) if _is_number(r.get(name))]
            x = [record["epoch"] + 1 if records == "epochs" else record["step"] for record in shown]
            axis.plot(
                x,
                [record[name] for record in shown],
                color=COLORS[number % len(COLORS)],
                linestyle=DASHES[number % len(DASHES)],
                marker="o" if len(shown) == 1 else None,
                linewidth=1.4,
                label=run.name,
            )
        axis.set_title(TITLES.get(name, name.removeprefix("train_").replace("_", " ")), fontsize=9)
        axis.set_xlabel("epoch" if records == "epochs" else "optimizer step", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def report(runs: Sequence[RunRecords], folder: Path) -> str:
    """Write report.md and curves.png into `folder`; returns the report's text."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {', '.join(run.name for run in runs)}", table(runs)]
    for run in runs:
        if run.knn:
            parts.append(f"## k nearest neighbours: {run.name}\n\n{knn_table(run.knn)}")
    curves(runs).savefig(folder / "curves.png", dpi=150)
    parts.append("![training curves](curves.png)\n")
    text = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    (folder / "report.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A table and the training curves of one or more runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output", type=Path, help="folder for both files (default: the run's, or `report` for several runs)"
    )
    given = parser.parse_args(argv)
    folder = given.output or (given.runs[0] if len(given.runs) == 1 else Path("report"))
    try:
        text = report([read_run(run) for run in given.runs], folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{text}\nWritten: {folder / 'report.md'}, {folder / 'curves.png'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
