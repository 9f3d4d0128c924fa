"""The paper's tables: every row is parsed and builds a model, commands are as documented, reports are correct."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102

import main_finetune
import main_pretrain
import main_segment
import methods
import models_classifier
from data import masks
from data.sources import open_source
from options import SegmentOptions, to_dict
from tools import smoke_data, table_jobs, table_report, tables
from tools.table_jobs import INTERRUPTED, Job
from tools.tables import ACCURACY, PROJECT, Plan, Setting, chosen, read_setting, read_tables
from util import checkpoint
from util.distributed import Processes

TABLES = read_tables()
SETTINGS = {"real": Setting(), "smoke": Setting(smoke=True, out=Path("/nowhere")), "short": Setting(epochs=10, nproc=8)}

# As printed in the paper: table, row, measure, number.
PAPER = [
    ("1", "2-mae", ACCURACY, 71.08),
    ("1", "2-nor-mae", ACCURACY, 83.56),
    ("1", "4-nor-mae", ACCURACY, 83.58),
    ("1", "8-mae", ACCURACY, 71.27),
    ("1", "32-nor-mae", ACCURACY, 74.73),
    ("2", "vit-tiny-mae-200", ACCURACY, 66.60),
    ("2", "vit-tiny-mae-400", ACCURACY, 67.63),
    ("2", "vit-tiny-moco-v3-200", ACCURACY, 70.09),
    ("2", "vit-tiny-dino-300", ACCURACY, 68.17),
    ("2", "vit-tiny-nor-mae-400", ACCURACY, 71.18),
    ("2", "vit-small-sup-nor-mae-200", ACCURACY, 80.16),
    ("2", "vit-small-nor-mae-400", ACCURACY, 81.04),
    ("2", "vit-base-u-mae-200", ACCURACY, 83.00),
    ("2", "vit-base-nor-dmae-200", ACCURACY, 84.22),
    ("3", "vit-tiny-dino", ACCURACY, 63.04),
    ("3", "vit-tiny-nor-mae", ACCURACY, 78.26),
    ("3", "vit-small-peco", ACCURACY, 83.60),
    ("3", "vit-base-beit", ACCURACY, 86.10),
    ("3", "vit-base-nor-mae", ACCURACY, 87.56),
    ("4", "vit-tiny-mae", "CIFAR-10", 95.01),
    ("4", "vit-tiny-nor-mae", "DTD", 60.18),
    ("4", "vit-tiny-nor-mae", "ADE20K", 33.54),
    ("4", "vit-small-mae", "Aircraft", 55.90),
    ("4", "vit-small-nor-mae", "Caltech-101", 82.08),
    ("5", "vit-tiny-0-mae", ACCURACY, 70.24),
    ("5", "vit-tiny-1e-5", ACCURACY, 76.20),
    ("5", "vit-small-5e-4", ACCURACY, 81.83),
    ("6", "50-mae", ACCURACY, 65.43),
    ("6", "85-nor-mae", ACCURACY, 70.16),
    ("7", "1000-nor-mae", ACCURACY, 82.97),
    ("7", "1600-mae", ACCURACY, 74.29),
    ("8", "vit-tiny-random-asymmetry", ACCURACY, 72.15),
    ("8", "vit-small-random-asymmetry", ACCURACY, 82.04),
    ("9", "noa-5e-5", ACCURACY, 72.52),
    ("10", "vit-tiny-dmae", "GB", 152),
    ("10", "vit-small-dmae", "minutes", 62),
    ("10", "vit-small-nor-mae", ACCURACY, 80.13),
    ("11", "mae", "minutes", 25.333),
    ("11", "mae-50-hidden", "price", 3.50),
    ("11", "nor-mae", "GB", 108),
]
COUNTS = {"1": 10, "2": 31, "3": 13, "4": 36, "5": 10, "6": 6, "7": 6, "8": 4, "9": 4, "10": 18, "11": 9}


def row_of(table, name):
    (row,) = [row for row in TABLES[table].rows if row.name == name]
    return row


@pytest.mark.parametrize(("table", "name", "measure", "number"), PAPER)
def test_the_papers_numbers(table, name, measure, number):
    assert row_of(table, name).paper[measure] == number


def test_every_number_of_the_paper_is_there():
    """Table 9 has NoA twice, because the paper does not state its weight."""
    found = {
        number: sum(value is not None for row in table.rows for value in row.paper.values())
        for number, table in TABLES.items()
        if number.isdecimal()
    }
    assert found == COUNTS


def test_rows_have_names_of_their_own_and_a_reason_where_they_are_cited():
    for table in TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        for row in table.rows:
            assert row.measures() or all(row.cited.values())
            assert len(row.labels) == len(table.columns)


def option_names(words):
    return [word for word in words if word.startswith("--")]


@functools.cache
def builds(words):
    """Parse a pretraining command as the program does, and build its model without data."""
    options = main_pretrain.parse_options(words)
    terms = dict(options.terms)
    if "teacher" in terms:
        terms["teacher"] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}  # of a teacher that is not available
    tokens = {"tokens": 8192} if hasattr(options, "tokenizer") else {}  # of a tokenizer that is not available
    with torch.device("meta"):
        return options, methods.from_options(to_dict(dataclasses.replace(options, terms=terms, **tokens)))


CASES = [(number, kind) for number in TABLES for kind in SETTINGS if kind != "short" or number == "7"]


@pytest.mark.parametrize(("number", "kind"), CASES)
def test_every_command_parses_and_its_model_is_made(number, kind, weights, monkeypatch):
    monkeypatch.chdir(PROJECT)
    setting = SETTINGS[kind]
    for job in Plan(setting).jobs(TABLES[number].rows):
        script, *words = job.words
        if script == "-m":
            script, *words = words
        if script == "tools.smoke_data":
            assert setting.smoke
            script, *words = words
        assert len(option_names(words)) == len(set(option_names(words))), "nothing is given twice"
        if script == "main_pretrain.py":
            options, model = builds(tuple(words))
            assert set(model.loss_terms) == set(options.terms)
            for option in ("tokenizer", "perceptual_encoder"):
                assert not (needed := getattr(options, option, "")) or Path(needed) / "result.json" in job.after
            assert (options.epochs == 10) == (setting.epochs == 10)
            assert not setting.smoke or (options.input_size == (64, 64) and model.embed_dim == 24)
        elif script in ("main_finetune.py", "main_segment.py"):
            at = words.index("--init_from") + 1
            pretrained, words[at] = words[at], weights
            assert Path(pretrained).parent.parent / "result.json" in job.after
            script = main_finetune if script == "main_finetune.py" else main_segment
            options = script.parse_options(words)
            assert options.data_path and options.model.startswith("mae_vit_")
        else:
            assert script == "benchmarks.bill"


def test_rows_that_tables_share_are_trained_once_and_others_are_not_mixed_up():
    plan = Plan(Setting())
    folders = {}
    for table in TABLES.values():
        for job in plan.jobs(table.rows):
            assert folders.setdefault(job.done, job.words) == job.words
    assert plan.pretraining(row_of("3", "vit-tiny-mae")) == plan.pretraining(row_of("9", "mae"))
    assert plan.pretraining(row_of("7", "1600-mae")).name == "mae_vit_tiny_in100-epochs1600"


def test_what_a_row_needs_is_trained_before_it():
    jobs = Plan(Setting()).jobs([row_of("3", "vit-small-peco")])
    names = [job.done.parent.parent.name for job in jobs]
    assert names[:3] == ["mae_vit_small_in100", "perceptual_tokenizer_vit_small_in100", "peco_vit_small_in100"]
    for needed, job in zip(jobs[:2], jobs[1:3], strict=True):
        assert job.after == (needed.done,) and str(needed.done.parent) in job.words
    shared = Plan(Setting()).pretrain_job(row_of("3", "vit-small-mae"), 0)
    assert jobs[0] == shared  # trained once for both rows


def test_the_neighbour_arms_are_as_strong_as_the_papers_patch_16(monkeypatch):
    monkeypatch.chdir(PROJECT)
    strengths = {}
    for number in ("nor_explained", "nor_explained_in100"):
        for row in TABLES[number].rows:
            options, model = builds(Plan(Setting()).pretrain_job(row, 0).words[1:])
            if "neighbor" in model.terms:
                strengths[number, row.name] = float(table_report.strength(json.dumps(to_dict(options))).split()[0])
            else:
                assert options.method == "mae"
    assert strengths.pop(("nor_explained", "nor-closest-literal")) == pytest.approx(5e-5 * 47, rel=1e-3)
    assert len(strengths) == 14
    assert all(value == pytest.approx(0.0384, rel=5e-3) for value in strengths.values()), strengths
    third, whole = (
        builds(Plan(Setting()).pretrain_job(row, 0).words[1:])[0] for row in TABLES["nor_explained"].rows[1::-1]
    )
    assert third.blr == pytest.approx(whole.blr / 3)


# ---- the command ----------------------------------------------------------------------------------------------------


VARIABLES = (
    *("DATA", "TRANSFER", "OUT", "NPROC", "ROWS", "SEEDS", "EPOCHS", "FINETUNE_EPOCHS", "MORE", "JOBS", "MINUTES"),
    *("SMOKE", "SET", "BILL", "PRICE", "TEACHER_BASE", "TEACHER_LARGE"),
)


class Pretended:
    """Mock of a program: its instances exit with the given codes, one after another, then with 0."""

    answers: list[int] = []
    started: list[list[str]] = []

    def __init__(self, words, said):
        self.started.append(words)
        self.answer = self.answers.pop(0) if self.answers else 0
        if self.answer == 0:
            done = Path(words[words.index("--output_dir") + 1]) / "result.json"
            done.parent.mkdir(parents=True)
            done.write_text("{}")

    def code(self):
        return self.answer

    def send(self, number):
        raise AssertionError("it has ended")


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Return a function that runs the tool with variables, and returns exit code and output.

    Programs that the tool starts are only recorded.
    """
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(table_jobs, "Process", Pretended)
    monkeypatch.setattr(tables, "report", lambda *what: None)

    def run(*words, codes=(), **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        Pretended.answers[:] = codes
        Pretended.started.clear()
        code = tables.main(list(words))
        return code, capsys.readouterr(), [" ".join(each) for each in Pretended.started]

    return run


def test_a_dry_run_prints_commands_to_paste_and_does_nothing(shell, tmp_path):
    out = tmp_path / "out"
    asked = {"ROWS": "noa-5e-5", "DATA": "/images", "NPROC": 2, "MORE": "--num_workers 9"}
    code, said, started = shell("9", "--dry-run", **asked)
    start = "torchrun --standalone --nproc_per_node 2"
    recipe, run = "noa_mae_vit_tiny_in100", "noa_mae_vit_tiny_in100-weight5e-5"
    assert (code, started) == (0, []) and not out.exists()
    assert said.out.splitlines() == [
        f"cd {PROJECT}",
        f"{start} main_pretrain.py -c configs/pretrain/{recipe}.yaml --terms.neighbor.weight 5e-5 --seed 0 "
        f"--data_path /images --output_dir {out}/pretrain/{run}/seed0 --num_workers 9",
        f"{start} main_finetune.py -c configs/finetune/nor_mae_tiny_in1k_released.yaml --model mae_vit_tiny_patch16 "
        f"--class_list imagenet100 --init_from {out}/pretrain/{run}/seed0/checkpoints/last.pth --seed 0 "
        f"--data_path /images --output_dir {out}/finetune/{run}/nor_mae_tiny_in1k_released/seed0 --num_workers 9",
    ]
    done = out / "pretrain" / run / "seed0" / "result.json"
    done.parent.mkdir(parents=True)
    done.touch()
    lines = shell("9", "--dry-run")[1].out.splitlines()
    assert lines[1].startswith("# finished: torchrun") and lines[2].startswith("torchrun")


def test_finished_jobs_are_skipped_and_an_interrupted_one_is_started_again(shell, tmp_path):
    asked = {"ROWS": "mae nor-mae", "DATA": tmp_path}
    code, said, first = shell("9", codes=[0, INTERRUPTED], **asked)
    assert code == INTERRUPTED and len(first) == 2 and "run the same command again to resume" in said.out
    code, _, second = shell("9")
    assert code == 0 and len(second) == 3 and second[0] == first[1]
    assert shell("9")[::2] == (0, [])


def test_smoke_tests_on_several_processes_start_them(shell):
    code, _, started = shell("9", SMOKE=1, NPROC=2, ROWS="mae")
    assert code == 0 and len(started) == 2 and all(words.startswith("torchrun") for words in started)


def test_a_failure_costs_what_needs_it_and_nothing_else(shell, tmp_path):
    code, said, started = shell("9", codes=[2], ROWS="mae nor-mae", DATA=tmp_path, SEEDS="0 1")
    assert code == 1 and len(started) == 7
    assert "skipped, because a job that it needs failed" in said.out and "2 of 8 jobs failed" in said.out


def test_what_is_missing_is_reported_before_any_work(shell, tmp_path):
    code, said, started = shell("9")
    assert (code, started) == (2, []) and "DATA must be the folder" in said.err
    code, said, started = shell("2", DATA=tmp_path, ROWS="vit-tiny-dmae-200")
    assert (code, started) == (2, []) and "TEACHER_BASE must be" in said.err and "vit-tiny-dmae-200" in said.err
    code, said, _ = shell("2", ROWS="vit-tiny-maes-200")
    assert code == 2 and "did you mean 'vit-tiny-mae-200'" in said.err
    code, said, _ = shell("12")
    assert code == 2 and "there is no table '12'" in said.err


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NPROC": "two"}, "NPROC is 'two'"),
        ({"NPROC": "0"}, "NPROC is '0'; it must be an integer of at least 1"),
        ({"JOBS": "0"}, "JOBS is '0'; it must be an integer of at least 1"),
        ({"MINUTES": "ten"}, "MINUTES is 'ten'; it is how long runs may take, a number of at least 0"),
        ({"MINUTES": "-3"}, "MINUTES is '-3'; it is how long runs may take, a number of at least 0"),
        ({"PRICE": "nan"}, "PRICE is 'nan'; it is what a device costs for an hour, a number of at least 0"),
        ({"SEEDS": "a"}, "SEEDS is 'a'"),
        ({"SMOKE": "yes"}, "SMOKE is 'yes'"),
        ({"PRICE": "cheap"}, "PRICE is 'cheap'"),
    ],
)
def test_variables_that_cannot_be(variables, words):
    with pytest.raises(ValueError, match=words):
        read_setting(variables)


