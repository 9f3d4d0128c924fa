"""Means, compared with plain arithmetic."""

import math

import pytest
import torch

from util.distributed import Processes
from util.meters import Means

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def of(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_means_are_weighted_and_the_recent_ones_restart():
    means = Means(ALONE)
    means.add(of(loss=1.0, neighbor=-3.0), weight=1)
    means.add(of(loss=4.0, neighbor=0.0), weight=3)
    assert means.recent() == pytest.approx({"loss": 13 / 4, "neighbor": -3 / 4})
    means.add(of(loss=10.0, neighbor=1.0), weight=2)
    assert means.recent() == pytest.approx({"loss": 10.0, "neighbor": 1.0})
    assert means.overall() == pytest.approx({"loss": (1 + 12 + 20) / 6, "neighbor": (-3 + 2) / 6})


def test_a_value_that_is_not_finite_is_left_out_of_its_own_mean_only():
    means = Means(ALONE)
    means.add(of(loss=math.nan, neighbor=2.0), weight=1)
    means.add(of(loss=5.0, neighbor=4.0), weight=1)
    assert means.overall() == pytest.approx({"loss": 5.0, "neighbor": 3.0})


def test_the_epoch_continues_after_a_restore_and_ends_at_a_reset():
    first, second = Means(ALONE), Means(ALONE)
    first.add(of(loss=1.0), weight=1)
    second.load_state_dict(first.state_dict())
    for means in (first, second):
        means.add(of(loss=2.0), weight=1)
    assert first.overall() == second.overall() == {"loss": 1.5}
    first.reset()
    first.add(of(loss=7.0), weight=1)
    assert first.overall() == {"loss": 7.0}


def test_there_are_no_means_before_the_first_value():
    assert Means(ALONE).recent() == Means(ALONE).overall() == {}


def test_sums_are_in_double_precision():
    means = Means(ALONE)
    means.add(of(loss=2.0**24), weight=1)
    means.add(of(loss=1.0), weight=1)
    assert means.overall() == {"loss": (2**24 + 1) / 2}
