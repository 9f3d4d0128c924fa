"""The results of the loading, bill and roofline benchmarks are computed correctly. Timings are not tested."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import bill, communication, input, measure, roofline, step

SMALL = "--batch_size 2 --rounds 1 --input_size 48 --decoder_depth 1".split()


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_variant_has_its_turn_in_every_round_in_changing_order():
    turns = []
    variants = {name: lambda name=name: turns.append(name) or float(len(turns)) for name in "abc"}
    found = measure.in_turn(variants, 8, 0, lambda text: None)
    rounds = [turns[start : start + 3] for start in range(0, 24, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert found["b"] == [1.0 + turns.index("b", start) for start in range(0, 24, 3)]


def test_an_epochs_time_and_price():
    """2 devices with 100 images in 0.5 s each: 400 images/s, 1 h for 1.44 million images, at 2 x 3 per hour."""
    assert bill.epoch(0.5, 100, 1_440_000, 2, 3.0) == {"images_per_s": 400, "minutes": 60, "price": 6}


def test_the_bill_is_written_beside_the_papers_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bill, "ROWS", ("mae", "nor_r20"))
    output = tmp_path / "bill.json"
    bill.main([*SMALL, "--price", "2", "--images", "1000", "--output", str(output)])
    result = json.loads(output.read_text())
    assert list(result["bill"]) == ["mae", "nor_r20"]
    assert all(each["mb_per_image"] > 0 and each["price"] > 0 for each in result["bill"].values())
    table = output.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert "| Table 11, 2 x H100: ViT-Tiny, NoR-MAE | 786 | 27.2 | 2.90 USD | 26.4 | 1.072 |" in table
    assert "| Table 10, 4 x RTX 6000: ViT-Small, NoR-MAE | 454 | 47.0 | - | 37.1 | 1.044 |" in table


def test_the_machine_is_described_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert measure.where(measure.machine("cpu")).endswith("commit not known.")


def test_only_steps_of_ours_are_compiled(monkeypatch):
    names = []
    monkeypatch.setattr(bill, "measure", lambda setting, variants, say: names.extend(variants) or {})
    monkeypatch.setattr(bill, "bill", lambda *_: {})
    monkeypatch.setattr(bill, "publish", lambda *_, **__: None)
    bill.main([*SMALL, "--price", "2", "--compile", "--variants", "restated_mae", "mae", "nor+compile"])
    assert names == ["restated_mae", "mae+compile", "nor+compile"]


def test_bytes_are_what_operations_read_and_write_and_views_move_nothing():
    x = torch.ones(10, 4)
    with roofline.BytesMoved() as count:
        _ = x.t() + 1.0
    assert count.total == 2 * 40 * 4
    weight = torch.ones(6, 4)
    with roofline.BytesMoved() as count:
        nn.functional.linear(x, weight)
    assert count.total == 4 * (40 + 24 + 60)


def test_the_roofline_counts_the_models_arithmetic(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "peak_bytes", lambda step, device: 0)
    monkeypatch.setattr(roofline, "ceilings", lambda setting: {"flop_per_s": 1e12, "bytes_per_s": 1e11})
    output = tmp_path / "roofline.json"
    roofline.main([*SMALL, "--variants", "mae", "nor", "--output", str(output)])
    result = json.loads(output.read_text())
    mae, nor = result["roofline"]["mae"], result["roofline"]["nor"]
    assert 1.1 < nor["flop"] / mae["flop"] < 1.4  # a second forward pass; forward and backward are three
    assert nor["bytes"] > mae["bytes"] > 4 * 5e6 * 7  # only AdamW: reads four values per weight, writes three
    for each in (mae, nor):
        seconds = 2 / each["images_per_s"]
        assert each["share"] == pytest.approx(max(each["flop"] / 1e12, each["bytes"] / 1e11) / seconds)
    assert "of the floor" in capsys.readouterr().out


def test_ceilings_are_those_of_work_that_was_done():
    found = roofline.ceilings(roofline.Setting(), seconds=0.0)
    assert found["flop_per_s"] > 1e6 and found["bytes_per_s"] > 1e6


def test_loaders_are_measured_and_packs_are_made(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    output = tmp_path / "input.json"
    words = "--images 8 --num_workers 0 --batch_size 4 --input_size 32 --rounds 2".split()
    input.main([str(folder), *words, "--variants", "torchvision", "pillow", "folder", "raw40", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {name: len(times) for name, times in result["seconds"].items()} == dict.fromkeys(
        ["torchvision", "pillow", "folder", "raw40"], 2
    )
    assert result["bytes_each"] == {"raw40": 40 * 53 * 3}
    assert result["pixels"]["mean"] < 1.0  # noise is the worst case; photographs have 0.05
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out


def test_images_without_files_are_no_baseline():
    with pytest.raises(ValueError, match="no image files"):
        input.measure(argparse.Namespace(data_path="digits"))


def test_the_share_that_is_lost_is_what_a_step_without_exchange_saves():
    seconds = {"with": [1.0, 2.0, 4.0], "without": [0.9, 1.7, 3.8]}
    result = {
        "setting": {"processes": 2, "method": "mae", "model": "m", "decoder_depth": 1, "batch_size": 8, "rounds": 3},
        "machine": measure.machine("cpu"),
        "ratios": measure.paired_ratios(seconds),
        "seconds": seconds,
        "gradient_bytes": 44e6,
    }
    assert communication.markdown(result).splitlines()[-1] == (
        "| 44 | 2.000 [1.500, 3.000] | 1.700 [1.300, 2.750] | 0.100 [0.075, 0.125] |"
    )


@pytest.mark.slow
def test_processes_take_their_turns_together(tmp_path, capsys):
    output = tmp_path / "communication.json"
    words = "--rounds 2 --batch_size 1 --decoder_depth 1 --model mae_vit_tiny_patch32".split()
    communication.main([*words, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["gradient_bytes"] > 4e6 and len(found["seconds"]["with"]) == 2
    assert output.with_suffix(".md").read_text() in capsys.readouterr().out
