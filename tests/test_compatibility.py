"""Checkpoints of earlier versions are resumed to the same weights and opened by tools. See tests/fixtures/make.py."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import methods
import programs
from tests.runs import Training, final, metrics
from tools import encoder
from util import checkpoint

PROJECT = Path(__file__).resolve().parent.parent
FIXTURES = PROJECT / "tests/fixtures"
RUNS = yaml.safe_load((FIXTURES / "runs.yaml").read_text())
PROGRAMS = {
    "main_pretrain": "pretrain",
    "main_finetune": "finetune",
    "main_linprobe": "probe",
    "main_segment": "segment",
}
PRETRAINED = [name for name, run in RUNS.items() if run["script"] == "main_pretrain"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_earlier_version_resumes_to_the_weights_that_it_would_have_reached(tmp_path, name):
    """Up to rounding, which differs between processors.

    Biases are not compared: those before a batch norm, and those of attention's keys, have no gradient but rounding,
    which Adam enlarges.
    """
    run, folder = RUNS[name], tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(FIXTURES / f"{name}.pth", folder / "checkpoints/last.pth")
    training = Training(folder, *run["options"].split(), script=run["script"], tiny=False)
    assert training.wait() == 0, training.stderr
    assert metrics(folder)[0]["step"] == run["stop_after"] + 1
    assert final(folder)["program"] == PROGRAMS[run["script"]]
    resumed, expected = final(folder)["model"], torch.load(FIXTURES / f"{name}_end.pth", weights_only=True)
    assert resumed.keys() == expected["model"].keys()
    before = torch.load(FIXTURES / f"{name}.pth", weights_only=True)["model"]
    for key, value in expected["model"].items():
        change = (value.double() - before[key].double()).norm()
        if not key.endswith("bias"):
            assert (resumed[key].double() - value.double()).norm() <= 0.01 * change, key


@pytest.mark.parametrize("name", RUNS)
def test_the_program_of_a_checkpoint_without_a_name_is_recognised_and_its_options_read(name):
    state = torch.load(FIXTURES / f"{name}.pth", weights_only=True)
    program = checkpoint.find_program(state)
    assert "program" not in state and program == PROGRAMS[RUNS[name]["script"]]
    assert checkpoint.program_at(FIXTURES / f"{name}.pth") == program
    assert checkpoint.program_at(FIXTURES / f"{name}_end.pth") == "", "weights alone"
    options = programs.read_options(program, state["options"])
    assert options.PROGRAM == program and options.total_batch_size == state["options"]["total_batch_size"]


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_pretrained_model_of_an_earlier_version_loads(name):
    path = FIXTURES / f"{name}.pth"
    model, options = methods.from_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert options["method"] == name and not model.training
    assert all(torch.equal(value, stored["model"][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*PRETRAINED, "finetune"])
def test_an_encoder_of_an_earlier_version_loads(name):
    found = encoder.load(FIXTURES / f"{name}.pth")
    assert found.heads == 2 and found.updates == RUNS[name]["stop_after"]
    assert found.classes == (10 if name == "finetune" else 0)
