"""Compare pretraining methods at a fixed budget: choose learning rates, train, evaluate, report with intervals.

    DATA=CIFAR10 bash scripts/leaderboard.sh                 # SET=cpu; skips finished runs, resumes interrupted ones
    DATA=CIFAR10 bash scripts/leaderboard.sh --dry-run       # print the commands that are known so far
    DATA=CIFAR10 bash scripts/leaderboard.sh --report        # only the report of what is finished

`configs/comparisons.yaml` contains the comparisons. The work has three parts: a sweep of the learning rate of each row,
evaluated on training images that no other part uses; trainings of equal length; and trainings of equal compute, whose
length follows from the time that the sweep took. `scripts/table.sh` explains the variables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchvision import datasets

import methods
from data.images import is_image_name
from tools import comparison_records, comparison_report, smoke_data, table_jobs, tables
from tools.command import reports_errors
from tools.comparison_file import Comparison, Row, Training, read_comparisons
from tools.table_jobs import Job, say
from tools.table_report import named
from tools.tables import SMOKE_DECODER, SMOKE_MODEL, SMOKE_RUN, SMOKE_VIEWS, UNPACKED, Setting, flags

TORCHVISION = {"torch/cifar10": datasets.CIFAR10, "torch/cifar100": datasets.CIFAR100}
ORIGIN = "origin.txt"
FURTHER = 2  # rates that a sweep tries beyond those of the comparison while the best is at its end
SMOKE_EVALUATION = {"total_batch_size": 8, "epochs": 1, "warmup_epochs": 0, "eval_every": 1, "device": "cpu"}


def value_at(folder: Path, path: str) -> float:
    """Return the number at a path such as `accuracy.last.acc1` in the result of a finished run."""
    value: Any = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for part in path.split("."):
        value = value[part]
    return float(value)


# ---- data -----------------------------------------------------------------------------------------------------------


def first_images(data: Path, dataset: str, split: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Yield each class and its images in order: paths of files, or PIL images of a set that torchvision unpacked."""
    if (data / UNPACKED[dataset]).is_dir():
        source = TORCHVISION[dataset](str(data), train=split == "train")
        for label, name in enumerate(source.classes):
            yield name, (source[number][0] for number, found in enumerate(source.targets) if found == label)
    else:
        for folder in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            yield folder.name, (path for path in sorted(folder.iterdir()) if is_image_name(path.name))


def prepare_data(plan: Plan) -> None:
    """Write the folders `data` and `choice`, with `train` and `val` in each, of the first images of each class.

    Both have the same training images. `data/val` has all validation images, `choice/val` further training images.
    The path of the data is stored beside them, in `origin.txt`.

    Raises:
        ValueError: A class has too few images, the data have no validation images, or the folders are of other data.
    """
    root, comparison, data = plan.data().parent, plan.comparison, Path(plan.setting.data)
    if root.is_dir():
        origin = root / ORIGIN
        if origin.exists() and (known := origin.read_text(encoding="utf-8")) != str(data.resolve()):
            raise ValueError(
                f"{root} has the images of {known}, DATA is {data}: give another OUT, or delete {origin} if the same "
                "images were moved"
            )
        return
    unpacked = data / UNPACKED[comparison.dataset]
    if not unpacked.is_dir() and not all((data / split).is_dir() for split in ("train", "val")):
        raise ValueError(
            f"DATA is {str(data)!r}; it must contain {unpacked.name} as torchvision unpacks it, or folders "
            "train/CLASS and val/CLASS"
        )
    train, choice = comparison.images["train"], comparison.images["choice"]
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, images in first_images(data, comparison.dataset, "train"):
        for folder, count in (("data/train", train), ("choice/val", choice)):
            found = write_images(itertools.islice(images, count), part / folder / name)
            if found < count:
                raise ValueError(f"class {name} has too few images: {train} + {choice} training images are needed")
    for name, images in first_images(data, comparison.dataset, "val"):
        write_images(images, part / "data" / "val" / name)
    shutil.copytree(part / "data" / "train", part / "choice" / "train", copy_function=os.link)
    (part / ORIGIN).write_text(str(data.resolve()), encoding="utf-8")
    part.rename(root)


