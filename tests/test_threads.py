"""Small models on a CPU use one thread, unless OMP_NUM_THREADS is set."""

import pytest
import torch
from torch import nn

from util import threads

SMALL, LARGE = nn.Linear(10, 10), nn.Linear(1000, 1001)


@pytest.mark.parametrize(
    ("model", "environment", "device", "expected"),
    [
        (SMALL, {}, "cpu", [1]),
        (LARGE, {}, "cpu", []),
        (SMALL, {"OMP_NUM_THREADS": "4"}, "cpu", []),
        (SMALL, {}, "cuda", []),
    ],
)
def test_threads(model, environment, device, expected, monkeypatch):
    monkeypatch.setattr(threads.os, "environ", environment)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    threads.choose_threads(model, torch.device(device))
    assert chosen == expected
