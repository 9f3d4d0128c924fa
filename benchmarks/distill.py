"""Collect the runs of scripts/distill_demo.sh: accuracies of students with and without a teacher, mean and deviation.

    python -m benchmarks.distill output/distill_demo

Writes distill.json into the folder and the table to the terminal. Nearest neighbours and the linear layer use the
encoders as they were pretrained, also the teacher's, which teaches only after it was fine-tuned.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from tools.markdown import make_table

MEASURES = {"knn": "nearest neighbours", "linear": "linear layer", "finetuned": "fine-tuned"}


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def accuracies(folder: Path) -> dict[str, float]:
    """Return the accuracies in percent of one encoder: last epoch, test images."""
    probe, tuned = read_result(folder / "probe"), read_result(folder / "finetuned")
    return {
        "knn": probe["knn_acc1"],
        "linear": probe["accuracy"]["last"]["acc1"],
        "finetuned": tuned["accuracy"]["last"]["acc1"],
    }


def collect(folder: Path) -> dict[str, Any]:
    """Return accuracies of the teacher and, by kind and seed, of the students."""
    found: dict[str, Any] = {"teacher": accuracies(folder / "teacher"), "students": {}}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"(alone|taught)([0-9]+)", path.name)
        if match and (path / "finetuned" / "result.json").is_file():
            updates = read_result(path)["steps"]
            found["students"].setdefault(match[1], {})[match[2]] = accuracies(path) | {"updates": updates}
    return found


def summary(seeds: Mapping[str, Mapping[str, float]], measure: str) -> str:
    values = [each[measure] for each in seeds.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def markdown(found: Mapping[str, Any]) -> str:
    rows = [["teacher", *(f"{found['teacher'][measure]:.1f}" for measure in MEASURES)]]
    names = {"alone": "student without teacher", "taught": "student with teacher"}
    rows += [
        [names[kind], *(summary(seeds, measure) for measure in MEASURES)] for kind, seeds in found["students"].items()
    ]
    return make_table(["top-1 %", *MEASURES.values()], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="OUTPUT of the script")
    folder = parser.parse_args(argv).folder
    found = collect(folder) | {"machine": machine("cpu")}
    (folder / "distill.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(markdown(found))


if __name__ == "__main__":
    main()
