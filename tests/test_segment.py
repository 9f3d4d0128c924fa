"""Segmentation: metrics compared with a loop over pixels, windows with the complete image, and complete runs."""

import copy
import json
import math
import shlex
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import nn

import main_segment
import models_upernet
from data.images import Pair
from data.loader import Batch, EvalSamples
from data.masks import IGNORE
from data.segment_augment import eval_transform
from data.sources import Source
from engine_segment import Objective, cross_entropy, evaluate, predicted_masks
from options import SegmentOptions, differences, from_dict, resolve_batch, to_dict
from options.schema import get_default
from programs import segment
from tests.runs import Training, assert_same_end, final, finish, losses, metrics, start_ranks
from tools import encoder, replay, visualize
from util import checkpoint, optim
from util.confusion import compute_metrics, confusion, table
from util.distributed import Processes
from util.overlay import TILE, colours, mask_sheet, overlay
from util.stepper import Stepper
from util.windows import Windows, predict, starts

PROJECT = Path(__file__).resolve().parent.parent
RECIPES = sorted(PROJECT.glob("configs/segment/*.yaml"))
SCRIPT = "main_segment"
ALONE = Processes(0, 1, 0, torch.device("cpu"))
NAMES = ("ground", "red", "green")


class Painter(nn.Module):
    """Return fixed logits for each pixel's colour, at full resolution, instead of both heads."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 1)

    def forward(self, images):
        return self.conv(images), self.conv(images)


def random_batches(classes=4, sizes=((9, 7), (5, 12), (8, 8))):
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate(sizes):
        labels = torch.randint(-1, classes - 1, (1, *size), generator=generator).to(torch.int16)
        yield Batch(torch.randn(1, 3, *size, generator=generator), labels, None, torch.tensor([number]))


# ---- objective


def test_the_loss_is_an_average_over_all_pixels_to_which_those_without_a_class_add_nothing():
    """mmsegmentation's `avg_non_ignore=False`."""
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(-1, 3, (2, 4, 4))
    terms = [-logits.log_softmax(dim=1)[n, masks[n, y, x], y, x] if masks[n, y, x] != IGNORE else torch.zeros(())
             for n in range(2) for y in range(4) for x in range(4)]  # fmt: skip
    assert (masks == IGNORE).any()
    torch.testing.assert_close(cross_entropy(logits, masks), torch.stack(terms).mean())
    halves = [cross_entropy(logits[n : n + 1], masks[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(cross_entropy(logits, masks), sum(halves) / 2)
    assert cross_entropy(logits, torch.full((2, 4, 4), IGNORE)) == 0


def test_the_auxiliary_head_counts_with_its_weight_and_logits_grow_to_the_mask():
    model = models_upernet.build("mae_vit_tiny_patch4", num_classes=3, input_size=(16, 16), embed_dim=8, depth=1,
                                 num_heads=2).eval()  # fmt: skip
    images, masks = torch.randn(2, 3, 16, 16), torch.randint(-1, 3, (2, 16, 16)).to(torch.int16)
    found = Objective(model, auxiliary=0.4)(images, masks)
    parts = [F.cross_entropy(F.interpolate(each, (16, 16), mode="bilinear"), masks.long(), ignore_index=-1,
                             reduction="none").mean() for each in model(images)]  # fmt: skip
    torch.testing.assert_close(found["segmentation"], parts[0])
    torch.testing.assert_close(found["loss"], parts[0] + 0.4 * parts[1])


def test_a_loss_that_is_not_finite_leaves_no_trace_in_the_running_statistics(small):
    model = copy.deepcopy(small).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    images, masks = torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16, dtype=torch.int16)
    objective = Objective(model, auxiliary=0.4)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.0), 1e-3)
    schedule = optim.warmup_poly(optimizer, steps=9, warmup_steps=0, power=1.0, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule)

    def step(images):
        with stepper.micro_step():
            stepper(objective(images, masks), torch.arange(2))

    step(images * torch.inf)
    assert stepper.bad_steps() == (1, 1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)
    step(images)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)


# ---- metrics


