"""Create the HTML page of a report: results, curves, images and options, in one file that works offline.

Curves are SVG; JavaScript shows the values under the pointer. Without JavaScript the curves are still readable.
"""

from __future__ import annotations

import base64
import html
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from options import describe_model, flatten
from tools import classifiers
from tools.figures.style import COLORS
from tools.records import RunRecords, is_number, machine_options, read_defaults

POINTS = 400  # maximum number of points of a curve
SAMPLES = 3  # images of reconstructions per run: the newest, the middle one, the first
CAPTIONS = {
    "reconstruction": "Reconstruction. Hidden patches should continue what the visible ones show. Blurred texture is "
    "normal; blocks without structure mean that the model has not learned.",
    "neighbors": "Closest neighbours: for each marked patch, the most similar of the up to eight patches around it.",
    "closeup": "Closest neighbours of single patches, enlarged.",
    "separation": "Separation of patches (CNP: closest-neighbour patch). Each panel shows the patches' features in two "
    "dimensions; groups that lie apart are distinguished by the encoder, overlapping groups are not. Compare with the "
    "untrained encoder: training should raise the score.",
    "attention": "Attention of the class token. Heads that select objects or parts are good; uniform maps are not.",
    "collapse": "Similarity of features between images. Values near 1 everywhere mean collapsed features.",
    "relations": "Relation of the two predictions during training.",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --line: #d8d8d8; --back: #fff; --head: #f4f4f4;
        --mark: #fff3cf; --good: #007a55; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --line: #444; --back: #17181a; --head: #24262a; --mark: #46401f;
          --good: #4cc79a; --bad: #ff8a80; }
  .chart polyline, .chart polygon, .legend line { filter: brightness(1.6); } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
       padding: 1rem clamp(.8rem, 3vw, 3rem) 3rem; max-width: 110rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
p.lead, figcaption, .note { color: var(--soft); } p.lead { margin-top: .2rem; } figcaption { font-size: .85rem; }
ul.verdict { list-style: none; padding: 0; } ul.verdict li { padding: .15rem 0 .15rem 1.4rem; position: relative; }
ul.verdict li::before { content: "\\2022"; position: absolute; left: .3rem; font-weight: 700; }
ul.verdict li.good::before { content: "\\2713"; color: var(--good); }
ul.verdict li.bad::before { content: "\\2717"; color: var(--bad); }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; background: var(--head); }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; min-width: 3rem; }
tr.differs td { background: var(--mark); font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(34rem, 100%), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figure img { max-width: 100%; height: auto; border: 1px solid var(--line);
         background: #fff; image-rendering: auto; }
.chart { position: relative; } .chart svg { width: 100%; height: auto; display: block; overflow: visible; }
.chart h3 { font-size: .95rem; margin: 0 0 .2rem; font-weight: 600; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.chart .gridline { stroke: var(--line); stroke-width: .7; } .chart .axis { stroke: var(--soft); }
.chart .cursor { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
.tip { position: absolute; pointer-events: none; background: var(--head); border: 1px solid var(--line);
       border-radius: 4px; padding: .2rem .5rem; font-size: .8rem; visibility: hidden; white-space: nowrap;
       z-index: 2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .3rem 0 1rem; }
.legend svg { vertical-align: middle; margin-right: .3rem; }
td.cell { text-align: center; min-width: 1.6rem; padding: .15rem .3rem; }
summary { cursor: pointer; margin: .4rem 0; }
@media print { details > * { display: block; } }
"""

SCRIPT = """
document.querySelectorAll('.chart').forEach(chart => {
  const svg = chart.querySelector('svg'), tip = chart.querySelector('.tip'), line = svg.querySelector('.cursor');
  const data = JSON.parse(chart.dataset.series), box = svg.viewBox.baseVal;
  const [left, right, low, high] = JSON.parse(chart.dataset.frame);
  const hide = () => { tip.style.visibility = line.style.visibility = 'hidden'; };
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const rect = svg.getBoundingClientRect();
    const at = (event.clientX - rect.left) / rect.width * box.width;
    if (at < left || at > right) { hide(); return; }
    const wanted = low + (at - left) / (right - left) * (high - low);
    let nearest = null;
    data.forEach(s => s.x.forEach(x => {
      if (nearest === null || Math.abs(x - wanted) < Math.abs(nearest - wanted)) nearest = x;
    }));
    if (nearest === null) return;
    const rows = data.map(s => {
      const i = s.x.indexOf(nearest);
      return i < 0 ? '' : s.name + ': ' + s.y[i].toPrecision(5);
    });
    const x = left + (nearest - low) / (high - low || 1) * (right - left);
    line.setAttribute('x1', x); line.setAttribute('x2', x);
    tip.textContent = ''; [chart.dataset.axis + ' ' + nearest, ...rows.filter(Boolean)].forEach(text => {
      const row = document.createElement('div'); row.textContent = text; tip.append(row); });
    tip.style.visibility = line.style.visibility = 'visible';
    const place = x / box.width * rect.width;
    tip.style.left = (place > rect.width / 2 ? place - tip.offsetWidth - 10 : place + 10) + 'px';
    tip.style.top = (event.clientY - chart.getBoundingClientRect().top + 12) + 'px';
  });
});
"""


# ---- parts of a page ------------------------------------------------------------------------------------------------


def cell(value: object) -> str:
    """Format a value for HTML: text is escaped, other values are shown as JSON."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def html_table(header: Sequence[str], rows: Iterable[tuple[Sequence[object], bool]]) -> str:
    """Return a table; marked rows are highlighted."""
    head = "".join(f"<th>{cell(name)}</th>" for name in header)
    body = ""
    for cells, marked in rows:
        kind = " class='differs'" if marked else ""
        body += f"<tr{kind}>{''.join(f'<td>{cell(value)}</td>' for value in cells)}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def embedded(data: bytes, kind: str, caption: str, name: str) -> str:
    """Return an image embedded in HTML."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{cell(name)}"><figcaption>{cell(caption)}</figcaption></figure>\n'


# ---- curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A curve; for several runs, their mean with the standard deviation as a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float] = ()


def thinned(series: Series) -> Series:
    """Reduce a curve to at most `POINTS` points, including the last one."""
    step = -(-len(series.x) // POINTS) or 1
    keep = sorted({*range(0, len(series.x), step), len(series.x) - 1})
    x, y, deviation = ([values[i] for i in keep] if values else [] for values in (series.x, series.y, series.deviation))
    return Series(series.name, x, y, deviation)


def color(number: int) -> str:
    return "currentColor" if COLORS[number % len(COLORS)] == "#000000" else COLORS[number % len(COLORS)]


def dash(number: int) -> str:
    return ("", "7 3", "2 3", "8 3 2 3")[number % 4]


def chart(title: str, axis: str, all_series: Sequence[Series]) -> str:
    """Return a chart of all series, with colours by their order; empty if there are no points."""
    shown = [(number, thinned(series)) for number, series in enumerate(all_series) if series.x]
    if not shown:
        return ""
    xs = [x for _, series in shown for x in series.x]
    ys = [y + sign * d for _, s in shown for y, d in zip(s.y, s.deviation or [0.0] * len(s.y), strict=True)
          for sign in (-1, 1)]  # fmt: skip
    ticks_x = MaxNLocator(6, integer=True).tick_values(min(xs), max(xs))
    ticks_y = MaxNLocator(5).tick_values(min(ys), max(ys))
    low, high = min(xs), max(xs)
    bottom, top = float(ticks_y[0]), float(ticks_y[-1])
    left, right, upper, lower = 58, 510, 8, 210

    def place(x: float, y: float) -> str:
        across = (x - low) / (high - low) if high > low else 0.5
        up = (y - bottom) / (top - bottom) if top > bottom else 0.5
        return f"{left + across * (right - left):.1f},{lower - up * (lower - upper):.1f}"

    parts = []
    for tick in ticks_y:
        _, y = place(low, float(tick)).split(",")
        parts.append(f'<line class="gridline" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{float(tick):.4g}</text>')
    for tick in ticks_x:
        if low <= tick <= high:
            x, _ = place(float(tick), bottom).split(",")
            parts.append(f'<text x="{x}" y="{lower + 16}" text-anchor="middle">{int(tick):,}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{lower}" y2="{lower}"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{lower + 32}" text-anchor="middle">{cell(axis)}</text>')
    for number, series in shown:
        points = " ".join(place(x, y) for x, y in zip(series.x, series.y, strict=True))
        if series.deviation:
            above = [place(x, y + d) for x, y, d in zip(series.x, series.y, series.deviation, strict=True)]
            below = [place(x, y - d) for x, y, d in zip(series.x, series.y, series.deviation, strict=True)]
            edge = " ".join([*above, *below[::-1]])
            parts.append(f'<polygon points="{edge}" fill="{color(number)}" opacity="0.15"/>')
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{color(number)}" stroke-width="1.8" '
            f'stroke-dasharray="{dash(number)}"/>'
        )
        if len(series.x) == 1:
            x, y = points.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="{3 + number}" fill="none" stroke="{color(number)}"/>')
    parts.append(f'<line class="cursor" y1="{upper}" y2="{lower}"/>')
    data = cell(json.dumps([{"name": s.name, "x": list(s.x), "y": list(s.y)} for _, s in shown]))
    frame = json.dumps([left, right, low, high])
    label = f"{cell(title)} over {cell(axis)}"
    return (
        f'<div class="chart" data-axis="{cell(axis)}" data-frame="{frame}" data-series="{data}"><h3>{cell(title)}</h3>'
        f'<svg viewBox="0 0 520 250" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        '<div class="tip"></div></div>\n'
    )


def legend(names: Sequence[str]) -> str:
    """Return the legend of colours and dashes."""
    marks = (
        f'<span><svg width="30" height="8"><line x1="0" x2="30" y1="4" y2="4" stroke="{color(number)}" '
        f'stroke-width="2" stroke-dasharray="{dash(number)}"/></svg>{cell(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(marks)}</div>\n'


# ---- several seeds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    name: str
    runs: Sequence[RunRecords]

    def series(self, key: str, records: str) -> Series:
        """Return the mean of a value over the runs, at the epochs or steps that all of them have."""
        axis, first = ("epoch", 1) if records == "epochs" else ("step", 0)
        each = [
            {record[axis] + first: record[key] for record in getattr(run, records) if is_number(record.get(key))}
            for run in self.runs
        ]
        common = sorted(set.intersection(*(set(values) for values in each)))
        columns = [[values[x] for values in each] for x in common]
        deviation = [statistics.stdev(column) for column in columns] if len(self.runs) > 1 else []
        return Series(self.name, common, [statistics.fmean(column) for column in columns], deviation)


def grouped(runs: Sequence[RunRecords]) -> list[Group]:
    """Group the runs by all options that affect the results, except the seed."""
    found: dict[str, list[RunRecords]] = {}
    for run in runs:
        ignored = machine_options(run.options) | {"seed"}
        key = json.dumps({n: v for n, v in run.options.items() if n not in ignored}, sort_keys=True, default=str)
        found.setdefault(key, []).append(run)
    groups = []
    for members in found.values():
        name = members[0].name if len(members) == 1 else f"{common_name(members)} ({len(members)} seeds)"
        groups.append(Group(name, members))
    return groups


def common_name(runs: Sequence[RunRecords]) -> str:
    """Return the common part of the names of the runs, or the first name."""
    names = [re.sub(r"[-_]?(seed)?[-_]?\d+$", "", run.name) for run in runs]
    return names[0] if names[0] and len(set(names)) == 1 else str(runs[0].options.get("method") or runs[0].name)


def mean_and_deviation(values: Sequence[float], pattern: str) -> str:
    """Return `mean ± standard deviation`, or the value itself if there is only one."""
    mean = format(statistics.fmean(values), pattern)
    return f"{mean} ± {format(statistics.stdev(values), pattern)}" if len(values) > 1 else mean


# ---- what the numbers mean ------------------------------------------------------------------------------------------


def verdict(run: RunRecords) -> list[tuple[str, str]]:
    """Return sentences about the run, each with `good`, `bad` or `plain`."""
    result, texts = run.result or {}, []
    done, epochs = run.epochs_done, run.options.get("epochs", "?")
    if run.result is None:
        texts.append(("bad", f"Not finished: {done} of {epochs} epochs. Re-running the same command resumes the run."))
    else:
        texts.append(("good", f"Finished: {done} of {epochs} epochs."))
    constant, loss = result.get("constant_loss"), run.last(f"train_{result.get('constant_loss_of', 'loss')}")
    if constant is not None and loss is not None:
        share = f"{loss:.4g}, {100 * loss / constant:.0f}% of the best constant prediction ({constant:.4g})"
        if loss < constant:
            texts.append(("good", f"The loss is {share}: the model uses what it sees."))
        else:
            texts.append(("bad", f"The loss is {share}: nothing was learned. Train longer or raise --blr."))
    if gain := classifiers.compare_with_scratch(classifiers.rows_below([run.folder])):
        texts.append(("good" if gain[0] > 0 else "bad", gain[1]))
    accuracy = (run.knn or {}).get("accuracy", {})
    if {"untrained encoder", "pretrained encoder"} <= accuracy.keys():
        gain = accuracy["pretrained encoder"] - accuracy["untrained encoder"]
        text = f"Nearest neighbours: {accuracy['pretrained encoder']:.2f}% with the pretrained encoder, "
        texts.append(("good" if gain > 0 else "bad", f"{text}{gain:+.2f} points from the untrained one."))
    if bad := result.get("bad_steps"):
        texts.append(("bad", f"{bad} updates were refused because they were not finite."))
    if bad := result.get("bad_images"):
        texts.append(("bad", f"{bad} images could not be read and were replaced; they are listed below."))
    return texts


def facts(run: RunRecords) -> str:
    """Return data set, model, device and duration in one line."""
    options, result, start = run.options, run.result or {}, (run.starts or [{}])[-1]
    data = options.get("data_path") or options.get("dataset") or ""
    parts = [
        f"data: {data}" if data else "",
        f"{result['images']:,} images" if is_number(result.get("images")) else "",
        f"model: {describe_model(options)}",
        f"{result['parameters'] / 1e6:.2f} M parameters" if is_number(result.get("parameters")) else "",
        f"device: {start['device']}" if start.get("device") else "",
        f"{duration(result['seconds_since_start'])} in the last start" if "seconds_since_start" in result else "",
        f"commit {start['commit'][:10]}" if start.get("commit") else "",
    ]
    return " · ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- sections -------------------------------------------------------------------------------------------------------


def results_section(runs: Sequence[RunRecords]) -> str:
    """Return the tables of classifiers and nearest neighbours."""
    parts = []
    if rows := classifiers.rows_below(run.folder for run in runs):
        shown = html_table(classifiers.HEADER, ((row.cells(), False) for row in rows))
        parts.append(f"<h2>Classifiers with the encoder and from scratch</h2>\n{shown}")
    for run in runs:
        if run.knn:
            whose = "" if len(runs) == 1 else f": {html.escape(run.name)}"
            found = (([name, f"{value:.2f}"], False) for name, value in run.knn["accuracy"].items())
            parts.append(f"<h2>k nearest neighbours{whose}</h2>\n{html_table(['features', 'accuracy %'], found)}")
            notes = (run.knn["protocol"], classifiers.pixels_note(run.knn["accuracy"]))
            parts += [f"<p class='note'>{html.escape(note)}</p>\n" for note in notes if note]
    return "".join(parts)


def classes_section(run: RunRecords) -> str:
    """Return accuracy per class and the confusion matrix of a classifier's last epoch, if result.json has them."""
    found = (run.result or {}).get("confusion")
    if not found:
        return ""
    names, matrix = found["classes"], found["matrix"]
    rows = []
    for name, counts, number in zip(names, matrix, range(len(names)), strict=True):
        total = sum(counts)
        wrong = max((n for n in range(len(names)) if n != number), key=lambda n: counts[n], default=None)
        mistaken = f"{names[wrong]} ({counts[wrong]})" if wrong is not None and counts[wrong] else ""
        rows.append(([name, f"{100 * counts[number] / total:.2f}" if total else "", total, mistaken], False))
    parts = [html_table(["class", "accuracy %", "images", "most often confused with"], rows)]
    if len(names) <= 30:
        head = "<th></th>" + "".join(f"<th>{cell(name)}</th>" for name in names)
        body = ""
        for number, (name, counts) in enumerate(zip(names, matrix, strict=True)):
            total = sum(counts) or 1
            shades = []
            for n, count in enumerate(counts):
                hue = "var(--good)" if n == number else "var(--bad)"
                background = f"color-mix(in srgb, {hue} {round(70 * count / total)}%, transparent)"
                shades.append(f"<td class='cell' style='background: {background}'>{count}</td>")
            body += f"<tr><th>{cell(name)}</th>{''.join(shades)}</tr>\n"
        parts.append("<p class='note'>Rows: true class. Columns: predicted class. Counts of test images.</p>")
        parts.append(f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")
    return f"<h2>Classes: {html.escape(run.name)}</h2>\n{''.join(parts)}"


def find_pictures(run: RunRecords) -> list[Path]:
    """Return the image files of the run: reconstructions (newest, middle, first), then figures."""
    samples = sorted((run.folder / "samples").glob("*.png"))[::-1]
    if len(samples) > SAMPLES:
        samples = [samples[round(n * (len(samples) - 1) / (SAMPLES - 1))] for n in range(SAMPLES)]
    return samples + sorted((run.folder / "figures").glob("*.png"))


def make_caption(path: Path) -> str:
    """Return the caption of an image."""
    if epoch := re.fullmatch(r"recon_e(\d+)", path.stem):
        return (
            f"Epoch {int(epoch[1])}. Rows: original, visible patches, reconstruction, hidden patches pasted into the "
            "original. The pasted row should look like the original."
        )
    known = next((text for name, text in CAPTIONS.items() if path.stem.startswith(name)), "")
    return known or path.stem.replace("_", " ")


def options_section(runs: Sequence[RunRecords]) -> str:
    """Return the options: those that differ from the defaults or between the runs first, the others collapsed."""
    each = [flatten(run.options) for run in runs]
    defaults = [flatten(read_defaults(run.options)) for run in runs]
    first: list[tuple[list[object], bool]] = []
    others: list[tuple[list[object], bool]] = []
    for name in dict.fromkeys(name for options in each for name in options):
        values = [options.get(name, "") for options in each]
        differs = any(value != values[0] for value in values)
        changed = any(
            name in options and options[name] != usual.get(name) for options, usual in zip(each, defaults, strict=True)
        )
        row = ([name, *values, defaults[0].get(name, "")], differs)
        (first if differs or changed else others).append(row)
    first.sort(key=lambda item: not item[1])
    header = ["option", *(run.name for run in runs), "default"]
    kept = (
        f"<details><summary>{len(others)} options at their defaults</summary>{html_table(header, others)}</details>\n"
    )
    return f"<h2>Options</h2>\n{html_table(header, first)}{kept}"


def environment_section(run: RunRecords) -> str:
    """Return the environment of each start of the run."""
    starts = [flatten(start) for start in run.starts]
    names = dict.fromkeys(name for start in starts for name in start)
    header = ["", *(f"start {number}" for number in range(1, len(starts) + 1))]
    return html_table(header, (([name, *(start.get(name, "") for start in starts)], False) for name in names))


def page(
    runs: Sequence[RunRecords],
    rows: Sequence[Mapping[str, str]],
    panels: Sequence[tuple[str, str]],
    titles: Mapping[str, str],
) -> str:
    """Return the report as self-contained HTML.

    Args:
        runs: The runs.
        rows: Values by name for each run.
        panels: Names of the values to draw, each with `epochs` or `steps`.
        titles: Titles of the values.
    """
    names = ", ".join(run.name for run in runs)
    groups = grouped(runs)
    parts = [f"<h1>{html.escape(names)}</h1>\n"]
    for run in runs:
        whose = "" if len(runs) == 1 else f"<b>{html.escape(run.name)}</b> · "
        parts.append(f"<p class='lead'>{whose}{html.escape(facts(run))}</p>\n")
        items = "".join(f"<li class='{kind}'>{html.escape(text)}</li>" for kind, text in verdict(run))
        parts.append(f"<ul class='verdict'>{items}</ul>\n")
    parts.append(results_section(runs))
    columns = list(dict.fromkeys(name for cells in rows for name in cells))
    lines = (([name, *(cells.get(name, "") for cells in rows)], False) for name in columns if name != "run")
    parts.append(f"<h2>Numbers</h2>\n{html_table(['', *(run.name for run in runs)], lines)}")
    parts.append(
        "<p class='note'>Losses are means over the last epoch. Accuracies are of the last and of the best epoch. "
        "Compare runs only where updates and images seen are equal.</p>\n"
    )
    if len(groups) < len(runs):
        means = []
        for key in (name for name, records in panels if records == "epochs"):
            last = [[x for run in group.runs if (x := run.last(key)) is not None] for group in groups]
            means.append(([titles.get(key, key), *(mean_and_deviation(v, ".4g") if v else "" for v in last)], False))
        parts.append("<h2>Mean and standard deviation over seeds, last epoch</h2>\n")
        parts.append(html_table(["", *(group.name for group in groups)], means))
    charts = [
        chart(
            titles.get(name, name.removeprefix("train_").replace("_", " ")),
            "epoch" if records == "epochs" else "step",
            [group.series(name, records) for group in groups],
        )
        for name, records in panels
    ]
    if any(charts):
        band = " Bands show the standard deviation over seeds." if len(groups) < len(runs) else ""
        parts.append(f"<h2>Curves</h2>\n<p class='note'>Point at a curve to read its values.{band}</p>\n")
        parts.append(f"{legend([group.name for group in groups])}<div class='grid'>{''.join(charts)}</div>\n")
    for run in runs:
        whose = "" if len(runs) == 1 else f": {html.escape(run.name)}"
        if found_pictures := find_pictures(run):
            shown = (
                embedded(path.read_bytes(), "png", make_caption(path), str(path.relative_to(run.folder)))
                for path in found_pictures
            )
            parts.append(f"<h2>Pictures{whose}</h2>\n<div class='pictures'>{''.join(shown)}</div>\n")
        parts.append(classes_section(run))
    parts.append(options_section(runs))
    for run in runs:
        whose = "" if len(runs) == 1 else f": {html.escape(run.name)}"
        if run.starts:
            started = f"started {len(run.starts)} time{'s' if len(run.starts) > 1 else ''}"
            parts.append(f"<h2>Environment{whose}</h2>\n<details><summary>{started}</summary>")
            parts.append(f"{environment_section(run)}</details>\n")
        bad = run.folder / "bad_images.txt"
        if bad.exists():
            unreadable = html.escape(bad.read_text())
            parts.append(f"<h2>Images that could not be read{whose}</h2>\n<details><pre>{unreadable}</pre></details>\n")
    head = (
        f"<meta charset='utf-8'>\n<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{html.escape(names)}</title>\n<style>{STYLE}</style>"
    )
    body = "".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'>\n<head>\n{head}\n</head>\n<body>\n{body}<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )
