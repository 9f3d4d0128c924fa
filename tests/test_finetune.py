"""Fine-tuning: objective and evaluation compared with loops, learning rates of layers with MAE's; complete runs."""

import argparse
import itertools
import json
import math
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import main_finetune
import models_classifier
from data.augment import finetune_transform
from data.loader import Batch
from engine_finetune import Distillation, Objective, evaluate
from tests.runs import Training, assert_same_end, final, finish, losses, metrics, start_ranks
from util import checkpoint, optim
from util.distributed import Processes
from util.evaluation import Evaluation
from util.run import Run

SCRIPT = "main_finetune"
STEPS_PER_EPOCH = 5
ALONE = Processes(0, 1, 0, torch.device("cpu"))
SMALL = dict(input_size=(8, 8), in_chans=1, embed_dim=24, depth=2, num_heads=2)


def classifier(num_classes=10, **changes):
    torch.manual_seed(0)
    return models_classifier.build("mae_vit_tiny_patch2", num_classes=num_classes, **(SMALL | changes))


def result(folder):
    return json.loads((folder / "result.json").read_text())


# ---- the model


@pytest.mark.parametrize(("pool", "classes", "count"), [("avg", 1000, 5_717_416), ("token", 100, 5_543_716)])
def test_the_classifier_is_timms_with_twelve_heads(pool, classes, count):
    ours = models_classifier.build(
        "mae_vit_tiny_patch16", num_classes=classes, input_size=(224, 224), global_pool=pool
    ).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_heads=12, global_pool=pool, num_classes=classes).eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == count
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layers_have_maes_rates(pool):
    """Stem .65^13, block i .65^(12 - i), all else 1; no decay for vectors, class token and positions."""
    model = models_classifier.build("mae_vit_tiny_patch16", num_classes=9, input_size=(32, 32), global_pool=pool)
    found = {}
    for group in optim.finetune_groups(model, 0.05, 0.65):
        for parameter in group["params"]:
            found[id(parameter)] = group["lr_scale"], group["weight_decay"]
    for name, parameter in model.named_parameters():
        stem, block = name.startswith(("cls_token", "pos_embed", "patch_embed")), name.startswith("blocks.")
        layer = 0 if stem else int(name.split(".")[1]) + 1 if block else 13
        decay = 0.0 if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else 0.05
        scale, weight_decay = found[id(parameter)]
        assert scale == pytest.approx(0.65 ** (13 - layer)) and weight_decay == decay, name
    shown = dict(
        (parts[0], scale)
        for scale, parts in models_classifier.list_layers(model, optim.finetune_groups(model, 0.05, 0.65))
    )
    assert shown["cls_token"] == pytest.approx(0.003697, rel=1e-3)
    assert shown["blocks.0"] == pytest.approx(0.005688, rel=1e-3)
    assert shown["blocks.11"] == 0.65


def test_a_new_head_starts_near_zero_and_a_fitting_one_is_kept():
    source = classifier(num_classes=10)
    same, other = classifier(num_classes=10), classifier(num_classes=7)
    models_classifier.load_encoder(same, source.state_dict(), {})
    assert torch.equal(same.head.weight, source.head.weight)
    models_classifier.load_encoder(other, source.state_dict(), {})
    assert 0 < other.head.weight.abs().max() < 1e-4
    assert torch.equal(other.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_from_scratch_the_class_token_is_as_wide_as_maes():
    """timm 0.3.2, which MAE requires, initialises it and the positions with std 0.02; current timm uses 1e-6."""
    torch.manual_seed(0)
    model = models_classifier.build("mae_vit_base_patch16", num_classes=2, input_size=(32, 32), depth=1)
    for drawn in (model.cls_token, model.pos_embed, model.blocks[0].mlp.fc1.weight):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.blocks[0].mlp.fc1.bias.any()


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 12), (16, 6)])
def test_positions_are_resampled_to_another_grid_as_mae_does(size):
    source = classifier(in_chans=4)
    report = models_classifier.load_encoder(model := classifier(input_size=size, in_chans=4), source.state_dict(), {})
    table = source.pos_embed[:, 1:].transpose(1, 2).reshape(1, 24, 4, 4)
    grid = size[0] // 2, size[1] // 2
    expected = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])
    assert bool(report.resampled) == (grid != (4, 4))


def test_positions_of_a_rectangle_go_by_the_options_it_was_made_with():
    source = classifier(input_size=(8, 18))
    made_with = {"input_size": [8, 18], "model": "mae_vit_tiny_patch2", "num_heads": 2}
    model = classifier(input_size=(12, 12))  # as many patches, but not the same grid
    assert models_classifier.load_encoder(model, source.state_dict(), made_with).resampled == ["pos_embed"]
    table = source.pos_embed[:, 1:].transpose(1, 2).reshape(1, 24, 4, 9)
    expected = F.interpolate(table, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, 1:], expected, atol=1e-6, rtol=1e-6)