def test_figures_are_what_a_loop_over_pixels_counts():
    """Four classes, the last of which is in no mask; images of several sizes; pixels without a class."""
    torch.manual_seed(1)
    model = Painter()
    windows = Windows(None, (1, 1), 1)
    found = evaluate(model, random_batches(), names="abcd", windows=windows, processes=ALONE, autocast=torch.no_grad)
    true, said = [], []
    for batch in random_batches():
        logits = model(batch.images)[0]
        rows, columns = batch.labels.shape[1:]
        for y in range(rows):
            for x in range(columns):
                if batch.labels[0, y, x] >= 0:
                    true.append(int(batch.labels[0, y, x]))
                    said.append(int(logits[0, :, y, x].argmax()))
    ious, accuracies = {}, {}
    for k, name in enumerate("abcd"):
        both = sum(t == k == s for t, s in zip(true, said, strict=True))
        either = sum(k in (t, s) for t, s in zip(true, said, strict=True))
        ious[name] = 100 * both / either if either else None
        accuracies[name] = 100 * both / true.count(k) if true.count(k) else None
        assert found["per_class"][name] == {"iou": ious[name], "acc": accuracies[name], "pixels": true.count(k)}
    there = [value for value in ious.values() if value is not None]
    assert found["miou"] == pytest.approx(sum(there) / len(there))
    assert found["miou"] == pytest.approx(100 * jaccard_score(true, said, average="macro"))
    assert accuracies["d"] is None and ious["d"] == 0.0, "it is predicted where it is not"
    assert found["mean_acc"] == pytest.approx(sum(accuracies[name] for name in "abc") / 3)
    assert found["pixel_acc"] == pytest.approx(100 * sum(t == s for t, s in zip(true, said, strict=True)) / len(true))
    assert found["images"] == 3


