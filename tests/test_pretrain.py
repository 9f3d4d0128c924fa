"""The pretraining program: images in folders, invalid input, and options that do not change the result."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import Training, assert_same_end, final, finish, losses, metrics

PHOTOS = (
    "--dataset folder --input_size 16 --in_chans 3 --model mae_vit_tiny_patch4 --total_batch_size 8 --epochs 2".split()
)


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(20):
        paint(folder / f"photo {seed:02d}.png", seed)
    return folder


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--epoch", "3"], ["unknown", "'epoch'", "did you mean", "epochs"]),
        (["--epochs", "three"], ["epochs", "three"]),
        (["--method", "nor_mea"], ["nor_mea", "nor_mae"]),
        (["--model", "vit_tiny"], ["vit_tiny", "mae_vit_"]),
        (["--mask_ratio", "0.999"], ["mask_ratio 0.999", "16"]),
        (["--mask_ratio", "0"], ["mask_ratio", "no patch is masked"]),
        (["--model", "mae_vit_tiny_patch3"], ["8 x 8", "3"]),
        (["--batch_size", "96"], ["total_batch_size", "256", "96"]),
        (["--total_batch_size", "4096"], ["4096", "1352"]),
        (["--data_path", "/nowhere/at/all", "--dataset", "folder"], ["/nowhere/at/all"]),
        (["--terms.neighbor.wait", "1"], ["terms.neighbor.wait", "weight"]),
        (["--terms.label.weight", "1"], ["terms.label"]),
        (["--dist_url", "env://"], ["torchrun"]),
        (["--device", "cuda", "--amp", "none"], ["--device cuda"]),
        (["--init_from", "/nowhere.pth"], ["/nowhere.pth"]),
    ],
)
def test_bad_input_is_reported_before_anything_is_written(tmp_path, words, fragments):
    if words[:2] == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    training = Training(tmp_path / "run", *words)
    assert training.wait() == 2
    for word in fragments:
        assert word in training.stderr
    assert "Traceback" not in training.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_empty_folder_and_too_few_images_are_refused(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    for folder, batch, fragments in ((tmp_path / "empty", 8, "no image"), (photos, 64, "20")):
        training = Training(tmp_path / "run", *PHOTOS, "--data_path", folder, "--total_batch_size", batch)
        assert training.wait() == 2
        assert fragments in training.stderr and str(folder) in training.stderr


def test_a_flat_folder_of_photos_trains_with_any_number_of_workers(tmp_path, photos):
    for workers in (0, 2):
        finish(tmp_path / str(workers), *PHOTOS, "--data_path", photos, "--num_workers", workers)
    assert_same_end(tmp_path / "0", tmp_path / "2")
    assert final(tmp_path / "0")["step"] == 2 * (20 // 8)


def test_unreadable_images_are_replaced_and_listed_up_to_a_limit(tmp_path):
    folder = tmp_path / "photos"
    for seed in range(16):
        paint(folder / f"{seed}.png", seed)
    (folder / "cut.jpg").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "text.jpg").write_text("not an image")
    words = [*PHOTOS, "--data_path", folder]
    said = finish(tmp_path / "run", *words, "--max_bad_fraction", "0.2")
    listed = (tmp_path / "run" / "bad_images.txt").read_text()
    assert "cut.jpg" in listed and "text.jpg" in listed and len(listed.splitlines()) == 2
    assert "2 unreadable images" in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bad_images"] == 2
    training = Training(tmp_path / "strict", *words, "--max_bad_fraction", "0.05")
    assert training.wait() == 2
    assert "--max_bad_fraction" in training.stderr and "text.jpg" in training.stderr


def test_an_unreadable_image_may_have_any_name(tmp_path):
    folder = tmp_path / "photos"
    for seed in range(8):
        paint(folder / f"{seed}.png", seed)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9 \xff.jpg")).write_text("not an image")  # no UTF-8
    (folder / "Käse.jpg").write_text("not an image")
    finish(tmp_path / "run", *PHOTOS, "--data_path", folder, "--epochs", "4", "--max_bad_fraction", "0.5")
    listed = (tmp_path / "run" / "bad_images.txt").read_text(encoding="utf-8")
    assert "Käse.jpg" in listed and "caf\\udce9 \\udcff.jpg" in listed


def test_other_images_are_another_run(tmp_path, photos):
    finish(tmp_path / "run", *PHOTOS, "--data_path", photos, "--epochs", "1")
    for seed in range(20):
        paint(tmp_path / "others" / f"photo {seed + 1:02d}.png", seed)
    training = Training(tmp_path / "run", *PHOTOS, "--data_path", tmp_path / "others", "--epochs", "1")
    assert training.wait() == 2
    assert "data (files and labels)" in training.stderr


def test_accumulation_gives_the_losses_of_the_whole_batch(tmp_path):
    finish(tmp_path / "whole", "--epochs", "1")
    finish(tmp_path / "parts", "--epochs", "1", "--batch_size", "64")
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for step, loss in whole.items():
        assert parts[step] == pytest.approx(loss, rel=1e-5)


def test_weights_of_another_run_are_a_start_and_not_a_resume(tmp_path):
    finish(tmp_path / "first", "--epochs", "1")
    last = tmp_path / "first" / "checkpoints" / "last.pth"
    said = finish(tmp_path / "second", "--epochs", "1", "--init_from", last)
    assert "72 of the images, chosen at random in each epoch, are not used because they do not fill a step" in said
    assert "5 updates are few" in said
    assert "term neighbor: default options; weight x (P-1) = 0.00015\n" in said
    assert f"next: python -m tools.report {tmp_path / 'second'}" in said
    assert "nothing was learned" in said, "five updates from random data do not beat the mean"
    assert "tensors loaded" in said
    assert metrics(tmp_path / "second")[0]["step"] == 1
    assert losses(tmp_path / "second")[1] < losses(tmp_path / "first")[1]


@pytest.mark.parametrize("method", ["mae", "nor_mae_released", "noa_mae", "random_asymmetry_mae"])
def test_every_method_of_the_paper_trains_from_the_command_line(tmp_path, method):
    finish(tmp_path / "run", "--method", method)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["reconstruction"] < lines[0]["reconstruction"]
    assert ("neighbor" in lines[0]) == (method != "mae")


def test_bf16_and_compilation_stay_near_full_precision(tmp_path):
    finish(tmp_path / "full", "--epochs", "1")
    finish(tmp_path / "half", "--epochs", "1", "--amp", "bf16")
    for step, loss in losses(tmp_path / "full").items():
        assert losses(tmp_path / "half")[step] == pytest.approx(loss, rel=2e-2)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    finish(tmp_path / "plain", "--epochs", "1")
    finish(tmp_path / "compiled", "--epochs", "1", "--compile")
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert plain.keys() == compiled.keys()
    for step, loss in plain.items():
        assert compiled[step] == pytest.approx(loss, rel=1e-4), "the masks are drawn outside what is compiled"