def test_patterns_choose_rows():
    assert [row.name for row in chosen(TABLES["6"], ["75-*"])] == ["75-mae", "75-nor-mae"]
    assert len(chosen(TABLES["6"], [])) == 6


def test_every_table_has_a_thin_script_and_every_script_a_table():
    scripts = {path.stem: path.read_text() for path in (PROJECT / "scripts").glob("table*.sh")}
    assert scripts.keys() == {*(f"table{number}" for number in range(1, 12)), "table", "table_nor_explained"}
    scripts["small_data"] = (PROJECT / "scripts" / "small_data.sh").read_text()
    for name, text in scripts.items():
        assert os.access(PROJECT / "scripts" / f"{name}.sh", os.X_OK)
        if name[5:].isdecimal():
            assert re.search(r'table\.sh" (\d+) "\$@"', text)[1] == name.removeprefix("table")
            assert len(text.splitlines()) <= 4
    others = set(re.findall(r"table=(nor_\w+)", scripts["table_nor_explained"]))
    sets = re.search(r"    ([\w| ]+)\) table=\"small_data_", scripts["small_data"])[1].split(" | ")
    assert others | {f"small_data_{name}" for name in sets} == TABLES.keys() - COUNTS.keys()


# ---- jobs -----------------------------------------------------------------------------------------------------------


