"""The paper's tables: every row parses and makes its model, commands are as said, reports add up."""

import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

import main_finetune
import main_pretrain
import methods
from tools import smoke_data, table_report, tables
from tools.tables import ACCURACY, INTERRUPTED, PROJECT, Plan, Setting, chosen, read_tables, setting_of
from util import checkpoint
from util.options import to_dict
from util.sources import open_source

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
    """Table 9 has NoA twice, because the paper does not say its weight."""
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of another project: nothing is inherited from it."""
    path = tmp_path_factory.mktemp("weights") / "theirs.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}}, path)
    return str(path)


@functools.cache
def builds(words):
    """Parse a pretraining command as the program does, and make its model without numbers."""
    options = main_pretrain.parse_options(words)
    terms = dict(options.terms)
    if "teacher" in terms:
        terms["teacher"] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}  # of a teacher that is not here
    with torch.device("meta"):
        return options, methods.from_options(to_dict(dataclasses.replace(options, terms=terms)))


CASES = [(number, kind) for number in TABLES for kind in SETTINGS if kind != "short" or number == "7"]


@pytest.mark.parametrize(("number", "kind"), CASES)
def test_every_command_parses_and_its_model_is_made(number, kind, weights, monkeypatch):
    monkeypatch.chdir(PROJECT)
    setting = SETTINGS[kind]
    for job in Plan(setting).jobs(TABLES[number].rows):
        script, *words = job.words
        assert len(option_names(words)) == len(set(option_names(words))), "nothing is said twice"
        if script == "main_pretrain.py":
            options, model = builds(tuple(words))
            assert set(model.terms) == set(options.terms)
            assert (options.epochs == 10) == (setting.epochs == 10)
            assert not setting.smoke or (options.input_size == (64, 64) and model.embed_dim == 24)
        elif script == "main_finetune.py":
            at = words.index("--init_from") + 1
            pretrained, words[at] = words[at], weights
            assert Path(pretrained).parent.parent / "result.json" in job.after
            options = main_finetune.parse_options(words)
            assert options.data_path and options.model.startswith("mae_vit_")
        else:
            assert script == "benchmarks/bill.py"


def test_rows_that_tables_share_are_trained_once_and_others_are_not_mixed_up():
    plan = Plan(Setting())
    folders = {}
    for table in TABLES.values():
        for job in plan.jobs(table.rows):
            assert folders.setdefault(job.done, job.words) == job.words
    assert plan.pretraining(row_of("3", "vit-tiny-mae")) == plan.pretraining(row_of("9", "mae"))
    assert plan.pretraining(row_of("7", "1600-mae")).name == "mae_vit_tiny_in100-epochs1600"


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


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Runs the tool with variables; answers exit code and what was said. Programs that it starts are only noted."""
    for name in ("DATA", "TRANSFER", "OUT", "NPROC", "ROWS", "SEEDS", "EPOCHS", "SMOKE", "MORE", "BILL", "PRICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    started, answers = [], []

    def pretend(words):
        started.append(words)
        code = answers.pop(0) if answers else 0
        if code == 0:
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{}")
        return code, False

    monkeypatch.setattr(tables, "carry_out", pretend)
    monkeypatch.setattr(tables, "report", lambda table, setting: None)

    def run(*words, codes=(), **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        answers[:] = codes
        started.clear()
        code = tables.main(list(words))
        return code, capsys.readouterr(), [" ".join(each) for each in started]

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
    assert code == INTERRUPTED and len(first) == 2 and "the same command goes on from here" in said.out
    code, _, second = shell("9")
    assert code == 0 and len(second) == 3 and second[0] == first[1]
    assert shell("9")[::2] == (0, [])


def test_a_failure_costs_what_needs_it_and_nothing_else(shell, tmp_path):
    code, said, started = shell("9", codes=[2], ROWS="mae nor-mae", DATA=tmp_path, SEEDS="0 1")
    assert code == 1 and len(started) == 7
    assert "left out, because what it needs failed" in said.out and "2 of 8 jobs failed" in said.out


def test_what_is_missing_is_said_before_any_work(shell, tmp_path):
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
        ({"NPROC": "0"}, "NPROC is 0"),
        ({"SEEDS": "a"}, "SEEDS is 'a'"),
        ({"SMOKE": "yes"}, "SMOKE is 'yes'"),
        ({"PRICE": "cheap"}, "PRICE is 'cheap'"),
    ],
)
def test_variables_that_cannot_be(variables, words):
    with pytest.raises(ValueError, match=words):
        setting_of(variables)