def test_counting_pixels_waits_for_no_device():
    """The meta device has no values: operations that read them, such as a size that depends on values, fail."""
    masks, predicted = torch.tensor([[0, IGNORE, 2, 1]]), torch.tensor([[1, 0, 2, 1]])
    assert confusion(masks, predicted, 3).tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert confusion(masks.to("meta"), predicted.to("meta"), 3).shape == (3, 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.bincount(predicted.flatten().to("meta"), minlength=9)


def test_a_class_that_is_nowhere_is_in_no_mean():
    found = compute_metrics(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert found["miou"] == pytest.approx(100 * (6 / 8 + 2 / 4) / 2) and found["per_class"]["c"]["iou"] is None
    assert found["mean_acc"] == pytest.approx(100 * (6 / 8 + 1) / 2) and found["pixel_acc"] == 80
    assert table(found).splitlines()[1:] == [
        "a       75.00   75.00  80.00%",
        "b       50.00  100.00  20.00%",
        "c           -       -   0.00%",
    ]


# ---- windows


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [(512, 512, 341, [0]), (683, 512, 341, [0, 171]), (1024, 512, 341, [0, 341, 512]), (1194, 512, 341, [0, 341, 682]),
     (100, 512, 341, [0])],
)  # fmt: skip
def test_windows_cover_the_length(length, crop, stride, expected):
    assert starts(length, crop, stride) == expected
    covered = {place for start in expected for place in range(start, start + crop)}
    assert covered >= set(range(length))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    size = {"input_size": (16, 16), "embed_dim": 8, "depth": 2, "num_heads": 2}
    return models_upernet.build("mae_vit_tiny_patch4", num_classes=3, **size).eval()


def test_a_model_is_evaluated_in_evaluation_mode_and_put_back(small):
    batches = list(random_batches(classes=4, sizes=((16, 16), (16, 16))))
    small = copy.deepcopy(small)
    how = {"names": "abc", "windows": Windows(None, (1, 1), 1), "processes": ALONE, "autocast": torch.no_grad}
    expected, state = evaluate(small, batches, **how), copy.deepcopy(small.state_dict())
    assert evaluate(small.train(), batches, **how) == expected
    assert small.training and all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


def test_one_window_is_the_whole_image(small):
    images = torch.randn(2, 3, 16, 16)
    slide, completed = (
        predict(small, images, Windows((16, 16), (10, 10), 4)),
        predict(small, images, Windows(None, (1, 1), 4)),
    )
    assert torch.equal(slide, completed)
    assert torch.equal(completed, F.interpolate(small(images)[0], (16, 16), mode="bilinear"))


@pytest.mark.parametrize("batch", [1, 4])
def test_windows_are_averaged_where_they_overlap(small, batch):
    """One window after another, one pixel after another."""
    images = torch.randn(1, 3, 23, 18)
    total, seen = torch.zeros(1, 3, 23, 18), torch.zeros(23, 18)
    for top in (0, 7):
        for left in (0, 2):
            logits = small(images[..., top : top + 16, left : left + 16])[0]
            total[..., top : top + 16, left : left + 16] += F.interpolate(logits, (16, 16), mode="bilinear")
            seen[top : top + 16, left : left + 16] += 1
    found = predict(small, images, Windows((16, 16), (10, 10), 4, batch=batch))
    torch.testing.assert_close(found, total / seen, atol=1e-5, rtol=1e-5)


def test_small_images_are_padded_and_cut_again(small):
    images = torch.randn(1, 3, 10, 13)
    padded = F.pad(images, (0, 3, 0, 6))
    expected = predict(small, padded, Windows((16, 16), (10, 10), 4))[..., :10, :13]
    assert torch.equal(predict(small, images, Windows((16, 16), (10, 10), 4)), expected)
    completed = predict(small, images, Windows(None, (1, 1), 4))
    padded = F.pad(images, (0, 3, 0, 2))  # to whole patches of 4
    assert torch.equal(completed, F.interpolate(small(padded)[0], (12, 16), mode="bilinear")[..., :10, :13])


@pytest.mark.parametrize("size", [None, (21, 33)])
def test_flipping_averages_the_probabilities_of_both_views_at_the_size_of_the_mask(small, size):
    """As in mmsegmentation: logits are resized, converted to probabilities, and averaged."""
    images = torch.randn(1, 3, 16, 20)
    how = Windows((16, 16), (10, 10), 4)
    straight, mirrored = predict(small, images, how), predict(small, images.flip(-1), how)
    if size:
        straight, mirrored = (F.interpolate(each, size, mode="bilinear") for each in (straight, mirrored))
    expected = torch.zeros_like(straight)
    for k in range(3):
        expected[:, k] += straight[:, k].exp() / straight.exp().sum(dim=1) / 2
        expected[:, k] += mirrored[:, k].flip(-1).exp() / mirrored.flip(-1).exp().sum(dim=1) / 2
    torch.testing.assert_close(predict(small, images, Windows((16, 16), (10, 10), 4, flip=True), size), expected)


# ---- schedule and pictures


def test_the_rate_rises_in_a_line_and_falls_by_a_power():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = optim.warmup_poly(optimizer, steps=50, warmup_steps=10, power=0.9, min_lr=0.5)
    for step in range(50):
        schedule.step_update(step)
        expected = 2.0 * step / 10 if step < 10 else 0.5 + 1.5 * (1 - (step - 10) / 40) ** 0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_colours_differ_and_overlays_show_what_has_no_class():
    palette = colours(150)[:-1].tolist()
    assert len({tuple(colour) for colour in palette}) == 150 and [0, 0, 0] not in palette
    mask = torch.tensor([[0, 1], [IGNORE, 2]])
    found = overlay(torch.ones(3, 2, 2), mask, 3)
    assert found[:, 1, 0].tolist() == [0, 0, 0]
    expected = 0.4 + 0.6 * colours(3)[1] / 255
    torch.testing.assert_close(found[:, 0, 1], expected)


def test_a_picture_shows_image_truth_and_prediction(tmp_path, small):
    def read(index):
        drawn = np.random.default_rng(index)
        return Pair(
            drawn.integers(0, 255, (20, 30, 3), dtype=np.uint8), drawn.integers(0, 3, (20, 30)).astype(np.int16)
        )

    samples = EvalSamples(Source(list("abc"), read), eval_transform(16), mean=(0.0,) * 3, std=(1.0,) * 3)
    windows = Windows((16, 16), (10, 10), 4)
    made = predicted_masks(small, samples, [0, 2], windows=windows, device=ALONE.device, autocast=torch.no_grad)
    assert [each[1].shape == each[2].shape == (20, 30) for each in made] == [True, True]
    state = {name: value.clone() for name, value in small.state_dict().items()}
    small.train()
    again = predicted_masks(small, samples, [0, 2], windows=windows, device=ALONE.device, autocast=torch.no_grad)
    assert small.training, "put back into its mode"
    assert all(torch.equal(one[2], other[2]) for one, other in zip(made, again, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    small.eval()
    assert torch.equal(made[1][1], torch.from_numpy(read(2).mask_HW))
    sheet = mask_sheet(made, 3, tmp_path / "samples" / "m.png")
    assert sheet.shape[1] == 2 * (TILE + 2) + 2 and sheet.shape[0] > 3 * (TILE + 2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "m.png")), sheet.numpy())


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Create 26 training and 5 test images, 24 x 32: a red and a green box on grey, and pixels without a class."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 26), ("val", 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            drawn = np.random.default_rng([number, count])
            image, mask = drawn.integers(90, 140, (24, 32, 3), dtype=np.uint8), np.zeros((24, 32), np.uint8)
            for label in (1, 2):
                top, left = drawn.integers(0, 14), drawn.integers(0, 20)
                image[top : top + 9, left : left + 11] = np.eye(3, dtype=np.uint8)[label - 1] * 200
                mask[top : top + 9, left : left + 11] = label
            mask[:2] = 255
            Image.fromarray(image).save(root / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def true_pixels(data):
    masks = [np.asarray(Image.open(path)) for path in (data / "masks" / "val").iterdir()]
    return [sum(int((mask == label).sum()) for mask in masks) for label in range(3)]


def finish_alone(folder, *words):
    """Run to the end without the options of the tiny model, assert that it succeeds, and return the log."""
    training = Training(folder, *words, script=SCRIPT, tiny=False)
    assert training.wait() == 0, training.stderr
    return training.stderr


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def completed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder, "--data_path", data, script=SCRIPT)
    return folder


def test_a_finished_run_tells_the_last_the_best_and_every_class(completed, data):
    found = result(completed)
    assert found["best_chosen_on"] == "held-out training images" and found["metric"] == "miou"
    assert found["accuracy"].keys() == {"last", "best"}
    last = found["accuracy"]["last"]
    assert last["images"] == 5 and list(last["per_class"]) == list(NAMES)
    assert [row["pixels"] for row in last["per_class"].values()] == true_pixels(data)
    lines = [json.loads(line) for line in (completed / "log.txt").read_text().splitlines()]
    assert {"val_miou", "val_mean_acc", "val_pixel_acc", "train_segmentation"} <= set(lines[-1])
    best = max(lines, key=lambda line: (line["val_miou"], line["epoch"]))
    step = final(completed)["step"] * (best["epoch"] + 1) // final(completed)["epoch"]
    assert found["best"] == {"name": "miou", "value": best["val_miou"], "epoch": best["epoch"], "step": step}
    assert (completed / "classes.txt").read_text().split() == list(NAMES)
    assert len((completed / "images_train.txt").read_text().splitlines()) == 24
    assert [path.name for path in (completed / "samples").iterdir()] == ["masks_e0003.png"]
    said = (completed / "train.log").read_text()
    assert "UPerNet on the outputs of blocks (0, 0, 0, 1)" in said and "masks: 26 grey" in said


def test_a_run_killed_anywhere_ends_like_an_uninterrupted_one(completed, data, tmp_path):
    folder, words = tmp_path / "run", ["--data_path", data, "--save_steps", "2"]
    for kill in (2, 5):
        Training(folder, *words, script=SCRIPT).kill_at(kill)
    finish(folder, *words, "--num_workers", "1", script=SCRIPT)
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)
    assert result(folder)["accuracy"] == result(completed)["accuracy"]


