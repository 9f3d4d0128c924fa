"""Tests that need a GPU: `bash scripts/test.sh -m gpu`."""

import pytest
import torch

from tests.runs import Training, final, finish, losses, metrics

pytestmark = pytest.mark.gpu
ON_GPU = ["--device", "cuda", "--epochs", "2"]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu") / "run"
    finish(folder, "--epochs", "2")
    return folder


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (["--amp", "none"], 1e-3),
        (["--amp", "bf16"], 2e-2),
        (["--amp", "fp16"], 2e-2),
        (["--amp", "none", "--compile"], 1e-3),
    ],
    ids=["fp32", "bf16", "fp16", "compiled"],
)
@pytest.mark.parametrize("method", ["mae", "nor_mae"])
def test_losses_are_the_cpus(on_cpu, tmp_path, method, words, tolerance):
    reference = on_cpu
    if method == "mae":
        reference = tmp_path / "reference"
        finish(reference, "--epochs", "2", "--method", "mae")
    finish(tmp_path / "run", "--method", method, *ON_GPU, *words)
    for step, loss in losses(reference).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=tolerance), step


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_killed_run_resumes_with_the_same_losses(tmp_path, amp):
    words = [*ON_GPU, "--amp", amp, "--save_steps", "1"]
    finish(tmp_path / "whole", *words)
    Training(tmp_path / "run", *words).kill_at(4)
    finish(tmp_path / "run", *words)
    assert final(tmp_path / "run")["scaler"] == final(tmp_path / "whole")["scaler"]
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, rel=1e-4), step


def test_fp16_overflow_backs_off_and_training_continues(tmp_path):
    finish(tmp_path / "run", *ON_GPU, "--amp", "fp16", "--terms.neighbor.weight", "3e4", "--max_bad_steps", "100")
    saved = final(tmp_path / "run")
    assert saved["scaler"]["scale"] < 65536
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert metrics(tmp_path / "run")[-1]["bad_steps"] < 10