class Slow:
    """Mock of a program that runs for three polls, and exits as after a save when it receives a signal."""

    running: set[str] = set()
    most = 0

    def __init__(self, words, said):
        self.words, self.stderr, self.looks, self.told = words, said, 0, []
        Slow.running.add(words[1])
        Slow.most = max(Slow.most, len(Slow.running))

    def code(self):
        self.looks += 1
        if self.looks < 3 and not self.told:
            return None
        Slow.running.discard(self.words[1])
        if self.told:
            return INTERRUPTED
        Path(self.words[2]).touch()
        return 0

    def send(self, number):
        self.told.append(number)


def jobs_in(folder, *names, needs=None):
    """Return jobs with these names; `needs` are their dependencies."""
    after = {name: (folder / other,) for name, other in (needs or {}).items()}
    return [Job((name, str(folder / name)), folder / name, after.get(name, ())) for name in names]


def test_several_jobs_run_side_by_side_and_none_before_what_it_needs(tmp_path, capsys):
    Slow.most = 0
    jobs = jobs_in(tmp_path, "a", "b", "c", "d", needs={"b": "a", "d": "c"})
    assert table_jobs.run(jobs, tmp_path, start=Slow, at_once=3) == 0
    started = re.findall(r"^  python (\w)", capsys.readouterr().out, re.MULTILINE)
    assert Slow.most == 2 and started[:2] == ["a", "c"] and sorted(started) == ["a", "b", "c", "d"]


