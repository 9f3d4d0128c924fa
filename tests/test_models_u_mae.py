"""Uniformity against the loop over pairs, its bounds, and what belongs to a feature."""

import pytest
import torch

from models_u_mae import UniformityOptions, UniformityTerm, uniformity
from tests.small import batch, small


def over_pairs(features):
    total = 0.0
    for one in features:
        for other in features:
            total += ((one @ other) / (one.norm() * other.norm())).item() ** 2
    return total / len(features) ** 2


@pytest.mark.parametrize(("images", "channels"), [(7, 5), (3, 16)])
def test_it_is_the_mean_squared_cosine_of_all_pairs(images, channels):
    features = torch.randn(images, channels, dtype=torch.float64)
    assert uniformity(features).item() == pytest.approx(over_pairs(features))


def test_its_bounds():
    assert uniformity(torch.eye(6, 8)).item() == pytest.approx(1 / 6)  # orthogonal
    assert uniformity(torch.randn(1, 8).expand(5, -1) * torch.arange(1, 6)[:, None]).item() == pytest.approx(1)
    assert 1 / 20 < uniformity(torch.randn(20, 8)).item() < 1


def test_random_features_of_a_tiny_encoder():
    torch.manual_seed(0)
    assert uniformity(torch.randn(1024, 192)).item() == pytest.approx(0.0062, abs=1e-4)


def test_its_gradient_is_that_of_the_pairs():
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(uniformity, features)


def test_half_precision_is_left():
    features = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(uniformity(features), uniformity(features.clone()))
        found = uniformity(features)
    assert found.dtype == torch.float32 and torch.equal(found, uniformity(features))


@pytest.mark.parametrize("pool", ["patches", "class", "class_released"])
def test_the_feature_is_what_pool_says(pool):
    model = small("u_mae", terms={"uniformity": {"pool": pool}})
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(-1, 1)
    images, _, noise = batch(model)
    latent = model.observe(images, noise=noise).latent.detach()
    if pool == "patches":
        features = torch.stack([sum(image[1:]) for image in latent])
    else:
        features = latent[:, 0]
    if pool == "class_released":  # U-MAE applies the encoder's norm to tokens that already went through it
        deviation = (features.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
        features = (features - features.mean(dim=1, keepdim=True)) / deviation * model.norm.weight + model.norm.bias
    found = model(images, noise=noise)["uniformity"].item()
    assert found == pytest.approx(over_pairs(features.detach()), rel=1e-5)
    if pool == "class_released":
        assert found != pytest.approx(over_pairs(latent[:, 0]), rel=1e-2)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="pool is 'cls'; it can be patches, class"):
        UniformityTerm(UniformityOptions(pool="cls"))
    with pytest.raises(ValueError, match="weight is inf"):
        UniformityTerm(UniformityOptions(weight=float("inf")))