def test_a_signal_saves_and_exits_with_75(data, tmp_path):
    training = Training(tmp_path / "run", "--data_path", data, script=SCRIPT)
    training.wait_for_step(2)
    training.send(signal.SIGTERM)
    assert training.wait() == 75
    assert final(tmp_path / "run")["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_eval_reports_the_metrics_of_training(completed, data, tmp_path):
    """With the windows of the run, and with others if given."""
    path = completed / "checkpoints" / "last.pth"
    said = finish(tmp_path / "none", "--eval", "--resume", path, "--data_path", data, script=SCRIPT)
    last = result(completed)["accuracy"]["last"]
    assert f"mIoU {last['miou']:.2f}%, mean accuracy {last['mean_acc']:.2f}%" in said
    assert not (tmp_path / "none").exists(), "an evaluation writes nothing"
    words = ["--window", "whole", "--flip"]
    other = finish(tmp_path / "none", "--eval", "--resume", path, "--data_path", data, *words, script=SCRIPT)
    assert "on 5 test images: mIoU" in other
    names = (completed / "classes.txt").read_text().split()
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(names)))
    words = ["--eval", "--resume", path, "--data_path", data, "--class_list", tmp_path / "reversed.txt"]
    refused = Training(tmp_path / "none", *words, script=SCRIPT)
    assert refused.wait() == 2
    assert f"{names[-1]} is class 2 of the segmenter, and class 0 of the data" in refused.stderr


