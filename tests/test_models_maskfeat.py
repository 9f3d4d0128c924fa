"""MaskFeat's head and loss against closed forms."""

import pytest
import torch

from methods import build
from models_maskfeat import MaskFeat
from tests.small import batch, direct, small


@pytest.mark.parametrize(("size", "weights"), [("tiny", 21_228), ("small", 42_348), ("base", 84_588)])
def test_the_head_has_the_known_number_of_weights(size, weights):
    with torch.device("meta"):
        model = build("maskfeat", f"mae_vit_{size}_patch16")
    parts = [*model.norm.parameters(), *model.decoder_pred.parameters()]
    assert sum(p.numel() for p in parts) == weights and model.decoder_pred.out_features == 108


@pytest.mark.parametrize(("width", "loss"), [(192, 0.188), (384, 0.265), (768, 0.418)])
def test_the_loss_at_the_start_is_a_ninth_and_the_variance_of_the_prediction(width, loss):
    torch.manual_seed(0)
    model = direct(MaskFeat, img_size=32, patch_size=16, embed_dim=width, depth=1, num_heads=4)
    images, found = torch.randn(2, 3, 32, 32), []
    for _ in range(16):
        torch.nn.init.trunc_normal_(model.decoder_pred.weight, std=0.02)
        found.append(model(images)["loss"].item())
    assert sum(found) / len(found) == pytest.approx(loss, rel=0.12)
    fresh = direct(MaskFeat, img_size=32, patch_size=16, embed_dim=width, depth=1, num_heads=4).decoder_pred
    assert fresh.weight.std().item() == pytest.approx(0.02, rel=0.05) and fresh.bias.abs().max() == 0


def test_predicting_zeros_costs_a_ninth_of_the_cells_that_vary():
    model = small("maskfeat")
    images, _, _ = batch(model)
    images[0] = 0.3
    target = model.target(images)
    error = model.target.error(torch.zeros_like(target), target).mean()
    assert error.item() == pytest.approx(0.75 / 9, abs=1e-6)
    best = target - target.flatten(0, 1).mean(dim=0)
    assert (
        model.constant_loss(images) == pytest.approx(best.square().mean().item(), rel=1e-5)
        and best.square().mean() < error
    )


@pytest.mark.parametrize(("channels", "patch", "width"), [(1, 8, 9), (5, 8, 45), (2, 24, 162)])
def test_grey_and_many_channels_and_other_patches(channels, patch, width):
    model = small("maskfeat", model=f"mae_vit_tiny_patch{patch}", input_size=(2 * patch, 3 * patch), in_chans=channels)
    images, _, _ = batch(model)
    assert model.target.width == width and model(images)["loss"].isfinite()


def test_the_encoder_ends_with_the_norm_that_the_head_reads():
    model = small("maskfeat").eval()
    images, _, noise = batch(model)
    view = model.observe(images, noise=torch.zeros_like(noise))  # hides nothing
    assert torch.equal(view.latent, model.encode(images))
    torch.testing.assert_close(view.pred, model.decoder_pred(model.encode(images)[:, 1:]))
    assert model.pictures(images) is None


def test_patches_without_cells_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        small("maskfeat", model="mae_vit_tiny_patch4")
