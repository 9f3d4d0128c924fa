"""Report a table: the paper's results, ours, the differences, and the details of our runs.

The report is Markdown with a plot. All results are read from run folders; missing runs are shown as "not run".
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

import methods
from tools.figures.style import BLUE, VERMILION, grid_lines, house_style, save
from tools.markdown import make_table
from util import checkpoint

BATCH = 4096  # images per step for which the paper reports memory
NOT_RUN, UNFINISHED = "not run", "not finished"


@dataclass(frozen=True)
class Runs:
    """Folders of pretraining and fine-tuning of a row, each with one folder per seed."""

    pretraining: Path
    finetuning: Path
    scratch: bool = False
    """Whether fine-tuning uses no pretrained weights."""


@dataclass(frozen=True)
class Bill:
    """Key of a value written by benchmarks.bill."""

    file: Path
    variant: str
    measure: str


def named(labels: Sequence[str]) -> str:
    """Return labels as part of a command or file name: `vit-tiny-mae-200`."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(labels).lower()).strip("-")


@dataclass
class Line:
    """A row of the report."""

    labels: tuple[str, ...]
    paper: float | None
    state: str = ""
    """Reason why we have no result."""
    values: list[float] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    place: Runs | Bill | None = None
    """Folders of our runs."""

    @property
    def name(self) -> str:
        """The labels as one name: `vit-tiny-mae-200`."""
        return named(self.labels)

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def measured(labels: tuple[str, ...], paper: float | None, cited: str, place: Runs | Bill | None) -> Line:
    """Return the row for a result of the paper, with our runs at `place`."""
    if place is None:
        return Line(labels, paper, f"cited: {cited}")
    line = _read_bill(labels, paper, place) if isinstance(place, Bill) else _read_runs(labels, paper, place)
    line.place = place
    return line


def _read_bill(labels: tuple[str, ...], paper: float | None, place: Bill) -> Line:
    if not place.file.exists():
        return Line(labels, paper, NOT_RUN)
    found = json.loads(place.file.read_text())
    bills = found["bill"]
    bill = bills.get(place.variant) or bills.get(f"{place.variant}+compile")
    if bill is None:
        return Line(labels, paper, NOT_RUN)
    value = bill["mb_per_image"] * BATCH / 1000 if place.measure == "GB" else bill[place.measure]
    setting, asked, machine = found["setting"], found["asked"], found["machine"]
    facts = {
        "device": f"{asked['devices']} x {machine['device']}",
        "batch": str(setting["batch_size"]),
        "amp": setting["amp"],
        "images of an epoch": f"{asked['images']:,}",
        "commit": short_commit(machine["commit"] or ""),
    }
    return Line(labels, paper, values=[value], facts=facts)


def _read_runs(labels: tuple[str, ...], paper: float | None, place: Runs) -> Line:
    seeds = find_seeds(place)
    if not seeds:
        begun = any(list(folder.glob("seed*/options.yaml")) for folder in (place.pretraining, place.finetuning))
        pretrained = any(place.pretraining.glob("seed*/result.json"))
        state = f"{UNFINISHED} (pretrained)" if pretrained else UNFINISHED if begun else NOT_RUN
        return Line(labels, paper, state)
    values, last, facts = [], [], []
    for seed in seeds:
        tuned = place.finetuning / seed
        result = json.loads((tuned / "result.json").read_text())
        accuracy, metric = result["accuracy"], result["metric"]
        values.append(accuracy.get("best", accuracy["last"])[metric])
        last.append(accuracy["last"][metric])
        pretraining = {} if place.scratch else describe_run(place.pretraining / seed, "")
        facts.append(pretraining | describe_run(tuned, "fine-tuning "))
        facts[-1]["best chosen on"] = result["best_chosen_on"]
        facts[-1]["metric"] = metric
    joined = {name: " / ".join(dict.fromkeys(each.get(name, "") for each in facts)) for name in facts[0]}
    joined = {"last epoch %": f"{statistics.mean(last):.2f}"} | joined
    return Line(labels, paper, values=values, facts=joined)


def find_seeds(place: Runs) -> list[str]:
    """Return the folders of finished seeds: `seed0`, `seed1`, ..."""
    found = [path.parent.name for path in place.finetuning.glob("seed*/result.json")]
    return sorted(found, key=lambda name: (len(name), name))


