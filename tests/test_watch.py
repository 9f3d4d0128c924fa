"""Tasks between epochs: the online kNN compared with `util.knn`, and the content of images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import methods
from data.sources import open_source
from tests.runs import Training, assert_same_end, finish, start_ranks
from util.features import encode_source
from util.knn import knn_accuracy
from util.watch import contact_sheet, select_rgb, write_sheet


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    finish(folder, "--epochs", "2", "--knn_every", "1", "--picture_every", "2")
    return folder


def test_the_curve_is_the_knn_of_the_checkpoints_encoder(watched):
    model, options = methods.from_checkpoint(watched / "checkpoints" / "last.pth")
    reading = {"input_size": (8, 8), "mean": options["mean"], "std": options["std"], "device": "cpu"}
    bank = encode_source(model, open_source("digits", "", "train", in_chans=1), **reading)
    queries = encode_source(model, open_source("digits", "", "val", in_chans=1), **reading)
    lines = [json.loads(line) for line in (watched / "log.txt").read_text().splitlines()]
    assert lines[1]["knn_acc1"] == pytest.approx(100 * knn_accuracy(*bank, *queries), abs=1e-4)
    assert all(20 < line["knn_acc1"] < 100 for line in lines)
    assert "online kNN: eval_crop keep_size: resized to cover 9 x 9" in (watched / "train.log").read_text()


def test_watching_changes_nothing(watched, tmp_path):
    finish(tmp_path / "run", "--epochs", "2")
    assert_same_end(watched, tmp_path / "run")


def test_pictures_are_written_when_due_and_hold_four_rows_of_eight(watched):
    assert [path.name for path in (watched / "samples").iterdir()] == ["recon_e0002.png"]
    picture = np.asarray(Image.open(watched / "samples" / "recon_e0002.png"))
    assert picture.shape[2] == 3
    assert picture.shape[1] == 8 * (96 + 2) + 2
    assert picture.shape[0] > 4 * (96 + 2) + 2, "and a caption"
    assert picture[: 96 * 4].std() > 20


def test_a_sheet_undoes_the_normalisation_and_repeats_pixels():
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    colour = torch.tensor([1.0, -1.0, 0.2]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    sheet = contact_sheet([colour], mean, std)
    assert sheet.shape == (96 + 4, 2 * 98 + 2, 3)
    assert sheet[50, 50].tolist() == [255, 0, 51]
    assert sheet[0, 0].tolist() == [255, 255, 255], "white between the images"


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_images_of_any_number_of_channels_are_shown_in_three(channels, shown):
    images = torch.arange(channels).float().view(1, channels, 1, 1).expand(2, channels, 4, 6)
    assert select_rgb(images)[:, :, 2, 3].tolist() == [shown, shown] and select_rgb(images[0]).shape == (3, 4, 6)


def paint(path, red, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 90, (16, 16, 3), dtype=np.uint8)
    noise[..., 0] += 150 * red
    Image.fromarray(noise).save(path)


def test_the_val_list_beside_a_train_list_is_asked_by_the_training_classes_names(tmp_path):
    lines = {"train": [], "val": []}
    for split, kinds in (("train", ("cats", "dogs")), ("val", ("dogs",))):  # alone, dogs would be number 0
        for number, kind in [(number, kind) for kind in kinds for number in range(10)]:
            paint(tmp_path / "data" / f"{split} {kind} {number}.png", kind == "cats", number)
            lines[split].append(f"{split} {kind} {number}.png\t{kind}\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines[split]))
    words = ["--dataset", tmp_path / "train.txt", "--data_path", tmp_path / "data", "--in_chans", 3]
    said = finish(tmp_path / "run", *words, "--total_batch_size", 10, "--epochs", 1, "--knn_every", 1)
    assert "20 training images classify the 10 images of the val split" in said
    assert "knn_acc1 100" in said


def test_a_val_split_smaller_than_the_number_of_processes_is_shared(tmp_path):
    for number in range(8):
        paint(tmp_path / "data" / "train" / "ab"[number % 2] / f"{number}.png", number % 2, number)
    for number in range(2):
        paint(tmp_path / "data" / "val" / "ab"[number] / "0.png", number, number + 8)
    words = ["--dataset", "folder", "--data_path", tmp_path / "data", "--in_chans", 3, "--total_batch_size", 6]
    ranks = start_ranks(3, tmp_path / "run", *words, "--epochs", 1, "--knn_every", 1)
    assert [rank.wait() for rank in ranks] == [0, 0, 0], ranks[0].stderr
    assert "classify the 2 images of the val split" in ranks[0].stderr


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "samples").write_text("a file in the folder's place")
    picture = write_sheet(torch.zeros(10, 30, 3, dtype=torch.uint8), "black", tmp_path / "samples" / "recon.png")
    assert picture.shape[1:] == (30, 3) and "cannot write" in caplog.text


def test_online_knn_without_labels_is_refused(tmp_path):
    for number in range(8):
        Image.new("RGB", (16, 16), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
    words = ["--dataset", "folder", "--data_path", tmp_path, "--in_chans", "3", "--total_batch_size", "4"]
    training = Training(tmp_path / "runs" / "run", *words, "--knn_every", "1")
    assert training.wait() == 2
    assert "--knn_every needs labels" in training.stderr


def test_without_a_validation_split_every_tenth_image_is_asked(tmp_path):
    for name in ("cats", "dogs"):
        for number in range(10):
            paint(tmp_path / "data" / name / f"{number}.png", name == "cats", number)
    words = ["--dataset", "folder", "--data_path", tmp_path / "data", "--in_chans", "3", "--total_batch_size", "10"]
    said = finish(tmp_path / "run", *words, "--knn_every", "3")
    assert "18 training images classify every tenth training image (2)" in said
    assert "knn_acc1 100" in said