def test_other_heads_another_size_and_no_encoder_are_refused():
    weights = classifier().state_dict()
    with pytest.raises(ValueError, match="2 attention heads, the model has 4"):
        made_with = {"input_size": [8, 8], "model": "mae_vit_tiny_patch2", "num_heads": 2}
        models_classifier.load_encoder(classifier(num_heads=4), weights, made_with)
    with pytest.raises(ValueError, match="other sizes"):
        models_classifier.load_encoder(classifier(embed_dim=48), weights, {})
    with pytest.raises(ValueError, match="no encoder"):
        models_classifier.load_encoder(classifier(), {"head.weight": weights["head.weight"]}, {})
    with pytest.raises(ValueError, match="10 classes, the data have 7"):
        models_classifier.load_classifier(classifier(num_classes=7), weights, {})
    with pytest.raises(ValueError, match="global_pool"):
        models_classifier.load_classifier(classifier(global_pool="token"), weights, {})


# ---- objective and evaluation


def test_mixed_targets_are_smoothed_and_weighted_by_hand():
    """Draw mixup's coefficient again, smooth the targets with .1 / C, and sum the cross-entropy in a loop."""
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 0, 9, 9])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    objective = Objective(model, classes=10, mixup=0.8, smoothing=0.1)
    np.random.seed(5)
    loss = objective(images.clone(), labels)["loss"]
    np.random.seed(5)
    np.random.rand()  # mixup's draw whether to mix
    share = np.random.beta(0.8, 0.8)
    logits = model(share * images + (1 - share) * images.flip(0)).log_softmax(dim=1)
    expected = 0.0
    for n in range(4):
        for c in range(10):
            target = 0.1 / 10
            target += 0.9 * share * (labels[n] == c).item() + 0.9 * (1 - share) * (labels[3 - n] == c).item()
            expected -= target * logits[n, c].item() / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_mixing_labels_are_smoothed():
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([3, 0, 9])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    logits = model(images).log_softmax(dim=1)
    expected = -(0.9 * logits[range(3), labels] + 0.1 * logits.mean(dim=1)).mean()
    torch.testing.assert_close(Objective(model, classes=10, smoothing=0.1)(images, labels)["loss"], expected)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_predictions_of_a_teacher_are_learned_by_hand(kind):
    images, labels = torch.randn(3, 1, 8, 8), torch.tensor([3, 0, 9])
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    found = Objective(model, classes=10, distillation=Distillation(teacher, 0.3, 2.0, kind))(images, labels)
    expected = 0.0
    for n in range(3):
        if kind == "hard":
            expected -= model(images)[n].log_softmax(0)[teacher(images)[n].argmax()] / 3
        else:
            p, q = ((x(images)[n] / 2).softmax(0) for x in (teacher, model))
            expected += 4 * sum(p[c] * (p[c] / q[c]).log() for c in range(10)) / 3
    torch.testing.assert_close(found["distillation"], expected)
    torch.testing.assert_close(found["label"], F.cross_entropy(model(images), labels))
    torch.testing.assert_close(found["loss"], 0.7 * found["label"] + 0.3 * found["distillation"])
    equal = Objective(model, classes=10, distillation=Distillation(model))(images, labels)
    assert equal["distillation"].item() == pytest.approx(0, abs=1e-6)


def test_evaluation_is_what_a_loop_counts():
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(53, 8, generator=generator), torch.randint(0, 7, (53,), generator=generator)
    batches = [
        Batch(logits[i : i + 10], labels[i : i + 10], None, torch.arange(i, min(i + 10, 53))) for i in range(0, 53, 10)
    ]
    figures = evaluate(nn.Identity(), batches, classes=8, processes=ALONE, autocast=torch.no_grad)
    right = [int(logits[n].argmax() == labels[n]) for n in range(53)]
    five = [int(labels[n] in logits[n].argsort(descending=True)[:5]) for n in range(53)]
    of_class = [[right[n] for n in range(53) if labels[n] == c] for c in range(7)]
    assert figures["acc1"] == pytest.approx(100 * sum(right) / 53)
    assert figures["acc5"] == pytest.approx(100 * sum(five) / 53)
    assert figures["mean_class_acc"] == pytest.approx(100 * sum(sum(c) / len(c) for c in of_class) / 7)
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert figures["images"] == 53
    counted = [[sum(labels[n] == c and logits[n].argmax() == d for n in range(53)) for d in range(8)] for c in range(8)]
    assert figures["confusion"] == counted


