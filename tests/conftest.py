"""Fixtures that several test files use."""

import signal

import pytest
import torch

from tests.runs import finish
from util.distributed import STOP_SIGNALS


@pytest.fixture(autouse=True)
def signals_mean_the_same_afterwards():
    """Assert that a test restores the signal handlers, which processes of later tests would inherit."""
    watched = (*STOP_SIGNALS, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in watched}
    yield
    after = {number: signal.getsignal(number) for number in watched}
    for number, act in before.items():
        signal.signal(number, act)
    assert after == before


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Return a checkpoint of pretraining, with a decoder."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    finish(folder, "--epochs", "1")
    return folder / "checkpoints" / "last.pth"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Return a checkpoint of another project, from which no options are inherited."""
    path = tmp_path_factory.mktemp("weights") / "theirs.pth"
    torch.save({"model": {"cls_token": torch.zeros(1)}}, path)
    return str(path)