def test_two_ranks_count_every_pixel_once(data, tmp_path):
    """Five images for two processes; one process computes the same metrics from their checkpoint."""
    words = ["--data_path", data, "--epochs", 1]
    ranks = start_ranks(2, tmp_path / "two", *words, script=SCRIPT)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    last = result(tmp_path / "two")["accuracy"]["last"]
    assert last["images"] == 5 and [row["pixels"] for row in last["per_class"].values()] == true_pixels(data)
    options = main_segment.parse_options(
        [
            "--eval",
            "--resume",
            str(tmp_path / "two/checkpoints/last.pth"),
            "--data_path",
            str(data),
            "--num_workers",
            "0",
        ]
    )
    options = segment.resolve(options)
    weights, made_with = checkpoint.load_model(options.resume)
    model = segment.build_model(options, 3, ALONE)
    models_upernet.load_segmenter(model, weights, made_with)
    alone = evaluate(
        model,
        segment.image_batches(options, segment.masks.open_test(options, ALONE), ALONE),
        names=NAMES,
        windows=segment.make_windows(options, model.patch),
        processes=ALONE,
        autocast=torch.no_grad,
    )
    assert alone == last


def test_steps_and_their_warmup_end_a_run_within_an_epoch(data, tmp_path):
    words = ["--steps", 7, "--warmup_steps", 2, "--layer_decay", 1, "--picture_every", 0]
    finish(tmp_path / "run", "--data_path", data, *words, script=SCRIPT)
    assert result(tmp_path / "run")["steps"] == 7
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    top = rates[2]
    assert rates == pytest.approx([0, top / 2, top, *(top * (1 - step / 5) for step in range(1, 5))])
    more = ["--steps", 10, "--allow_change", "steps"]
    finish(tmp_path / "run", "--data_path", data, *words, *more, script=SCRIPT)
    assert result(tmp_path / "run")["steps"] == 10
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates[7:] == pytest.approx([top * (1 - step / 8) for step in range(5, 8)])


@pytest.mark.parametrize("kind", ["pretrained", "segmenter"])
def test_a_checkpoint_begins_a_run_and_need_not_be_described(kind, completed, data, tmp_path):
    if kind == "pretrained":
        words = ["--data_path", "scenes", "--in_chans", 3, "--input_size", 32, "--model", "mae_vit_tiny_patch8"]
        finish(tmp_path / "pre", *words, "--epochs", 1, "--total_batch_size", 500, script="main_pretrain")
    start = (tmp_path / "pre" if kind == "pretrained" else completed) / "checkpoints" / "last.pth"
    options = main_segment.parse_options(["--init_from", str(start)])
    assert (options.embed_dim, options.depth, options.num_heads) == (24, 2, 2) and options.input_size == (512, 512)
    words = ["--init_from", start, "--data_path", data, "--input_size", 16, "--total_batch_size", 8, "--steps", 1]
    machine = ["--device", "cpu", "--num_workers", 0, "--picture_every", 0]
    said = finish_alone(tmp_path / "run", *words, *machine)
    assert "tensors loaded" in said
    assert ("resampled to this model's grid: pos_embed" in said) == (kind == "pretrained")


def test_bad_input_is_reported_before_any_epoch(completed, data, tmp_path):
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "headless.pth")
    last = completed / "checkpoints" / "last.pth"
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    at = ["--data_path", data]
    cases = [
        ([], "no data: give --data_path FOLDER"),
        (["--data_path", tmp_path], "must hold a folder images"),
        ([*at, "--batch_size", 1, "--total_batch_size", 4], "batch norm compares the images"),
        ([*at, "--init_from", tmp_path / "headless.pth"], "no encoder"),
        ([*at, "--init_from", last, "--num_heads", 4], "2 attention heads, the model has 4"),
        ([*at, "--eval"], "eval needs a checkpoint"),
        ([*at, "--eval", "--resume", last, "--class_list", tmp_path / "four.txt"], "are for 3 classes, the data has 4"),
        ([*at, "--stride", 17], "17 leaves gaps between windows of 16 pixels"),
        ([*at, "--input_size", 18], "patches of 4 x 4 pixels do not fill images of 18 x 18"),
        ([*at, "--dataset", "ade"], "dataset"),
    ]
    runs = [(Training(tmp_path / f"run{n}", *words, script=SCRIPT), told) for n, (words, told) in enumerate(cases)]
    for number, (training, told) in enumerate(runs):
        assert training.wait() == 2, training.stderr
        assert told in training.stderr and "Traceback" not in training.stderr
        assert not (tmp_path / f"run{number}").exists()


