"""Report runs on one page: report.html is self-contained and works offline.

    python -m tools.report output/quickstart                     # report.html in that folder
    python -m tools.report output/mae output/nor --output report   # compare runs, in the folder `report`

It reads options.yaml, environment.json, log.txt, metrics.jsonl, result.json, the images in samples/ and figures/, and
knn.json of tools.knn if it exists. Unfinished runs are reported up to their current state.
Updates and images seen are listed beside every metric, because runs that saw different amounts of data cannot be
compared by their metrics alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_text
from options import describe_model
from tools import report_page
from tools.command import reports_errors
from tools.markdown import make_table
from tools.records import RunRecords, is_number, read_run

TITLES = {
    "train_loss": "loss",
    "train_reconstruction": "reconstruction loss",
    "train_neighbor": "neighbour term, unweighted",
    "knn_acc1": "k nearest neighbours, accuracy in %",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
    "data_wait": "share of time spent waiting for data",
}
TITLES |= {
    f"{images}_{figure}": f"{what}, {whose}"
    for images, whose in (("val", "validation images"), ("choice", "validation images"), ("test", "test images"))
    for figure, what in (
        ("acc1", "top-1 in %"),
        ("acc5", "top-5 in %"),
        ("mean_class_acc", "mean per class in %"),
        ("loss", "loss"),
    )
}
STEP_CURVES = ("lr", "grad_norm", "images_per_s", "data_wait")
NO_CURVE = ("run_id", "epoch", "step", "train_lr")


# ---- table ----------------------------------------------------------------------------------------------------------


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def peak_lr(options: Mapping[str, Any]) -> float | None:
    """Return the learning rate at the end of the warm-up."""
    if options.get("lr"):
        return float(options["lr"])
    if options.get("blr") and options.get("total_batch_size"):
        return float(options["blr"]) * int(options["total_batch_size"]) / 256
    return None


def row(run: RunRecords) -> dict[str, str]:
    """Return the table row of a run."""
    options = run.options
    done = f"{run.epochs_done} of {options.get('epochs', '?')}"
    speeds = sorted(record["images_per_s"] for record in run.steps if is_number(record.get("images_per_s")))
    losses = [name for name in (run.epochs[-1] if run.epochs else {}) if name.startswith("train_")]
    cells = {
        "run": run.name,
        "method": str(options.get("method", "")),
        "model": describe_model(options),
        "epochs": done if run.result is not None else f"{done}, unfinished",
        "updates": f"{run.updates:,}",
        "images seen": f"{run.updates * int(options.get('total_batch_size') or 0):,}",
        "learning rate": _number(peak_lr(options), ".3e"),
    }
    for name in losses:
        if name not in NO_CURVE:
            cells[f"last {name.removeprefix('train_')}"] = _number(run.last(name), ".4g")
    for name in run.accuracies:
        if values := run.values(name):
            what = "kNN" if name == "knn_acc1" else name
            cells |= {f"last {what} %": f"{values[-1]:.2f}", f"best {what} %": f"{max(values):.2f}"}
    cells |= test_metrics(run.result or {})
    if speeds:
        cells["images/s (median)"] = f"{speeds[len(speeds) // 2]:.0f}"
    return {name: text for name, text in cells.items() if text}


def test_metrics(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the test metrics of result.json; empty for pretraining."""
    cells = {}
    for epoch, metrics in result.get("accuracy", {}).items():
        cells[f"{epoch} epoch, test {result['metric']} %"] = f"{metrics[result['metric']]:.2f}"
    if cells:
        cells["best epoch chosen on"] = result["best_chosen_on"]
    if "knn_acc1" in result:
        cells["kNN of the frozen encoder, test acc1 %"] = f"{result['knn_acc1']:.2f}"
    return cells


def table(runs: Sequence[RunRecords]) -> str:
    """Return Markdown for the terminal: one line per run, or one line per value for a single run."""
    rows = [row(run) for run in runs]
    columns = list(dict.fromkeys(name for cells in rows for name in cells))
    if len(runs) == 1:
        return make_table(["", ""], [(name, rows[0][name]) for name in columns])
    return make_table(columns, [[cells.get(name, "") for name in columns] for cells in rows])


# ---- curves ---------------------------------------------------------------------------------------------------------


def list_panels(runs: Sequence[RunRecords]) -> list[tuple[str, str]]:
    """Return the name of each curve with `epochs` or `steps`, its x axis; curves over epochs are first."""
    of_epochs = [
        name
        for name in dict.fromkeys(name for run in runs for record in run.epochs for name in record)
        if name not in NO_CURVE and any(run.last(name) is not None for run in runs)
    ]
    steps = [record for run in runs for record in run.steps]
    of_steps = [name for name in STEP_CURVES if any(is_number(record.get(name)) for record in steps)]
    return [(name, "epochs") for name in of_epochs if name not in of_steps] + [(name, "steps") for name in of_steps]


def page(runs: Sequence[RunRecords]) -> str:
    """Return the report as self-contained HTML."""
    panels, titles = list_panels(runs), TITLES
    if ("train_reconstruction", "epochs") in panels:
        titles = TITLES | {"train_loss": "loss: reconstruction + weighted terms"}
    return report_page.page(runs, [row(run) for run in runs], panels, titles)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Report runs on one page that works offline.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, help="folder (default: the run's, or `report` for several runs)")
    given = parser.parse_args(argv)
    folder = given.output or (given.runs[0] if len(given.runs) == 1 else Path("report"))
    runs = [read_run(run) for run in given.runs]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", page(runs))
    sys.stdout.write(f"{table(runs)}\nWritten: {folder / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
