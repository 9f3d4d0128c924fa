"""Class weights, compared with scikit-learn and with a loop over images and pixels; invalid values."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

import engine_finetune
import engine_segment
from data import masks
from data.class_weights import balanced_weights, count_pixels, image_weights, pixel_weights
from data.masks import IGNORE
from data.sources import Source
from options import FinetuneOptions, ProbeOptions, SegmentOptions, parse
from tests.test_masks import ALONE, binary, options

LABELS = np.random.default_rng(0).choice(4, 300, p=[0.7, 0.2, 0.07, 0.03])


def labelled(labels, classes=4):
    return Source([str(n) for n in range(len(labels))], lambda n: None, labels, [f"c{k}" for k in range(classes)])


def test_balanced_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    np.testing.assert_allclose(balanced_weights(np.bincount(LABELS)), expected)
    np.testing.assert_allclose(image_weights(("balanced",), labelled(LABELS)), expected)
    assert np.average(expected[LABELS]) == pytest.approx(1), "the loss keeps its size"


def test_a_class_that_does_not_occur_has_weight_one():
    there = compute_class_weight("balanced", classes=np.unique([0, 0, 0, 2]), y=[0, 0, 0, 2])
    assert balanced_weights(np.array([3, 0, 1])).tolist() == [there[0], 1, there[1]]


def test_pixels_are_counted_in_the_training_masks_alone(tmp_path, caplog):
    caplog.set_level("INFO")
    root = binary(tmp_path, (0, 1, 255), names=("ground", "tumour"), count=8, area=0.2)
    found = masks.open_splits(options(root, ignore_label=255, test_share=0.25, holdout=0.2), ALONE)
    pixels = np.concatenate([found.train.read(n).mask_HW.ravel() for n in range(len(found.train))])
    pixels = pixels[pixels != IGNORE]
    expected = compute_class_weight("balanced", classes=np.arange(2), y=pixels)
    np.testing.assert_allclose(pixel_weights(("balanced",), found.train), expected)
    assert f"tumour {expected[1]:.4g} ({(pixels == 1).sum():,} pixels)" in caplog.text
    uncounted = Source(found.train.names, found.train.read, classes=found.train.classes)
    assert count_pixels(uncounted, 2).tolist() == np.bincount(pixels).tolist()


def test_given_weights_must_be_one_for_each_class(caplog):
    caplog.set_level("INFO")
    assert image_weights(("1", "5", "0", "2.5"), labelled(LABELS)) == [1, 5, 0, 2.5]
    assert "class weights (as given): c0 1, c1 5, c2 0, c3 2.5" in caplog.text
    assert image_weights((), labelled(LABELS)) is None
    with pytest.raises(ValueError, match=r"2 weights for 4 classes \(c0, c1, c2, c3\): give one for each"):
        image_weights(("1", "5"), labelled(LABELS))


@pytest.mark.parametrize("schema", [FinetuneOptions, ProbeOptions, SegmentOptions])
@pytest.mark.parametrize("flag", ["--class_weights", "--class_weight"])
def test_the_option_is_read_with_its_alias(schema, flag, tmp_path):
    start = ["--init_from", "x.pth"]
    assert parse(schema, [*start, flag, "1", "5"]).class_weights == ("1", "5")
    assert parse(schema, [*start, flag, "balanced"]).class_weights == ("balanced",)
    (tmp_path / "r.yaml").write_text("class_weights: [1, 0.5]\n")
    assert parse(schema, [*start, "-c", str(tmp_path / "r.yaml")]).class_weights == ("1", "0.5")


@pytest.mark.parametrize("words", [("balance",), ("1", "-1"), ("0", "0"), ("1", "balanced"), ("nan", "1")])
@pytest.mark.parametrize("schema", [FinetuneOptions, ProbeOptions, SegmentOptions])
def test_what_is_no_weight_is_refused(schema, words):
    with pytest.raises(ValueError, match="class_weights: must be one number for each class, or `balanced`"):
        schema(class_weights=words)


WEIGHTS = [1.0, 5.0, 0.5]


class Fixed(nn.Module):
    """Return the given logits."""

    def forward(self, images):
        return images


def test_the_classifiers_loss_is_that_of_a_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    found = engine_finetune.Objective(Fixed(), classes=3, class_weights=WEIGHTS)(logits, labels)["loss"]
    total = sum(-WEIGHTS[label] * logits[n].log_softmax(0)[label] for n, label in enumerate(labels.tolist()))
    torch.testing.assert_close(found, total / sum(WEIGHTS[label] for label in labels.tolist()))
    smooth = engine_finetune.Objective(Fixed(), classes=3, smoothing=0.1, class_weights=WEIGHTS)(logits, labels)
    expected = nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS), label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(smooth["loss"], expected)


def test_mixed_targets_are_weighted_as_labels_are():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    objective = engine_finetune.Objective(Fixed(), classes=3, mixup=0.8, class_weights=WEIGHTS)
    found = objective._mixed_loss(logits, targets)
    above = below = 0.0
    for n in range(4):
        for k in range(3):
            above += WEIGHTS[k] * targets[n, k] * -logits[n].log_softmax(0)[k]
            below += WEIGHTS[k] * targets[n, k]
    torch.testing.assert_close(found, above / below)
    labels = torch.tensor([0, 1, 2, 2])
    hard = engine_finetune.Objective(Fixed(), classes=3, class_weights=WEIGHTS)(logits, labels)["loss"]
    torch.testing.assert_close(objective._mixed_loss(logits, nn.functional.one_hot(labels, 3).float()), hard)


@pytest.mark.parametrize(("given", "mixes"), [({}, False), ({"mixup": 0.5}, True), ({"cutmix": 0.5}, True)])
def test_images_are_mixed_if_one_of_both_is_given(given, mixes):
    assert (engine_finetune.Objective(Fixed(), classes=3, **given).mix is not None) == mixes


def test_the_segmenters_loss_is_that_of_a_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(-1, 3, (2, 4, 5))
    found = engine_segment.cross_entropy(logits, labels, torch.tensor(WEIGHTS))
    total = 0.0
    for n in range(2):
        for y in range(4):
            for x in range(5):
                if (label := int(labels[n, y, x])) != IGNORE:
                    total += WEIGHTS[label] * -logits[n, :, y, x].log_softmax(0)[label]
    torch.testing.assert_close(found, total / labels.numel())
    nothing = torch.full((2, 4, 5), IGNORE)
    assert engine_segment.cross_entropy(logits, nothing, torch.tensor(WEIGHTS)) == 0
    torch.testing.assert_close(
        engine_segment.cross_entropy(logits, labels, torch.ones(3)), engine_segment.cross_entropy(logits, labels)
    )


def test_weights_are_in_no_checkpoint_and_follow_the_model():
    objective = engine_finetune.Objective(nn.Linear(2, 3), classes=3, class_weights=WEIGHTS)
    assert not [name for name in objective.state_dict() if "weights" in name]
    loss = objective.to("meta")(torch.zeros(4, 2, device="meta"), torch.zeros(4, dtype=torch.long, device="meta"))[
        "loss"
    ]
    assert loss.device.type == "meta"