def test_a_run_that_became_unstable_is_replayed(data, tmp_path, capsys):
    training = Training(tmp_path / "run", "--data_path", data, "--lr", "1e30", "--max_bad_steps", 2, script=SCRIPT)
    assert training.wait() == 3, training.stderr
    (dump,) = (tmp_path / "run" / "debug").glob("*.json")
    assert replay.main([str(dump), "--device", "cpu"]) == 0
    assert "not finite" in capsys.readouterr().out


# ---- figure 9


def test_figure_9_shows_runs_side_by_side(completed, data, tmp_path, capsys):
    words = ["--count", "2", "--device", "cpu", "--no_tensorboard"]
    output = tmp_path / "figure9.png"
    best = str(completed / "checkpoints" / "best.pth")
    assert visualize.main(["figure9", str(completed), best, *words, "--output", str(output)]) == 0
    with Image.open(output) as drawn:
        assert drawn.width > drawn.height and np.asarray(drawn.convert("RGB")).std() > 20
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "other.pth")
    assert visualize.main(["figure9", str(tmp_path / "other.pth"), *words]) == 2
    assert "is not a segmenter of main_segment.py" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a segmenter, whose encoder has no last norm"):
        encoder.load(completed / "checkpoints" / "last.pth")


# ---- recipes


def test_the_earlier_names_of_the_resize_factors_are_read():
    options = main_segment.parse_options(["--min_scale", "0.6", "--max_scale", "1.5"])
    assert (options.min_resize, options.max_resize) == (0.6, 1.5)
    stored = to_dict(options)
    earlier = {{"min_resize": "min_scale", "max_resize": "max_scale"}.get(name, name): stored[name] for name in stored}
    assert from_dict(SegmentOptions, earlier) == options
    assert differences(SegmentOptions, earlier, stored) == []


def recipe(name, *words):
    return main_segment.parse_options(["-c", str(PROJECT / f"configs/segment/{name}.yaml"), *words])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_command_runs_it_and_it_holds_only_what_differs(path, completed):
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("#   ")]
    given = shlex.split(command.lstrip("# "))
    given = given[given.index("main_segment.py") + 1 :]
    assert given[:2] == ["-c", str(path.relative_to(PROJECT))]
    weights = str(completed / "checkpoints" / "last.pth")
    assert recipe(path.stem, *(weights if word == "CHECKPOINT" else word for word in given[2:])).data_path
    defaults = {field.name: get_default(field) for field in fields(SegmentOptions)}
    resolved = recipe(path.stem)
    assert not [name for name in yaml.safe_load(path.read_text()) if getattr(resolved, name) == defaults[name]]


def test_ade20k_is_trained_as_published():
    epochs, steps = recipe("ade20k"), recipe("ade20k_160k")
    for found in (epochs, steps):
        rate = optim.absolute_lr(found.lr, found.blr, found.total_batch_size)
        assert (rate, found.total_batch_size, found.warmup_steps, found.holdout) == (pytest.approx(1e-4), 16, 1500, 0)
        assert (found.layer_decay, found.drop_path, found.weight_decay, found.power) == (0.65, 0.1, 0.05, 1.0)
        assert (found.input_size, found.min_resize, found.max_resize, found.max_class_share) == (
            (512, 512),
            0.5,
            2.0,
            0.75,
        )
        assert segment.make_windows(found, 16) == Windows((512, 512), (341, 341), 16, batch=0)
        for processes in (1, 2, 4, 8):
            assert resolve_batch(found, processes).batch_size == 16 // processes
    assert (epochs.epochs, epochs.steps, steps.steps) == (100, 0, 160_000)


@pytest.mark.slow
def test_the_quickstart_is_far_above_chance(tmp_path):
    """Predicting "ground" everywhere has 13%."""
    finish_alone(tmp_path / "run", "-c", PROJECT / "configs/segment/quickstart.yaml", "--device", "cpu")
    assert result(tmp_path / "run")["accuracy"]["last"]["miou"] > 40
    assert not math.isnan(result(tmp_path / "run")["last"]["train_loss"])