@pytest.mark.parametrize("classes", [2, 7])
def test_equal_logits_count_alike_in_the_accuracy_and_in_the_confusion_matrix(classes):
    labels = torch.arange(400) % classes
    logits = torch.randint(0, 2, (400, classes), generator=torch.Generator().manual_seed(0)).float()  # many ties
    batch = Batch(logits, labels, None, torch.arange(400))
    figures = evaluate(nn.Identity(), [batch], classes=classes, processes=ALONE, autocast=torch.no_grad)
    right = sum(figures["confusion"][c][c] for c in range(classes))
    assert figures["acc1"] == 100 * right / 400 and figures.get("acc5", 100) >= figures["acc1"]


def test_more_than_100_classes_have_no_confusion_matrix():
    batch = Batch(torch.eye(101), torch.arange(101), None, torch.arange(101))
    figures = evaluate(nn.Identity(), [batch], classes=101, processes=ALONE, autocast=torch.no_grad)
    assert figures["acc1"] == 100 and "confusion" not in figures


def test_few_classes_have_no_top_5():
    logits, labels = torch.eye(5), torch.arange(5)
    batch = Batch(logits, labels, None, torch.arange(5))
    assert "acc5" not in evaluate(nn.Identity(), [batch], classes=5, processes=ALONE, autocast=torch.no_grad)


def augmented(aa, reprob):
    transform = finetune_transform(
        (32, 32), min_scale=1.0, hflip=0.0, aa=aa, color_jitter=0.0, reprob=reprob, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    return transform(np.full((32, 32, 3), 255, np.uint8))


def test_erased_rectangles_are_noise_in_a_normalised_image():
    assert torch.equal(augmented("", 0.0), torch.full((3, 32, 32), 255, dtype=torch.uint8))
    erased_HW = (augmented("", 1.0) != 2.0).any(dim=0)  # white is (1 - .5) / .25
    rows, columns = erased_HW.any(dim=1).nonzero(), erased_HW.any(dim=0).nonzero()
    assert erased_HW.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1), "a rectangle"
    assert 0.02 < erased_HW.float().mean() < 0.4


def test_automatic_augmentation_is_drawn_from_the_seeds_of_a_sample():
    image = augmented("rand-m9-mstd0.5-inc1", 0.25)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert torch.equal(image, augmented("rand-m9-mstd0.5-inc1", 0.25))


def test_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="timm knows no augmentation 'rnad'"):
        finetune_transform(
            (8, 8), min_scale=1.0, hflip=0.0, aa="rnad", color_jitter=0.0, reprob=0.0, mean=(0.5,) * 3, std=(0.5,) * 3
        )


# ---- runs


@pytest.fixture(scope="module")
def completed(tmp_path_factory, pretrained):
    """An uninterrupted run with mixing, erasing, drop path and a moving average."""
    folder = tmp_path_factory.mktemp("completed") / "run"
    finish(folder, "--init_from", pretrained, "--ema", "0.9", script=SCRIPT)
    return folder


def test_a_finished_run_tells_the_last_and_the_best(completed):
    names = {path.name for path in completed.iterdir()}
    assert {"options.yaml", "log.txt", "metrics.jsonl", "result.json", "images_train.txt", "images_test.txt"} <= names
    found = result(completed)
    assert found["best_chosen_on"] == "held-out training images" and found["metric"] == "acc1"
    assert found["accuracy"].keys() == {"last", "best"}
    assert found["accuracy"]["last"]["images"] == 445
    lines = [json.loads(line) for line in (completed / "log.txt").read_text().splitlines()]
    best = max(lines, key=lambda line: (line["val_acc1"], line["epoch"]))
    assert found["best"] == {
        "name": "acc1",
        "value": best["val_acc1"],
        "epoch": best["epoch"],
        "step": (best["epoch"] + 1) * STEPS_PER_EPOCH,
    }
    assert checkpoint.load(completed / "checkpoints" / "best.pth")["epoch"] == best["epoch"] + 1
    train, choice, test = (
        (completed / f"images_{name}.txt").read_text().splitlines() for name in ("train", "choice", "test")
    )
    assert not set(train) & set(choice) and len(train) + len(choice) == 1352 and len(test) == 445
    said = (completed / "train.log").read_text()
    assert "held-out training images" in said
    assert all(words in said for words in ("digits: 1352 images", "weights from", "x 0.650000): blocks.1"))


