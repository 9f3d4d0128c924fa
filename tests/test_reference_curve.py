"""The quickstart reproduces its committed curve."""

import json
from pathlib import Path

import pytest

from tests.runs import Training

PROJECT = Path(__file__).resolve().parent.parent
CURVE = PROJECT / "configs" / "pretrain" / "quickstart_curve.json"
TOLERANCE = 0.01  # of the loss; rounding differs between processors, and training amplifies it slowly
EPOCHS = 3
STEPS_PER_EPOCH = 10


def test_the_first_epochs_of_the_quickstart_follow_the_reference(tmp_path):
    recipe = PROJECT / "configs" / "pretrain" / "quickstart.yaml"
    words = ["-c", recipe, "--device", "cpu", "--log_every", STEPS_PER_EPOCH]
    Training(tmp_path / "run", *words, tiny=False).kill_at((EPOCHS + 1) * STEPS_PER_EPOCH)
    ours = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()][:EPOCHS]
    reference = json.loads(CURVE.read_text())["epochs"]
    assert len(ours) == EPOCHS
    for epoch, expected in zip(ours, reference, strict=False):
        for name in ("train_loss", "train_reconstruction", "train_neighbor"):
            assert epoch[name] == pytest.approx(expected[name], rel=TOLERANCE), (epoch["epoch"], name)


def test_the_reference_curve_shows_learning():
    epochs = json.loads(CURVE.read_text())["epochs"]
    assert epochs[-1]["train_reconstruction"] < 0.5 * epochs[0]["train_reconstruction"]
    known = [epoch["knn_acc1"] for epoch in epochs if "knn_acc1" in epoch]
    assert known[-1] > known[0] + 20