def write_images(images: Iterator[Any], folder: Path) -> int:
    """Copy files, or write PIL images as PNG; return their number."""
    folder.mkdir(parents=True)
    number = 0
    for number, image in enumerate(images, start=1):
        if isinstance(image, Path):
            shutil.copyfile(image, folder / image.name)
        else:
            image.save(folder / f"{number:05d}.png")
    return number


# ---- jobs -----------------------------------------------------------------------------------------------------------


class Plan:
    """The jobs of a comparison and their folders."""

    def __init__(self, comparison: Comparison, setting: Setting):
        self.comparison, self.setting = comparison, setting
        self.root = setting.root

    def data(self, folder: str = "data") -> Path:
        """Folder of the images: `data`, or `choice` for the choice of learning rates."""
        if self.setting.smoke:
            return self.root / "data" / smoke_data.data_folder("")
        counts = self.comparison.images
        return self.root / "images" / f"{counts['train']}-{counts['choice']}" / folder

    def pretraining(self, training: Training, seed: int) -> Path:
        return self.root / "pretrain" / training.name / f"seed{seed}"

    def evaluated(self, training: Training, seed: int, name: str, data: str = "data") -> Path:
        """Folder of an evaluation."""
        place = "evaluate" if data == "data" else data
        return self.root / place / training.name / name / f"seed{seed}"

    def needed(self, training: Training) -> dict[str, Path]:
        """What a training needs: a run folder or a file by option. They are trained once, with seed 0."""
        return {
            option: self.root / "kmeans" / f"{tables.with_options('centers', need['kmeans'])}.pth"
            if isinstance(need, Mapping)
            else self.pretraining(need, 0)
            for option, need in training.needs.items()
        }

    def helpers(self, training: Training) -> list[Job]:
        """The jobs that must run before a training."""
        found: list[Job] = []
        for option, path in self.needed(training).items():
            need = training.needs[option]
            if isinstance(need, Training):
                found += self.pretrain(need, 0)
            else:
                sizes = {name: training.options[name] for name in ("input_size", "mean", "std")}
                options = {
                    **sizes,
                    "patch_size": training.options["model"].rpartition("patch")[2],
                    **need["kmeans"],
                }
                options |= {"num_workers": 0, "device": "cpu", "output": path} | (
                    {"epochs": 1} if self.setting.smoke else {}
                )
                words = ("-m", "tools.tokenizer", "kmeans", str(self.data() / "train"), *flags(options))
                found.append(Job(words, path))
        return found

    def pretrain(self, training: Training, seed: int) -> list[Job]:
        """A pretraining, after what it needs."""
        folder, options = self.pretraining(training, seed), dict(training.set)
        needed = self.needed(training)
        if self.setting.smoke:
            own = methods.own_options(training.options["method"])
            options |= SMOKE_RUN | {name: SMOKE_MODEL[name] for name in ("embed_dim", "depth", "num_heads")}
            options |= {name: value for name, value in (SMOKE_DECODER | SMOKE_VIEWS).items() if name in own}
        options |= needed | {"seed": seed, "data_path": self.data(), "output_dir": folder}
        words = ("main_pretrain.py", "-c", f"configs/pretrain/{training.recipe}.yaml", *flags(options))
        after = tuple(path if path.suffix else path / "result.json" for path in needed.values())
        return [*self.helpers(training), Job((*words, *self.setting.more), folder / "result.json", after)]

    def evaluate(self, training: Training, seed: int, name: str, data: str = "data") -> Job:
        evaluation, encoder = self.comparison.evaluations[name], self.pretraining(training, seed)
        folder = self.evaluated(training, seed, name, data)
        options = {**evaluation.set, **dict.fromkeys(("seed", *evaluation.seed_options), seed)}
        if self.setting.smoke and not evaluation.program.startswith("-m "):
            options |= SMOKE_EVALUATION | ({"labels_per_class": 0} if "labels_per_class" in options else {})
        options |= {
            "init_from": encoder / "checkpoints" / "last.pth",
            "data_path": self.data(data),
            "output_dir": folder,
        }
        if evaluation.program.startswith("-m "):
            del options["init_from"]
            words = (*evaluation.program.split(), str(encoder), *flags(options))
        else:
            options |= training.evaluate
            recipe = ("-c", f"configs/finetune/{evaluation.recipe}.yaml") if evaluation.recipe else ()
            words = (evaluation.program, *recipe, *flags(options), *self.setting.more)
        return Job(words, folder / "result.json", (encoder / "result.json",))

    def sweep_trials(self, row: Row) -> dict[float, Training]:
        """The trainings of the sweep of a row, by learning rate (blr).

        Those of `rates`; when these are finished and the best is the smallest or the largest, the next one beyond it,
        and so on until the best has neighbours on both sides, at most `FURTHER` in all.
        """
        factors = list(self.comparison.rates)
        limit = len(factors) + (0 if self.setting.smoke or len(factors) < 2 else FURTHER)
        while True:
            blr = float(row.training.options["blr"])
            rates = [float(f"{factor * blr:.4g}") for factor in factors]
            trials = {rate: _at_rate(row.training, rate).over(**self.comparison.sweep) for rate in rates}
            scores = [self.sweep_score(training) for training in trials.values()]
            if len(factors) >= limit or None in scores:
                return trials
            best = scores.index(max(score for score in scores if score is not None))
            if 0 < best < len(factors) - 1:
                return trials
            if best:
                factors.append(factors[-1] ** 2 / factors[-2])
            else:
                factors.insert(0, factors[0] ** 2 / factors[1])

    def choosing_evaluation(self) -> str:
        """The evaluation that gives the measure by which a rate is chosen."""
        return next(
            name for name, each in self.comparison.evaluations.items() if self.comparison.chosen_by in each.measures
        )

    def sweep(self, row: Row) -> list[Job]:
        return [
            job
            for training in self.sweep_trials(row).values()
            if not self.diverged(training)
            for job in (*self.pretrain(training, 0), self.evaluate(training, 0, self.choosing_evaluation(), "choice"))
        ]

    def diverged(self, training: Training) -> bool:
        """Whether a trial of the sweep ended because its losses were no longer finite."""
        folder = self.pretraining(training, 0)
        return not (folder / "result.json").exists() and any((folder / "debug").glob("bad-step-*"))

    def sweep_score(self, training: Training) -> float | None:
        """The measure of a trial on the choice images, 0 if it diverged; None before it is finished."""
        if self.diverged(training):
            return 0.0
        folder = self.evaluated(training, 0, self.choosing_evaluation(), "choice")
        if not (folder / "result.json").exists():
            return None
        return value_at(
            folder, self.comparison.evaluations[self.choosing_evaluation()].measures[self.comparison.chosen_by]
        )

    def sweep_scores(self, row: Row) -> dict[float, float]:
        """The finished part of the sweep: the measure on the choice images by learning rate."""
        scores = {rate: self.sweep_score(training) for rate, training in self.sweep_trials(row).items()}
        return {rate: score for rate, score in scores.items() if score is not None}

    def best_training(self, row: Row) -> Training | None:
        """The training with the best rate of the sweep; None before all of it is finished."""
        if not self.comparison.rates:
            return row.training
        scores = self.sweep_scores(row)
        if len(scores) < len(self.sweep_trials(row)):
            return None
        return _at_rate(row.training, max(scores, key=lambda rate: scores[rate]))

    def spent(self, folder: Path) -> float | None:
        """Seconds of a finished training, all starts together; None if unknown, as when a start was killed."""
        if not (folder / "environment.json").exists():
            return None
        starts = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        name = {"cpu": "cpu_seconds", "wall": "seconds"}[self.comparison.clock]
        return sum(start[name] for start in starts) if all(name in start for start in starts) else None

    def needed_runs(self, training: Training) -> list[Path]:
        """The folders of the runs that a training needs, each once: a teacher of several terms is trained once."""
        needs = [need for need in training.needs.values() if isinstance(need, Training)]
        return list(
            dict.fromkeys(each for need in needs for each in (self.pretraining(need, 0), *self.needed_runs(need)))
        )

    def preparing(self, training: Training) -> float | None:
        """Seconds of the runs that a training needs, without fitting k-means centres; None if unknown."""
        times = [self.spent(folder) for folder in self.needed_runs(training)]
        return None if None in times else sum(time for time in times if time is not None)

    def equal_compute(self, row: Row) -> Training | str | None:
        """The training whose length fills the budget, from the times of the sweep; None before they are known.

        If there is none, the reason: times that are unknown, or needed runs that leave no time for an epoch.
        """
        best = self.best_training(row)
        if best is None or not self.comparison.seconds:
            return None
        trials = self.sweep_trials(row).values()
        folders = [self.pretraining(training, 0) for training in trials if not self.diverged(training)]
        if not folders:
            return "every rate of its sweep diverged"
        times = [seconds for folder in folders if (seconds := self.spent(folder)) is not None]
        if not times:
            return f"runs were killed whose time is now unknown: {', '.join(str(folder) for folder in folders)}"
        if not all((folder / "result.json").exists() for folder in self.needed_runs(best)):
            return None
        preparing = self.preparing(best)
        if preparing is None:
            return "a run that it needs was killed, so its time is unknown"
        epochs = round(
            (self.comparison.seconds - preparing) / statistics.median(times) * self.comparison.sweep["epochs"]
        )
        if epochs < 1:
            return f"what it needs takes {preparing:.0f} s of {self.comparison.seconds:g}"
        share = float(row.training.options["warmup_epochs"]) / float(row.training.options["epochs"])
        return best.over(epochs=epochs, warmup_epochs=float(f"{share * epochs:.3g}"))

    def budgets(self, row: Row) -> dict[str, Training]:
        """The trainings of a row that can be named so far: `images` (equal images) and `compute` (equal compute)."""
        found = {"images": self.best_training(row), "compute": self.equal_compute(row)}
        return {budget: training for budget, training in found.items() if isinstance(training, Training)}

    def reasons(self, rows: Sequence[Row]) -> dict[str, str]:
        """Why rows have no training at equal compute, by row."""
        found = {row.name: self.equal_compute(row) for row in rows}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """All jobs that are known, each once: the sweeps, then every row with one seed before any with two."""
        found = [job for row in rows if self.comparison.rates for job in self.sweep(row)]
        for seed in dict.fromkeys(seed for row in rows for seed in row.seeds):
            for budget in ("images", "compute"):
                for row in rows:
                    training = self.budgets(row).get(budget)
                    if training and seed in row.seeds:
                        found += self.pretrain(training, seed)
                        found += [self.evaluate(training, seed, name) for name in self.comparison.evaluations]
        return list({job.done: job for job in found}.values())


