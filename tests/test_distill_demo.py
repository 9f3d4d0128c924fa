"""The distillation demo: its commands, and the table of its results."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
import main_pretrain
from benchmarks import distill
from tests.small import teacher_checkpoint

PROJECT = Path(__file__).resolve().parent.parent
PARSERS = {
    "main_pretrain.py": main_pretrain.parse_options,
    "main_finetune.py": main_finetune.parse_options,
    "main_linprobe.py": main_linprobe.parse_options,
}
RECORDER = """#!/bin/sh
exec {python} {recorder} "$@"
"""
RECORD = """
import json, os, pathlib, sys
words = sys.argv[1:]
if words[0] == "-c":
    exec(words[1])
    sys.exit()
with open({log!r}, "a") as file:
    file.write(json.dumps(words) + chr(10))
if words[0].startswith("main_"):
    folder = pathlib.Path(words[words.index("--output_dir") + 1])
    folder.mkdir(parents=True)
    number = len(open({log!r}).readlines())
    result = {{"steps": 7, "knn_acc1": number, "accuracy": {{"last": {{"acc1": number + 0.5}}}}}}
    (folder / "result.json").write_text(json.dumps(result))
else:
    sys.path.insert(0, os.getcwd())
    from benchmarks import distill
    sys.argv = words[1:]
    distill.main()
"""


def write_result(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"steps": 30} | values))


def write_encoder(folder, knn, linear, tuned):
    write_result(folder)
    write_result(folder / "probe", knn_acc1=knn, accuracy={"last": {"acc1": linear}, "best": {"acc1": 99.0}})
    write_result(folder / "finetuned", accuracy={"last": {"acc1": tuned}, "best": {"acc1": 99.0}})


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path, monkeypatch, capsys):
    numbers = {"alone0": (30, 40, 50), "alone1": (32, 41, 53), "alone2": (31, 45, 47), "taught0": (33, 44, 60)}
    write_encoder(tmp_path / "teacher", 50.25, 60.0, 70.0)
    for name, values in numbers.items():
        write_encoder(tmp_path / name, *values)
    write_result(tmp_path / "taught1")  # not finished
    monkeypatch.setattr(sys, "argv", ["distill", str(tmp_path)])
    distill.main()
    found = json.loads((tmp_path / "distill.json").read_text())
    assert found["students"]["alone"]["1"] == {"knn": 32, "linear": 41, "finetuned": 53, "updates": 30}
    assert list(found["students"]["taught"]) == ["0"] and found["machine"]["cores"] == os.cpu_count()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    spread = [
        f"{sum(values) / 3:.1f} ± {statistics.stdev(values):.1f}"
        for values in zip(*(numbers[f"alone{seed}"] for seed in range(3)), strict=True)
    ]
    assert ["student without teacher", *spread] in rows
    assert ["student with teacher", "33.0", "44.0", "60.0"] in rows
    assert any(row[0] == "teacher" and row[2:] == ["60.0", "70.0"] for row in rows)


def test_the_commands_are_accepted_and_students_differ_by_the_teacher_alone(tmp_path):
    """Python is replaced by a script that records each command and writes a fake result."""
    log, python = tmp_path / "log", tmp_path / "python"
    (tmp_path / "recorder.py").write_text(RECORD.format(log=str(log)))
    python.write_text(RECORDER.format(python=sys.executable, recorder=tmp_path / "recorder.py"))
    python.chmod(0o755)
    (tmp_path / "images").mkdir()
    variables = {"DATA": str(tmp_path / "images"), "OUTPUT": str(tmp_path / "out"), "SEEDS": "4 5", "EPOCHS": "20"}
    done = subprocess.run(
        ["bash", "scripts/distill_demo.sh"], cwd=PROJECT, env=os.environ | variables | {"NOR_MAE_PYTHON": str(python)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    assert [words[0] for words in commands] == ["main_pretrain.py", "main_finetune.py", "main_linprobe.py"] + 4 * [
        *("main_pretrain.py", "main_linprobe.py", "main_finetune.py")
    ] + ["-m"]
    teacher = tmp_path / "out" / "teacher" / "finetuned" / "checkpoints" / "last.pth"
    options = {}
    for words in commands[:-1]:
        words = [teacher_checkpoint() if word.endswith(".pth") and "--init_from" in words else word for word in words]
        parsed = PARSERS[words[0]](words[1:])
        options[parsed.output_dir] = parsed
    out = tmp_path / "out"
    for seed in (4, 5):
        alone, taught = (vars(options[str(out / f"{kind}{seed}")]) for kind in ("alone", "taught"))
        different = {name for name in alone if alone[name] != taught[name]}
        assert different == {"method", "terms", "output_dir"}
        assert alone["seed"] == seed and alone["warmup_epochs"] == 2 and alone["epochs"] == 20
        assert taught["terms"]["teacher"]["checkpoint"] == str(teacher)
        for part in ("probe", "finetuned"):
            assert vars(options[str(out / f"alone{seed}" / part)])["seed"] == seed
    found = json.loads((out / "distill.json").read_text())
    assert list(found["students"]) == ["alone", "taught"] and list(found["students"]["taught"]) == ["4", "5"]
    assert "student with teacher" in done.stdout


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    from torchvision.io import write_png

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 200), ("val", 10)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
                write_png(pixels // (1 + label), str(folder / f"{number}.png"))
    variables = {
        "DATA": str(tmp_path / "images"), "OUTPUT": str(tmp_path / "out"), "NOR_MAE_PYTHON": sys.executable,
        "SEEDS": "0", "EPOCHS": "2", "TEACHER_EPOCHS": "2", "FINETUNE_EPOCHS": "2",
    }  # fmt: skip
    script = ["bash", "scripts/distill_demo.sh"]
    done = subprocess.run(script, cwd=PROJECT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert {*found["students"]} == {"alone", "taught"}
    assert found["students"]["alone"]["0"]["updates"] == found["students"]["taught"]["0"]["updates"] > 0
