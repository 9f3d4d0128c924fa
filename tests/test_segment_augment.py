"""Augmentation of images with masks: both are transformed together, and random numbers depend on the sample's seed."""

import colorsys

import numpy as np
import pytest
import torch

from data.images import Pair
from data.loader import TrainSamples, collate
from data.masks import IGNORE
from data.segment_augment import (
    distort,
    eval_transform,
    fitted,
    place_crop,
    resize_mask,
    saturate,
    train_transform,
)
from data.sources import Source

MEAN, STD = (0.5, 0.25, 0.1), (0.5, 0.5, 0.5)


def coded(rows=40, columns=60, classes=5, seed=0):
    """Return a pair whose image encodes the mask: classes in blocks of 10, red is 50 times the class."""
    blocks = np.random.default_rng(seed).integers(0, classes, (rows // 10, columns // 10))
    mask = blocks.repeat(10, 0).repeat(10, 1).astype(np.int16)
    image = np.stack([mask * 50, 255 - mask * 50, np.full_like(mask, 77)], axis=-1).astype(np.uint8)
    return Pair(image, mask)


def transform(**changes):
    options = dict(short_side=40, min_resize=0.5, max_resize=2.0, max_class_share=0.75, hflip=0.5, photometric=False)
    return train_transform((32, 32), **(options | changes), mean=MEAN)


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_move_together(seed):
    """Away from edges, the red channel still encodes the class; padding has the mean colour and no class."""
    torch.manual_seed(seed)
    image, mask = transform()(coded(seed=seed))
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8 and mask.shape == (32, 32)
    told = image[0].float() / 50
    classed = mask != IGNORE
    assert ((told - mask).abs() < 0.3)[classed].float().mean() > 0.6
    outside = image[:, ~classed]
    assert torch.equal(outside, torch.tensor([[128], [64], [26]], dtype=torch.uint8).expand_as(outside))
    rows = classed.any(dim=1)
    assert rows[: int(rows.sum())].all(), "padding is below"


def test_at_scale_one_without_chance_it_is_a_crop():
    pair = coded()
    image, mask = transform(min_resize=1.0, max_resize=1.0, hflip=0.0)(pair)
    found = [
        (top, left)
        for top in range(9)
        for left in range(29)
        if np.array_equal(pair.image_HWC[top : top + 32, left : left + 32].transpose(2, 0, 1), image.numpy())
        and np.array_equal(pair.mask_HW[top : top + 32, left : left + 32], mask.numpy())
    ]
    assert found


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [((683, 512), 512, (683, 512)), ((256, 300), 512, (512, 600)), ((100, 1000), 512, (205, 2048)),
     ((10, 10), 4, (4, 4))],
)  # fmt: skip
def test_images_fit_2048_by_512(size, short, expected):
    assert fitted(size, short) == expected


def test_a_mask_is_resized_by_the_middles_of_pixels():
    mask = torch.arange(35).view(5, 7).to(torch.int16)
    for rows, columns in ((5, 7), (10, 14), (3, 4), (1, 1), (7, 9)):
        loop = [[mask[int((r + 0.5) * 5 / rows), int((c + 0.5) * 7 / columns)].item() for c in range(columns)]
                for r in range(rows)]  # fmt: skip
        assert resize_mask(mask, (rows, columns)).tolist() == loop


def test_a_crop_that_a_class_fills_is_drawn_again():
    """11 of 249 positions contain both classes; in 7 of them no class fills 75%, which ten draws find often."""
    mask = torch.zeros(8, 256, dtype=torch.int16)
    mask[:, 128:132] = 1
    mask[:, 200:] = IGNORE
    both = []
    for seed in range(200):
        torch.manual_seed(seed)
        top, left = place_crop(mask, (8, 8), 0.75)
        assert top == 0 and 0 <= left <= 248
        both.append(len(set(mask[:, left : left + 8].flatten().tolist()) - {IGNORE}) > 1)
    assert np.mean(both) == pytest.approx(1 - (1 - 7 / 249) ** 9 * (1 - 11 / 249), abs=0.1)
    assert place_crop(mask[:, :8], (32, 32), 0.75) == (0, 0), "an image smaller than the crop has one place"


def test_saturation_is_hsvs():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 4, 5, generator=generator) * 255
    image[:, 0, 0] = 99.0
    for factor in (0.5, 1.0, 1.4):
        found = saturate(image, factor)
        for r in range(4):
            for c in range(5):
                hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, r, c] / 255).tolist())
                expected = colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor), value)
                assert (found[:, r, c] / 255).tolist() == pytest.approx(expected, abs=1e-5)


def test_distortion_stays_within_its_bounds():
    """At most 32 of 255 for brightness and 0.5 for contrast; grey remains grey, and other channels are unchanged."""
    grey = torch.full((3, 6, 6), 100, dtype=torch.uint8)
    values = set()
    for seed in range(80):
        torch.manual_seed(seed)
        found = distort(grey)
        assert found.dtype == torch.uint8 and found.unique().numel() == 1
        values.add(int(found[0, 0, 0]))
    assert 100 in values and min(values) >= 34 and max(values) <= 198 and len(values) > 20
    torch.manual_seed(0)
    assert distort(torch.full((5, 4, 4), 100, dtype=torch.uint8)).shape == (5, 4, 4)


def test_an_image_is_evaluated_at_its_size_with_its_mask_unchanged():
    image, mask = eval_transform(20)(coded())
    assert image.shape == (3, 20, 30) and mask.shape == (40, 60)


def samples(seed=7):
    source = Source([str(n) for n in range(4)], lambda index: coded(seed=index))
    return TrainSamples(source, transform(photometric=True), seed, None, mean=MEAN, std=STD)


def test_a_sample_follows_from_seed_epoch_and_index_alone():
    one = [samples()[0, index] for index in (0, 1, 2)]
    torch.rand(100)
    other = [samples()[0, index] for index in (2, 1, 0)]
    for first, second in zip(one, reversed(other), strict=True):
        assert torch.equal(first.image, second.image) and torch.equal(first.label, second.label)
    assert not torch.equal(one[0].image, samples()[1, 0].image)
    assert not torch.equal(one[0].image, samples(seed=8)[0, 0].image)


def test_masks_are_the_labels_of_a_batch():
    batch = samples().__getitems__([(0, 0), (0, 3)])
    assert batch.labels.shape == (2, 32, 32) and batch.labels.dtype == torch.int16
    assert torch.equal(batch.labels[1], samples()[0, 3].label)
    moved = batch.to("cpu")
    assert moved.images.dtype == torch.float32 and torch.equal(moved.labels, batch.labels)
    assert collate([samples()[0, 0]], MEAN, STD).labels.shape == (1, 32, 32)
