"""timm's automatic augmentation as classifiers use it: Pillow accepts the arguments of its strongest level."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from data.augment import finetune_transform, operations, posterize

PLAIN = {"min_scale": 0.08, "hflip": 0.5, "color_jitter": 0.0, "reprob": 0.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}


def test_posterize_keeps_the_highest_bits_and_none_is_black():
    pixels = np.random.RandomState(0).randint(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for bits in range(9):
        kept = pixels & np.uint8(256 - 2 ** (8 - bits)) if bits else np.zeros_like(pixels)
        assert np.array_equal(np.asarray(posterize(image, bits)), kept), bits


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "rand-m10-mstd0.5-inc1", "rand-m10-n8-inc1"])
def test_no_level_of_the_recipes_is_refused(aa):
    """At level 10 posterization keeps 0 bits; with 8 of 15 operations per image, it is in nearly every image."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    transform = finetune_transform((16, 16), aa=aa, **PLAIN)
    pixels = np.random.RandomState(0).randint(0, 256, (20, 20, 3), dtype=np.uint8)
    for _ in range(200):
        assert transform(pixels).shape == (3, 16, 16)


@pytest.mark.parametrize("aa", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "v0", "originalr"])
def test_posterize_is_replaced_in_the_pipeline_and_nowhere_else(aa):
    before = dict(auto_augment.NAME_TO_OP)
    transform = finetune_transform((16, 16), aa=aa, **PLAIN)
    found = [op for op in operations(transform.keywords["pipeline"]) if op.name.startswith("Posterize")]
    assert found and all(op.aug_fn is posterize for op in found)
    assert before == auto_augment.NAME_TO_OP and posterize not in before.values()
