"""Faults in one of several processes, and resuming with another number of processes."""

import signal
import time
from functools import partial

import pytest
import torch

from tests.faults import inject
from tests.faults.few import CLASSIFIER, STEPS_PER_EPOCH, few
from tests.runs import Training, final, finish, losses, metrics, start_ranks


def test_a_bad_loss_of_one_process_leaves_the_update_out_in_all(tmp_path):
    """Only rank 1 has a bad loss; rank 0, which writes the checkpoint, skips the update as well."""
    ranks = start_ranks(2, tmp_path / "run", *few(), "--epochs", 1, faults={1: partial(inject.bad_losses, 3, 3)})
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert [line["bad_steps"] for line in metrics(tmp_path / "run")] == [0, 0, 1, 1, 1, 1, 1]
    state = final(tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {6}


def test_the_others_of_a_lost_process_end_and_leave_a_valid_checkpoint(tmp_path):
    ranks = start_ranks(2, tmp_path / "run", *few(), "--epochs", 400, "--save_steps", 1)
    ranks[0].wait_for_step(3)
    ranks[1].send(signal.SIGKILL)
    began = time.monotonic()
    assert ranks[0].wait(60) not in (0, 75)
    assert time.monotonic() - began < 60
    assert final(tmp_path / "run")["step"] >= 2


def test_a_signal_inside_the_evaluation_of_one_process_abandons_that_of_all(tmp_path):
    fault = partial(inject.signals_inside_evaluation, 1, signal.SIGUSR1)
    words = few(*CLASSIFIER, "--epochs", 1)
    ranks = start_ranks(2, tmp_path / "run", *words, script="main_finetune", faults={1: fault})
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].stderr
    state = final(tmp_path / "run")
    assert (state["epoch"], state["sampler"]["offset"]) == (0, STEPS_PER_EPOCH["main_finetune"])
    assert not (tmp_path / "run" / "log.txt").exists(), "metrics of an incomplete evaluation are not logged"


def test_more_processes_with_fewer_images_each_resume_with_the_same_losses(tmp_path):
    finish(tmp_path / "whole", *few())
    Training(tmp_path / "run", *few(), "--batch_size", 2, "--save_steps", 1).kill_at(9)
    ranks = start_ranks(2, tmp_path / "run", *few(), "--batch_size", 4)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert "with 2 processes instead of 1" in ranks[0].stderr
    whole = losses(tmp_path / "whole")
    assert losses(tmp_path / "run").keys() == whole.keys()
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(whole[step], rel=1e-4), step
