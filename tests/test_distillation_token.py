"""DeiT's distillation token: timm's model, the loss of each head, and all programs that read its checkpoints."""

import csv
import json

import pytest
import timm
import torch
from torch import nn

import main_finetune
import main_segment
import models_classifier
from engine_finetune import Distillation, Objective
from hubconf import load_encoder
from models_vit import load_matching
from tests.runs import LIGHT, TINY_CLASSIFIER
from tools import embed, export, predict
from util import checkpoint, extras

SIZES = {"model": "mae_vit_tiny_patch4", "embed_dim": 24, "depth": 2, "num_heads": 2, "input_size": (16, 12)}
ARGUMENTS = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": (16, 12), "num_classes": 5}


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def distilled(**changes):
    options = SIZES | {"num_classes": 5, "global_pool": "token", "distill_token": True} | changes
    return lively(models_classifier.build(**options))


def test_it_is_timms_model():
    ours, theirs = distilled(), timm.create_model("deit_tiny_distilled_patch16_224", **ARGUMENTS)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.set_distilled_training(True)
    images = torch.randn(3, 3, 16, 12)
    for found, expected in zip(ours.train()(images), theirs.train()(images), strict=True):
        torch.testing.assert_close(found, expected)
    both = ours(images)
    torch.testing.assert_close(ours.eval()(images), (both[0] + both[1]) / 2)
    torch.testing.assert_close(theirs.eval()(images), (both[0] + both[1]) / 2)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_each_head_has_its_own_loss(kind):
    torch.manual_seed(0)
    model, teacher = distilled().double().train(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 12, 5)).double()
    images, labels = torch.randn(3, 3, 16, 12).double(), torch.tensor([4, 0, 2])
    w, T, smoothing = 0.3, 2.0, 0.1
    distillation = Distillation(lambda x: teacher(x).detach(), w, T, kind)
    found = Objective(model, classes=5, smoothing=smoothing, distillation=distillation)(images, labels)
    of_class, of_token = model(images)
    label = taught = torch.zeros((), dtype=torch.float64)
    for n in range(3):
        logs = of_class[n].log_softmax(0)
        label = label - sum(((c == labels[n]) * (1 - smoothing) + smoothing / 5) * logs[c] for c in range(5)) / 3
        answer = teacher(images)[n].detach()
        if kind == "hard":
            taught = taught - of_token[n].log_softmax(0)[answer.argmax()] / 3
        else:
            p, q = (answer / T).softmax(0), (of_token[n] / T).softmax(0)
            taught = taught + T**2 * sum(p[c] * (p[c].log() - q[c].log()) for c in range(5)) / 3
    torch.testing.assert_close(found["label"], label)
    torch.testing.assert_close(found["distillation"], taught, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(found["loss"], 0.7 * label + 0.3 * taught, rtol=1e-6, atol=1e-6, check_dtype=False)
    found["loss"].backward()
    trained = model.head.weight.grad.clone(), model.head_dist.weight.grad.clone(), model.dist_token.grad.clone()
    model.zero_grad()
    (0.7 * label + 0.3 * taught).backward()
    again = model.head.weight.grad, model.head_dist.weight.grad, model.dist_token.grad
    for ours, theirs in zip(trained, again, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_token_starts_as_the_class_token_also_at_another_size():
    torch.manual_seed(0)
    plain = models_classifier.build(**SIZES, num_classes=0, global_pool="token")
    weights = lively(plain).state_dict()
    larger = SIZES | {"input_size": (32, 24)}
    made_with = SIZES | {"input_size": [16, 12]}
    for sizes in (SIZES, larger):
        reference = models_classifier.build(**sizes, num_classes=0, global_pool="token")
        models_classifier.load_encoder(reference, weights, made_with)
        model = models_classifier.build(**sizes, num_classes=5, global_pool="token", distill_token=True)
        models_classifier.load_encoder(model, weights, made_with)
        torch.testing.assert_close(model.pos_embed[:, 2:], reference.pos_embed[:, 1:])
        assert model.head_dist.weight.std() < 1e-4 and not model.head_dist.bias.any()
        tokens = model.eval().forward_features(torch.randn(2, 3, *sizes["input_size"]))
        torch.testing.assert_close(tokens[:, 0], tokens[:, 1])


def test_positions_of_both_tokens_stay_when_a_distilled_classifier_is_resized():
    model = distilled()
    larger = models_classifier.build(
        **SIZES | {"input_size": (32, 24)}, num_classes=5, global_pool="token", distill_token=True
    )
    load_matching(larger, model.state_dict(), grid=(4, 3))
    assert torch.equal(larger.pos_embed[:, :2], model.pos_embed[:, :2]) and larger.pos_embed.shape[1] == 50


def test_new_classes_get_two_new_heads():
    model = models_classifier.build(**SIZES, num_classes=7, global_pool="token", distill_token=True)
    report = models_classifier.load_encoder(model, distilled().state_dict(), SIZES)
    assert sorted(report.missing) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]


def test_a_plain_model_refuses_its_weights_and_it_those_of_a_plain_classifier():
    weights = distilled().state_dict()
    plain = models_classifier.build(**SIZES, num_classes=5, global_pool="token")
    with pytest.raises(ValueError, match="have a distillation token.*--distill_token"):
        models_classifier.load_encoder(plain, weights, SIZES)
    with pytest.raises(ValueError, match="without a distillation token"):
        models_classifier.load_classifier(distilled(), plain.state_dict(), SIZES)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--global_pool", "token"], "distill_token: learns from a teacher: give distill_from"),
        (["--distill_from", "x.pth"], "distill_token: is a second class token: use global_pool token"),
        (["--global_pool", "token", "--distill_from", "x", "--export", "hf"], "hf has no distillation token"),
    ],
)
def test_impossible_combinations_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        main_finetune.parse_options([*TINY_CLASSIFIER, *LIGHT, "--distill_token", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run with a distillation token whose teacher is a plain classifier."""
    folder = tmp_path_factory.mktemp("distilled")
    start = [*TINY_CLASSIFIER, *LIGHT, "--lr", "3e-3", "--global_pool", "token"]
    assert main_finetune.main([*start, "--output_dir", str(folder / "teacher")]) == 0
    taught = ["--distill_from", str(folder / "teacher"), "--distill_token", "--distill_labels", "hard"]
    assert main_finetune.main([*start, *taught, "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_is_evaluated_without_its_teacher(run, capsys):
    capsys.readouterr()
    last = run / "checkpoints" / "last.pth"
    assert main_finetune.main(["--eval", "--resume", str(last), "--num_workers", "0", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["acc1"] == json.loads((run / "result.json").read_text())["accuracy"]["last"]["acc1"]


def test_timm_loads_the_export_strictly(run, tmp_path):
    assert export.main(["timm", str(run), "--output", str(tmp_path / "timm")]) == 0
    facts = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert facts["architecture"] == "deit_base_distilled_patch16_224"
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    weights, _ = checkpoint.load_model(run / "checkpoints" / "last.pth")
    model.load_state_dict(weights, strict=True)
    assert type(model).__name__ == "VisionTransformerDistilled"
    facts = json.loads((tmp_path / "timm" / "export.json").read_text())
    assert facts["largest_difference"].keys() == {"tokens", "features", "logits"}
    exported, _ = load_encoder(tmp_path / "timm")
    ours, _ = load_encoder(run)
    images = torch.randn(2, 1, 8, 8)
    tokens = model.forward_features(images)
    torch.testing.assert_close(ours(images), tokens[:, :2].mean(dim=1))
    torch.testing.assert_close(exported(images), tokens[:, :2].mean(dim=1))


def test_predictions_are_those_of_both_heads(run, tmp_path, capsys):
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    assert predict.main([str(run), str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    with open(tmp_path / "out" / predict.TABLE) as file:
        (row,) = csv.DictReader(file)
    weights, options = checkpoint.load_model(run / "checkpoints" / "last.pth")
    names = ("model", "input_size", "in_chans", "embed_dim", "depth", "num_heads", "global_pool")
    model = models_classifier.build(num_classes=10, distill_token=True, **{name: options[name] for name in names})
    model.load_state_dict(weights)
    first, second = model.train()((pixels[None, None] / 255 - options["mean"][0]) / options["std"][0])
    expected = ((first + second) / 2).softmax(dim=1).max().item()
    assert float(row["probability"]) == pytest.approx(expected, abs=2e-6)


def test_other_readers_refuse_clearly(run, tmp_path, capsys):
    if not extras.missing_packages(*extras.EXPORT_PACKAGES["hf"]):
        assert export.main(["hf", str(run)]) == 2 and "no distillation token" in capsys.readouterr().err
    segment = ["--data_path", "scenes", "--init_from", str(run), "--device", "cpu", "--num_workers", "0"]
    assert main_segment.main([*segment, "--output_dir", str(tmp_path / "segment")]) == 2
    assert "distillation token" in capsys.readouterr().err
    assert embed.main([str(run), "digits", "--output", str(tmp_path / "features.npz"), "--device", "cpu"]) == 0


def test_a_distilled_classifier_can_teach(run):
    weights, options = checkpoint.load_model(run / "checkpoints" / "last.pth")
    statistics = tuple(options["mean"]), tuple(options["std"])
    teacher = models_classifier.load_teacher(weights, options, 10, statistics)
    encoder, _ = load_encoder(run)
    images = torch.randn(2, 1, 8, 8)
    tokens = encoder.forward_features(images)
    model = teacher.classifier
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(teacher(images), expected)