def test_a_run_killed_anywhere_ends_like_an_uninterrupted_one(completed, pretrained, tmp_path):
    folder, words = tmp_path / "run", ["--init_from", pretrained, "--ema", "0.9", "--save_steps", "2"]
    for kill in (3, STEPS_PER_EPOCH + 2):
        Training(folder, *words, script=SCRIPT).kill_at(kill)
    finish(folder, *words, "--num_workers", "1", script=SCRIPT)
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)
    one, other = final(completed), final(folder)
    assert all(torch.equal(value, other["ema"][name]) for name, value in one["ema"].items())
    assert result(folder)["accuracy"] == result(completed)["accuracy"]
    assert result(folder)["best"] == result(completed)["best"], "the best survives"


def test_a_run_learns_from_a_teacher_and_resumes_with_no_other(completed, pretrained, tmp_path):
    folder, teacher = tmp_path / "run", tmp_path / "teacher.pth"
    teacher.write_bytes((completed / "checkpoints/last.pth").read_bytes())
    words = ["--init_from", pretrained, "--distill_from", teacher, "--epochs", 1]
    finish(folder, *words, script=SCRIPT)
    assert {"loss", "label", "distillation"} <= metrics(folder)[-1].keys()
    other = torch.load(teacher, weights_only=True)
    other["ema"]["head.bias"] += 1
    torch.save(other, teacher)
    refused = Training(folder, *words, "--epochs", 2, "--allow_change", "epochs", script=SCRIPT)
    assert refused.wait() == 2 and "distill_digest" in refused.stderr


def test_a_signal_saves_and_exits_with_75(tmp_path):
    training = Training(tmp_path / "run", script=SCRIPT)
    training.wait_for_step(2)
    training.send(signal.SIGTERM)
    assert training.wait() == 75
    assert final(tmp_path / "run")["step"] == metrics(tmp_path / "run")[-1]["step"]


def test_a_kill_after_the_last_epoch_still_ends_in_a_result(completed, pretrained, tmp_path):
    """The evaluation at the end is repeated."""
    folder, words = tmp_path / "run", ["--init_from", pretrained, "--ema", "0.9"]
    finish(folder, *words, script=SCRIPT)
    (folder / "result.json").unlink()
    finish(folder, *words, script=SCRIPT)
    assert result(folder)["accuracy"] == result(completed)["accuracy"]


def test_a_kill_before_the_best_has_its_name_costs_nothing(tmp_path):
    words = ["--epochs", 2, "--eval_every", 2]
    finish(tmp_path / "run", *words, script=SCRIPT)
    accuracy = result(tmp_path / "run")["accuracy"]
    for name in ("result.json", "checkpoints/best.pth"):
        (tmp_path / "run" / name).unlink()
    finish(tmp_path / "run", *words, script=SCRIPT)
    assert result(tmp_path / "run")["accuracy"] == accuracy and accuracy["best"]


def first_is_best():
    record = Run.record_best
    Run.record_best = lambda self, name, value: None if self.state.best else record(self, name, value)


def latest_is_best():
    record = Run.record_best
    Run.record_best = lambda self, name, value: (self.state.best.clear(), record(self, name, value))


def test_a_run_resumed_from_an_epoch_file_in_a_new_folder_has_the_best_of_the_uninterrupted_one(tmp_path):
    words = ["--epochs", 3, "--save_every", 1]
    finish(tmp_path / "run", *words, script=SCRIPT, fault=first_is_best)
    files, expected = tmp_path / "run" / "checkpoints", result(tmp_path / "run")
    assert expected["accuracy"]["best"] != expected["accuracy"]["last"]
    best = checkpoint.load(files / "epoch-0001.pth")["model"]["head.weight"]
    for epoch in (1, 2):  # the best epoch itself, and the one after it
        again = tmp_path / f"again{epoch}"
        finish(again, *words, "--resume", files / f"epoch-000{epoch}.pth", script=SCRIPT, fault=first_is_best)
        assert result(again)["accuracy"] == expected["accuracy"] and result(again)["best"] == expected["best"]
        assert torch.equal(checkpoint.load(again / "checkpoints" / "best.pth")["model"]["head.weight"], best)


def test_going_back_to_an_earlier_epoch_goes_back_to_its_best(tmp_path):
    folder, words = tmp_path / "run", ["--epochs", 2, "--save_every", 1]
    finish(folder, *words, script=SCRIPT, fault=latest_is_best)
    assert checkpoint.load(folder / "checkpoints" / "best.pth")["epoch"] == 2
    first = folder / "checkpoints" / "epoch-0001.pth"
    words += ["--resume", first, "--lr", 1e-4, "--allow_change", "lr"]
    finish(folder, *words, script=SCRIPT, fault=first_is_best)
    assert result(folder)["best"]["epoch"] == 0 and "best" in result(folder)["accuracy"]
    best = checkpoint.load(folder / "checkpoints" / "best.pth")
    assert torch.equal(best["model"]["head.weight"], checkpoint.load(first)["model"]["head.weight"])


