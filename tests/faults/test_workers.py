"""Data loading workers that hang or exit: they are replaced without losing a batch; the second time is an error."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.loader import Batches, TrainSamples, pretrain_transform
from data.sources import Source
from tests.faults import inject
from tests.faults.few import few
from tests.runs import Training, assert_same_end, finish, losses


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Check for exited workers every 0.2 seconds instead of every 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def make_batches(transform=None, num_workers=2, **more):
    source = Source([str(number) for number in range(40)], lambda index: np.full((8, 8, 3), index, np.uint8))
    samples = TrainSamples(source, transform or pretrain_transform(8), 0, None, mean=[0] * 3, std=[1] * 3)
    return Batches(samples, batch_size=2, num_workers=num_workers, **more)


def stop(batches, number=0):
    """Suspend a worker and return its process id."""
    pid = batches._loader._processes[number].pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def images(stream):
    return torch.cat([batch.images for batch in stream])


@pytest.mark.parametrize("seconds", [0.0, 0.2], ids=["while it loads", "with batches delivered"])
def test_workers_that_hang_are_replaced_where_they_were(caplog, seconds):
    batches = make_batches(worker_timeout=1)
    stream = batches.epoch(0)
    found = [next(stream)]
    before = [process.pid for process in batches._loader._processes]
    time.sleep(seconds)
    stop(batches)
    found += stream
    assert torch.equal(images(found), images(make_batches(num_workers=0).epoch(0)))
    assert "worker hung (no batch for 1 s); restarting all" in caplog.text
    after = [process.pid for process in batches._loader._processes]
    assert not set(before) & set(after) and not any(os.path.exists(f"/proc/{pid}") for pid in before)
    batches.close()


@pytest.mark.parametrize(("number", "what"), [(signal.SIGSTOP, "hung"), (signal.SIGKILL, "died")])
def test_workers_that_are_lost_between_epochs_are_replaced(caplog, number, what):
    batches = make_batches(worker_timeout=1)
    list(batches.epoch(0))
    os.kill(batches._loader._processes[1].pid, number)
    assert torch.equal(images(batches.epoch(1)), images(make_batches(num_workers=0).epoch(1)))
    assert f"a data loading worker {what}" in caplog.text
    batches.close()


def sleep(image):
    time.sleep(60)


def test_workers_that_hang_again_are_an_error_with_advice():
    with pytest.raises(RuntimeError, match="hung twice .*no batch for 0.2 s.*worker_timeout .*num_workers 0"):
        next(make_batches(sleep, num_workers=1, worker_timeout=0.2).epoch(0))


def test_without_a_limit_a_slow_worker_is_waited_for(caplog):
    batches = make_batches(num_workers=1, worker_timeout=0)
    stream = batches.epoch(0)
    found = [next(stream)]
    pid = stop(batches)
    threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()
    found += stream
    assert torch.equal(images(found), images(make_batches(num_workers=0).epoch(0)))
    assert not caplog.records and batches._loader._processes[0].pid == pid
    batches.close()


def test_a_run_whose_worker_hangs_or_is_killed_ends_like_an_uninterrupted_one(tmp_path):
    words = few("--epochs", 4)
    finish(tmp_path / "whole", *words)
    training = Training(
        tmp_path / "run", *words, "--num_workers", 2, "--worker_timeout", 2, fault=inject.impatient_loader
    )
    for step, number in ((2, signal.SIGSTOP), (16, signal.SIGKILL)):  # one loss in each of two epochs is allowed
        training.wait_for_step(step)
        os.kill(training.workers()[0], number)
    assert training.wait() == 0, training.stderr
    assert "worker hung (no batch for 2 s)" in training.stderr and "worker died" in training.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
