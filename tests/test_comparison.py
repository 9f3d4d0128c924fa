"""Comparisons at a fixed budget: what they say, their jobs, their statistics, and a complete run with stand-ins."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import methods
import programs
import programs.pretrain
from options import to_dict
from tests.small import options_of, small
from tools import comparison, comparison_records, comparison_report, given, neighbor_statistics, table_jobs
from tools.comparison import Plan, chosen
from tools.comparison_file import Comparison, Evaluation, Row, Training, read_comparisons
from tools.comparison_report import Result, differences, holm, paired
from tools.figures import models, separation
from tools.figures.subject import Subject
from tools.table_jobs import Job
from tools.tables import PROJECT, Setting

COMPARISONS = read_comparisons()
RESULTS = PROJECT / "benchmarks" / "results"
ENCODER = str(next((PROJECT / "tests" / "fixtures").glob("*mae*.pth")))


# ---- what the file says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_row_parses_and_its_evaluations_exist(name, tmp_path):
    """Each command line is one that the program accepts."""
    found = COMPARISONS[name]
    assert found.reference in [row.name for row in found.rows]
    plan = Plan(found, Setting(out=tmp_path, data=str(tmp_path)))
    scripts = {"main_pretrain.py": "pretrain", "main_linprobe.py": "probe", "main_finetune.py": "finetune"}
    for row in found.rows:
        for job in (
            *plan.pretrain(row.training, 0),
            *(plan.evaluate(row.training, 0, each) for each in found.evaluations),
        ):
            if job.words[0] in scripts:
                words = [ENCODER if word.endswith("last.pth") else word for word in job.words[1:]]
                options = programs.parse_options(scripts[job.words[0]], words)
                assert Path(options.output_dir) == job.done.parent


def test_every_row_with_a_teacher_can_be_built(monkeypatch, tmp_path):
    """Whether their sizes fit is only known when the teacher's checkpoint is read. All terms share one teacher."""
    found = COMPARISONS["leaderboard_cpu"]
    plan = Plan(found, Setting(out=tmp_path))
    rows = [row for row in found.rows if "terms.teacher.checkpoint" in row.training.needs]
    assert len(rows) == 7
    teacher = programs.parse_options("pretrain", plan.helpers(rows[0].training)[0].words[1:])
    weights = programs.pretrain.build_model(teacher).state_dict()
    monkeypatch.setattr(methods, "load_pretrained", lambda path: (weights, to_dict(teacher)))
    for row in rows:
        options = programs.parse_options("pretrain", plan.pretrain(row.training, 0)[-1].words[1:])
        model = programs.pretrain.build_model(options)
        assert [name for name, term in model.terms.items() if term.teacher.network is not None] == ["teacher"], row.name


def test_the_arms_of_the_neighbour_comparison_have_the_strength_that_they_name():
    """weight x (P - 1), with P = 48 pixels of a patch, or E = 64 channels; alignment reaches 2 (P - 1) / P."""
    found = {row.name: row.training.options for row in COMPARISONS["nor_explained_cpu"].rows}
    weights = {name: float(options.get("terms.neighbor.weight", 0)) for name, options in found.items()}
    for name, weight in weights.items():
        width = 64 if "embedding" in name else 48
        if name.startswith("mae"):
            assert weight == 0
        elif name == "closest, literal 5e-5":
            assert weight == 5e-5
        elif name == "NoA":
            assert weight * 2 * 47 / 48 == pytest.approx(0.0384, rel=2e-3)
        else:
            effective = float(name.rpartition("effective ")[2]) if "effective" in name else 0.0384
            assert weight * (width - 1) == pytest.approx(effective, rel=2e-3), name
    assert len({row.training.name for row in COMPARISONS["nor_explained_cpu"].rows}) == len(found)


def test_methods_that_train_the_class_token_are_evaluated_on_it(tmp_path):
    found = COMPARISONS["leaderboard_cpu"]
    plan = Plan(found, Setting(out=tmp_path))
    words = {row.name: plan.evaluate(row.training, 0, "probe").words for row in found.rows}
    token = {name for name, each in words.items() if ("--global_pool", "token") in itertools.pairwise(each)}
    assert token == {"moco_v3", "dino"}