def describe_run(folder: Path, prefix: str) -> dict[str, str]:
    """Describe a finished run from its options, result, environment and last checkpoint."""
    options = yaml.safe_load((folder / "options.yaml").read_text())
    result = json.loads((folder / "result.json").read_text())
    starts = json.loads((folder / "environment.json").read_text())
    found = {
        "epochs": str(options["epochs"]),
        "updates": f"{result['steps']:,}",
        "images seen": f"{result['images_seen']:,}",
        "batch": f"{options['total_batch_size']:,}",
        "data": read_fingerprint(folder),
        "commit": " / ".join(dict.fromkeys(short_commit(start["commit"]) for start in starts)),
    }
    if not prefix:
        found = {"weight x (P-1)": strength(json.dumps(options))} | found
    return {prefix + name: value for name, value in found.items()}


def short_commit(described: str) -> str:
    """Shorten the output of `git describe`; the mark for uncommitted changes is kept."""
    commit, dash, dirty = described.partition("-")
    return commit[:10] + dash + dirty


def read_fingerprint(folder: Path) -> str:
    """Return the first digits of the training images' fingerprint, from a checkpoint."""
    path = folder / "checkpoints" / checkpoint.LAST
    return checkpoint.load(path)["data"][:12] if path.exists() else ""


@functools.cache
def strength(options: str) -> str:
    """Return the strength of the neighbour term, weight x (P - 1), with a note if its relation has another scale."""
    stored: dict[str, Any] = json.loads(options)
    if "neighbor" not in (stored.get("terms") or {}):
        return "-"
    with torch.device("meta"):  # shapes only
        model: Any = methods.from_options(stored)
    term = model.terms["neighbor"]
    if scale := term.scale(model):
        return ", ".join(f"{value:.3g} ({name})" for name, value in scale.items())
    return f"{term.options.weight * (term.width(model) - 1):.3g} (of another scale)"


# ---- Markdown and picture -------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ours(line: Line) -> str:
    if line.mean is None:
        return line.state
    spread = "" if line.deviation is None else f" ± {line.deviation:.2f}"
    seeded = not isinstance(line.place, Bill)
    seeds = f" ({len(line.values)} seed{'s' if len(line.values) > 1 else ''})" if seeded else ""
    return f"{line.mean:.2f}{spread}{seeds}"


def difference(line: Line) -> str:
    return "" if line.mean is None or line.paper is None else f"{line.mean - line.paper:+.2f}"


def markdown(title: str, columns: Sequence[str], lines: Sequence[Line], note: str, source: str) -> str:
    """Return the report: results, then details of the runs."""
    numbers = [[*line.labels, number(line.paper), ours(line), difference(line)] for line in lines]
    text = f"# {title}\n\n"
    if note:
        text += f"{note}\n\n"
    text += make_table([*columns, source, "ours", "difference"], numbers)
    text += "\n± is the standard deviation over seeds. Compare numbers only if updates and images seen are similar.\n"
    names = list(dict.fromkeys(name for line in lines for name in line.facts))
    if names:
        facts = [[*line.labels, *(line.facts.get(name, "") for name in names)] for line in lines if line.facts]
        text += f"\n## Runs\n\n{make_table([*columns, *names], facts)}"
    return text


def picture(title: str, lines: Sequence[Line], source: str) -> Figure:
    """Plot the results of `source` as rings and ours as squares with standard deviation; one panel per unit."""
    panels: dict[str, list[Line]] = {}
    for line in lines:
        panels.setdefault(line.place.measure if isinstance(line.place, Bill) else "%", []).append(line)
    figure = Figure(figsize=(6, 0.5 + 0.35 * len(panels) + 0.19 * len(lines)), layout="constrained")
    heights = [len(panel) for panel in panels.values()]
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    handles: dict[str, Any] = {}
    for axis, (unit, panel) in zip(axes, panels.items(), strict=True):
        for place, line in enumerate(panel):
            if line.paper is not None:
                (handles[source],) = axis.plot(line.paper, place, "o", mfc="none", color=BLUE)
            if line.mean is not None:
                handles["ours"] = axis.errorbar(line.mean, place, xerr=line.deviation, fmt="s", ms=4, color=VERMILION)
        axis.set_yticks(range(len(panel)), [", ".join(line.labels) for line in panel])
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_xlabel(unit)
        grid_lines(axis)
    axes[0].set_title(title)
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower right", ncols=2)
    return figure


def write(
    path: Path, title: str, columns: Sequence[str], lines: Sequence[Line], note: str = "", source: str = "paper"
) -> None:
    """Write the report and its plot. `source` is the name of the published results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{markdown(title, columns, lines, note, source)}\n![{source} and ours]({path.stem}.png)\n")
    with house_style():
        save(picture(title, lines, source), path.with_suffix(".png"))
