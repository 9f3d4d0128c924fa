"""Run the paper's tables: pretrain, fine-tune or profile their models, and report the paper's results and ours.

    DATA=IMAGENET bash scripts/table1.sh --dry-run        # print the commands
    DATA=IMAGENET NPROC=8 bash scripts/table1.sh          # skip finished runs, resume interrupted ones
    SMOKE=1 bash scripts/table1.sh                        # smoke test: tiny models on a CPU
    bash scripts/table1.sh --report                       # only the report

configs/tables.yaml contains the tables; `scripts/table.sh` lists the variables. The folder of a run depends on its
options, not on the table: rows that are in several tables are trained once.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

import methods
from options import nearest
from tools import smoke_data, table_collect, table_jobs, table_report
from tools.command import reports_errors
from tools.table_jobs import Job, command, say

PROJECT = Path(__file__).resolve().parent.parent

TABLES = PROJECT / "configs" / "tables.yaml"

ACCURACY = "accuracy"
BILL_MEASURES = ("GB", "minutes", "price")
WARMUP = 0.2  # fraction of the epochs if EPOCHS is given; 40 of 200 in the paper
FINETUNE_WARMUP = 0.05  # the same if FINETUNE_EPOCHS is given; 5 of 100 in the paper
UNPACKED = {"torch/cifar10": "cifar-10-batches-py", "torch/cifar100": "cifar-100-python"}  # torchvision's folders

SEGMENTED = "ade20k"  # the data set of main_segment.py

SMOKE_RUN = {
    "total_batch_size": 8,
    "epochs": 1,
    "warmup_epochs": 0,
    "class_list": "",
    "num_workers": 0,
    "device": "cpu",
}
SMOKE_MODEL = {"input_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2}
SMOKE_DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
SMOKE_VIEWS = {  # options of the methods with several views
    "proj_hidden_dim": 32,
    "proj_dim": 16,
    "out_dim": 64,
    "head_hidden_dim": 32,
    "head_bottleneck_dim": 16,
    "local_crops": 1,
    "local_size": 32,
}
SMOKE_BILL = "--device cpu --batch_size 2 --rounds 1 --input_size 32 --decoder_depth 1"


@dataclass(frozen=True)
class Setting:
    """The settings in environment variables."""

    data: str = "DATA"
    transfer: str = "TRANSFER"
    out: Path = PROJECT / "output" / "tables"
    nproc: int = 1
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: int = 0
    finetune_epochs: int = 0
    smoke: bool = False
    more: tuple[str, ...] = ()
    jobs: int = 1
    minutes: float = 0
    teachers: Mapping[str, str] = field(default_factory=dict)
    price: float = 3.19
    bill: str = "--device cuda --amp bf16 --batch_size 512"

    @property
    def root(self) -> Path:
        """Folder of the runs; smoke tests have a separate one."""
        return self.out / "smoke" if self.smoke else self.out


def read_setting(given: Mapping[str, str]) -> Setting:
    """Read the settings from environment variables. Raises ValueError for invalid values."""

    def number(name: str, default: int, least: int = 0) -> int:
        text = given.get(name) or str(default)
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{name} is {text!r}; it must be an integer of at least {least}")
        return int(text)

    def amount(name: str, default: float, what: str) -> float:
        text = given.get(name) or str(default)
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {text!r}; it is {what}, a number of at least 0")
        return value

    def path(name: str, default: str) -> str:
        return os.path.abspath(given[name]) if given.get(name) else default

    seeds = given.get("SEEDS", "0").split()
    if not seeds or not all(seed.isdecimal() for seed in seeds):
        raise ValueError(f"SEEDS is {given.get('SEEDS')!r}; it must be integers such as '0 1 2'")
    if given.get("SMOKE", "0") not in ("", "0", "1"):
        raise ValueError(f"SMOKE is {given['SMOKE']!r}; it must be 1 or empty")
    data = path("DATA", Setting.data)
    return Setting(
        data=data,
        transfer=path("TRANSFER", data if given.get("DATA") else Setting.transfer),
        out=Path(path("OUT", str(Setting.out))),
        nproc=number("NPROC", Setting.nproc, least=1),
        rows=tuple(given.get("ROWS", "").split()),
        seeds=tuple(int(seed) for seed in seeds),
        epochs=number("EPOCHS", 0),
        finetune_epochs=number("FINETUNE_EPOCHS", 0),
        smoke=given.get("SMOKE", "0") == "1",
        more=tuple(shlex.split(given.get("MORE", ""))),
        jobs=number("JOBS", Setting.jobs, least=1),
        minutes=amount("MINUTES", Setting.minutes, "how long runs may take"),
        teachers={size: path(f"TEACHER_{size.upper()}", "") for size in ("base", "large")},
        price=amount("PRICE", Setting.price, "what a device costs for an hour"),
        bill=given.get("BILL") or Setting.bill,
    )


@functools.cache
def read_recipe(name: str) -> Mapping[str, Any]:
    """Read a recipe of configs/pretrain."""
    return yaml.safe_load((PROJECT / "configs" / "pretrain" / f"{name}.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Row:
    """A row of a table: the paper's results by metric, and the runs for ours."""

    labels: tuple[str, ...]
    paper: Mapping[str, float | None]
    cited: Mapping[str, str]
    """Reasons why we have no result, by metric."""
    recipe: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For an option whose value is a run, such as `tokenizer`: the recipe of that run and, recursively, its needs."""
    finetune: str = ""
    finetune_all: Mapping[str, Any] = field(default_factory=dict)
    """Options of fine-tuning in every row of the table, in addition to the recipe."""
    finetune_set: Mapping[str, Any] = field(default_factory=dict)
    """Options of fine-tuning in this row."""
    dataset: str = ""
    """Data set for pretraining, if DATA is a folder of torchvision."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """Data set of a metric, if it differs from that of pretraining."""
    bill: str = ""

    @property
    def name(self) -> str:
        """Name in ROWS: `vit-tiny-mae-200`."""
        return table_report.named(self.labels)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the recipe, overridden by those of the row."""
        return {**read_recipe(self.recipe), **self.set}

    @property
    def size(self) -> str:
        return self.options["model"].split("_")[2]

    def helpers(self) -> dict[str, Row]:
        """Return the runs that must be trained before this one, by the option that uses them."""
        return {
            option: replace(self, set={}, teacher="", **{"needs": {}, **entry}) for option, entry in self.needs.items()
        }

    def measures(self) -> list[str]:
        """Return the metrics for which there are runs."""
        return [measure for measure in self.paper if measure not in self.cited]


