"""A trained classifier as a teacher of another one: its sizes, its normalisation, other image sizes and grey images."""

import pytest
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import models_classifier
from models_classifier import load_teacher

SMALL = {"model": "mae_vit_tiny_patch4", "embed_dim": 16, "depth": 1, "num_heads": 2}
THEIRS = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)


def classifier(input_size=(16, 16), **options):
    torch.manual_seed(0)
    model = models_classifier.build(num_classes=3, input_size=input_size, **(SMALL | options)).eval()
    for head in (model.head, *([model.head_dist] if options.get("distill_token") else [])):
        nn.init.normal_(head.weight)
    return model


def options_of(model, mean=THEIRS[0], std=THEIRS[1]):
    return SMALL | {"input_size": list(model.patch_embed.img_size), "mean": list(mean), "std": list(std)}


def normalized(pixels, statistics):
    mean, std = (torch.tensor(values)[:, None, None] for values in statistics)
    return (pixels - mean) / std


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_off_unless_asked_for():
    assert not classifier().grad_checkpointing and classifier(grad_checkpointing=True).grad_checkpointing


def test_images_are_normalised_as_the_teachers():
    model, ours = classifier(), ((0.2,) * 3, (0.5,) * 3)
    pixels = torch.rand(2, 3, 16, 16)
    teacher = load_teacher(model.state_dict(), options_of(model), 3, ours)
    assert_same(teacher(normalized(pixels, ours)), model(normalized(pixels, THEIRS)))
    teacher = load_teacher(model.state_dict(), options_of(model), 3, THEIRS)
    images = normalized(pixels, THEIRS)
    assert torch.equal(teacher(images), model(images))
    assert not teacher.train().training and not teacher.classifier.training
    assert not any(weight.requires_grad for weight in teacher.parameters()) and not teacher(images).requires_grad


def test_images_of_another_size_are_resized_to_the_teachers():
    model = classifier((16, 24))
    teacher = load_teacher(model.state_dict(), options_of(model), 3, THEIRS)
    for size in ((8, 8), (16, 32), (20, 24), (16, 24)):
        images = torch.randn(2, 3, *size)
        resized = images if size == (16, 24) else F.interpolate(images, (16, 24), mode="bicubic", antialias=True)
        assert torch.equal(teacher(images), model(resized))


def test_a_teacher_of_colour_images_gets_grey_ones_as_equal_channels():
    model, grey = classifier(), ((0.2,), (0.5,))
    pixels = torch.rand(2, 1, 16, 16)
    teacher = load_teacher(model.state_dict(), options_of(model), 3, grey)
    expected = model(normalized(pixels.expand(-1, 3, -1, -1), THEIRS))
    assert_same(teacher(normalized(pixels, grey)), expected)
    model = classifier(in_chans=1)
    teacher = load_teacher(model.state_dict(), options_of(model, (0.3,), (0.1,)), 3, grey)
    assert_same(teacher(normalized(pixels, grey)), model(normalized(pixels, ((0.3,), (0.1,)))))


@pytest.mark.parametrize("distill_token", [False, True])
def test_sizes_of_a_file_without_options_are_read_from_its_weights(distill_token):
    """A model of MAE or timm: 6 heads by its 384 channels, ImageNet's statistics."""
    model = classifier(
        (20, 20), model="mae_vit_small_patch4", embed_dim=0, num_heads=0, depth=2, distill_token=distill_token,
        global_pool="token" if distill_token else "avg",
    )  # fmt: skip
    images = torch.randn(2, 3, 20, 20)
    imagenet = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    teacher = load_teacher(model.state_dict(), {}, 3, imagenet)
    assert torch.equal(teacher(images), model(images))
    assert (teacher.classifier.patch_embed.img_size, len(teacher.classifier.blocks)) == ((20, 20), 2)
    pixels, ours = torch.rand(2, 3, 20, 20), ((0.2,) * 3, (0.5,) * 3)
    assert_same(
        load_teacher(model.state_dict(), {}, 3, ours)(normalized(pixels, ours)), model(normalized(pixels, imagenet))
    )


@pytest.mark.parametrize("heads", [3, 12])
def test_heads_of_a_tiny_teacher_of_another_project_must_be_given(heads, caplog):
    model = classifier(embed_dim=192, num_heads=heads)
    images, statistics = torch.randn(2, 3, 16, 16), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    with pytest.raises(ValueError, match="12 in NoR-MAE and MAE-Lite, 3 in DeiT and timm. Give --distill_heads"):
        load_teacher(model.state_dict(), {}, 3, statistics)
    assert torch.equal(load_teacher(model.state_dict(), {}, 3, statistics, heads)(images), model(images))
    assert not caplog.records


def test_a_grey_teacher_without_options_takes_the_normalisation_of_the_data():
    model = classifier(in_chans=1)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(load_teacher(model.state_dict(), {}, 3, ((0.2,), (0.5,)), 2)(images), model(images))


def test_weights_that_cannot_teach_are_refused():
    model, colour = classifier(), ((0.2,) * 3, (0.5,) * 3)
    weights, options = model.state_dict(), options_of(model)
    with pytest.raises(ValueError, match="head for 3 classes, the data have 4"):
        load_teacher(weights, options, 4, colour)
    for missing in ("head.weight", "patch_embed.proj.weight"):
        rest = {name: value for name, value in weights.items() if name != missing}
        with pytest.raises(ValueError, match="not those of a classifier: patch_embed.proj.weight or head.weight"):
            load_teacher(rest, options, 3, colour)
    with pytest.raises(ValueError, match="width 16. Give --distill_heads"):
        load_teacher(weights, {}, 3, colour)
    with pytest.raises(ValueError, match="distill_heads: the teacher was trained with 2 attention heads, not with 4"):
        load_teacher(weights, options, 3, colour, 4)
    with pytest.raises(ValueError, match="distill_heads: 3 heads cannot share 16 channels"):
        load_teacher(weights, {}, 3, colour, 3)
    grey = classifier(in_chans=1)
    with pytest.raises(ValueError, match="its images have 1 channels, the data 3"):
        load_teacher(grey.state_dict(), options_of(grey, (0.3,), (0.1,)), 3, colour)
    with pytest.raises(ValueError, match="its images have 3 channels, the data 4"):
        load_teacher(weights, options, 3, ((0.2,) * 4, (0.5,) * 4))
