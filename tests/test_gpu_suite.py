"""The GPU suite: its report before it starts, and a complete run with tiny models on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from tools.tables import PROJECT


def suite(*words, folder=PROJECT, **variables):
    """Run scripts/gpu_suite.sh in a folder; return the exit code and the output."""
    environment = os.environ | {"NOR_MAE_PYTHON": sys.executable, "SMOKE": "0", "DATA": ""} | variables
    ended = subprocess.run(
        ["bash", PROJECT / "scripts/gpu_suite.sh", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_missing_is_listed_before_work():
    code, output = suite("study")
    assert code != 0 and "GPU: none" in output and 'no images in ""; study and small need CIFAR-10' in output
    code, output = suite("speeds")
    assert code == 2 and "Name a part: check, tests, speed, study, small or all, found 'speeds'." in output


def test_paths_are_relative_to_the_folder_of_the_command(tmp_path):
    (tmp_path / "given" / "train").mkdir(parents=True)
    _, output = suite("check", folder=tmp_path, DATA="given", IMAGES="photos")
    assert f"DATA: {tmp_path}/given\nIMAGES: {tmp_path}/photos\n" in output


@pytest.fixture
def recorder(tmp_path):
    """Create a program in place of Python that prints its arguments and OUT."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "$@" "OUT=$OUT"\n')
    path.chmod(0o755)
    return str(path)


def test_results_and_runs_are_relative_to_the_folder_of_the_command(tmp_path, recorder):
    given = {"SMOKE": "1", "RESULTS": "numbers", "OUT": "runs", "NOR_MAE_PYTHON": recorder}
    code, output = suite("speed", folder=tmp_path, **given)
    places = [line.split("--output ")[1] for line in output.splitlines() if "--output" in line]
    names = [f"{name}_smoke_tiny.json" for name in ("step", "memory", "bill", "roofline")]
    assert code == 0 and places == [f"{tmp_path}/numbers/{name} OUT={tmp_path}/runs" for name in names]
    assert (tmp_path / "numbers").is_dir() and not (PROJECT / "numbers").exists()


@pytest.mark.parametrize("minutes", ["0.5", "x", "-1", "0", "09"])
@pytest.mark.parametrize("part", ["check", "speed"])
def test_minutes_that_are_no_whole_number_are_refused(part, minutes, recorder):
    code, output = suite(part, MINUTES=minutes, SMOKE="1", NOR_MAE_PYTHON=recorder)
    wanted = f"MINUTES is '{minutes}': give a whole number of at least 1, such as MINUTES=9.\n"
    assert (code, output) == (2, wanted)


@pytest.mark.slow
def test_every_part_runs_in_smoke_form(tmp_path):
    code, output = suite("all", SMOKE="1", RESULTS=str(tmp_path / "results"), OUT=str(tmp_path / "out"))
    assert code == 0 and "not measured" not in output and "exit code" not in output, output[-3000:]
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert {f"{name}_smoke_tiny.json" for name in ("step", "memory", "bill", "roofline")} < found
    assert {"nor_explained", "small_data"} < found
    code, output = suite("speed", SMOKE="1", RESULTS=str(tmp_path / "results"), OUT=str(tmp_path / "out"))
    assert code == 0 and output.count("already measured") == 4
