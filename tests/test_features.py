"""Features of a source: rows and tokens are correct, and the model is unchanged."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from data.images import BadImage
from data.loader import NothingReadable, Source, open_source, pixel_statistics
from util.features import encode_source, load_pixels
from util.knn import knn_accuracy


class Encoder(nn.Module):
    """Return a class token with large values and two patch tokens: the channel means of the left and the right half."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def encode(self, images):
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        left, right = (half.mean(dim=(2, 3)) for half in images.chunk(2, dim=3))
        return torch.stack([torch.full_like(left, 1e6), left, right], dim=1)


def make_source(images=10, bad=(), labelled=True):
    def read(index):
        if index in bad:
            raise BadImage(str(index), "broken on purpose")
        return np.random.RandomState(index).randint(0, 256, (8, 8, 3), np.uint8)

    return Source([str(i) for i in range(images)], read, np.arange(images) % 3 if labelled else None)


def options(channels=3, **more):
    mean, std = pixel_statistics(channels)
    return {"input_size": 8, "mean": mean, "std": std, "batch_size": 4, **more}


def normalised(source, index):
    mean, std = pixel_statistics(3)
    return (source.read(index) / 255 - mean) / std


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_are_the_average_of_the_patch_tokens(num_workers):
    source, model = make_source(), Encoder().train()
    features, labels = encode_source(model, source, device="cpu", **options(num_workers=num_workers))
    expected = np.stack([normalised(source, index).mean(axis=(0, 1)) for index in range(10)])
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert features.dtype == torch.float32 and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert model.calls == [(4, False, False), (4, False, False), (2, False, False)] and model.training


def test_pixels_are_features_too():
    source = make_source()
    features, labels = load_pixels(source, **options())
    np.testing.assert_allclose(features[3], normalised(source, 3).transpose(2, 0, 1).reshape(-1), atol=1e-6)
    assert features.shape == (10, 192) and len(labels) == 10


def test_a_share_of_a_source_without_labels():
    features, labels = encode_source(Encoder(), make_source(labelled=False), device="cpu", indices=[7, 2], **options())
    assert labels is None
    np.testing.assert_allclose(features[0], normalised(make_source(), 7).mean(axis=(0, 1)), atol=1e-6)


def test_unreadable_images_are_left_out():
    features, labels = encode_source(Encoder(), make_source(bad=[0, 8, 9]), device="cpu", **options())
    assert len(features) == 7 and labels.tolist() == [1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(NothingReadable):
        encode_source(Encoder(), make_source(bad=range(10)), device="cpu", **options())


def test_autocast_is_entered_for_each_batch_and_features_stay_float32():
    entered = []

    @contextlib.contextmanager
    def autocast():
        entered.append(1)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    model = Encoder()
    model.encode = lambda images: images.flatten(2).transpose(1, 2).bfloat16()
    features, _ = encode_source(model, make_source(), device="cpu", autocast=autocast, **options())
    assert features.dtype == torch.float32 and len(entered) == 3


def test_a_failure_leaves_the_model_in_training():
    model = Encoder().train()
    model.encode = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        encode_source(model, make_source(), device="cpu", **options())
    assert model.training


def test_raw_pixels_of_the_digits_are_a_strong_baseline():
    both = [load_pixels(open_source("digits", "", split, in_chans=1), **options(1)) for split in ("train", "val")]
    assert 0.96 < knn_accuracy(*both[0], *both[1]) < 1