def _at_rate(training: Training, blr: float) -> Training:
    """Return the training with a learning rate; the recipe's own adds nothing to the name."""
    return training if blr == float(training.options["blr"]) else training.over(blr=blr)


# ---- running --------------------------------------------------------------------------------------------------------


def chosen(comparison: Comparison, asked: Sequence[str]) -> list[Row]:
    """Return the rows that match ROWS (`nor_*`), or all, and the reference.

    Raises:
        ValueError: A pattern matches no row.
    """
    names = {named([row.name]): row for row in comparison.rows}
    found = tables.matching(list(names), [pattern.replace("_", "-") for pattern in asked], comparison.name)
    return [row for name, row in names.items() if name in found or row.name == comparison.reference]


def measured(plan: Plan, rows: Sequence[Row]) -> list[comparison_report.Result]:
    """Return what is finished, one entry for each row, budget and seed."""
    found = []
    for row in rows:
        for budget, training in plan.budgets(row).items():
            for seed in row.seeds:
                folder = plan.pretraining(training, seed)
                if not (
                    folder / "result.json"
                ).exists():  # deleted to be trained again: see drop_needed_without_weights
                    continue
                values = {
                    measure: value_at(plan.evaluated(training, seed, name), path)
                    for name, evaluation in plan.comparison.evaluations.items()
                    if (plan.evaluated(training, seed, name) / "result.json").exists()
                    for measure, path in evaluation.measures.items()
                }
                if values:
                    timed = (folder, *plan.needed_runs(training))
                    commits, devices = zip(*map(comparison_report.read_environment, timed), strict=True)
                    found.append(
                        comparison_report.Result(
                            row=row.name,
                            budget=budget,
                            seed=seed,
                            values=values,
                            blr=float(training.options["blr"]),
                            epochs=int(training.options["epochs"]),
                            images=int(value_at(folder, "images_seen")),
                            seconds=plan.spent(folder),
                            preparing=plan.preparing(training),
                            options={name: value for name, value in training.set.items() if name != "blr"},
                            recipe=training.recipe,
                            commit=commits[0],
                            device=" / ".join(dict.fromkeys(devices)),
                        )
                    )
    return found


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    comparisons = read_comparisons()
    parser = argparse.ArgumentParser(description="Compare pretraining methods at a fixed budget.")
    parser.add_argument("comparison", metavar="COMPARISON", help=f"one of {', '.join(comparisons)}")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands that are known so far")
    parser.add_argument("--report", action="store_true", help="only report the results so far")
    parser.add_argument("--collect", metavar="FOLDER", type=Path, help="also copy report, plot and runs to a folder")
    given = parser.parse_args(argv)
    if given.comparison not in comparisons:
        raise ValueError(f"there is no comparison {given.comparison!r}; there are {', '.join(comparisons)}")
    comparison = comparisons[given.comparison]
    setting = tables.read_setting(os.environ)
    if setting.epochs or setting.finetune_epochs:
        raise ValueError(
            "EPOCHS and FINETUNE_EPOCHS do not apply to a comparison, whose epochs are in configs/comparisons.yaml"
        )
    if "SEEDS" in os.environ:
        comparison = replace(comparison, rows=tuple(replace(row, seeds=setting.seeds) for row in comparison.rows))
    plan, rows = Plan(comparison, setting), chosen(comparison, setting.rows)
    if given.dry_run:
        tables.show(plan.jobs(rows), setting)
        return 0
    code = 0 if given.report else run(plan, rows)
    path = plan.root / "reports" / f"{comparison.name}.md"
    sweeps = {row.name: plan.sweep_scores(row) for row in rows}
    comparison_report.write(
        path, comparison, measured(plan, rows), sweeps, reasons=plan.reasons(rows), smoke=setting.smoke
    )
    say(f"report: {path}")
    if given.collect:
        given.collect.mkdir(parents=True, exist_ok=True)
        for suffix in (".md", ".png", ".json"):
            shutil.copyfile(path.with_suffix(suffix), given.collect / path.with_suffix(suffix).name)
        comparison_records.pack(plan.root, plan.jobs(rows), given.collect / f"{comparison.name}_runs.tar.xz")
        say(f"collected in {given.collect}")
    return code


def run(plan: Plan, rows: Sequence[Row]) -> int:
    """Run the sweeps, then the trainings that follow from them. Return the exit code."""
    setting = plan.setting
    plan.root.mkdir(parents=True, exist_ok=True)
    if setting.smoke:
        smoke_data.write(setting.root / "data", ())
    else:
        prepare_data(plan)
    done: set[Path] = set()
    code, began = 0, time.monotonic()
    while missing := {job.done for job in plan.jobs(rows) if not job.done.exists()} - done:
        done |= missing
        comparison_records.drop_needed_without_weights(plan.jobs(rows))
        left = max(setting.minutes - (time.monotonic() - began) / 60, 1e-6) if setting.minutes else 0
        code = max(code, tables.run_jobs(plan.jobs(rows), setting, left, short=plan.comparison.clock == "cpu"))
        if code == table_jobs.INTERRUPTED:
            break
    for name, reason in plan.reasons(rows).items():
        say(f"{name}: no run at equal compute: {reason}")
    return code


if __name__ == "__main__":
    sys.exit(main())