def test_a_best_that_could_not_be_saved_costs_itself_and_no_other_takes_its_place(tmp_path, caplog):
    model, average = nn.Linear(2, 2), {"weight": torch.full((2, 2), 7.0), "bias": torch.zeros(2)}
    best = {"format": 1, "model": model.state_dict(), "ema": average, "options": {}, "epoch": 3, "best": {"epoch": 2}}
    best["step"] = 30
    checkpoint.save(tmp_path / "best.pth", best)
    run = SimpleNamespace(
        processes=ALONE,
        checkpoints=tmp_path,
        state=SimpleNamespace(best={"epoch": 2}, is_best=False),
        leave_if_stopped=lambda: None,
    )
    how = {"metric": "acc1", "chosen_on": "the test images", "every": 1, "describe": str}
    evaluation = Evaluation(run, model, lambda images: {"acc1": 50.0, "images": 4}, **how)
    with caplog.at_level("INFO"):
        assert evaluation.at_end()["accuracy"].keys() == {"last", "best"}
    assert torch.equal(model.weight, average["weight"]), "the average is evaluated"
    assert "the best epoch, epoch 3, was chosen by acc1 on the test images" in caplog.text
    run.state.best = {"epoch": 4}
    assert evaluation.at_end()["accuracy"].keys() == {"last"}


@pytest.mark.parametrize(
    ("chosen_on", "best", "evaluated"),
    [
        ("the test images", 1, ["choice", "choice"]),
        ("the test images", 0, ["choice", "choice", "test"]),
        ("held-out images", 1, ["choice", "choice", "test"]),
        ("held-out images", 0, ["choice", "choice", "test", "test"]),
    ],
)
def test_nothing_is_evaluated_twice(chosen_on, best, evaluated, tmp_path):
    """The evaluation after the last epoch is reused if it used the test images, and if the last epoch is the best."""
    model = nn.Linear(2, 2)
    saved = {"format": 1, "model": model.state_dict(), "options": {}, "epoch": best + 1, "best": {"epoch": best}}
    saved["step"] = 10
    checkpoint.save(tmp_path / "best.pth", saved)
    state = SimpleNamespace(best={"epoch": best}, is_best=best == 1)
    run = SimpleNamespace(
        processes=ALONE,
        checkpoints=tmp_path,
        state=state,
        options=SimpleNamespace(epochs=2),
        source=SimpleNamespace(classes=["a", "b"]),
        record_best=lambda name, value: None,
        leave_if_stopped=lambda: None,
    )
    calls = []

    def measure(images):
        calls.append(images)
        return {"acc1": float(len(calls)), "images": 4, "confusion": [[len(calls), 0], [0, 0]]}

    evaluation = Evaluation(run, model, measure, metric="acc1", chosen_on=chosen_on, every=1, describe=str)
    evaluation.after_epoch(0)
    evaluation.after_epoch(1)
    found = evaluation.at_end()
    last = {"the test images": 2, "held-out images": 3}[chosen_on]
    assert calls == evaluated
    assert found["accuracy"]["last"] == {"acc1": last, "images": 4}
    assert found["accuracy"]["best"] == {"acc1": last if best == 1 else len(calls), "images": 4}
    assert found["confusion"]["matrix"] == [[last, 0], [0, 0]]


def test_two_ranks_are_one_process_without_mixup(tmp_path):
    words = ["--mixup", 0, "--cutmix", 0, "--drop_path", 0, "--epochs", 2, "--holdout", 0.013, "--optimizer", "sgd"]
    finish(tmp_path / "one", *words, script=SCRIPT)
    ranks = start_ranks(2, tmp_path / "two", *words, script=SCRIPT)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    for step, loss in losses(tmp_path / "one").items():
        assert losses(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4)
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    for name in ("last", "best"):
        assert two["accuracy"][name]["images"] == 445, "an odd number of images, each counted once"
        assert two["accuracy"][name]["loss"] == pytest.approx(one["accuracy"][name]["loss"], rel=1e-4)
        assert two["accuracy"][name]["acc1"] == pytest.approx(one["accuracy"][name]["acc1"], abs=100 / 445)


def test_steps_end_a_run_within_an_epoch(tmp_path):
    said = finish(tmp_path / "run", "--steps", "7", "--warmup_epochs", 0, "--min_lr", 0, script=SCRIPT)
    assert "no --init_from: the encoder starts from random weights" in said
    assert f"next: python -m tools.predict {tmp_path / 'run'} IMAGES" in said
    assert "2 epochs x 5 steps, the last epoch cut short, = 7 updates" in said
    assert result(tmp_path / "run")["steps"] == 7 and len(metrics(tmp_path / "run")) == 7
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx([rates[0] * 0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(7)])
    words = ["--steps", "7", "--warmup_epochs", 0, "--min_lr", 0, "--save_steps", 1]
    Training(tmp_path / "killed", *words, script=SCRIPT).kill_at(6)  # the first step of the incomplete epoch
    finish(tmp_path / "killed", *words, script=SCRIPT)
    assert_same_end(tmp_path / "run", tmp_path / "killed")
    assert result(tmp_path / "killed")["accuracy"] == result(tmp_path / "run")["accuracy"]


