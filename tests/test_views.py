"""Views of an image: every operation compared with Pillow or a loop, and several views from the loader."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as pixels

from data.images import pretrain_transform, read_image
from data.views import augmented_crop, gaussian_blur, is_plain, jitter_colours, make_view, make_views
from models_vit import Crop
from tests.test_data import make_batches, make_source, train_samples
from tests.test_images import assert_close_to_pillows, smooth

PLAIN = Crop((16, 20), (0.3, 1.0), hflip=0.0)
EVERYTHING = Crop(
    (16, 20),
    (0.3, 1.0),
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_prob=0.8,
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
    interpolation="bilinear",
)


def crop_with(**changes):
    return Crop((16, 20), (0.3, 1.0), **{"hflip": 0.0} | changes)


def view(crop, image, seed=0, in_chans=3):
    torch.manual_seed(seed)
    return augmented_crop(image, crop, in_chans)


def picture(image_CHW):
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# ---- operations -----------------------------------------------------------------------------------------------------


def test_a_plain_view_is_the_crop_of_masked_image_modelling():
    image = smooth(60, 80)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = pretrain_transform((16, 20), min_scale=0.3, hflip=0)(image)
        assert torch.equal(view(PLAIN, image, seed), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_crop_is_torchvisions_in_either_interpolation(interpolation):
    image = smooth(90, 120)
    mode = v2.InterpolationMode(interpolation)
    reference = v2.RandomResizedCrop((16, 20), scale=(0.05, 0.4), interpolation=mode)
    for seed in range(10):
        torch.manual_seed(seed)
        expected = tensor(reference(Image.fromarray(image)))
        found = view(Crop((16, 20), (0.05, 0.4), hflip=0.0, interpolation=interpolation), image, seed)
        assert_close_to_pillows(found, expected)


@pytest.mark.parametrize(("strength", "enhance"), [(0, "Brightness"), (1, "Contrast"), (2, "Color")])
def test_jitter_is_pillows_enhancement_by_a_factor_near_one(strength, enhance):
    image = tensor(Image.fromarray(smooth(40, 50)))
    strengths = [0.0, 0.0, 0.0, 0.0]
    strengths[strength] = 0.4
    for seed in range(5):
        torch.manual_seed(seed)
        factor = torch.empty(()).uniform_(0.6, 1.4).item()
        torch.manual_seed(seed)
        found = jitter_colours(image, *strengths)
        expected = tensor(getattr(ImageEnhance, enhance)(picture(image)).enhance(factor))
        assert (found.int() - expected.int()).abs().max() <= 2


def test_hue_is_turned_as_in_the_colour_circle():
    """A pure colour keeps its maximum and minimum channel values; a shift by a third permutes the channels."""
    red = torch.tensor([200, 40, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4)
    shifted = v2.functional.adjust_hue(red, 1 / 3)
    assert (shifted[:, 0, 0].int() - torch.tensor([40, 200, 40])).abs().max() <= 1
    for seed in range(10):
        torch.manual_seed(seed)
        turned = jitter_colours(red, 0, 0, 0, 0.1)
        assert abs(int(turned.max()) - 200) <= 1 and abs(int(turned.min()) - 40) <= 1


def test_jitter_is_in_random_order(monkeypatch):
    applied = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(pixels, f"adjust_{name}", lambda image, amount, name=name: applied.append(name) or image)
    orders = set()
    for seed in range(200):
        torch.manual_seed(seed)
        applied.clear()
        jitter_colours(torch.zeros(3, 2, 2, dtype=torch.uint8), 0.4, 0.4, 0.2, 0.1)
        orders.add(tuple(applied))
    assert len(orders) == 24


def test_grey_is_pillows_luma_in_three_channels():
    image = smooth(60, 80)
    grey = view(crop_with(grayscale=1.0), image)
    expected = tensor(picture(view(PLAIN, image)).convert("L").convert("RGB"))
    assert (grey.int() - expected.int()).abs().max() <= 1 and torch.equal(grey[0], grey[2])


def test_solarize_inverts_the_upper_half():
    image = smooth(60, 80)
    found, plain = view(crop_with(solarize=1.0), image), view(PLAIN, image)
    assert torch.equal(found, tensor(ImageOps.solarize(picture(plain), 128)))
    assert torch.equal(found, torch.where(plain >= 128, 255 - plain, plain))


def blur_by_loop(image, sigma):
    """Blur by a loop: every pixel is the weighted mean of its two-dimensional neighbourhood."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = range(-radius, radius + 1)
    C, H, W = image.shape
    total = sum(math.exp(-(a * a + b * b) / (2 * sigma**2)) for a in offsets for b in offsets)
    blurred = torch.zeros(C, H, W, dtype=torch.float64)
    for row in range(H):
        for column in range(W):
            for a in offsets:
                for b in offsets:
                    pixel = image[:, min(max(row + a, 0), H - 1), min(max(column + b, 0), W - 1)].double()
                    blurred[:, row, column] += math.exp(-(a * a + b * b) / (2 * sigma**2)) / total * pixel
    return blurred


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_blur_equals_a_loop(sigma, channels):
    image = torch.randint(0, 256, (channels, 7, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert (gaussian_blur(image, sigma).double() - blur_by_loop(image, sigma)).abs().max() <= 0.51


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_blur_is_near_pillows_approximation(sigma):
    image = tensor(Image.fromarray(smooth(64, 64)))
    expected = tensor(picture(image).filter(ImageFilter.GaussianBlur(sigma)))
    assert (gaussian_blur(image, sigma).int() - expected.int()).abs().float().mean() < 1


@pytest.mark.parametrize("name", ["hflip", "grayscale", "blur", "solarize", "jitter_prob"])
def test_an_operation_happens_as_often_as_asked(name):
    image = smooth(24, 24)
    changes = {name: 0.3, "jitter": (0.4, 0.4, 0.2, 0.1)}
    crop = crop_with(**changes)
    happened = 0
    for seed in range(150):
        torch.manual_seed(seed)
        plain = augmented_crop(image, PLAIN, 3)
        happened += not torch.equal(view(crop, image, seed), plain)
    assert 25 <= happened <= 65  # 45 expected, standard deviation 6


# ---- several views --------------------------------------------------------------------------------------------------


def test_views_have_their_sizes_and_differ():
    crops = (EVERYTHING, Crop((8, 8), (0.05, 0.4), count=3))
    torch.manual_seed(0)
    views = make_views(crops, 3)(smooth(60, 80))
    assert [tuple(one.shape) for one in views] == [(3, 16, 20)] + [(3, 8, 8)] * 3
    assert all(one.dtype == torch.uint8 for one in views)
    assert not torch.equal(views[1], views[2])


def test_what_is_a_plain_crop():
    assert is_plain(PLAIN) and is_plain(Crop((8, 8)))
    assert not is_plain(EVERYTHING) and not is_plain(Crop((8, 8), count=2))
    assert not is_plain(Crop((8, 8), interpolation="bilinear")) and not is_plain(Crop((8, 8), blur=0.1))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colour_operations_are_left_out_of_other_images_and_this_is_logged(channels, caplog):
    image = smooth(30, 30, channels)
    with caplog.at_level(logging.WARNING):
        transform = make_views((EVERYTHING,), channels)
    assert f"found {channels}" in caplog.text
    for seed in range(10):
        torch.manual_seed(seed)
        (found,) = transform(image)
        assert found.shape == (channels, 16, 20) and found.dtype == torch.uint8
    caplog.clear()
    make_views((EVERYTHING,), 3)
    make_views((PLAIN,), channels)
    assert not caplog.text


def test_crops_of_a_jpeg_file_are_the_same_when_only_their_part_is_decoded(tmp_path):
    from data.decode import lacks_parts

    if lacks_parts():
        pytest.skip("the decoder of parts is not installed")
    Image.fromarray(smooth(120, 160)).save(tmp_path / "a.jpg", quality=95)
    transform = make_views((EVERYTHING, Crop((8, 8), (0.05, 0.4), count=2)), 3)
    found = []
    for lazy in (False, True):
        torch.manual_seed(3)
        found.append(transform(read_image(str(tmp_path / "a.jpg"), lazy=lazy)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- through the loader ---------------------------------------------------------------------------------------------


def samples():
    transform = make_views((Crop((8, 12), blur=0.5), Crop((4, 4), (0.1, 0.4), count=2, jitter_prob=0.5)), 3)
    return train_samples(make_source(24), transform, 7, None)


def test_a_batch_holds_a_tensor_for_each_view():
    batch = samples().__getitems__([(0, 3), (0, 5)])
    assert [tuple(view.shape) for view in batch.images] == [(2, 3, 8, 12), (2, 3, 4, 4), (2, 3, 4, 4)]
    assert batch.noise is None and len(batch) == 2
    for row, index in enumerate((3, 5)):
        one = samples()[(0, index)]
        assert all(torch.equal(view[row], own) for view, own in zip(batch.images, one.image, strict=True))


def test_a_method_of_one_altered_crop_gets_a_tensor():
    crop = Crop((8, 12), jitter=(0.4, 0.4, 0.4, 0.0), jitter_prob=1.0)
    one, several = (
        train_samples(make_source(24), make(3), 7, None)
        for make in (lambda channels: make_view(crop, channels), lambda channels: make_views((crop,), channels))
    )
    (expected,) = several.__getitems__([(0, 3), (0, 5)]).images
    assert torch.equal(one.__getitems__([(0, 3), (0, 5)]).images, expected)


def test_views_are_normalised_as_images_are():
    batch = samples().__getitems__([(0, 3)])
    moved = batch.to("cpu")
    for view, before in zip(moved.images, batch.images, strict=True):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (batch.mean, batch.std))
        torch.testing.assert_close(view, (before / 255 - mean) / std)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_views_come_from_workers_as_from_this_process(num_workers):
    here, there = (list(make_batches(samples(), num_workers=count).epoch(1)) for count in (0, num_workers))
    assert len(here) == len(there) == 6
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.index, b.index) and isinstance(b.images, list)
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))


def test_views_of_a_sample_depend_on_seed_epoch_and_index_only():
    once, again, other = samples()[(0, 3)], samples()[(0, 3)], samples()[(1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(once.image, again.image, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once.image, other.image, strict=True))
