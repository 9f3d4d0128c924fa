"""What runs did, on one page: report.html opens anywhere, offline, with everything in it.

    python -m tools.report output/quickstart                     # report.html and curves.png in that folder
    python -m tools.report output/mae output/nor --output report   # runs side by side, into the folder `report`

It reads options.yaml, environment.json, log.txt, metrics.jsonl, result.json, the pictures in samples/ and figures/ and,
where tools.knn was run, knn.json. A run that is still going on, or was cut off, is reported as far as it came.
Updates and images seen stand beside every figure, because runs that saw different amounts of data cannot be compared by
their figures alone.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.figures.style import curve_of, grid_lines, house_style, save

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
    for images, whose in (("choice", "images that choose the best"), ("test", "test images"))
    for figure, what in (
        ("acc1", "top-1 in %"),
        ("acc5", "top-5 in %"),
        ("mean_class_acc", "mean per class in %"),
        ("loss", "loss"),
    )
}
STEP_CURVES = ("lr", "grad_norm", "images_per_s", "data_wait")
NO_CURVE = ("run_id", "epoch", "step", "train_lr")
SAMPLES = 3  # of a run's pictures of reconstructions: the first, the middle one, the last


@dataclass(frozen=True)
class RunRecords:
    """One run folder as read: records of epochs and of steps, each once and in order."""

    name: str
    folder: Path
    options: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    knn: Mapping[str, Any] | None
    starts: Sequence[Mapping[str, Any]]
    """Where and with what each start of the run was."""

    def values(self, key: str) -> list[float]:
        """An epoch's figure, of all epochs that have it."""
        return [record[key] for record in self.epochs if is_number(record.get(key))]

    def last(self, key: str) -> float | None:
        """The newest value of an epoch's figure."""
        return next(iter(self.values(key)[::-1]), None)

    @property
    def accuracies(self) -> list[str]:
        """The names of the epochs' figures that are accuracies."""
        return list(dict.fromkeys(name for record in self.epochs for name in record if "acc" in name))

    @property
    def updates(self) -> int:
        return max((record["step"] for record in [*self.epochs, *self.steps]), default=0)


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
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
        folder=folder,
        options=yaml.safe_load((folder / "options.yaml").read_text()) or {},
        epochs=read_records(folder / "log.txt", "epoch"),
        steps=read_records(folder / "metrics.jsonl", "step"),
        result=_read_json(folder / "result.json"),
        knn=_read_json(folder / "knn.json"),
        starts=_read_json(folder / "environment.json") or [],
    )


# ---- figures in a table ---------------------------------------------------------------------------------------------


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else format(value, pattern)


def row(run: RunRecords) -> dict[str, str]:
    """The run's line of the table."""
    options = run.options
    done = f"{len(run.epochs)} of {options.get('epochs', '?')}"
    speeds = sorted(record["images_per_s"] for record in run.steps if is_number(record.get("images_per_s")))
    losses = [name for name in (run.epochs[-1] if run.epochs else {}) if name.startswith("train_")]
    cells = {
        "run": run.name,
        "method": str(options.get("method", "")),
        "model": str(options.get("model", "")),
        "epochs": done if run.result is not None else f"{done}, unfinished",
        "updates": f"{run.updates:,}",
        "images seen": f"{run.updates * int(options.get('total_batch_size') or 0):,}",
        "learning rate": _number(max((r["lr"] for r in run.steps if is_number(r.get("lr"))), default=None), ".2e"),
    }
    for name in losses:
        if name not in NO_CURVE:
            cells[f"last {name.removeprefix('train_')}"] = _number(run.last(name), ".4g")
    for name in run.accuracies:
        if values := run.values(name):
            what = "kNN" if name == "knn_acc1" else name
            cells |= {f"last {what} %": f"{values[-1]:.2f}", f"best {what} %": f"{max(values):.2f}"}
    cells |= judged(run.result or {})
    if speeds:
        cells["images/s (median)"] = f"{speeds[len(speeds) // 2]:.0f}"
    return {name: text for name, text in cells.items() if text}