CONSTANT_RATE = ["--warmup_epochs", 0, "--lr", 1e-3, "--min_lr", 1e-3, "--layer_decay", 1, "--ema", 0.5]


def test_a_run_that_is_given_more_steps_ends_like_one_that_had_them_from_the_start(tmp_path):
    folder, accepted = tmp_path / "run", ["--allow_change", "steps"]
    finish(tmp_path / "direct", *CONSTANT_RATE, "--steps", 12, script=SCRIPT)
    finish(folder, *CONSTANT_RATE, "--steps", 7, script=SCRIPT)
    said = finish(folder, *CONSTANT_RATE, "--steps", 9, *accepted, script=SCRIPT)  # within the epoch
    assert "epoch 2 continues after 2 of 5 steps" in said
    assert (result(folder)["steps"], result(folder)["last"]["step"], len(metrics(folder))) == (9, 9, 9)
    finish(folder, *CONSTANT_RATE, "--steps", 12, *accepted, script=SCRIPT)  # beyond it
    assert "is finished" in finish(folder, *CONSTANT_RATE, "--steps", 12, script=SCRIPT)
    assert_same_end(tmp_path / "direct", folder)
    one, other = final(tmp_path / "direct"), final(folder)
    assert all(torch.equal(value, other["ema"][name]) for name, value in one["ema"].items())
    assert losses(folder) == losses(tmp_path / "direct") and len(metrics(folder)) == 12
    assert result(folder)["accuracy"]["last"] == result(tmp_path / "direct")["accuracy"]["last"]

    def epochs(folder):
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        return {line["epoch"]: {name: line[name] for name in line.keys() - {"run_id"}} for line in lines}

    assert epochs(folder) == epochs(tmp_path / "direct"), "means over all steps of an epoch"


def test_the_best_of_an_epoch_cut_short_is_kept_when_more_steps_follow(tmp_path):
    folder, words = tmp_path / "run", [*CONSTANT_RATE, "--eval_every", 2, "--save_every", 1]
    finish(folder, *words, "--steps", 7, script=SCRIPT, fault=first_is_best)
    before = result(folder)
    finish(folder, *words, "--steps", 10, "--allow_change", "steps", script=SCRIPT, fault=first_is_best)
    after = result(folder)
    assert (after["best"], after["best"]["step"]) == (before["best"], 7)
    assert after["accuracy"]["best"] == before["accuracy"]["last"] != after["accuracy"]["last"]
    assert checkpoint.load(folder / "checkpoints" / "best.pth")["step"] == 7


def test_steps_and_epochs_are_refused_with_advice_that_leads_on(tmp_path):
    def refusal(*words):
        training = Training(tmp_path / "run", *CONSTANT_RATE, *words, script=SCRIPT)
        assert training.wait() == 2
        return training.stderr

    finish(tmp_path / "run", *CONSTANT_RATE, "--steps", 7, script=SCRIPT)
    said = refusal("--steps", 17)
    assert "steps  7 -> 17" in said and "accept it with --allow_change steps." in said
    said = refusal("--epochs", 4, "--allow_change", "epochs")
    assert "steps  7 -> 0" in said and "accept it with --allow_change epochs steps." in said
    assert "step 7 is beyond the 6 steps of --steps 6: " in refusal("--steps", 6, "--allow_change", "steps")
    batch = ["--total_batch_size", 128, "--allow_change", "steps", "total_batch_size"]
    assert "continues only with total_batch_size 256, not 128" in refusal("--steps", 17, *batch)
    finish(tmp_path / "run", *CONSTANT_RATE, "--epochs", 2, "--allow_change", "epochs", "steps", script=SCRIPT)
    assert result(tmp_path / "run")["steps"] == len(metrics(tmp_path / "run")) == 10


