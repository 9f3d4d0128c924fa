"""Report a comparison: means over seeds, paired differences from the reference with intervals, and a plot.

A difference is paired by seed: row minus reference with the same seed. The 95% interval and the p-value are of the
two-sided paired t-test; p-values are corrected by Holm's method for the number of rows, separately for each measure
and budget.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from scipy import stats

from tools.comparison_file import Comparison
from tools.figures.style import COLORS, MARKERS, grid_lines, house_style, save
from tools.markdown import make_table
from tools.table_report import short_commit

BUDGETS = {"images": "Equal images", "compute": "Equal compute"}
LEVEL = 0.05


@dataclass(frozen=True)
class Result:
    """A finished pretraining with its evaluations."""

    row: str
    budget: str
    seed: int
    values: Mapping[str, float]
    """Measures; in percent unless the evaluation has `percent: false`."""
    blr: float
    epochs: int
    images: int
    seconds: float | None
    """Of the training; None if a start of it was killed."""
    preparing: float | None
    """Seconds of the runs that it needed; None if unknown."""
    options: Mapping[str, Any]
    recipe: str
    commit: str
    device: str
    """Of the training and of the runs that it needed."""

    @property
    def total(self) -> float | None:
        """Seconds of the training and of the runs that it needed."""
        return None if self.seconds is None or self.preparing is None else self.seconds + self.preparing


@dataclass(frozen=True)
class Difference:
    """Mean paired difference, its 95% interval, and the p-value before and after Holm's correction."""

    mean: float
    low: float
    high: float
    p: float
    corrected: float
    pairs: int


def read_environment(folder: Path) -> tuple[str, str]:
    """Return the commits and the devices of the starts of a run, usually one of each."""
    starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    commits = [short_commit(start["commit"] or "") for start in starts]
    devices = [", ".join(start["gpus"]) or start["processor"] for start in starts]
    return " / ".join(dict.fromkeys(commits)), " / ".join(dict.fromkeys(devices))


def paired(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float, float]:
    """Return mean, lower and upper end of the 95% interval, and p-value of paired differences.

    Args:
        values: one per seed, at least two.
        reference: of the same seeds.
    """
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    n, mean, deviation = len(differences), statistics.mean(differences), statistics.stdev(differences)
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * deviation / math.sqrt(n)
    if deviation == 0:
        return mean, mean, mean, 1.0 if mean == 0 else 0.0
    p = 2 * float(stats.t.sf(abs(mean) / (deviation / math.sqrt(n)), n - 1))
    return mean, mean - half, mean + half, p


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down method."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def by_seed(results: Sequence[Result], row: str, budget: str, measure: str) -> dict[int, float]:
    return {
        each.seed: each.values[measure]
        for each in results
        if each.row == row and each.budget == budget and measure in each.values
    }


def differences(results: Sequence[Result], reference: str, budget: str, measure: str) -> dict[str, Difference]:
    """Return the difference of each row from the reference, for rows that share two seeds with it."""
    expected = by_seed(results, reference, budget, measure)
    found: dict[str, tuple[float, float, float, float, int]] = {}
    for row in dict.fromkeys(each.row for each in results if each.budget == budget and each.row != reference):
        values = by_seed(results, row, budget, measure)
        seeds = sorted(values.keys() & expected.keys())
        if len(seeds) > 1:
            found[row] = (*paired([values[seed] for seed in seeds], [expected[seed] for seed in seeds]), len(seeds))
    corrected = holm([each[3] for each in found.values()])
    return {
        row: Difference(*each[:4], corrected=p, pairs=each[4])
        for (row, each), p in zip(found.items(), corrected, strict=True)
    }


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation; `-` without values."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def described(difference: Difference | None, digits: int) -> str:
    """Return the difference, its interval and the p-value; `-` without one."""
    if difference is None:
        return "-"
    p = f"p {difference.corrected:.2g}"
    verdict = p if difference.corrected < LEVEL else f"within noise, {p}"
    mean, low, high = (f"{each:+.{digits}f}" for each in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}], {verdict}"


def list_measures(comparison: Comparison) -> dict[str, int]:
    """Return the decimals of each measure."""
    return {name: 1 if each.percent else 3 for each in comparison.evaluations.values() for name in each.measures}


def make_tables(comparison: Comparison, results: Sequence[Result], budget: str, reasons: Mapping[str, str]) -> str:
    """Return the two tables of a budget: accuracies, and differences from the reference.

    Args:
        reasons: why rows have no results, by row.
    """
    measures = list_measures(comparison)
    accuracies, compared = [], []
    found = {measure: differences(results, comparison.reference, budget, measure) for measure in measures}
    for row in comparison.rows:
        mine = [each for each in results if each.row == row.name and each.budget == budget]
        if not mine:
            why = f"not run: {reasons[row.name]}" if row.name in reasons else "not run"
            accuracies.append([row.name, "0", why, *[""] * (2 + len(measures))])
            continue
        seconds = [each.total for each in mine if each.total is not None]
        cells = []
        for measure, digits in measures.items():
            values = [each.values[measure] for each in mine if measure in each.values]
            missing = f" ({len(values)} of {len(mine)} seeds)" if len(values) < len(mine) else ""
            cells.append(spread(values, digits) + missing)
        times = f"{statistics.mean(seconds):.0f}" if seconds else "-"
        accuracies.append([row.name, str(len(mine)), f"{mine[0].epochs}", f"{mine[0].images:,}", times, *cells])
        if row.name != comparison.reference:
            compared.append(
                [row.name, *(described(found[measure].get(row.name), measures[measure]) for measure in measures)]
            )
    text = f"## {BUDGETS[budget]}\n\n"
    text += make_table(["row", "seeds", "epochs", "images seen", f"{comparison.clock} s", *measures], accuracies)
    if compared:
        text += f"\nDifference from `{comparison.reference}`:\n\n" + make_table(["row", *measures], compared)
    return text


