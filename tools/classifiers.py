"""Compare classifiers: linear probes, fine-tuned encoders, and encoders trained from scratch.

    python -m tools.classifiers output/quickstart                    # every finished classifier below that folder
    python -m tools.classifiers output/finetune output/scratch

Labels, updates and images seen are listed beside every accuracy, because accuracies of runs that differ in these cannot
be compared directly. If a folder contains results of tools.knn, they come first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HEADER = ("what", "last epoch %", "best epoch %", "best chosen on", "labels", "updates", "images seen")


def neighbours(folder: Path) -> Iterator[tuple[str, ...]]:
    """Return the rows of tools.knn, whose bank is the complete training set."""
    path = folder / "knn.json"
    if path.exists():
        for name, accuracy in json.loads(path.read_text())["accuracy"].items():
            yield f"nearest neighbours, {name}", f"{accuracy:.2f}", "", "", "all", "", ""


def classifier(folder: Path) -> Iterator[tuple[str, ...]]:
    """Return the row of a finished run of main_finetune.py or main_linprobe.py; for a probe also that of kNN."""
    result = json.loads((folder / "result.json").read_text())
    metric, accuracy = result["metric"], result["accuracy"]
    labels = f"{len((folder / 'images_train.txt').read_text().splitlines()):,}"
    if "knn_acc1" in result:
        yield f"{folder.name}: nearest neighbours", f"{result['knn_acc1']:.2f}", "", "", labels, "", ""
    best = f"{accuracy['best'][metric]:.2f}" if "best" in accuracy else ""
    yield (
        folder.name if metric == "acc1" else f"{folder.name} (mean per class)",
        f"{accuracy['last'][metric]:.2f}",
        best,
        result["best_chosen_on"],
        labels,
        f"{result['steps']:,}",
        f"{result['images_seen']:,}",
    )


def classifiers_below(folder: Path) -> list[Path]:
    """Return this folder and its subfolders that contain a finished classifier."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    results = [path for path in (folder, *inside) if (path / "result.json").exists()]
    return [path for path in results if "accuracy" in json.loads((path / "result.json").read_text())]


def table(folders: Sequence[Path]) -> str:
    """Return a Markdown table; raise ValueError if there are no rows."""
    rows = [row for folder in folders for row in neighbours(folder)]
    found = [path for folder in folders for path in classifiers_below(folder)]
    if not found:
        raise ValueError(f"no finished classifier in {', '.join(map(str, folders))}: a run of main_finetune.py has one")
    rows += [row for path in found for row in classifier(path)]
    lines = [HEADER, tuple("---" for _ in HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare classifiers: linear probes, fine-tuned encoders, and encoders trained from scratch."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, or folders of runs")
    given = parser.parse_args(argv)
    try:
        sys.stdout.write(table(given.folders))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