@dataclass(frozen=True)
class Table:
    number: str
    title: str
    columns: tuple[str, ...]
    note: str
    source: str
    """Source of the published results."""
    rows: tuple[Row, ...]


@functools.cache
def read_tables(path: Path = TABLES) -> dict[str, Table]:
    """Return all tables of the file by number."""
    return {number: _table(number, entry) for number, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def _table(number: str, entry: Mapping[str, Any]) -> Table:
    rows = [_row(entry, each) for each in entry["rows"]]
    columns, source = tuple(entry["columns"]), entry.get("source", "paper")
    return Table(number, entry["title"], columns, entry.get("note", ""), source, tuple(rows))


def _row(table: Mapping[str, Any], entry: Mapping[str, Any]) -> Row:
    entry = dict(entry)
    paper = entry.pop("paper")
    paper = paper if isinstance(paper, Mapping) else {ACCURACY: paper}
    cited = dict(table.get("cited_sets", {}))
    if reason := entry.pop("cited", ""):
        cited = dict.fromkeys(paper, reason)
    entry.setdefault("finetune", table.get("finetune", ""))
    shared = {name: table[name] for name in ("sets", "dataset") if name in table}
    shared["finetune_all"] = table.get("finetune_set", {})
    return Row(labels=tuple(entry.pop("row")), paper=paper, cited=cited, **shared, **entry)


# ---- jobs -----------------------------------------------------------------------------------------------------------


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """Append options to a name: `mae_vit_tiny_in100-epochs1000`."""
    return "-".join([name, *(f"{option.split('.')[-1]}{_text(value)}" for option, value in options.items())])


def flags(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Plan:
    """The jobs of a row under the settings, and their folders."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def _changes(self, row: Row) -> dict[str, Any]:
        """Return the options that differ from the recipe of the row."""
        epochs = self.setting.epochs
        return dict(row.set) | ({"epochs": epochs, "warmup_epochs": f"{WARMUP * epochs:g}"} if epochs else {})

    def pretraining(self, row: Row) -> Path:
        """Return the folder of the pretraining of the row, with one folder per seed."""
        return self.setting.root / "pretrain" / with_options(row.recipe, self._changes(row))

    def finetuning(self, row: Row, measure: str) -> Path:
        changes = dict(row.finetune_set) | self._finetune_epochs()
        whose = row.sets[measure].split("/")[-1] if measure in row.sets else row.finetune
        return self.setting.root / "finetune" / self.pretraining(row).name / with_options(whose, changes)

    def _finetune_epochs(self) -> dict[str, Any]:
        epochs = self.setting.finetune_epochs
        return {"epochs": epochs, "warmup_epochs": f"{FINETUNE_WARMUP * epochs:g}"} if epochs else {}

    def bill(self, row: Row) -> Path:
        setting = self.setting
        words = [row.size, setting.bill, f"{setting.price:g}", str(setting.nproc)]
        return setting.root / "bill" / f"{table_report.named(words)}.json"

    def _teacher(self, row: Row) -> str:
        if self.setting.smoke:
            return str(self._smoke_teacher().done.parent / "checkpoints" / "last.pth")
        return self.setting.teachers.get(row.teacher) or f"TEACHER_{row.teacher.upper()}"

    def _smoke_teacher(self) -> Job:
        folder = self.setting.root / "pretrain" / "teacher" / "seed0"
        options = SMOKE_MODEL | SMOKE_DECODER | SMOKE_RUN | {"data_path": self._data(), "output_dir": folder}
        words = ("main_pretrain.py", *flags({"method": "mae", "model": "mae_vit_tiny_patch16"} | options))
        return Job(words, folder / "result.json")

    def _data(self, dataset: str = "") -> str:
        """Return the folder of a transfer set, or that of the pretraining images."""
        if self.setting.smoke:
            return str(self.setting.root / "data" / smoke_data.data_folder(dataset))
        return self.setting.transfer if dataset else self.setting.data

    def _dataset(self, row: Row, measure: str = "") -> dict[str, str]:
        """Return the value of --dataset, if it cannot be derived from the folder."""
        if measure in row.sets:
            return {"dataset": row.sets[measure]}
        unpacked = row.dataset and os.path.isdir(os.path.join(self._data(), UNPACKED[row.dataset]))
        return {"dataset": row.dataset} if unpacked else {}

    def pretrain_job(self, row: Row, seed: int) -> Job:
        setting, folder = self.setting, self.pretraining(row) / f"seed{seed}"
        options = self._changes(row)
        after: tuple[Path, ...] = ()
        if row.teacher:
            options["terms.teacher.checkpoint"] = self._teacher(row)
            after = (self._smoke_teacher().done,) if setting.smoke else ()
        for option, helper in row.helpers().items():
            needed = self.pretraining(helper) / f"seed{seed}"
            options[option] = needed
            after = (*after, needed / "result.json")
        if setting.smoke:
            own = methods.own_options(row.options["method"])
            options |= SMOKE_MODEL | SMOKE_RUN
            options |= {name: value for name, value in (SMOKE_DECODER | SMOKE_VIEWS).items() if name in own}
        options |= self._dataset(row) | {"seed": seed, "data_path": self._data(), "output_dir": folder}
        recipe = ("main_pretrain.py", "-c", f"configs/pretrain/{row.recipe}.yaml")
        return Job((*recipe, *flags(options), *setting.more), folder / "result.json", after)

    def finetune_job(self, row: Row, measure: str, seed: int) -> Job:
        setting, folder = self.setting, self.finetuning(row, measure) / f"seed{seed}"
        pretrained = self.pretraining(row) / f"seed{seed}"
        program_file, recipe = "main_finetune.py", f"finetune/{row.finetune}"
        options: dict[str, Any] = {"model": row.options["model"]} | dict(row.finetune_all) | dict(row.finetune_set)
        changes = self._finetune_epochs() | (SMOKE_RUN if setting.smoke else {})
        if row.sets.get(measure) == SEGMENTED:
            program_file, recipe = "main_segment.py", f"segment/{SEGMENTED}"
            options = {"model": row.options["model"]}
            changes |= {"warmup_steps": 0} if changes else {}  # they would override warmup_epochs
            changes |= {"input_size": SMOKE_MODEL["input_size"]} if setting.smoke else {}
        options |= changes | self._dataset(row, measure)
        options |= {"init_from": pretrained / "checkpoints" / "last.pth", "seed": seed}
        options |= {"data_path": self._data(row.sets.get(measure, "")), "output_dir": folder}
        words = (program_file, "-c", f"configs/{recipe}.yaml", *flags(options), *setting.more)
        program = smoke_data.opener(row.sets.get(measure, "")) if setting.smoke else ()
        return Job((*program, *words), folder / "result.json", (pretrained / "result.json",))

    def _with_helpers(self, row: Row, seed: int) -> list[Job]:
        """Return the pretraining job of a row, after the jobs on which it depends."""
        before = [job for helper in row.helpers().values() for job in self._with_helpers(helper, seed)]
        return [*before, self.pretrain_job(row, seed)]

    def bill_job(self, row: Row) -> Job:
        setting, output = self.setting, self.bill(row)
        options = {"size": row.size, "price": setting.price, "devices": setting.nproc, "output": output}
        how = shlex.split(SMOKE_BILL if setting.smoke else setting.bill)
        return Job(("-m", "benchmarks.bill", *how, *flags(options)), output)

    def jobs(self, rows: Iterable[Row]) -> list[Job]:
        """Return the jobs of the rows, each once, ordered by their dependencies."""
        found: list[Job] = []
        rows = list(rows)
        for seed in self.setting.seeds:  # all rows with the first seed are run before the second seed
            for row in rows:
                if row.bill:
                    found.append(self.bill_job(row))
                elif row.measures():
                    found += [self._smoke_teacher()] if row.teacher and self.setting.smoke else []
                    found += self._with_helpers(row, seed)
                    found += [self.finetune_job(row, measure, seed) for measure in row.measures()]
        return list({job.done: job for job in found}.values())


def matching(names: Sequence[str], asked: Sequence[str], what: str) -> list[str]:
    """Return the names that match the patterns of ROWS, or all names if there are no patterns.

    Args:
        what: The table, for the error.

    Raises:
        ValueError: A pattern matches no name.
    """
    for pattern in asked:
        if not fnmatch.filter(names, pattern):
            advice = nearest(pattern, names) or f"there are {', '.join(names)}"
            raise ValueError(f"ROWS: {what} has no row {pattern!r}; {advice}")
    return [name for name in names if not asked or any(fnmatch.fnmatch(name, pattern) for pattern in asked)]


def chosen(table: Table, asked: Sequence[str]) -> list[Row]:
    """Return the rows that match ROWS (`vit-tiny-*`), or all. Raises ValueError for a pattern without a match."""
    names = matching([row.name for row in table.rows], asked, f"table {table.number}")
    return [row for row in table.rows if row.name in names]


def check(rows: Sequence[Row], setting: Setting) -> None:
    """Raise ValueError if an environment variable is missing, before jobs are started."""
    if setting.smoke:
        return
    trained = [row for row in rows if not row.bill and row.measures()]
    if trained and not os.path.isdir(setting.data):
        raise ValueError(f"DATA must be the folder of the images to pretrain on, found {setting.data!r}")
    if any(row.sets for row in trained) and not os.path.isdir(setting.transfer):
        raise ValueError(f"TRANSFER must be the folder that torchvision unpacked its sets in: {setting.transfer!r}")
    for size in sorted({row.teacher for row in trained if row.teacher}):
        if not os.path.isfile(setting.teachers.get(size, "")):
            needy = ", ".join(row.name for row in trained if row.teacher == size)
            raise ValueError(
                f"TEACHER_{size.upper()} must be the checkpoint of a trained ViT-{size.capitalize()}/16: {needy} learn "
                "from it. Name other rows with ROWS to do without"
            )


# ---- running --------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], setting: Setting, minutes: float, *, short: bool = False) -> int:
    """Run the jobs that are not finished, at most for `minutes` (0: no limit). Return the exit code.

    `short`: the jobs take only minutes on a CPU core, so they are forked from a process that has imported everything.
    """
    quick = (setting.smoke or short) and setting.nproc == 1
    start: Callable[..., table_jobs.Program] = table_jobs.Fork if quick else table_jobs.Process
    return table_jobs.run(jobs, setting.root, start=start, nproc=setting.nproc, at_once=setting.jobs, minutes=minutes)


def show(jobs: Sequence[Job], setting: Setting) -> None:
    """Print the commands, one per line; those of finished jobs as comments."""
    say(f"cd {shlex.quote(str(PROJECT))}")
    for job in jobs:
        finished = "# finished: " if job.done.exists() else ""
        say(finished + shlex.join(command(job, setting.nproc)))


def report(table: Table, setting: Setting, bring: Path | None = None, models: bool = False) -> None:
    """Write the report of all rows and log its path; `bring` is a folder for curves and results."""
    plan = Plan(setting)
    lines = []
    for row in table.rows:
        for measure, paper in row.paper.items():
            place: table_report.Bill | table_report.Runs | None = None
            if row.bill and measure in BILL_MEASURES:
                place = table_report.Bill(plan.bill(row), row.bill, measure)
            elif measure not in row.cited:
                scratch = row.finetune_set.get("from_scratch", False)
                place = table_report.Runs(plan.pretraining(row), plan.finetuning(row, measure), scratch)
            label = row.labels if len(row.paper) == 1 else (*row.labels, measure)
            lines.append(table_report.measured(label, paper, row.cited.get(measure, ""), place))
    columns = table.columns if len(lines) == len(table.rows) else (*table.columns, "Measure")
    path = setting.root / "reports" / f"table_{table.number}.md"
    smoke = "Smoke test: tiny models on a few tiny images. Our numbers below have no meaning.\n\n"
    title = f"Table {table.number}: {table.title}" if table.number.isdecimal() else table.title
    note = (smoke if setting.smoke else "") + table.note
    table_report.write(path, title, columns, lines, note, table.source)
    say(f"report: {path}")
    if bring:
        table_collect.collect(bring, path, title, lines, models)
        say(f"collected in {bring}")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    tables = read_tables()
    parser = argparse.ArgumentParser(description="Run a table of the paper, and report the paper's numbers and ours.")
    parser.add_argument("table", metavar="TABLE", help=f"one of {', '.join(tables)}")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--report", action="store_true", help="only report the results so far")
    parser.add_argument("--collect", metavar="FOLDER", type=Path, help="also collect curves and results in a folder")
    parser.add_argument(
        "--models", action="store_true", help="with --collect: also each row's model, in half precision"
    )
    given = parser.parse_args(argv)
    if given.models and not given.collect:
        raise ValueError("--models needs --collect FOLDER")
    if given.table not in tables:
        raise ValueError(f"there is no table {given.table!r}; there are {', '.join(tables)}")
    setting, table = read_setting(os.environ), tables[given.table]
    rows = chosen(table, setting.rows)
    jobs = Plan(setting).jobs(rows)
    if given.dry_run:
        show(jobs, setting)
        return 0
    code = 0
    if not given.report:
        check(rows, setting)
        if setting.smoke:
            smoke_data.write(setting.root / "data", {name for row in rows for name in row.sets.values()})
        code = run_jobs(jobs, setting, setting.minutes)
    report(table, setting, given.collect, given.models)
    return code


if __name__ == "__main__":
    sys.exit(main())