def test_patterns_choose_rows():
    assert [row.name for row in chosen(TABLES["6"], ["75-*"])] == ["75-mae", "75-nor-mae"]
    assert len(chosen(TABLES["6"], [])) == 6


def test_every_table_has_a_thin_script_and_every_script_a_table():
    scripts = {path.stem: path.read_text() for path in (PROJECT / "scripts").glob("table*.sh")}
    assert scripts.keys() == {*(f"table{number}" for number in range(1, 12)), "table", "table_nor_explained"}
    for name, text in scripts.items():
        assert os.access(PROJECT / "scripts" / f"{name}.sh", os.X_OK)
        if name not in ("table", "table_nor_explained"):
            assert re.search(r'table\.sh" (\d+) "\$@"', text)[1] == name.removeprefix("table")
            assert len(text.splitlines()) <= 4
    assert set(re.findall(r"table=(\w+)", scripts["table_nor_explained"])) == TABLES.keys() - COUNTS.keys()


# ---- the report -----------------------------------------------------------------------------------------------------


def fabricate(folder, options, result, commit="0123456789abcdef-dirty"):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "options.yaml").write_text(yaml.safe_dump(to_dict(options)))
    (folder / "environment.json").write_text(json.dumps([{"commit": commit}]))
    (folder / "result.json").write_text(json.dumps(result))
    checkpoint.save(folder / "checkpoints" / "last.pth", {"format": checkpoint.FORMAT, "data": "fedcba9876543210"})


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
    assert "| ViT-Small | PeCo | 83.60 | cited: PeCo is not built yet |  |" in text
    assert "| ViT-Small | NoR-MAE | 84.28 | not finished |  |" in text
    facts = [cell.strip() for cell in text.splitlines()[-3].split("|")]
    assert facts[3:10] == ["77.00", "0.0384 (weight x (P-1))", "200", "12,200", "24,985,600", "2,048", "fedcba987654"]
    assert facts[10] == "0123456789-dirty" and "the test images" in facts
    assert (tmp_path / "reports" / "table_3.png").stat().st_size > 10_000


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


# ---- smoke ----------------------------------------------------------------------------------------------------------


def test_smoke_data_opens_as_what_it_stands_for(tmp_path):
    sets = sorted(set(TABLES["4"].rows[0].sets.values()))
    smoke_data.write(tmp_path, sets)
    for name in ["", *sets]:
        dataset = name if name in smoke_data.LAYOUTS else "folder"
        for split, least in (("train", 30), ("val", 10)):
            source = open_source(dataset, str(tmp_path / smoke_data.folder_of(name)), split)
            assert len(source) >= least and source.read(0).shape[2] == 3 and len(source.classes) == 10
    assert set(smoke_data.LAYOUTS) < set(sets)


@pytest.mark.slow
def test_a_row_in_smoke_form_and_again(tmp_path):
    variables = os.environ | {"OUT": str(tmp_path), "SMOKE": "1", "ROWS": "nor-diagonal", "OMP_NUM_THREADS": "1"}
    command = shlex.split("bash scripts/table_nor_explained.sh")

    def run():
        return subprocess.run(command, cwd=PROJECT, env=variables, capture_output=True, text=True, check=True).stdout

    assert "finished before" not in run()
    assert run().count("finished before") == 2
    text = (tmp_path / "smoke" / "reports" / "table_nor_explained.md").read_text()
    assert re.search(r"\| NoR diagonal \| - \| \d+\.\d\d \(1 seed\) \|", text) and "0.0384 (weight x (P-1))" in text
