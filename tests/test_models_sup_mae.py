"""The label term against the release's numbers, and where the number of classes comes from."""

import math
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods import build
from models_sup_mae import LabelOptions, LabelTerm
from tests.small import batch, small


@pytest.mark.parametrize(("size", "weights"), [("tiny", 3_672_040), ("small", 4_261_864), ("base", 5_441_512)])
def test_the_head_has_the_known_number_of_weights(size, weights):
    with torch.device("meta"):
        model = build("sup_mae", f"mae_vit_{size}_patch16")
    assert sum(p.numel() for p in model.terms["label"].parameters()) == weights


@pytest.mark.parametrize("classes", [10, 1000])
def test_at_first_every_class_is_as_likely(classes):
    """0.0691 for ImageNet, once weighted."""
    model = small("sup_mae", terms={"label": {"classes": classes}})
    images, labels, noise = batch(model, n=64)
    weighted = 0.01 * model(images, labels, noise=noise)["label"].item()
    assert weighted == pytest.approx(0.01 * math.log(classes), rel=0.02)


def test_the_term_is_the_cross_entropy_of_the_mean_visible_patch():
    model = small("sup_mae", terms={"label": {"classes": 3, "temperature": 2.5, "hidden": 8}})
    term, (images, labels, noise) = model.terms["label"], batch(model)
    view = model.observe(images, labels, noise=noise)
    pooled = torch.stack([sum(tokens[1:]) / (len(tokens) - 1) for tokens in view.latent])
    first, norm, _, last = term.head
    inner = pooled @ first.weight.T + first.bias
    inner = (inner - inner.mean(dim=0)) / (inner.var(dim=0, correction=0) + norm.eps).sqrt()
    logits = (inner * norm.weight + norm.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(term.logits(view), logits)
    probabilities = F.softmax(logits.detach() / 2.5, dim=1)
    per_image = [-math.log(row[label]) for row, label in zip(probabilities, labels, strict=True)]
    assert term(model, view).item() == pytest.approx(sum(per_image) / len(per_image))


def test_a_float64_model_has_a_float64_term():
    model = small("sup_mae", terms={"label": {"classes": 3, "hidden": 8}}).double()
    images, labels, noise = batch(model)
    value = model(images.double(), labels, noise=noise)["label"]
    assert value.dtype == torch.float64
    view = model.observe(images.double(), labels, noise=noise)
    expected = F.cross_entropy(model.terms["label"].head(view.latent[:, 1:].mean(dim=1)) / 10, labels)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_the_state_holds_nothing_that_a_refused_update_would_move():
    model = small("sup_mae")
    assert not [name for name, _ in model.terms.named_buffers()]


def test_without_labels_the_term_refuses():
    model = small("sup_mae")
    images, _, noise = batch(model)
    with pytest.raises(ValueError, match="'label' needs labels"):
        model(images, noise=noise)


def test_the_number_of_classes_is_the_datas_unless_it_is_given():
    model = small("sup_mae")
    assert model.terms["label"].head[-1].out_features == 1000
    model.terms["label"].learn_classes(7)
    assert model.terms["label"].options.classes == 7 and model.terms["label"].head[-1].out_features == 7
    last = model.terms["label"].head[-1]  # with MAE's initial weights, as the first one
    bound = math.sqrt(6 / (last.in_features + 7))
    assert not last.bias.any() and 0.9 * bound < last.weight.abs().max() <= bound
    images, labels, noise = batch(model)
    assert model(images, labels, noise=noise)["label"].item() == pytest.approx(math.log(7), rel=0.1)
    given = small("sup_mae", terms={"label": {"classes": 12}})
    given.terms["label"].learn_classes(12)
    with pytest.raises(ValueError, match="for 12 classes and the training images have 7"):
        given.terms["label"].learn_classes(7)


def test_it_joins_the_neighbour_term():
    model = small("sup_nor_mae")
    assert list(model.terms) == ["label", "neighbor"]
    assert [term.options.weight for term in model.terms.values()] == [0.01, 5e-5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0; it must be more than 0"),
        ({"weight": math.nan}, "weight is nan"),
        ({"hidden": 0}, "hidden is 0; it must be a finite number of at least 1"),
        ({"classes": -1}, "classes is -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LabelTerm(LabelOptions(**options))


def test_batch_norm_of_one_image_is_refused_before_training():
    from main_pretrain import parse_options
    from programs.pretrain import build_model, complete_options

    options = parse_options("--method sup_mae --input_size 16 --model mae_vit_tiny_patch8 --depth 1".split())
    source = types.SimpleNamespace(classes=["cat", "dog"], value_range=())
    with pytest.raises(ValueError, match="batch_size 1: the batch norm of the term label needs at least 2 images"):
        complete_options(replace(options, batch_size=1), build_model(options), source)


def test_pretraining_takes_the_classes_of_its_images():
    from main_pretrain import parse_options
    from programs.pretrain import build_model, complete_options

    options = parse_options("--method sup_mae --input_size 16 --model mae_vit_tiny_patch8 --depth 1".split())
    model = build_model(options)
    completed = complete_options(options, model, types.SimpleNamespace(classes=["cat", "dog", "eel"], value_range=()))
    assert options.terms["label"]["classes"] == 0 and completed.terms["label"]["classes"] == 3
    assert model.terms["label"].head[-1].out_features == 3