def test_when_the_time_is_up_what_runs_is_asked_to_save_and_nothing_new_begins(tmp_path, capsys):
    class Endless(Slow):
        def code(self):
            return INTERRUPTED if self.told == [signal.SIGTERM] else None

    jobs = jobs_in(tmp_path, "a", "b", "c")
    assert table_jobs.run(jobs, tmp_path, start=Endless, at_once=2, minutes=0.2 / 60) == INTERRUPTED
    said = capsys.readouterr().out
    assert "time limit reached" in said and "run the same command again to resume" in said and "python c" not in said
    assert table_jobs.run(jobs, tmp_path, start=Slow, minutes=1) == 0


def test_a_stop_is_passed_on_once(tmp_path):
    told = []

    class Stopped(Slow):
        def code(self):
            if not told:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            return INTERRUPTED if told else None

        def send(self, number):
            told.append(number)

    before = signal.getsignal(signal.SIGTERM)
    assert table_jobs.run(jobs_in(tmp_path, "a", "b"), tmp_path, start=Stopped) == INTERRUPTED
    assert told == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("kind", [table_jobs.Process, table_jobs.Fork])
def test_a_program_is_a_process_that_can_be_stopped_and_whose_output_is_kept(tmp_path, kind):
    (tmp_path / "good.py").write_text("import sys; sys.stderr.write(' '.join(sys.argv[1:])); sys.exit(3)")
    (tmp_path / "long.py").write_text("import time; time.sleep(100)")

    def end(name, *words, number=0):
        program = kind(["python", str(tmp_path / name), *words], tmp_path / "logs" / "output.txt")
        if number:
            program.send(number)
        deadline = time.monotonic() + 60
        while (code := program.code()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        program.send(signal.SIGTERM)  # no error if the program has exited
        return code

    assert end("good.py", "one", "two") == 3 and (tmp_path / "logs" / "output.txt").read_text() == "one two"
    assert end("long.py", number=signal.SIGTERM) == -signal.SIGTERM


def test_the_end_of_the_output_of_a_failed_job_is_shown(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("raise ValueError('no such thing')")
    jobs = [Job((str(tmp_path / "bad.py"),), tmp_path / "runs" / "seed0" / "result.json")]
    assert table_jobs.run(jobs, tmp_path, at_once=2) == 1
    said = capsys.readouterr().out
    assert "[1 of 1] runs/seed0: failed with exit code 1. The end of" in said and "ValueError: no such thing" in said


def test_all_rows_come_with_one_seed_before_any_with_two():
    jobs = Plan(Setting(seeds=(0, 1))).jobs(TABLES["6"].rows)
    assert [job.done.parent.name for job in jobs] == ["seed0"] * 12 + ["seed1"] * 12


# ---- small data -----------------------------------------------------------------------------------------------------


def test_what_torchvision_unpacked_is_read_as_that_and_a_folder_as_a_folder(tmp_path):
    (tmp_path / "unpacked" / "cifar-100-python").mkdir(parents=True)
    row = TABLES["small_data_cifar100"].rows[1]
    for folder, there in ((tmp_path / "unpacked", True), (tmp_path, False)):
        plan = Plan(Setting(data=str(folder)))
        for words in (plan.pretrain_job(row, 0).words, plan.finetune_job(row, ACCURACY, 0).words):
            assert ("torch/cifar100" in words) == there and str(folder) in words


def test_from_scratch_shares_the_pretraining_and_has_a_folder_of_its_own():
    scratch, pretrained = TABLES["small_data_cifar10"].rows[:2]
    plan = Plan(Setting(finetune_epochs=20))
    assert plan.pretraining(scratch) == plan.pretraining(pretrained)
    assert (
        plan.finetuning(scratch, ACCURACY).name == "small_data-from_scratchtrue-layer_decay1.0-epochs20-warmup_epochs1"
    )
    assert plan.finetuning(pretrained, ACCURACY).name == "small_data-epochs20-warmup_epochs1"
    words = plan.finetune_job(scratch, ACCURACY, 0).words
    assert words[words.index("--from_scratch") + 1] == "true" and words[words.index("--epochs") + 1] == "20"


@pytest.mark.parametrize(("classes", "parameters"), [(10, 3_583_306), (100, 3_600_676)])
def test_eight_blocks_stay_below_the_published_small_model(classes, parameters, monkeypatch):
    """3.65 M parameters and 0.27 GMAC, computed by a formula and by torch."""
    monkeypatch.chdir(PROJECT)
    recipe = f"configs/pretrain/mae_vit_tiny8_cifar{classes}.yaml"
    options = main_pretrain.parse_options(["-c", recipe])
    sizes = {name: getattr(options, name) for name in ("input_size", "embed_dim", "depth", "num_heads")}
    model = models_classifier.build(options.model, num_classes=classes, **sizes).eval()
    D, T, P = 192, 1 + 8 * 8, 48
    block = 2 * 2 * D + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * 4 * D + (4 * D + 1) * D  # norms, qkv, out, mlp
    by_hand = (P + 1) * D + D + T * D + 8 * block + 2 * D + (D + 1) * classes  # embedding, class token, positions, head
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand == parameters < 3.65e6
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    products = 12 * D * D * T + 2 * T * T * D  # a block's matrices, and attention of all pairs of tokens
    assert counter.get_total_flops() / 2 == (T - 1) * P * D + 8 * products + D * classes < 0.27e9


# ---- the report -----------------------------------------------------------------------------------------------------


def fabricate(folder, options, result, commit="0123456789abcdef-dirty"):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "options.yaml").write_text(yaml.safe_dump(to_dict(options)))
    (folder / "environment.json").write_text(json.dumps([{"commit": commit, "host": "secret"}]))
    (folder / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0000001}\n{"epoch": 1, "train_loss": 0.5}\n')
    (folder / "result.json").write_text(json.dumps(result))
    state = {
        "format": checkpoint.FORMAT,
        "data": "fedcba9876543210",
        "options": to_dict(options),
        "epoch": 2,
        "step": 4,
    }
    checkpoint.save(folder / "checkpoints" / "last.pth", state | {"model": {"weight": torch.tensor([1 / 3])}})


def test_a_report_of_two_seeds(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(PROJECT)
    plan, row = Plan(Setting(out=tmp_path)), row_of("3", "vit-tiny-nor-mae")
    for seed, best, last in ((0, 77.0, 76.0), (1, 79.0, 78.0)):
        steps = {"steps": 12_200, "images_seen": 24_985_600}
        job = plan.pretrain_job(row, seed)
        fabricate(job.done.parent, main_pretrain.parse_options(job.words[1:]), steps)
        job = plan.finetune_job(row, ACCURACY, seed)
        words = [weights if word.endswith("last.pth") else word for word in job.words[1:]]
        accuracy = {"best": {"acc1": best, "mean_class_acc": 1.0}, "last": {"acc1": last}}
        result = steps | {"accuracy": accuracy, "metric": "acc1", "best_chosen_on": "the test images"}
        fabricate(job.done.parent, main_finetune.parse_options(words), result)
    half = plan.pretrain_job(row_of("3", "vit-small-nor-mae"), 0).done.parent
    half.mkdir(parents=True)
    (half / "options.yaml").touch()
    tables.report(TABLES["3"], plan.setting)
    text = (tmp_path / "reports" / "table_3.md").read_text()
    assert "| ViT-Tiny | NoR-MAE | 78.26 | 78.00 ± 1.41 (2 seeds) | -0.26 |" in text
    assert "| ViT-Tiny | MAE | 71.04 | not run |  |" in text
    assert "| ViT-Small | PeCo | 83.60 | not run |  |" in text
    assert "| ViT-Small | NoR-MAE | 84.28 | not finished |  |" in text
    facts = [cell.strip() for cell in text.splitlines()[-3].split("|")]
    assert facts[3:10] == ["77.00", "0.0384 (weight x (P-1))", "200", "12,200", "24,985,600", "2,048", "fedcba987654"]
    assert facts[10] == "0123456789-dirty" and "the test images" in facts
    assert (tmp_path / "reports" / "table_3.png").stat().st_size > 10_000

    tables.report(TABLES["3"], plan.setting, tmp_path / "brought", models=True)
    brought = {path.name for path in (tmp_path / "brought").iterdir()}
    assert brought == {"table_3.json", "table_3.md", "table_3.png", "vit-tiny-nor-mae.pth"}
    text = (tmp_path / "brought" / "table_3.json").read_text()
    ours = json.loads(text)["rows"][3]
    assert (
        ours["row"] == ["ViT-Tiny", "NoR-MAE"]
        and ours["published"] == 78.26
        and list(ours["seeds"]) == ["seed0", "seed1"]
    )
    first = ours["seeds"]["seed0"]
    assert first["pretraining"]["curve"] == {"epoch": [0, 1], "train_loss": [1.0, 0.5]}
    assert first["finetuning"]["result"]["accuracy"]["best"]["acc1"] == 77.0
    assert first["pretraining"]["options"]["method"] == "nor_mae" and first["pretraining"]["data"] == "fedcba987654"
    assert str(tmp_path) not in text and "secret" not in text
    weights, options = checkpoint.load_model(tmp_path / "brought" / "vit-tiny-nor-mae.pth")
    assert weights["weight"].dtype == torch.float16 and options["method"] == "nor_mae"


def test_a_start_from_scratch_says_nothing_of_a_pretraining_that_it_did_not_take(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(PROJECT)
    table = TABLES["small_data_cpu"]
    plan, row = Plan(Setting(out=tmp_path)), table.rows[0]
    words = [weights if word.endswith("last.pth") else word for word in plan.finetune_job(row, ACCURACY, 0).words[1:]]
    accuracy = {"last": {"acc1": 30.0}}
    result = {"steps": 390, "images_seen": 49_920, "accuracy": accuracy, "metric": "acc1", "best_chosen_on": "nothing"}
    fabricate(plan.finetuning(row, ACCURACY) / "seed0", main_finetune.parse_options(words), result)
    tables.report(table, plan.setting, tmp_path / "brought", models=True)
    text = (tmp_path / "reports" / "table_small_data_cpu.md").read_text()
    assert text.startswith("# Small data on a CPU core") and "| Start | published | ours | difference |" in text
    assert (
        "| from scratch | - | 30.00 (1 seed) |  |" in text
        and "| fine-tuning updates |" in text
        and "| updates |" not in text
    )
    (first, *others) = json.loads((tmp_path / "brought" / "table_small_data_cpu.json").read_text())["rows"]
    assert list(first["seeds"]["seed0"]) == ["finetuning"] and others[0]["state"] == "not run"
    assert not list((tmp_path / "brought").glob("*.pth"))


def test_a_report_of_costs(tmp_path):
    plan = Plan(Setting(out=tmp_path))
    path = plan.bill(row_of("11", "mae"))
    assert path == plan.bill(row_of("10", "vit-tiny-mae"))
    path.parent.mkdir()
    bill = {"nor+compile": {"mb_per_image": 25.0, "minutes": 9.5, "price": 1.25}}
    asked = {"devices": 2, "images": 1_281_167}
    machine, setting = {"device": "H100", "commit": "0123456"}, {"batch_size": 512, "amp": "bf16"}
    path.write_text(json.dumps({"bill": bill, "asked": asked, "machine": machine, "setting": setting}))
    tables.report(TABLES["11"], plan.setting)
    text = (tmp_path / "reports" / "table_11.md").read_text()
    assert "| NoR-MAE | GB | 108.00 | 102.40 | -5.60 |" in text
    assert "| NoR-MAE | GB | 2 x H100 | 512 | bf16 | 1,281,167 | 0123456 |" in text
    assert "| NoR-MAE | minutes | 27.17 | 9.50 | -17.67 |" in text
    assert "| MAE | GB | 102.00 | not run |  |" in text


@pytest.mark.parametrize("change", [{"bill": "--device cpu"}, {"price": 2.5}, {"nproc": 8}])
def test_costs_are_measured_again_for_other_settings(change):
    row = row_of("11", "mae")
    assert Plan(dataclasses.replace(Setting(), **change)).bill(row) != Plan(Setting()).bill(row)


def test_a_picture_has_a_panel_for_each_unit():
    costs = [table_report.Bill(Path("bill.json"), "mae", measure) for measure in ("GB", "minutes")]
    lines = [
        table_report.Line(("MAE", "GB"), 102.0, place=costs[0]),
        table_report.Line(("MAE", "minutes"), 35.0, values=[9.0], place=costs[1]),
        table_report.Line(("MAE", "accuracy"), 66.6, values=[60.0, 62.0]),
        table_report.Line(("MAE, again", "GB"), None, values=[90.0], place=costs[0]),
    ]
    figure = table_report.picture("Costs", lines, "paper")
    assert [axis.get_xlabel() for axis in figure.axes] == ["GB", "minutes", "%"]
    names = [[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes]
    assert names == [["MAE, GB", "MAE, again, GB"], ["MAE, minutes"], ["MAE, accuracy"]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["paper", "ours"]


# ---- smoke ----------------------------------------------------------------------------------------------------------


def test_smoke_data_opens_as_what_it_stands_for(tmp_path, monkeypatch):
    """All data sets of Table 4 in their original layouts; the arguments before a program disable hash checks."""
    for known, names in ((CIFAR10, CIFAR), (CIFAR100, CIFAR), (Flowers102, ["_file_dict"])):
        for name in names:
            monkeypatch.setattr(known, name, getattr(known, name))  # restored afterwards
    sets = TABLES["4"].rows[0].sets.values()
    smoke_data.write(tmp_path, sets)
    assert set(smoke_data.LAYOUTS) == set(sets)
    for name in smoke_data.KNOWN_BY_HASH:
        with pytest.raises(ValueError, match="cannot be opened"):
            open_source(name, str(tmp_path / smoke_data.data_folder(name)))
    smoke_data.forget_hashes()
    for name in ["", *sets]:
        if name == tables.SEGMENTED:
            continue
        for split, least in (("train", 30), ("val", 10)):
            source = open_source(name or "folder", str(tmp_path / smoke_data.data_folder(name)), split)
            assert len(source) >= least and source.read(0).shape[2] == 3
            assert set(source.labels) == set(range(10))


def test_ade20k_in_smoke_form_has_its_layout_and_numbers(tmp_path):
    smoke_data.write(tmp_path, [tables.SEGMENTED])
    options = SegmentOptions(dataset="ade20k", data_path=str(tmp_path / "ade20k"), holdout=0.0)
    found = masks.open_splits(options, Processes(0, 1, 0, torch.device("cpu")))
    assert (len(found.train), len(found.test), found.classes) == (40, 20, 150)
    pair = found.train.read(39)
    assert pair.image_HWC.shape == (64, 64, 3) and set(np.unique(pair.mask_HW)) == {masks.IGNORE, 0, 10}


CIFAR = ["train_list", "test_list", "meta"]


def smoke(table, out, *codes, **variables):
    """Run a table's script as a smoke test and return its output. `codes` are the accepted exit codes, by default 0."""
    script, extra = f"table{table}", {}
    if not table.isdecimal():
        script = "small_data" if table.startswith("small_data") else "table_nor_explained"
        extra = {"SET": table.rpartition("_")[2].replace("in100", "imagenet100").replace("explained", "cifar10")}
    given = variables | {"SMOKE": "1", "OUT": str(out), "NOR_MAE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        ["bash", str(PROJECT / "scripts" / f"{script}.sh")], env=kept | given | extra, capture_output=True, text=True
    )
    assert done.returncode in (codes or [0]), done.stdout + done.stderr
    return done.stdout


def assert_reported(table, out):
    """Assert that each row has our result with its details, or the reason why not; and that there is a plot."""
    text = (out / "smoke" / "reports" / f"table_{table}.md").read_text()
    missing = [line for line in text.splitlines() if "| not " in line]
    assert not missing or (table == "10" and all("| accuracy |" in line for line in missing)), "Table 2's are not run"
    measures = sum(len(row.paper) for row in TABLES[table].rows)
    numbers = text.split("## Runs")[0]
    assert numbers.count("\n| ") == measures + 2
    assert (out / "smoke" / "reports" / f"table_{table}.png").stat().st_size > 5_000
    return text


def test_what_the_neighbour_term_does_in_smoke_form(tmp_path, monkeypatch, capsys):
    """Interrupt the jobs (on a very fast machine they may finish before), resume them; then no job is left."""
    cut = smoke("nor_explained", tmp_path, 0, INTERRUPTED, MINUTES="0.25")
    assert "time limit reached" in cut or "[20 of 20]" in cut
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SMOKE": "1", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert tables.main(["nor_explained"]) == 0
    text = assert_reported("nor_explained", tmp_path)
    assert len(re.findall(r"\| - \| \d+\.\d\d \(1 seed\) \|", text)) == 10
    assert text.count("0.0384 (weight x (P-1))") >= 4 and "0.00235 (weight x (P-1))" in text
    capsys.readouterr()
    assert tables.main(["nor_explained", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("# finished: python main_") == 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return one folder for all tables: shared runs are trained once."""
    return tmp_path_factory.mktemp("tables")


@pytest.mark.slow
@pytest.mark.parametrize("table", [table for table in TABLES if table != "nor_explained"])
def test_a_table_in_smoke_form(shared, table):
    smoke(table, shared)
    assert_reported(table, shared)
