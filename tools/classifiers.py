"""Compare classifiers: linear probes, fine-tuned encoders, and encoders trained from scratch.

    python -m tools.classifiers output/quickstart                    # every finished classifier below that folder
    python -m tools.classifiers output/finetune output/scratch

Labels, updates and images seen are listed beside every accuracy, because accuracies of runs that differ in these cannot
be compared directly. If a folder contains results of tools.knn, they follow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.command import reports_errors
from tools.records import read_json, read_options

HEADER = ("classifier", "run", "last epoch %", "best epoch %", "best chosen on", "labels", "updates", "images seen")
FINE_TUNED, LINEAR, NEIGHBORS, SCRATCH = KINDS = (
    "fine-tuned",
    "linear layer on the frozen encoder",
    "nearest neighbours of the frozen encoder",
    "from scratch",
)
METRICS = ("acc1", "mean_class_acc")
PIXELS_NOTE = (
    "Raw pixels do well on small centred images such as digits, where strokes of a class fall on the same pixels; on "
    "photographs they usually do worse than a trained encoder."
)


def read_kind(folder: Path) -> str:
    """Return the kind (see `KINDS`) of the run in `folder`, or "" if its options are not stored."""
    options = read_options(folder)
    if "from_scratch" not in options:  # only main_linprobe.py has no such option
        return LINEAR if options.get("init_from") else ""
    return FINE_TUNED if options["init_from"] and not options["from_scratch"] else SCRATCH


@dataclass(frozen=True)
class Row:
    """The result of a classifier. Accuracies are in %, or None if they are not available."""

    kind: str
    run: str
    metric: str
    last: float
    best: float | None
    chosen_on: str
    labels: int
    updates: int | None
    images_seen: int | None

    def cells(self) -> tuple[str, ...]:
        """Return the cells in the order of `HEADER`."""
        kind = self.kind + (" (mean per class)" if self.metric == "mean_class_acc" else "")
        best = "" if self.best is None else f"{self.best:.2f}"
        counts = ("" if count is None else f"{count:,}" for count in (self.labels, self.updates, self.images_seen))
        return kind, self.run, f"{self.last:.2f}", best, self.chosen_on, *counts


def read_classifier(folder: Path) -> Iterator[Row]:
    """Yield the results of a run of main_finetune.py or main_linprobe.py; a probe also has a kNN result."""
    result = read_json(folder / "result.json")
    metric, accuracy = result["metric"], result["accuracy"]
    labels = (folder / "images_train.txt").read_bytes().count(b"\n")
    best = accuracy["best"][metric] if "best" in accuracy else None
    trained = (result["best_chosen_on"], labels, result["steps"], result["images_seen"])
    yield Row(read_kind(folder), folder.name, metric, accuracy["last"][metric], best, *trained)
    if "knn_acc1" in result:
        yield Row(NEIGHBORS, folder.name, "acc1", result["knn_acc1"], None, "", labels, None, None)


def rows_below(folders: Iterable[Path]) -> list[Row]:
    """Return the rows of all classifiers below `folders`, in the order of `KINDS`."""
    rows = [row for folder in folders for path in classifiers_below(folder) for row in read_classifier(path)]
    return sorted(rows, key=lambda row: [*KINDS, ""].index(row.kind))


def compare_with_scratch(rows: Iterable[Row]) -> tuple[float, str] | None:
    """Compare fine-tuning with training from scratch.

    Returns:
        The difference in points and a sentence; None unless there is one run of each, with the same metric and the
        same numbers of labels, updates and images seen.
    """
    compared = [row for row in rows if row.kind in (FINE_TUNED, SCRATCH)]
    if [row.kind for row in compared] != [FINE_TUNED, SCRATCH]:
        return None
    tuned, scratch = compared
    if replace(tuned, kind="", run="", last=0, best=0) != replace(scratch, kind="", run="", last=0, best=0):
        return None
    points = tuned.last - scratch.last
    return points, (
        f"Trained with {tuned.labels:,} labels: {tuned.last:.2f}% fine-tuned from this encoder, {scratch.last:.2f}% "
        f"from scratch, a difference of {points:+.2f} points."
    )


def pixels_note(accuracy: Mapping[str, float]) -> str:
    """Return an explanation if raw pixels are better than an encoder, otherwise ""."""
    raw, encoder = accuracy.get("raw pixels"), accuracy.get("pretrained encoder")
    return PIXELS_NOTE if raw is not None and encoder is not None and raw > encoder else ""


def neighbors_table(knn: Mapping[str, Any]) -> str:
    """Return the results of tools.knn as Markdown."""
    rows = [("features", "accuracy %"), *((name, f"{value:.2f}") for name, value in knn["accuracy"].items())]
    notes = [note for note in (knn.get("protocol", ""), pixels_note(knn["accuracy"])) if note]
    return markdown_table(rows) + "".join(f"\n{note}\n" for note in notes)


def classifiers_below(folder: Path) -> list[Path]:
    """Return this folder and its subfolders that contain a finished classifier."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    results = [path for path in (folder, *inside) if (path / "result.json").exists()]
    return [path for path in results if (read_json(path / "result.json") or {}).get("metric") in METRICS]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" if number != 1 else f"|-{line}-|\n" for number, line in enumerate(lines))


def table(folders: Sequence[Path]) -> str:
    """Return Markdown tables of the classifiers and of nearest neighbours. Raises ValueError without classifiers."""
    rows = rows_below(folders)
    if not rows:
        raise ValueError(f"no finished classifier in {', '.join(map(str, folders))}: a run of main_finetune.py has one")
    text = markdown_table([HEADER, *(row.cells() for row in rows)])
    if gain := compare_with_scratch(rows):
        text += f"\n{gain[1]}\n"
    for path in (folder / "knn.json" for folder in folders):
        if knn := read_json(path):
            text += f"\nNearest neighbours, {path.parent.name}:\n\n{neighbors_table(knn)}"
    return text


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare classifiers: linear probes, fine-tuned encoders, and encoders trained from scratch."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, or folders of runs")
    given = parser.parse_args(argv)
    sys.stdout.write(table(given.folders))
    return 0


if __name__ == "__main__":
    sys.exit(main())