def judged(result: Mapping[str, Any]) -> dict[str, str]:
    """What result.json says of a finished run on its test images: nothing of pretraining."""
    cells = {}
    for epoch, figures in result.get("accuracy", {}).items():
        cells[f"{epoch} epoch, test {result['metric']} %"] = f"{figures[result['metric']]:.2f}"
    if cells:
        cells["best epoch chosen on"] = result["best_chosen_on"]
    if "knn_acc1" in result:
        cells["kNN of the frozen encoder, test acc1 %"] = f"{result['knn_acc1']:.2f}"
    return cells


def columns_of(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns that any of the rows has, in order."""
    return list(dict.fromkeys(name for cells in rows for name in cells))


def table(runs: Sequence[RunRecords]) -> str:
    """Markdown for the terminal: one line a run; one figure a line where there is a single run."""
    rows = [row(run) for run in runs]
    columns = columns_of(rows)
    if len(runs) == 1:
        lines = ["| | |", "|---|---|", *(f"| {name} | {rows[0][name]} |" for name in columns)]
    else:
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cells.get(name, "") for name in columns) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


def knn_table(knn: Mapping[str, Any]) -> str:
    """Markdown of what tools.knn measured."""
    lines = ["| features | accuracy % |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in knn["accuracy"].items()]
    return "\n".join(lines) + f"\n\n{knn['protocol']}\n"


# ---- curves ---------------------------------------------------------------------------------------------------------


def panels_of(runs: Sequence[RunRecords]) -> list[tuple[str, str]]:
    """What there are curves of, and whether over epochs or steps: means of epochs first."""
    of_epochs = [
        name
        for name in dict.fromkeys(name for run in runs for record in run.epochs for name in record)
        if name not in NO_CURVE and any(run.last(name) is not None for run in runs)
    ]
    steps = [record for run in runs for record in run.steps]
    of_steps = [name for name in STEP_CURVES if any(is_number(record.get(name)) for record in steps)]
    return [(name, "epochs") for name in of_epochs if name not in of_steps] + [(name, "steps") for name in of_steps]


def curves(runs: Sequence[RunRecords]) -> Figure:
    """One panel a figure, all runs in each."""
    panels = panels_of(runs)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.2 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, records) in zip(axes, panels, strict=False):
        for number, run in enumerate(runs):
            shown = [r for r in (run.epochs if records == "epochs" else run.steps) if is_number(r.get(name))]
            x = [record["epoch"] + 1 if records == "epochs" else record["step"] for record in shown]
            axis.plot(x, [record[name] for record in shown], label=run.name, **curve_of(number, len(shown)))
        title = TITLES.get(name, name.removeprefix("train_").replace("_", " "))
        pretraining = name == "train_loss" and ("train_reconstruction", "epochs") in panels
        axis.set_title(f"{title}: reconstruction + weighted terms" if pretraining else title)
        axis.set_xlabel("epoch" if records == "epochs" else "optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        grid_lines(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# ---- the page -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; background: #f5f5f5; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
tr.differs td { background: #fff6dd; font-weight: 600; }
figure { margin: 0 0 1.5rem; } figure img { max-width: 100%; border: 1px solid #e3e3e3; }
figcaption { color: #555; font-size: .85rem; }
summary { cursor: pointer; color: #0050a0; margin: .4rem 0; }
@media print { details > * { display: block; } body { margin: 0; } }
"""


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return html.escape(text)


def html_table(header: Sequence[str], rows: Iterable[tuple[Sequence[object], bool]]) -> str:
    """A table; a row that is marked stands out."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in header)
    body = ""
    for cells, marked in rows:
        kind = " class='differs'" if marked else ""
        body += f"<tr{kind}>{''.join(f'<td>{_cell(value)}</td>' for value in cells)}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def embedded(data: bytes, kind: str, caption: str) -> str:
    """A picture inside the page."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{_cell(caption)}"><figcaption>{_cell(caption)}</figcaption></figure>\n'


def svg_of(figure: Figure) -> bytes:
    """The figure as SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def pictures_of(run: RunRecords) -> list[Path]:
    """The run's own pictures: of reconstructions the first, the middle one and the last; then all drawn later."""
    samples = sorted((run.folder / "samples").glob("*.png"))
    if len(samples) > SAMPLES:
        samples = [samples[round(n * (len(samples) - 1) / (SAMPLES - 1))] for n in range(SAMPLES)]
    return samples + sorted((run.folder / "figures").glob("*.png"))


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    result: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def options_section(runs: Sequence[RunRecords]) -> str:
    """Every option of every run; those that differ between runs are marked and stand first."""
    each = [flat(run.options) for run in runs]
    rows = []
    for name in dict.fromkeys(name for options in each for name in options):
        values = [options.get(name, "") for options in each]
        rows.append(([name, *values], any(value != values[0] for value in values)))
    rows.sort(key=lambda item: not item[1])
    return html_table(["option", *(run.name for run in runs)], rows)


def environment_section(run: RunRecords) -> str:
    """What each start of the run ran on, one line a figure."""
    starts = [flat(start) for start in run.starts]
    names = dict.fromkeys(name for start in starts for name in start)
    header = ["", *(f"start {number}" for number in range(1, len(starts) + 1))]
    return html_table(header, (([name, *(start.get(name, "") for start in starts)], False) for name in names))


def page(runs: Sequence[RunRecords]) -> str:
    """The whole report as HTML; it needs nothing beside it."""
    names = ", ".join(run.name for run in runs)
    rows = [row(run) for run in runs]
    columns = columns_of(rows)
    lines = (([name, *(cells.get(name, "") for cells in rows)], False) for name in columns if name != "run")
    figures = html_table(["", *(run.name for run in runs)], lines)
    parts = [
        f"<h1>{html.escape(names)}</h1>\n<p class='lead'>Losses are means over the last epoch; accuracies are last and "
        "best. Compare runs by them only where updates and images seen are alike.</p>\n",
        figures,
    ]
    if panels_of(runs):
        drawn = embedded(svg_of(curves(runs)), "svg+xml", "Means over epochs, and what was logged at steps.")
        parts.append(f"<h2>Curves</h2>\n{drawn}")
    for run in runs:
        whose = "" if len(runs) == 1 else f": {html.escape(run.name)}"
        if run.knn:
            found = (([name, f"{value:.2f}"], False) for name, value in run.knn["accuracy"].items())
            parts.append(f"<h2>k nearest neighbours{whose}</h2>\n{html_table(['features', 'accuracy %'], found)}")
            parts.append(f"<p>{html.escape(run.knn['protocol'])}</p>\n")
        if found_pictures := pictures_of(run):
            parts.append(f"<h2>Pictures{whose}</h2>\n")
            parts += [embedded(path.read_bytes(), "png", str(path.relative_to(run.folder))) for path in found_pictures]
    parts.append(f"<h2>Options</h2>\n<details open><summary>all options</summary>{options_section(runs)}</details>\n")
    for run in runs:
        whose = "" if len(runs) == 1 else f": {html.escape(run.name)}"
        if run.starts:
            started = f"started {len(run.starts)} time{'s' if len(run.starts) > 1 else ''}"
            parts.append(f"<h2>Environment{whose}</h2>\n<details open><summary>{started}</summary>")
            parts.append(f"{environment_section(run)}</details>\n")
        bad = run.folder / "bad_images.txt"
        if bad.exists():
            said = html.escape(bad.read_text())
            parts.append(f"<h2>Images that could not be read{whose}</h2>\n<details><pre>{said}</pre></details>\n")
    head = f"<meta charset='utf-8'>\n<title>{html.escape(names)}</title>\n<style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'>\n<head>\n{head}\n</head>\n<body>\n{''.join(parts)}</body>\n</html>\n"


def report(runs: Sequence[RunRecords], folder: Path) -> list[Path]:
    """Write report.html and, where anything was logged, curves.png into `folder`; answers their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.html"]
    with house_style():
        written[0].write_text(page(runs), encoding="utf-8")
        if panels_of(runs):
            written.append(folder / "curves.png")
            save(curves(runs), written[1])
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What runs did, on one page that opens offline.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--output", type=Path, help="folder for both files (default: the run's, or `report` for several runs)"
    )
    given = parser.parse_args(argv)
    folder = given.output or (given.runs[0] if len(given.runs) == 1 else Path("report"))
    try:
        runs = [read_run(run) for run in given.runs]
        written = report(runs, folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{table(runs)}\nWritten: {', '.join(map(str, written))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