def list_scores(scores: Mapping[float, float]) -> str:
    """Return the scores of a sweep by learning rate, with a star at the first best, which is the one used."""
    best = max(scores, key=scores.__getitem__)
    return ", ".join(f"{rate:g}: {score:.1f}{' *' if rate == best else ''}" for rate, score in scores.items())


def markdown(
    comparison: Comparison,
    results: Sequence[Result],
    sweeps: Mapping[str, Mapping[float, float]],
    reasons: Mapping[str, str],
) -> str:
    """Return the report."""
    text = f"# {comparison.title}\n\n{comparison.note}\n\n"
    text += (
        "Mean ± standard deviation over seeds; accuracies in percent. Differences are paired by seed: mean, 95% "
        "interval, p-value of the paired t-test, corrected by Holm's method for the number of rows. "
        "Seconds include runs a row needs.\n"
    )
    for budget in BUDGETS:
        if any(each.budget == budget for each in results):
            text += f"\n{make_tables(comparison, results, budget, reasons if budget == 'compute' else {})}"
    if any(sweeps.values()):
        rates = [[row, list_scores(scores)] for row, scores in sweeps.items() if scores]
        text += (
            f"\n## Learning rates\n\n`blr` and {comparison.chosen_by} accuracy on held-out training images, seed 0; "
            f"* marks the one used.\n\n{make_table(['row', 'sweep'], rates)}"
        )
    commits = ", ".join(dict.fromkeys(each.commit for each in results))
    return f"{text}\nCommit: {commits or '-'}. Device: {list_devices(results)}.\n"


def list_devices(results: Sequence[Result]) -> str:
    """Return the device of all results, or the rows of each device."""
    rows: dict[str, dict[str, None]] = {}
    for each in results:
        rows.setdefault(each.device, {})[each.row] = None
    if len(rows) < 2:
        return next(iter(rows), "-")
    listed = "; ".join(f"{device} ({', '.join(names)})" for device, names in rows.items())
    return f"{listed}. Do not compare the seconds of different devices"


def picture(comparison: Comparison, results: Sequence[Result]) -> Figure:
    """Plot the mean and standard deviation of each measure over seeds.

    A comparison with a budget of compute is plotted against the seconds of pretraining, another one row by row.
    """
    measures = list_measures(comparison)
    finished = [row.name for row in comparison.rows if any(each.row == row.name for each in results)]
    columns = math.ceil(math.sqrt(len(measures))) if comparison.seconds else min(4, len(measures))
    lines = math.ceil(len(measures) / columns)
    size = (
        (4.2 * columns, 3.4 * lines + 1) if comparison.seconds else (3 * columns, (0.22 * len(finished) + 0.8) * lines)
    )
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    handles: dict[str, Any] = {}
    for index, (axis, measure) in enumerate(zip(axes, measures, strict=False)):
        for number, row in enumerate(finished):
            for budget in BUDGETS:
                mine = [each for each in results if (each.row, each.budget) == (row, budget) and measure in each.values]
                seconds = [each.total for each in mine if each.total is not None]
                if not mine or (comparison.seconds and not seconds):
                    continue
                values = [each.values[measure] for each in mine]
                point, bar = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
                handles[row] = axis.errorbar(
                    *((statistics.mean(seconds), point, bar) if comparison.seconds else (point, number, None, bar)),
                    marker=MARKERS[number // len(COLORS) % len(MARKERS)],
                    color=COLORS[number % len(COLORS)],
                    markerfacecolor="none" if budget == "compute" else None,
                    capsize=2,
                    linestyle="",
                )
        name = f"{measure}, %" if measures[measure] == 1 else measure
        if comparison.seconds:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 70 and not 7 x 10^1
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xlabel(f"{comparison.clock.upper()} seconds of pretraining")
            axis.set_ylabel(name)
        else:
            axis.set_yticks(range(len(finished)), finished if index % columns == 0 else [])
            axis.invert_yaxis()
            axis.set_xlabel(name)
        grid_lines(axis)
    for axis in axes:
        axis.set_axis_off()
    if comparison.seconds:
        figure.suptitle("filled: equal images, hollow: equal compute", fontsize=8)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=7, fontsize=7)
    return figure


def write(
    path: Path,
    comparison: Comparison,
    results: Sequence[Result],
    sweeps: Mapping[str, Mapping[float, float]],
    *,
    reasons: Mapping[str, str] | None = None,
    smoke: bool = False,
) -> None:
    """Write the report, and the plot and the results as JSON beside it.

    Args:
        sweeps: accuracy of each row on held-out images by learning rate.
        reasons: why rows have no results at equal compute, by row.
    """
    text = markdown(comparison, results, sweeps, reasons or {})
    if smoke:
        text = f"Smoke test: tiny models on a few tiny images. The numbers have no meaning.\n\n{text}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n![mean and standard deviation over seeds]({path.stem}.png)\n", encoding="utf-8")
    with house_style():
        save(picture(comparison, results), path.with_suffix(".png"))
    rates = {row: {f"{rate:g}": score for rate, score in scores.items()} for row, scores in sweeps.items()}
    found = {
        "title": comparison.title,
        "sweeps": rates,
        "results": [dataclasses.asdict(each) for each in results],
    }
    path.with_suffix(".json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
