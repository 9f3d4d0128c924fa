"""Saves that fail, are interrupted, or find no folder; signals at critical points; incomplete records."""

import errno
import json
import logging
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.faults import inject
from tests.faults.few import STEPS_PER_EPOCH, few
from tests.runs import Training, assert_same_end, final, finish, losses, metrics
from util.logging import log_file

STEPS = STEPS_PER_EPOCH["main_pretrain"]
ONE = few("--epochs", 1, "--save_steps", 1)


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("completed") / "run"
    finish(folder, *ONE)
    return folder


def test_a_full_disk_for_one_try_is_tried_again(completed, tmp_path):
    said = finish(tmp_path / "run", *ONE, fault=partial(inject.full_disk, 2, 2))
    assert "No space left" in said and "try 1 of 3" in said and "try 2" not in said
    assert_same_end(completed, tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT])
def test_other_failures_of_the_disk_are_tried_again_too(tmp_path, number):
    said = finish(tmp_path / "run", *ONE, fault=partial(inject.full_disk, 1, 1, number))
    assert f"[Errno {number}]" in said and "try 1 of 3" in said


def test_a_device_that_is_really_full_costs_a_save_and_no_step(completed, tmp_path):
    """The error that torch raises for a failed write is reported as the error of the disk."""
    said = finish(tmp_path / "run", *ONE, fault=partial(inject.full_device, 2, 4))
    assert said.count("No space left on device") == 3 and "not saved; training continues with" in said
    assert_same_end(completed, tmp_path / "run")


def test_a_log_file_without_space_is_silent(caplog, capsys):
    with log_file(Path("/dev/full")):
        logging.getLogger("run").error("a line that cannot be written")
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_for_a_while_costs_a_save_and_no_step(completed, tmp_path):
    said = finish(tmp_path / "run", *ONE, fault=partial(inject.full_disk, 3, 5))
    assert "training continues with the last checkpoint on disk (1 in a row)" in said
    assert_same_end(completed, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(completed)


def test_a_disk_that_stays_full_ends_the_run_with_4_and_a_valid_checkpoint(completed, tmp_path):
    training = Training(tmp_path / "run", *ONE, "--max_save_failures", 1, fault=partial(inject.full_disk, 3, 1000))
    assert training.wait() == 4, training.stderr
    assert "2 saves in a row" in training.stderr and "Traceback" not in training.stderr
    assert final(tmp_path / "run")["step"] == 2
    finish(tmp_path / "run", *ONE)
    assert_same_end(completed, tmp_path / "run")


def test_a_folder_that_vanishes_ends_the_run_with_4_and_a_message(tmp_path):
    training = Training(tmp_path / "run", *few("--epochs", 400, "--save_steps", 1), "--max_save_failures", 1)
    training.wait_for_step(2)
    (tmp_path / "run").rename(tmp_path / "gone")
    assert training.wait() == 4, training.stderr
    assert "2 saves in a row" in training.stderr and "Traceback" not in training.stderr


def test_a_kill_inside_a_save_costs_that_save_only(completed, tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, *ONE, fault=partial(inject.signal_inside_save, 3, signal.SIGKILL))
    assert training.wait() == -signal.SIGKILL
    assert final(folder)["step"] == 2
    assert "removed .last.pth.tmp" in finish(folder, *ONE)
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)


def test_a_signal_inside_a_save_lets_it_end_and_saves_the_step_it_stops_after(completed, tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, *ONE, fault=partial(inject.signal_inside_save, 2, signal.SIGTERM))
    assert training.wait() == 75, training.stderr
    assert final(folder)["step"] == metrics(folder)[-1]["step"] == 3
    finish(folder, *ONE)
    assert_same_end(completed, folder)


def test_a_second_interrupt_inside_a_save_leaves_the_last_checkpoint_as_it_was(tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, *ONE, fault=partial(inject.interrupted_twice_inside_save, 3))
    assert training.wait() == 130, training.stderr
    assert final(folder)["step"] == 2


def test_a_signal_while_workers_start_is_heard(completed, tmp_path):
    words = [*ONE, "--num_workers", 1]
    training = Training(tmp_path / "run", *words, fault=partial(inject.signal_at_loader_start, signal.SIGUSR1))
    assert training.wait() == 75, training.stderr
    assert final(tmp_path / "run")["step"] == 1
    finish(tmp_path / "run", *words)
    assert_same_end(completed, tmp_path / "run")


def test_a_kill_between_an_update_and_its_line_leaves_no_gap(completed, tmp_path):
    folder = tmp_path / "run"
    assert Training(folder, *ONE, fault=partial(inject.killed_before_line, 3)).wait() == -signal.SIGKILL
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    finish(folder, *ONE)
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(completed)


def test_a_kill_inside_a_line_leaves_complete_lines_only(completed, tmp_path):
    folder = tmp_path / "run"
    assert Training(folder, *ONE, fault=partial(inject.killed_inside_line, 3)).wait() == -signal.SIGKILL
    assert not (folder / "metrics.jsonl").read_text().endswith("\n")
    finish(folder, *ONE)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert losses(folder) == losses(completed)


def test_tensorboard_without_space_is_one_warning_and_the_lines_are_complete(completed, tmp_path):
    said = finish(tmp_path / "run", *ONE, fault=inject.broken_tensorboard)
    assert said.count("cannot write to TensorBoard") == 1
    assert losses(tmp_path / "run") == losses(completed)


def test_without_tensorboard_a_run_says_so_once_and_has_its_lines(completed, tmp_path):
    said = finish(tmp_path / "run", *ONE, fault=inject.missing_tensorboard)
    assert said.count("no TensorBoard curves") == 1 and "metrics.jsonl has the same values" in said
    assert losses(tmp_path / "run") == losses(completed)
    assert not list((tmp_path / "run").glob("events.*"))


def test_a_clock_that_goes_back_changes_nothing(completed, tmp_path):
    finish(tmp_path / "run", *ONE, fault=inject.jumping_clock)
    assert_same_end(completed, tmp_path / "run")
