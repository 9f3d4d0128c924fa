"""The doctor's checks with known amounts of free space, and its estimate of time and price."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_pretrain
import main_segment
from data.sources import open_source
from tests.runs import SCRIPTS, TINY
from tests.test_masks import paint
from tools import doctor
from tools.doctor import DOUBTFUL, GOOD, WRONG, Measured
from util import extras
from util.run import resolve

CPU = torch.device("cpu")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def options():
    return main_pretrain.parse_options([*TINY, "--batch_size", "64", "--accum_iter", "4", "--num_workers", "3"])


@pytest.fixture
def free(monkeypatch):
    """Return a function that sets the free space of every file system."""

    def set_free(amount):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, amount))

    return set_free


def test_a_healthy_machine_gets_an_estimate_and_nothing_is_written(tmp_path, capsys):
    output = tmp_path / "run"
    words = [*TINY, "--output_dir", str(output), "--batch_size", "32", "--batches", "2", "--price", "3"]
    code = doctor.main(words)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "64 of 64 read" in said and "1,352 images of 10 classes" in said
    assert "an epoch of 5 updates" in said and "price, at 3 an hour" in said
    assert WRONG not in said
    assert not output.exists()


def test_time_and_price_are_the_arithmetic_of_the_measurement(options):
    """An epoch of 5 updates of 4 x 90 s takes 0.5 h; two devices at 3 an hour cost 3 an epoch and 9 for 3 epochs."""
    lines = list(doctor.estimate(options, 5, Measured(seconds=90.0, waiting=0.25, memory=3 * 10**9), 2, 3.0))
    assert "64 images x 2 processes, 25% of it waiting" in lines[0]
    assert lines[1].startswith("3.00 GB")
    assert lines[2] == "an epoch of 5 updates: 30.0 minutes"
    assert lines[3] == "the run of 3 epochs: 90.0 minutes"
    assert "3.00 an epoch, 9.00 the run" in lines[4]


def test_packages_are_compared_with_the_requirements(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("# pins\ntorch==0.1\nno-such-package-anywhere==1.0\n")
    found = [finding for finding in doctor.packages(pins) if finding.what == "packages"]
    assert [finding.verdict for finding in found] == [WRONG, DOUBTFUL]
    assert "no-such-package-anywhere" in found[0].text and "tested with 0.1" in found[1].text


def test_a_package_that_only_an_option_needs_is_checked(monkeypatch):
    options = main_pretrain.parse_options([*SCRIPTS["main_pretrain"], "--export", "timm", "onnx"])
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    found = next(finding for finding in doctor.examine(options, 1, 1, None) if "onnx" in str(finding))
    assert found.verdict == WRONG and "--export onnx needs onnx: run" in found.text


def test_unreadable_images_are_counted_and_compared_with_the_limit(tmp_path):
    for number in range(10):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_text("not an image")
    source = open_source("folder", str(tmp_path), "train", in_chans=3)
    found = doctor.images(source, max_bad_fraction=0.2)
    assert found.verdict == DOUBTFUL and "9 of 10 read" in found.text and "5.png" in found.text
    assert doctor.images(source, max_bad_fraction=0.0).verdict == WRONG


def test_shared_memory_must_hold_what_workers_have_ready(options, free):
    """2 processes x 3 workers x 2 batches x 64 images of 8 x 8 bytes with 16 float32 values of noise."""
    image = doctor.make_first_plan(resolve(options), 2, CPU).image_bytes
    needed = 2 * 3 * 2 * 64 * (8 * 8 + 4 * 16)
    for amount, verdict in ((needed, WRONG), (needed + 1, DOUBTFUL), (2 * needed + 1, GOOD)):
        free(amount)
        assert doctor.shared_memory(options, image, 2).verdict == verdict


def test_the_disk_must_hold_every_checkpoint(options, free, tmp_path):
    plan = doctor.make_first_plan(resolve(options), 1, CPU)
    weights = sum(value.numel() for value in plan.model.state_dict().values())
    trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    needed = (options.keep + 3) * 4 * (weights + 2 * trained)
    size, files = doctor.checkpoint_bytes(plan, plan.make_optimizer(CPU)), doctor.checkpoint_files(plan.options)
    assert files * size == needed
    for amount, verdict in ((needed, WRONG), (2 * needed + 1, GOOD)):
        free(amount)
        assert doctor.disk(str(tmp_path / "run"), size, files).verdict == verdict


def test_a_folder_that_cannot_be_written_is_found(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = doctor.disk(str(tmp_path / "file" / "run"), 1, 1)
    assert found.verdict == WRONG and str(tmp_path / "file") in found.text and "--output_dir" in found.text


def test_a_classifier_is_sampled_as_it_will_be_trained(tmp_path, capsys):
    """Random erasing returns floats, the EMA is a second set of weights, SGD has one buffer, the best is kept."""
    words = [*SCRIPTS["main_finetune"], *"--batch_size 64 --num_workers 1 --ema 0.9 --optimizer sgd".split()]
    plan = doctor.make_first_plan(resolve(main_finetune.parse_options(words)), 1, CPU)
    weights = sum(value.numel() for value in plan.model.state_dict().values())
    trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    assert plan.image_bytes == 4 * 8 * 8 + 8
    size, files = doctor.checkpoint_bytes(plan, plan.make_optimizer(CPU)), doctor.checkpoint_files(plan.options)
    assert (files, size) == (plan.options.keep + 4, 4 * (2 * weights + trained))
    more = ["--program", "main_finetune.py", "--batches", "1", "--output_dir", str(tmp_path / "run")]
    assert doctor.main([*words, *more, "--num_workers", "0"]) == 0
    assert "of 10 classes" in (said := capsys.readouterr().out) and "an epoch of 5 updates" in said
    assert doctor.main([*words, *more, "--batch_size", "1", "--total_batch_size", "1"]) == 2
    assert "batch_size must be even" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_segmenter_is_sampled_as_it_will_be_trained(tmp_path, capsys):
    """RGB crops of 16 x 16 with 16-bit masks; batch norm statistics are saved too. 36 steps are 3 epochs."""
    words = [*SCRIPTS["main_segment"], "--data_path", "scenes", "--total_batch_size", "16", "--steps", "36"]
    plan = doctor.make_first_plan(resolve(main_segment.parse_options(words)), 1, CPU)
    whole = sum(value.numel() * value.element_size() for value in plan.model.state_dict().values())
    trained = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    crop = next(iter(plan.batches.epoch(0)))
    assert plan.image_bytes == (crop.images[0].nbytes + crop.labels[0].nbytes) == 16 * 16 * (3 + 2)
    size, files = doctor.checkpoint_bytes(plan, plan.make_optimizer(CPU)), doctor.checkpoint_files(plan.options)
    assert (files, size) == (plan.options.keep + 4, whole + 8 * trained)
    more = ["--program", "main_segment.py", "--batches", "1", "--output_dir", str(tmp_path / "run")]
    assert doctor.main([*words, *more]) == 0
    said = capsys.readouterr().out
    assert "of 6 classes; 64 of 64 read with masks" in said and "the run of" in said and WRONG not in said
    assert doctor.main([*words, *more, "--batch_size", "1", "--total_batch_size", "1"]) == 2
    assert "batch_size 1: batch norm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_masks_are_found_that_are_damaged_missing_or_invalid(tmp_path, capsys):
    data = paint(tmp_path / "data", count=10, size=(20, 20))
    words = [*SCRIPTS["main_segment"], "--data_path", str(data), "--program", "main_segment.py", "--batches", "1"]
    assert doctor.main(words) == 0
    assert "of 3 classes" in capsys.readouterr().out
    for number in range(5):
        (data / "masks" / f"{number}.png").write_bytes(b"no picture")
    assert doctor.main(words) == 2
    assert "5 of 10 masks" in (said := capsys.readouterr().err) and "masks/0.png" in said
    assert doctor.main([*words, "--check_masks", "false"]) == 1
    assert " of 8 read with masks" in (said := capsys.readouterr().out) and f"not read: {data / 'masks'}" in said
    for number in range(5):
        Image.fromarray(np.full((20, 20), 7, np.uint8)).save(data / "masks" / f"{number}.png")
    assert doctor.main(words) == 2
    assert "it holds 7; the 3 classes are 0 to 2" in capsys.readouterr().err
    (data / "masks" / "4.png").unlink()
    assert doctor.main(words) == 2
    assert "there is no masks/4.png" in capsys.readouterr().err


def test_bad_input_is_reported_as_by_the_run(capsys):
    for words, told in (
        ([*TINY, "--epoch", "3"], "did you mean"),
        ([*TINY, "--layer_decay", "0.65"], "options of main_pretrain.py; --program selects another program"),
        ([*TINY, "--batches", "0"], "at least 1"),
        ([*TINY, "--data_path", "/nowhere", "--dataset", "folder"], "/nowhere"),
    ):
        assert doctor.main(words) == 2
        assert told in capsys.readouterr().err


def test_out_of_memory_is_reported_with_advice_and_no_traceback(monkeypatch, capsys):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor, "train_one_epoch", full)
    assert doctor.main([*TINY, "--batch_size", "64"]) == 1
    assert "do not fit on cpu: try --batch_size 32" in capsys.readouterr().out


@pytest.mark.gpu
def test_gpus_are_named_and_nccl_is_checked():
    found = list(doctor.devices(torch.device("cuda"), 1))
    assert [finding.what for finding in found] == ["GPU", "NCCL"]
    assert {finding.verdict for finding in found} == {GOOD}
