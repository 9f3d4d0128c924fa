"""Compare runs with different relations, from their folders.

Figure 6 of the NoR-MAE paper shows that another relation at the same weight trains differently. Relations differ in
scale by orders of magnitude, so equal weights are not equal strengths: the label gives the weight, and a panel what the
weighted term adds to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.figures.style import curve_style, grid_lines, note
from tools.records import RunRecords, is_number, read_run

WIDTH = 7.0


def describe_relation(run: RunRecords) -> str:
    """Return a label: the relation and weight of the run, or that it has no relation."""
    term: Mapping[str, Any] | None = (run.options.get("terms") or {}).get("neighbor")
    if term is None:
        return f"no neighbour term ({run.options.get('method')})"
    words = [term["relation"].replace("_", " ")]
    words += ["random mask"] if term["companion"] == "random" else []
    words += ["released selection"] if term["cnp"] == "released" else []
    words += [f"by {term['normalize']}"] if term["normalize"] != "token" else []
    return f"{', '.join(words)}, weight {term['weight']:g}"


def make_labels(runs: Sequence[RunRecords]) -> list[str]:
    """Return one label per run; the name of the run is added to duplicates."""
    labels = [describe_relation(run) for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label} ({run.name})" for label, run in zip(labels, runs, strict=True)
    ]


def series(run: RunRecords, name: str) -> tuple[list[int], list[float]]:
    """Return epochs, counted from 1, and the values of a metric."""
    shown = [record for record in run.epochs if is_number(record.get(name))]
    return [record["epoch"] + 1 for record in shown], [record[name] for record in shown]


def added_by_the_term(run: RunRecords) -> tuple[list[int], list[float]]:
    """Return epochs, and the weighted neighbour term in each."""
    epochs, values = series(run, "train_neighbor")
    weight = run.options["terms"]["neighbor"]["weight"] if values else 0.0
    return epochs, [weight * value for value in values]


def relations(folders: Sequence[Path]) -> Figure:
    """Draw Figure 6: training curves of runs with different relations, from their folders."""
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("give the run folders to compare")
    panels = [
        ("reconstruction loss", [series(run, "train_reconstruction") for run in runs]),
        ("weight x neighbour term", [added_by_the_term(run) for run in runs]),
        ("k nearest neighbours, accuracy in %", [series(run, "knn_acc1") for run in runs]),
    ]
    panels = [(title, curves) for title, curves in panels if any(values for _, values in curves)]
    if not panels:
        raise ValueError(
            f"no curves to draw: no finished epoch of pretraining in {', '.join(run.name for run in runs)}"
        )
    labels = make_labels(runs)
    figure = Figure(figsize=(WIDTH, 2.9 + 0.16 * len(runs)), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for number, (epochs, values) in enumerate(curves):
            axis.plot(epochs, values, label=labels[number], **curve_style(number, len(values)))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        grid_lines(axis)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2 if len(runs) > 3 else 1)
    seen = sorted({f"{run.updates:,} updates of {run.options['total_batch_size']} images" for run in runs})
    model = sorted({str(run.options["model"]) for run in runs})
    note(figure, [f"{', '.join(model)}; {'; '.join(seen)}. Means over epochs."], WIDTH)
    return figure
