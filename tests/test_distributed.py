"""Runs with several processes: the same losses and weights up to rounding, one writer, a common decision to stop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runs import TINY, Training, assert_same_end, final, finish, losses, metrics, start_ranks
from util.distributed import Agreement, Processes, StopRequest, pick_device, start, world_size

PROJECT = Path(__file__).resolve().parent.parent


def finish_ranks(count, folder, *words, **more):
    ranks = start_ranks(count, folder, *words, **more)
    codes = [rank.wait() for rank in ranks]
    assert codes == [0] * count, "\n".join(rank.stderr for rank in ranks)
    return ranks


def assert_equal_to_rounding(one, other, rel=2e-5, without_gradient=()):
    """Assert equal losses and weights, except weights whose gradient is only rounding errors, which Adam amplifies."""
    first, second = losses(one), losses(other)
    assert first.keys() == second.keys()
    for step, loss in first.items():
        assert second[step] == pytest.approx(loss, rel=rel), step
    weights = final(other)["model"]
    for name, value in final(one)["model"].items():
        if name in without_gradient:
            continue
        theirs = weights[name]
        if name.endswith("qkv.bias"):  # the keys' gradient is only rounding errors
            query, _, values = value.chunk(3)
            value, theirs = torch.cat([query, values]), torch.cat([theirs.chunk(3)[0], theirs.chunk(3)[2]])
        torch.testing.assert_close(theirs, value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "mae"],
        ["--method", "nor_mae"],
        ["--method", "nor_mae", "--terms.neighbor.normalize", "feature", "--terms.neighbor.weight", "1e-2"],
        ["--method", "nor_mae", "--terms.neighbor.relation", "off_diagonal_squared", "--terms.neighbor.weight", "1e-2"],
        ["--method", "random_asymmetry_mae", "--batch_size", "64"],
    ],
    ids=["mae", "nor_mae", "feature", "squared", "accumulated"],
)
def test_two_processes_equal_one(tmp_path, words):
    finish(tmp_path / "one", *words, "--epochs", 1)
    ranks = finish_ranks(2, tmp_path / "two", *words, "--epochs", 1)
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")
    assert "epoch 1/" in ranks[0].stderr and "epoch" not in ranks[1].stderr, "one process speaks"
    assert len(metrics(tmp_path / "two")) == 5, "and one writes"


@pytest.mark.slow
def test_two_compiled_processes_have_the_losses_of_two_plain_ones(tmp_path):
    for name, words in (("plain", []), ("compiled", ["--compile"])):
        finish_ranks(2, tmp_path / name, "--depth", 1, "--epochs", 1, *words)
    assert_equal_to_rounding(tmp_path / "plain", tmp_path / "compiled", rel=1e-4)


def test_another_number_of_processes_resumes_with_the_same_images(tmp_path):
    finish(tmp_path / "one")
    words = ["--save_steps", "3"]
    ranks = start_ranks(2, tmp_path / "changed", *words)
    ranks[0].wait_for_step(7)
    for rank in ranks:
        rank.send(signal.SIGKILL)
        rank.wait()
    said = finish(tmp_path / "changed", *words)
    assert "with 1 processes instead of 2" in said
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "changed")


@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_any_process_stops_all_after_one_save(tmp_path, receiver):
    ranks = start_ranks(2, tmp_path / "run", "--epochs", "30")
    ranks[0].wait_for_step(3)
    ranks[receiver].send(signal.SIGUSR1)
    assert [rank.wait() for rank in ranks] == [75, 75]
    assert final(tmp_path / "run")["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_an_error_of_the_main_process_reaches_all(tmp_path):
    finish(tmp_path / "run", "--epochs", "1")
    ranks = start_ranks(2, tmp_path / "run", "--epochs", "1", "--mask_ratio", "0.5")
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert "mask_ratio" in ranks[0].stderr


def torchrun(*words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True, **options)


def test_torchrun_restarts_a_lost_process_and_the_curve_is_the_same(tmp_path):
    words = [*TINY, "--save_steps", "1"]
    launcher = torchrun(
        "--nproc_per_node=2", "--max-restarts=1", "main_pretrain.py", *words, "--output_dir", tmp_path / "run"
    )
    victim = None
    while victim is None:
        assert launcher.poll() is None, launcher.stderr.read()
        path = tmp_path / "run" / "environment.json"
        if len(metrics(tmp_path / "run")) >= 4:
            victim = json.loads(path.read_text())[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    _, said = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, said[:6000]
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 2, "it was started twice"
    finish_ranks(2, tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_single_process_agrees_with_itself_at_once():
    agree = Agreement(Processes(0, 1, 0, torch.device("cpu")))
    assert [agree(request) for request in (0, 1, 2)] == [0, 1, 2]
    assert agree.resolve() == 0


def test_a_signal_is_remembered_and_not_acted_on():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop = StopRequest().listen()
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal is signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_rank_without_a_device_says_so_itself(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    training = Training(tmp_path / "run", "--device", "cuda", environment=second)
    assert training.wait() == 2
    assert "process 1 of this machine has no GPU" in training.stderr


def test_a_rank_without_an_address_is_a_process_alone(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with start("cpu") as processes:
        assert processes.world_size == world_size() == 1


def test_devices_are_checked(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU"):
        pick_device("cuda")
    for name in ("gpu", "cuda:x"):
        with pytest.raises(ValueError, match=f"expected auto, cpu, cuda, cuda:N or mps, found '{name}'"):
            pick_device(name)
    assert pick_device("auto").type in ("cpu", "mps")