def test_rows_are_chosen_with_the_reference():
    found = COMPARISONS["leaderboard_cpu"]
    assert [row.name for row in chosen(found, ["simmim"])] == ["mae", "simmim"]
    assert [row.name for row in chosen(found, ["nor_*"])] == ["mae", "nor_mae", "nor_mae_released"]
    assert len(chosen(found, [])) == len(found.rows)
    with pytest.raises(ValueError, match="did you mean 'simmim'"):
        chosen(found, ["simmin"])


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_paired_differences_agree_with_scipy():
    generator = np.random.default_rng(0)
    for n in (2, 3, 5):
        values, reference = generator.normal(50, 2, n).tolist(), generator.normal(49, 2, n).tolist()
        mean, low, high, p = paired(values, reference)
        expected = stats.ttest_rel(values, reference)
        interval = expected.confidence_interval(0.95)
        assert mean == pytest.approx(np.mean(values) - np.mean(reference))
        assert (low, high, p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    assert paired([1.0, 2.0], [0.0, 1.0]) == (1.0, 1.0, 1.0, 0.0)
    assert paired([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 0.0, 1.0)


def test_holm_by_hand():
    """Sorted .01 x 4, .02 x 3, .03 x 2, .5 x 1; none smaller than the one before; at most 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def result(row, seed, linear, budget="images", **more):
    facts = {"blr": 1e-3, "epochs": 2, "images": 100, "seconds": 10.0, "preparing": 0.0, "options": {}, "recipe": "r"}
    return Result(
        row=row, budget=budget, seed=seed, values={"linear": linear}, commit="c", device="d", **(facts | more)
    )


def test_differences_are_paired_by_seed_and_need_two():
    results = [result("mae", 0, 50), result("mae", 1, 60), result("mae", 2, 70)]
    results += [result("a", 2, 73), result("a", 1, 61), result("b", 0, 40), result("a", 0, 99, budget="compute")]
    found = differences(results, "mae", "images", "linear")
    assert found.keys() == {"a"} and found["a"].mean == 2 and found["a"].pairs == 2
    expected = stats.ttest_rel([61, 73], [60, 70])
    assert found["a"].p == found["a"].corrected == pytest.approx(expected.pvalue)


def test_percent_has_one_decimal_and_other_measures_three():
    found = comparison_report.list_measures(COMPARISONS["nor_explained_cpu"])
    assert (found["linear"], found["separation"]) == (1, 3)
    assert comparison_report.spread([41.26, 41.46], 1) == "41.4 ± 0.1"
    assert comparison_report.spread([0.8371, 0.8401], 3) == "0.839 ± 0.002"
    difference = comparison_report.Difference(0.0123, -0.001, 0.0256, 0.04, 0.08, 5)
    assert comparison_report.described(difference, 3) == "+0.012 [-0.001, +0.026], within noise, p 0.08"


def points(axis):
    """Mean and both ends of the bar of each row, in the order of drawing."""
    return [(drawn[0].get_xydata()[0].tolist(), drawn[2][0].get_segments()[0].tolist()) for drawn in axis.containers]


def test_the_plot_has_the_mean_and_deviation_of_each_row():
    measures = Evaluation("main_linprobe.py", {"linear": "accuracy.last.acc1"})
    rows = tuple(Row(name, Training("mae_vit_cpu_cifar10"), (0, 1)) for name in ("mae", "a", "not run"))
    plain = Comparison("c", "C", "mae", rows, {"probe": measures}, {})
    results = [result("mae", 0, 50), result("mae", 1, 52), result("a", 0, 40), result("a", 1, 40.5, preparing=2.0)]
    (axis,) = comparison_report.picture(plain, results).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mae", "a"]
    assert points(axis)[0] == ([51, 0], [pytest.approx([51 - 2**0.5, 0]), pytest.approx([51 + 2**0.5, 0])])
    assert points(axis)[1][0] == [40.25, 1]
    timed = dataclasses.replace(plain, seconds=60)
    (axis,) = comparison_report.picture(timed, [*results, result("mae", 0, 49, budget="compute", seconds=20.0)]).axes
    assert [point for point, _ in points(axis)] == [[10, 51], [20, 49], [11, 40.25]]
    assert [drawn[0].get_markerfacecolor() == "none" for drawn in axis.containers] == [False, True, False]
    assert axis.get_xlabel() == "CPU seconds of pretraining" and axis.get_xscale() == "log"


# ---- a complete comparison with programs that only write results -----------------------------------------------------

TINY = """
tiny:
  title: A test
  images: {train: 2, choice: 1}
  reference: mae
  seeds: [0, 1]
  set: {epochs: 4, warmup_epochs: 1, decoder_depth: 1}
  rates: [0.5, 1]
  sweep: {epochs: 2}
  chosen_by: linear
  seconds: 60
  clock: cpu
  evaluations:
    probe: {program: main_linprobe.py, set: {epochs: 1}, measures: {linear: accuracy.last.acc1}}
  rows:
  - {row: mae, recipe: mae_vit_cpu_cifar10}
  - {row: simmim, recipe: simmim_vit_cpu_cifar10}
  - row: beit
    recipe: beit_vit_cpu_cifar10
    needs: {tokenizer: {recipe: vq_tokenizer_vit_cpu_cifar10}}
"""


class StandIn:
    """Writes what a program would: the accuracy depends on the method and the rate, the time on the epochs."""

    def __init__(self, words, said):
        options = dict(zip(words[1:], words[2:], strict=False))
        folder = Path(options["--output_dir"])
        folder.mkdir(parents=True)
        if words[1] == "main_linprobe.py":
            trained = json.loads((Path(options["--init_from"]).parent.parent / "result.json").read_text())
            found = {"accuracy": {"last": {"acc1": trained["score"] + int(options["--seed"])}}}
        else:
            method = options.get("--method", Path(options["-c"]).stem.partition("_vit")[0])
            seconds = {"mae": 3, "simmim": 6, "beit": 5, "vq_tokenizer": 1}[method] * int(options.get("--epochs", 10))
            octaves = abs(math.log2(float(options.get("--blr", 4e-3)) / 2e-3))
            score = {"mae": 55, "simmim": 45, "beit": 50, "vq_tokenizer": 0}[method] - 5 * octaves
            found = {"score": score, "images_seen": 100}
            start = {"commit": "abc", "gpus": [], "processor": "a processor", "cpu_seconds": seconds}
            (folder / "environment.json").write_text(json.dumps([start]))
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.pth").touch()
        (folder / "result.json").write_text(json.dumps(found))

    def code(self):
        return 0

    def send(self, number): ...


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    path = tmp_path / "comparisons.yaml"
    path.write_text(TINY)
    (found,) = read_comparisons(path).values()
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "given" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    monkeypatch.setattr(table_jobs, "Fork", StandIn)
    return Plan(found, Setting(data=str(tmp_path / "given"), out=tmp_path / "out"))


def test_a_comparison_from_the_sweep_to_the_report(tiny, tmp_path, capsys):
    rows = list(tiny.comparison.rows)
    assert comparison.run(tiny, rows) == 0
    mae, simmim, beit = rows
    assert tiny.sweep_scores(mae) == {1e-3: 50, 2e-3: 55, 4e-3: 50}  # the smallest of two was best: one beyond it
    budgets = {row.name: tiny.budgets(row) for row in rows}
    assert all(each["images"].options["blr"] == 2e-3 for each in budgets.values())
    # 60 s at 3, 6 and 5 s an epoch; the tokenizer takes 10 s of beit's
    assert [budgets[name]["compute"].options["epochs"] for name in ("mae", "simmim", "beit")] == [20, 10, 10]
    assert budgets["mae"]["compute"].options["warmup_epochs"] == 5  # a quarter, as in the comparison
    assert "decoder_depth" in mae.training.set or mae.training.options["decoder_depth"] == 1
    assert "decoder_depth" not in simmim.training.set  # it has none

    results = comparison.measured(tiny, rows)
    assert len(results) == 3 * 2 * 2
    first = next(each for each in results if each.row == "beit" and each.seed == 1)
    assert (first.values, first.preparing, first.commit) == ({"linear": 51.0}, 10.0, "abc")
    assert comparison_report.list_devices(results) == "a processor"
    comparison_report.write(tmp_path / "r.md", tiny.comparison, results, {"mae": tiny.sweep_scores(mae)})
    text = (tmp_path / "r.md").read_text()
    assert "| mae | 2 | 4 | 100 | 12 | 55.5 ± 0.7 |" in text
    assert "| simmim | -10.0 [-10.0, -10.0], p 0 |" in text
    assert "| mae | 0.001: 50.0, 0.002: 55.0 *, 0.004: 50.0 |" in text
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == len(results)
    assert (tmp_path / "r.png").stat().st_size > 5_000
    capsys.readouterr()
    assert comparison.run(tiny, rows) == 0 and "python" not in capsys.readouterr().out  # nothing is left to do


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sweep_ends_two_rates_beyond_those_of_the_comparison(tiny, monkeypatch, sign):
    monkeypatch.setattr(tiny, "sweep_score", lambda training: sign * float(training.options["blr"]))
    found = list(tiny.sweep_trials(tiny.comparison.rows[0]))
    assert found == ([2e-3, 4e-3, 8e-3, 16e-3] if sign > 0 else [5e-4, 1e-3, 2e-3, 4e-3])
    monkeypatch.setattr(
        tiny, "sweep_score", lambda training: {2e-3: 5.0, 4e-3: 7.0}.get(float(training.options["blr"]))
    )
    assert list(tiny.sweep_trials(tiny.comparison.rows[0])) == [2e-3, 4e-3, 8e-3]  # the third is not finished


def test_a_rate_that_diverges_is_the_worst_and_is_not_tried_again(tiny, monkeypatch):
    mae = tiny.comparison.rows[0]
    (lower, higher) = tiny.sweep_trials(mae).values()
    debug = tiny.pretraining(higher, 0) / "debug"
    debug.mkdir(parents=True)
    (debug / "bad-step-00000007.json").touch()
    (debug.parent / "environment.json").write_text('[{"cpu_seconds": 0.1}]')
    assert tiny.sweep_score(higher) == 0 and tiny.sweep_score(lower) is None
    assert [job.done.parent for job in tiny.sweep(mae)] == [
        tiny.pretraining(lower, 0),
        tiny.evaluated(lower, 0, "probe", "choice"),
    ]
    assert comparison.run(tiny, [mae]) == 0
    assert tiny.sweep_scores(mae) == {1e-3: 50, 2e-3: 55, 4e-3: 0}
    (tiny.pretraining(tiny.sweep_trials(mae)[1e-3], 0) / "environment.json").unlink()
    assert tiny.equal_compute(mae).options["epochs"] == 20  # 60 s at 3 s an epoch: the time of 2e-3 alone
    monkeypatch.setattr(tiny, "diverged", lambda training: True)
    assert tiny.equal_compute(mae) == "every rate of its sweep diverged"


def test_a_row_without_time_for_an_epoch_is_not_run_at_equal_compute(tiny, tmp_path, capsys):
    tiny.comparison = dataclasses.replace(tiny.comparison, seconds=12)
    rows = [tiny.comparison.rows[0], tiny.comparison.rows[2]]
    assert comparison.run(tiny, rows) == 0
    reason = "what it needs takes 10 s of 12"
    assert f"beit: no run at equal compute: {reason}" in capsys.readouterr().out
    results = comparison.measured(tiny, rows)
    assert {(each.row, each.budget) for each in results} == {("mae", "images"), ("mae", "compute"), ("beit", "images")}
    comparison_report.write(tmp_path / "r.md", tiny.comparison, results, {}, reasons=tiny.reasons(rows))
    images, compute = (tmp_path / "r.md").read_text().split("## Equal compute")
    assert "| beit | 2 | 4 |" in images and f"| beit | 0 | not run: {reason} |" in compute


def test_another_machine_continues_from_the_records(tiny, tmp_path, capsys):
    """It trains what is missing, and again only the runs whose weights it needs."""
    mae, simmim, beit = tiny.comparison.rows
    comparison.run(tiny, [mae, simmim])
    complete = comparison.measured(tiny, [mae, simmim])
    comparison_records.pack(tiny.root, tiny.jobs([mae, simmim]), tmp_path / "runs.tar.xz")
    other = Plan(tiny.comparison, Setting(data=tiny.setting.data, out=tmp_path / "other"))
    with tarfile.open(tmp_path / "runs.tar.xz") as archive:
        assert all(Path(name).name in ("result.json", "environment.json") for name in archive.getnames())
        archive.extractall(other.root, filter="data")
    lost = other.evaluated(other.budgets(simmim)["images"], 1, "probe")
    shutil.rmtree(lost)
    capsys.readouterr()
    assert comparison.run(other, [mae, simmim]) == 0
    assert comparison.measured(other, [mae, simmim]) == complete
    again = other.pretraining(other.budgets(simmim)["images"], 1)
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python ")]
    assert [line.rpartition(" ")[2] for line in started] == [str(again), str(lost)]
    assert comparison.run(other, [beit]) == 0 and len(comparison.measured(other, [beit])) == 4
    (needed,) = other.needed_runs(other.budgets(beit)["images"])
    environment = (needed / "environment.json").read_text().replace("a processor", "a faster one")
    (needed / "environment.json").write_text(environment)
    results = comparison.measured(other, [mae, beit])
    assert comparison_report.list_devices(results) == (
        "a processor (mae); a processor / a faster one (beit). Do not compare the seconds of different devices"
    )


def test_a_lost_teacher_is_trained_again_with_what_it_needs(tmp_path):
    first, second, third = (tmp_path / name / "result.json" for name in ("first", "second", "third"))
    for path in (first, second):
        path.parent.mkdir()
        path.touch()
    jobs = [Job((), first), Job((), second, (first,)), Job((), third, (second,))]
    comparison_records.drop_needed_without_weights(jobs)
    assert not first.exists() and not second.exists()


def test_the_images_are_the_first_of_each_class(tiny):
    comparison.prepare_data(tiny)
    root = tiny.data().parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.png")}
    both = {
        f"{folder}/train/{name}/{n}.png" for folder in ("data", "choice") for name in ("cat", "dog") for n in (0, 1)
    }
    val = {f"data/val/{name}/{n}.png" for name in ("cat", "dog") for n in (0, 1)}
    assert found == both | val | {f"choice/val/{name}/2.png" for name in ("cat", "dog")}


def test_a_pretraining_that_was_deleted_is_not_reported(tiny):
    mae = tiny.comparison.rows[0]
    comparison.run(tiny, [mae])
    complete = comparison.measured(tiny, [mae])
    shutil.rmtree(tiny.pretraining(tiny.budgets(mae)["images"], 1))
    assert comparison.measured(tiny, [mae]) == [each for each in complete if (each.budget, each.seed) != ("images", 1)]


def test_images_of_other_data_are_refused(tiny, tmp_path, monkeypatch):
    comparison.prepare_data(tiny)
    monkeypatch.chdir(tmp_path)
    comparison.prepare_data(Plan(tiny.comparison, dataclasses.replace(tiny.setting, data="given")))
    other = Plan(tiny.comparison, dataclasses.replace(tiny.setting, data=str(tmp_path)))
    with pytest.raises(ValueError, match=r"has the images of .*given, DATA is .*: give another OUT, or delete"):
        comparison.prepare_data(other)
    (tiny.data().parent / "origin.txt").unlink()
    comparison.prepare_data(other)


@pytest.mark.parametrize("name", ["EPOCHS", "FINETUNE_EPOCHS"])
def test_variables_of_tables_are_refused(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "3")
    assert comparison.main(["leaderboard_cpu", "--dry-run"]) == 2
    assert "do not apply to a comparison" in capsys.readouterr().err


def test_the_report_shows_that_a_measure_lacks_seeds():
    measures = Evaluation("main_linprobe.py", {"linear": "accuracy.last.acc1", "k-NN": "knn_acc1"})
    rows = (Row("mae", Training("mae_vit_cpu_cifar10"), (0, 1, 2)),)
    results = [result("mae", seed, 50 + seed) for seed in (0, 1, 2)]
    results[0] = dataclasses.replace(results[0], values={"linear": 50.0, "k-NN": 30.0})
    text = comparison_report.make_tables(
        Comparison("c", "C", "mae", rows, {"probe": measures}, {}), results, "images", {}
    )
    assert "| 51.0 ± 1.0 | 30.0 (1 of 3 seeds) |" in text


def test_one_star_marks_the_rate_of_a_tie_that_is_used():
    assert (
        comparison_report.list_scores({1e-3: 40.0, 2e-3: 50.0, 4e-3: 50.0}) == "0.001: 40.0, 0.002: 50.0 *, 0.004: 50.0"
    )


def test_wrong_data_are_refused_before_work(tiny, tmp_path):
    plan = Plan(tiny.comparison, Setting(data=str(tmp_path), out=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"cifar-10-batches-py.*or folders train/CLASS"):
        comparison.prepare_data(plan)
    (tmp_path / "given" / "train" / "cat" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"class cat has too few images: 2 \+ 1"):
        comparison.prepare_data(tiny)


def test_a_time_is_the_sum_over_starts_and_unknown_if_one_was_killed(tiny, tmp_path):
    (tmp_path / "environment.json").write_text('[{"cpu_seconds": 2, "seconds": 9}, {"cpu_seconds": 3, "seconds": 9}]')
    assert tiny.spent(tmp_path) == 5
    (tmp_path / "environment.json").write_text('[{}, {"cpu_seconds": 3, "seconds": 9}]')
    assert tiny.spent(tmp_path) is None


def test_a_teacher_of_several_terms_counts_once(tiny, monkeypatch):
    teacher = Training("mae_vit_cpu_cifar10")
    student = Training("mae_vit_cpu_cifar10", {"method": "amd"}, {"a": teacher, "b": teacher, "c": {"kmeans": {}}})
    monkeypatch.setattr(tiny, "spent", lambda folder: 7.0)
    assert tiny.preparing(student) == 7.0
    monkeypatch.setattr(tiny, "spent", lambda folder: None)
    assert tiny.preparing(student) is None


# ---- published results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in COMPARISONS if (RESULTS / f"{name}.json").exists()])
def test_published_results_have_the_settings_of_the_file(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    trainings = {row.name: row.training for row in COMPARISONS[name].rows}
    assert len({each["commit"] for each in results}) <= 4
    for each in results:
        training = trainings[each["row"]]
        assert each["recipe"] == training.recipe
        if each["budget"] == "images":
            assert each["options"] == json.loads(json.dumps({k: v for k, v in training.set.items() if k != "blr"}))


@pytest.mark.slow
@pytest.mark.skipif("NOR_MAE_CIFAR10" not in os.environ, reason="NOR_MAE_CIFAR10 does not name a folder with CIFAR-10")
def test_a_published_row_comes_out_again(tmp_path):
    """On another processor, rounding differs, so that the result differs as that of another seed does."""
    given = {"DATA": os.environ["NOR_MAE_CIFAR10"], "OUT": str(tmp_path), "ROWS": "mae", "SEEDS": "0"}
    words = [sys.executable, "-m", "tools.comparison", "nor_explained_cpu"]
    subprocess.run(words, cwd=PROJECT, env=os.environ | given | {"OMP_NUM_THREADS": "1"}, check=True)
    (found,) = json.loads((tmp_path / "reports" / "nor_explained_cpu.json").read_text())["results"]
    results = json.loads((RESULTS / "nor_explained_cpu.json").read_text())["results"]
    published = [each["values"] for each in results if each["row"] == "mae"]
    assert found["values"].keys() == published[0].keys()
    for measure, value in found["values"].items():
        values = [each[measure] for each in published]
        assert abs(value - statistics.mean(values)) <= 3 * statistics.stdev(values), measure


# ---- statistics of neighbours ----------------------------------------------------------------------------------------


def test_agreement_is_the_mean_correlation_of_two_predictions():
    words = "--method mae --model mae_vit_tiny_patch4 --input_size 16 --embed_dim 12 --depth 1 --num_heads 2"
    words += " --decoder_embed_dim 8 --decoder_depth 1 --decoder_num_heads 2 --data_path digits"
    words += " --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5"
    options = to_dict(programs.parse_options("pretrain", words.split()))
    torch.manual_seed(0)
    model = methods.from_options(options).eval()
    cpu = torch.device("cpu")
    trained = given.Trained(model, options, 0, Path("last.pth"), cpu)
    shown = models.FigureModel("m", "", model, ((0.5,) * 3, (0.5,) * 3), cpu)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    subject = Subject([shown], pixels, ["a", "b", "c"])
    found = neighbor_statistics.measure(trained, subject)

    neighbor = neighbor_statistics.with_diagonal(trained)
    view = neighbor.observe(shown.normalized(pixels), noise=subject.noise)
    predictions = view.pred, neighbor.terms["neighbor"].second_pass(neighbor, view)
    first, second = (each.detach().double().numpy() for each in predictions)
    correlations = [np.corrcoef(first[n, patch], second[n, patch])[0, 1] for n in range(3) for patch in range(16)]
    assert found["agreement"] == pytest.approx(np.mean(correlations), abs=1e-4)

    one = neighbor_statistics.measure_encoder(Subject([shown], pixels[:1], ["a"]))
    encoded = separation.encode(Subject([shown], pixels[:1], ["a"]), shown)[0]
    cosines = [float(a @ b) for a, b in zip(encoded.visible, encoded.companions, strict=True)]
    assert one["cosine_companion"] == pytest.approx(np.mean(cosines), abs=1e-6)
    pairs = [(i, j) for i in range(len(cosines)) for j in range(len(cosines))]
    other = [float(encoded.visible[i] @ encoded.companions[j]) for i, j in pairs if encoded.ids[i] != encoded.ids[j]]
    assert one["cosine_other"] == pytest.approx(np.mean(other), abs=1e-6)
    visible = [float(encoded.visible[i] @ encoded.visible[j]) for i, j in pairs if i != j]
    assert one["cosine_visible"] == pytest.approx(np.mean(visible), abs=1e-6)


@pytest.mark.parametrize("method", ["sup_mae", "simmim", "cross_mae"])
def test_agreement_is_for_methods_with_the_decoder_of_mae(method):
    model = small(method)
    trained = given.Trained(model, options_of(method, model), 0, Path("last.pth"), torch.device("cpu"))
    if method == "sup_mae":
        weights = neighbor_statistics.with_diagonal(trained).state_dict()
        assert torch.equal(weights["decoder_pred.weight"], model.decoder_pred.weight)
    else:
        with pytest.raises(ValueError, match=f"method {method} has another decoder than MAE"):
            neighbor_statistics.with_diagonal(trained)


@pytest.mark.slow
def test_the_comparison_runs_in_smoke_form(tmp_path):
    variables = {"SMOKE": "1", "OUT": str(tmp_path), "SEEDS": "0 1", "ROWS": "nor_mae cluster_mim", "DATA": ""}
    for name in ("cpu", "nor_explained_cpu"):
        rows = {"ROWS": "closest"} if name == "nor_explained_cpu" else {}
        ended = subprocess.run(
            ["bash", "scripts/leaderboard.sh"], cwd=PROJECT, env=os.environ | variables | rows | {"SET": name}
        )
        assert ended.returncode == 0
    text = (tmp_path / "smoke" / "reports" / "leaderboard_cpu.md").read_text()
    assert text.startswith("Smoke test") and "| nor_mae | 2 | 10 |" in text
    text = (tmp_path / "smoke" / "reports" / "nor_explained_cpu.md").read_text()
    assert (
        "| row | seeds | epochs | images seen | cpu s | k-NN | linear | fine-tuned | 10 labels | separation |" in text
    )
