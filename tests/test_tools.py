"""Tools that open a trained model: correct results for a known model, and messages for unsupported input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import main_pretrain
from programs import pretrain
from tools import given, knn, neighbor_statistics

MODEL = (
    "--model mae_vit_tiny_patch2 --embed_dim 24 --depth 1 --num_heads 2 --decoder_embed_dim 16 --decoder_depth 1 "
    "--decoder_num_heads 2 --input_size 8 --in_chans 1 --norm_pix_loss"
).split()
RUN = "--data_path digits --epochs 1 --warmup_epochs 0 --batch_size 256 --num_workers 0 --device cpu".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run of a few updates on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main_pretrain.main([*MODEL, *RUN, "--output_dir", str(folder)]) == 0
    return folder


def test_the_untrained_model_is_the_one_that_the_run_began_with(run):
    options = main_pretrain.parse_options([*MODEL, *RUN])
    torch.manual_seed(options.seed)
    begun = pretrain.build_model(options).state_dict()
    again = knn.untrained(given.load(run, "cpu").options).state_dict()
    assert begun.keys() == again.keys()
    assert all(torch.equal(begun[name], again[name]) for name in begun)


def test_knn_writes_three_rows_of_held_out_accuracy(run, capsys):
    assert knn.main([str(run), "--device", "cpu"]) == 0
    found = json.loads((run / "knn.json").read_text())
    assert list(found["accuracy"]) == ["raw pixels", "untrained encoder", "pretrained encoder"]
    assert found["accuracy"]["raw pixels"] > 95  # digits are easy for pixels, but not with wrong labels or splits
    assert 20 < found["accuracy"]["pretrained encoder"] < 100
    assert "after 5 updates, 1,280 images seen" in found["protocol"]
    assert f"{found['accuracy']['untrained encoder']:.2f}" in capsys.readouterr().out


def write_shades(folder, count):
    """Write grey images, each in its own shade."""
    folder.mkdir(parents=True)
    for shade in range(count):
        Image.fromarray(np.full((8, 8), shade, np.uint8)).save(folder / f"{shade}.png")


def test_knn_on_other_data_has_its_own_file(run, tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            write_shades(tmp_path / "photos" / split / name, 12)
    (run / "knn.json").write_text("of the run")
    assert knn.main([str(run), "--device", "cpu", "--data_path", str(tmp_path / "photos")]) == 0
    assert (run / "knn.json").read_text() == "of the run"
    assert json.loads((run / "knn-photos.json").read_text())["protocol"].startswith("Data: photos. Average")


def test_knn_takes_labels_by_class_name_where_a_class_has_no_validation_images(run, tmp_path):
    for split, classes in {"train": "abc", "val": "ac"}.items():
        for brightness, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            shade = 80 * "abc".index(name) + brightness
            Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / split / name / "x.png")
    trained = given.load(run, "cpu")
    bank, queries, what = knn.splits(trained, str(tmp_path))
    assert what == "validation" and bank.labels.tolist() == [0, 1, 2]
    assert queries.labels.tolist() == [0, 2]
    (tmp_path / "train" / "a" / "x.png").unlink()
    with pytest.raises(ValueError, match="classes that the training images do not have: a"):
        knn.splits(trained, str(tmp_path))


def test_knn_sets_training_images_aside_where_there_are_no_validation_images(run, tmp_path, caplog):
    for name in "ab":
        write_shades(tmp_path / name, 40)
    bank, queries, what = knn.splits(given.load(run, "cpu"), str(tmp_path))
    assert what == "held-out training" and "no val images" in caplog.text
    assert (len(bank), np.bincount(queries.labels).tolist()) == (60, [10, 10])  # a minimum of 20, not a tenth of 80
    assert not set(bank.names) & set(queries.names)


def test_knn_refuses_data_without_labels(run, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    assert knn.main([str(run), "--data_path", str(tmp_path), "--device", "cpu"]) == 2
    assert "need labels" in capsys.readouterr().err


def test_neighbor_statistics_have_the_mask_ratio_of_the_run_and_do_not_need_val(run, tmp_path, monkeypatch):
    write_shades(tmp_path / "photos", 3)
    trained = given.load(run, "cpu")
    monkeypatch.setattr(given, "load", lambda *_: replace(trained, options=trained.options | {"mask_ratio": 0.5}))
    subjects = []
    monkeypatch.setattr(neighbor_statistics, "measure", lambda _, subject: subjects.append(subject) or {})
    words = ["--data_path", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    assert neighbor_statistics.main([str(run), *words]) == 0
    assert [(len(each.pixels), each.mask_ratio) for each in subjects] == [(3, 0.5)]


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        (knn, ["--batch_size", "0"]),
        (knn, ["--num_workers", "-1"]),
        (neighbor_statistics, ["--images", "0", "--output_dir", "unused"]),
    ],
)
def test_numbers_that_are_too_small_are_refused(capsys, tool, words):
    assert tool.main(["no-such-run", *words]) == 2
    assert f"{words[0]}: must be at least {int(words[1] == '0')}, found {words[1]}" in capsys.readouterr().err