def follow_the_average():
    """Record, in the process of a run, the head's bias before the first and after each update, and its average.

    The loss of the third update is not finite.
    """
    prepare, after_step, path = Run.prepare, Run.after_step, os.environ["AVERAGES"]
    forward, calls = Objective.forward, itertools.count(1)

    def third_is_bad(self, *batch, **more):
        losses = forward(self, *batch, **more)
        return {"loss": losses["loss"] * (math.nan if next(calls) == 3 else 1.0)}

    def prepare_and_note(self, model, *args, ema, **others):
        self.noted = [(model.head.bias.tolist(), ema.head.bias.tolist())]
        self.pair = model, ema
        prepare(self, model, *args, ema=ema, **others)

    def step_and_note(self):
        self.noted.append(tuple(each.head.bias.tolist() for each in self.pair))
        Path(path).write_text(json.dumps(self.noted))
        after_step(self)

    Objective.forward, Run.prepare, Run.after_step = third_is_bad, prepare_and_note, step_and_note


def test_the_moving_average_follows_every_update_that_is_not_refused(pretrained, tmp_path):
    words = ["--init_from", pretrained, "--ema", "0.75", "--epochs", 1, "--warmup_epochs", 0]
    environment = {"AVERAGES": str(tmp_path / "averages.json")}
    training = Training(tmp_path / "run", *words, script=SCRIPT, environment=environment, fault=follow_the_average)
    assert training.wait() == 0, training.stderr
    noted = torch.tensor(json.loads((tmp_path / "averages.json").read_text()), dtype=torch.float64)
    weights, averages = noted[:, 0], noted[:, 1]
    moved = (weights.diff(dim=0) != 0).any(dim=1)
    assert moved.tolist() == [update != 3 for update in range(1, STEPS_PER_EPOCH + 1)]
    expected = weights[0]
    for step in range(1, len(noted)):
        if step != 3:
            expected = 0.75 * expected + 0.25 * weights[step]
        torch.testing.assert_close(averages[step], expected, rtol=1e-4, atol=1e-8)
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pth")
    torch.testing.assert_close(saved["ema"]["head.bias"].double(), averages[-1], rtol=0, atol=0)


def test_every_metric_says_how_images_were_cropped(completed, pretrained, tmp_path):
    last = completed / "checkpoints" / "last.pth"
    assert result(completed)["eval_crop"] == "keep_size"
    kept = finish(tmp_path / "none", "--eval", "--resume", last, script=SCRIPT)
    assert "evaluation: eval_crop keep_size: resized to cover 9 x 9, centre crop 8 x 8; images of the input" in kept
    cropped = finish(tmp_path / "none", "--eval", "--resume", last, "--eval_crop", "mae", script=SCRIPT)
    assert "evaluation: eval_crop mae: resized to cover 9 x 9, centre crop 8 x 8\n" in cropped
    top1 = [line for said in (kept, cropped) for line in said.splitlines() if "top-1" in line]
    assert top1[0].partition("images:")[2] != top1[1].partition("images:")[2]
    words = ["--init_from", pretrained, "--epochs", 1, "--eval_crop", "mae"]
    finish(tmp_path / "run", *words, script=SCRIPT)
    assert result(tmp_path / "run")["eval_crop"] == "mae"
    said = finish(tmp_path / "none", "--eval", "--resume", tmp_path / "run" / "checkpoints" / "last.pth", script=SCRIPT)
    assert "evaluation: eval_crop mae" in said, "inherited from the run"


def test_eval_reports_the_accuracy_of_training(completed, tmp_path):
    for name in ("last", "best"):
        path = completed / "checkpoints" / f"{name}.pth"
        said = finish(tmp_path / name, "--eval", "--resume", path, script=SCRIPT)
        assert f"top-1 {result(completed)['accuracy'][name]['acc1']:.2f}%" in said
        assert not (tmp_path / name).exists(), "an evaluation writes nothing"


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_and_accuracies_of_a_plain_one(pretrained, tmp_path):
    """Without drop path, because compiled code draws other random numbers."""
    words = ["--init_from", pretrained, "--drop_path", 0, "--epochs", 2]
    finish(tmp_path / "plain", *words, script=SCRIPT)
    finish(tmp_path / "compiled", *words, "--compile", script=SCRIPT)
    compiled = losses(tmp_path / "compiled")
    for step, loss in losses(tmp_path / "plain").items():
        assert compiled[step] == pytest.approx(loss, rel=1e-4)
    one, other = result(tmp_path / "plain"), result(tmp_path / "compiled")
    for name in ("last", "best"):
        assert other["accuracy"][name]["loss"] == pytest.approx(one["accuracy"][name]["loss"], rel=1e-4)


def test_from_scratch_has_the_sizes_and_not_the_weights(pretrained):
    options = main_finetune.parse_options(["--init_from", str(pretrained), "--from_scratch", "--aa", ""])
    assert (options.embed_dim, options.depth, options.num_heads, options.in_chans) == (24, 2, 2, 1)
    assert main_finetune.parse_options(["--init_from", str(pretrained), "--aa", "", "--depth", "1"]).depth == 1
    with pytest.raises(ValueError, match="from_scratch: needs init_from"):
        main_finetune.parse_options(["--from_scratch"])


