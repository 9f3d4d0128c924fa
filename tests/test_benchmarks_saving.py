"""The saving benchmark: the expected size of a checkpoint, and the share of time that follows from its seconds."""

import json

import pytest

from benchmarks import saving
from benchmarks.measure import quartiles
from benchmarks.step import Setting


def test_a_save_is_measured_and_its_share_follows(tmp_path, capsys):
    words = "--batch_size 1 --rounds 2".split()
    saving.main([*words, "--folder", str(tmp_path), "--output", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    model = Setting().build("nor_mae")
    numbers = sum(value.numel() for value in model.state_dict().values())
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert found["megabytes"] == pytest.approx(4 * (numbers + 2 * trained) / 1e6, rel=0.01), "weights and two moments"
    assert {name: len(values) for name, values in found["seconds"].items()} == {"step": 2, "save": 2, "bytes": 2}
    each = quartiles(found["seconds"]["save"])["median"]
    assert found["seconds_between_saves"] == 600, "an epoch takes longer at this speed"
    assert found["share_of_training"] == pytest.approx(each / (600 + each))
    assert f"{100 * found['share_of_training']:.3f}% of the training" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "result.md"]