def test_a_released_checkpoint_with_a_pickled_namespace_begins_a_run(pretrained, tmp_path):
    weights = checkpoint.load_weights(pretrained)
    torch.save({"model": weights, "args": argparse.Namespace(lr=1e-3), "epoch": 9}, tmp_path / "released.pth")
    said = finish(tmp_path / "run", "--init_from", tmp_path / "released.pth", "--epochs", 1, script=SCRIPT)
    assert "tensors loaded" in said and "decoder_blocks" in said


def paint(folder, images=3):
    folder.mkdir(parents=True)
    for number in range(images):
        Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(folder / f"{number}.png")


@pytest.mark.parametrize(
    ("script", "data", "words"),
    [
        (SCRIPT, "digits", ["--aa", "", "--steps", 1]),
        ("main_linprobe", "digits", ["--epochs", 1]),
        (
            "main_segment",
            "scenes",
            "--photometric false --window whole --short_side 8 --picture_every 0 --steps 1".split(),
        ),
    ],
)
def test_an_encoder_of_coloured_images_begins_with_grey_ones(tmp_path, script, data, words):
    """If requested; mean and deviation are the averages over the three channels unless they are given."""
    made_with = SMALL | {"model": "mae_vit_tiny_patch2", "in_chans": 3, "mean": [0.2, 0.4, 0.9], "std": [0.3, 0.2, 0.1]}
    weights = classifier(0, in_chans=3).state_dict()
    weights = {
        name.replace("fc_norm.", "norm."): value for name, value in weights.items()
    }  # as pretraining leaves them
    state = {"format": checkpoint.FORMAT, "model": weights, "options": made_with}
    checkpoint.save(tmp_path / "coloured.pth", state)
    words = [*words, "--init_from", tmp_path / "coloured.pth", "--data_path", data, "--input_size", 8, "--in_chans", 1]
    words += ["--std", 0.25, "--total_batch_size", 40, "--warmup_epochs", 0, "--num_workers", 0, "--device", "cpu"]
    training = Training(tmp_path / "run", *words, script=script, tiny=False)
    assert training.wait() == 0, training.stderr
    assert "in_chans 1: the first layer's weights are for 3 channels and are summed over them" in training.stderr
    found = final(tmp_path / "run")["options"]
    assert found["mean"] == [pytest.approx(0.5)] and found["std"] == [0.25]


def test_bad_input_is_reported_before_any_epoch(pretrained, completed, tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            paint(tmp_path / "good" / split / name)
    for name in "ab":
        for split in ("train", "val"):
            paint(tmp_path / "empty" / split / name)
            paint(tmp_path / "unknown" / split / name)
    (tmp_path / "empty" / "train" / "c").mkdir()
    paint(tmp_path / "unknown" / "val" / "c")
    (tmp_path / "classes.txt").write_text("a\nz\n")
    head = completed / "checkpoints" / "last.pth"
    torch.save({"model": {"head.weight": torch.zeros(10, 24)}}, tmp_path / "headless.pth")
    small = ["--total_batch_size", 2, "--holdout", 0.3]
    cases = [
        (["--init_from", tmp_path / "headless.pth"], "no encoder"),
        (["--init_from", pretrained, "--embed_dim", 48], "with embed_dim 48, depth 2, num_heads 2: without model,"),
        (["--init_from", pretrained, "--num_heads", 4], "2 attention heads, the model has 4. The checkpoint is of"),
        (["--eval"], "eval needs a checkpoint"),
        (["--eval", "--resume", head, "--data_path", tmp_path / "good"], "10 classes, the data have 2"),
        (["--eval", "--resume", pretrained], "no classification head"),
        (["--num_classes", 9], "labels 0 to 9"),
        (["--labels_per_class", 500], "labels_per_class is 500, but class"),
        (["--labels_per_class", 5, "--label_share", 0.1], "either"),
        (["--data_path", tmp_path / "empty", *small], "class folders without images: c"),
        (["--data_path", tmp_path / "good", "--class_list", tmp_path / "classes.txt", *small], "no folder"),
        (["--batch_size", 1, "--total_batch_size", 4], "batch_size must be even"),
        (["--cls_token"], "--global_pool token"),
        (["--aa", "rand-m9"], "in_chans is 1"),
    ]
    runs = [
        (Training(tmp_path / f"run{number}", *words, script=SCRIPT), told) for number, (words, told) in enumerate(cases)
    ]
    for number, (training, told) in enumerate(runs):
        assert training.wait() == 2, training.stderr
        assert told in training.stderr and "Traceback" not in training.stderr
        assert not (tmp_path / f"run{number}").exists()
