"""SimMIM against its release's counts, a plain restatement, and the equal head by convolution and pixel shuffle."""

import pytest
import torch
import torch.nn.functional as F

from methods import METHODS, build
from models_simmim import SimMIM
from models_targets import Target, patchify, unpatchify
from tests.small import SMALL, batch, direct, small
from util.optim import pretrain_groups


def plain(**changes):
    sizes = dict(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2, mask_ratio=0.6)
    torch.manual_seed(0)
    return direct(SimMIM, **(sizes | changes))


def test_it_hides_30_of_49_cells_of_32_pixels():
    with torch.device("meta"):
        model = build("simmim", "mae_vit_tiny_patch16")
    mask = model.draw_mask(torch.rand(3, 196))
    assert mask.sum(dim=1).tolist() == [120.0] * 3
    cells = unpatchify(mask[:, :, None].repeat(1, 1, 256), 16, (14, 14)).reshape(3, 7, 32, 7, 32)
    share = cells.mean(dim=(2, 4))
    assert set(share.unique().tolist()) == {0.0, 1.0}, "a cell is hidden as a whole"
    assert share.sum(dim=(1, 2)).tolist() == [30.0] * 3


def test_any_cell_may_be_hidden():
    often = plain().draw_mask(torch.rand(2000, 64)).mean(dim=0)
    assert often.min() > 0.55 and often.max() < 0.70  # 10 of 16


@pytest.mark.parametrize(("mask_cell", "hidden"), [(4, 39), (8, 40), (12, 6 * 9), (16, 3 * 16)])
def test_cells_of_other_sizes(mask_cell, hidden):
    model = plain(mask_cell=mask_cell)
    mask = model.draw_mask(torch.rand(5, 64))
    if mask_cell == 12:  # 3 x 3 cells of which 6 are hidden; those at the edges are cut
        assert all(count <= hidden for count in mask.sum(dim=1).tolist())
        first = mask.reshape(5, 8, 8)[:, ::3, ::3].sum(dim=(1, 2))
        assert first.tolist() == [6.0] * 5
    else:
        assert mask.sum(dim=1).tolist() == [float(hidden)] * 5


def test_the_encoder_sees_a_blank_wherever_something_is_hidden():
    model, changed = plain(), None
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    view = model.observe(images, noise=noise)
    hidden = unpatchify(view.mask[:, :, None].repeat(1, 1, 48), 4, (8, 8)) > 0
    changed = model.observe(torch.where(hidden, torch.randn_like(images), images), noise=noise)
    assert torch.equal(view.pred, changed.pred)
    x = model.patch_embed(images)
    x = x * (1 - view.mask[:, :, None]) + model.mask_token * view.mask[:, :, None]
    x = torch.cat([model.cls_token.expand(2, -1, -1), x + model.pos_embed[:, 1:]], dim=1)
    torch.testing.assert_close(view.latent, model.norm(model.blocks(x)))


def test_the_loss_is_the_mean_absolute_difference_per_hidden_pixel_and_channel():
    model = plain()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    pred, mask = model.predict(images, noise=noise)
    pixels = unpatchify(mask[:, :, None].repeat(1, 1, 16), 4, (8, 8))  # one channel
    difference = (unpatchify(pred, 4, (8, 8)) - images).abs()
    expected = (difference * pixels).sum() / pixels.sum() / 3
    torch.testing.assert_close(model(images, noise=noise)["loss"], expected)


def test_the_head_is_a_convolution_and_a_pixel_shuffle():
    model = plain()
    latent = torch.randn(2, 64, 16)
    made = unpatchify(model.decoder_pred(latent), 4, (8, 8))
    by_channel = torch.arange(48).reshape(4, 4, 3).permute(2, 0, 1).flatten()  # pixel shuffle: channel, row, column
    weight, bias = model.decoder_pred.weight[by_channel], model.decoder_pred.bias[by_channel]
    convolved = F.conv2d(latent.transpose(1, 2).unflatten(2, (8, 8)), weight[:, :, None, None], bias)
    torch.testing.assert_close(F.pixel_shuffle(convolved, 4), made)


def test_another_target_is_one_class():
    class Brightness(Target):
        width = 2

        def forward(self, images):
            patches = patchify(images, 4)
            return torch.stack([patches.mean(dim=-1), patches.amax(dim=-1)], dim=-1)

        def error(self, pred, target):
            return (pred - target).square().mean(dim=-1)

    class Brightest(SimMIM):
        def make_target(self):
            return Brightness()

    torch.manual_seed(0)
    model = Brightest(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    pred, mask = model.predict(images, noise=noise)
    error = (pred - model.target(images)).square().mean(dim=-1)
    torch.testing.assert_close(model(images, noise=noise)["loss"], error[mask > 0].mean())


def test_the_baseline_is_the_best_constant_patch():
    model = plain()
    images = torch.randn(8, 3, 32, 32).exp()
    target = model.target(images).flatten(0, 1)
    best = model.constant_loss(images)
    assert best == pytest.approx((target - target.median(dim=0).values).abs().mean().item())
    assert best < (target - target.mean(dim=0)).abs().mean().item()


def test_initial_weights_are_those_of_the_release():
    """A normal distribution cut off at one standard deviation has 0.5396 of it."""
    torch.manual_seed(0)
    model = build("simmim", "mae_vit_small_patch16", depth=3)
    std = 0.02 * 0.5396
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(std, rel=0.02)
    for number, block in enumerate(model.blocks, start=1):
        for first in (block.attn.qkv, block.mlp.fc1):
            assert first.weight.std().item() == pytest.approx(std, rel=0.02)
        for last in (block.attn.proj, block.mlp.fc2):
            assert last.weight.std().item() == pytest.approx(std / (2 * number) ** 0.5, rel=0.02)
            assert last.weight.abs().max() <= 0.02 / (2 * number) ** 0.5 + 1e-6
        assert not any(bias.any() for name, bias in block.named_parameters() if name.endswith("bias"))
        assert (block.norm1.weight == 1).all()
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(std, rel=0.15) and token.abs().max() <= 0.02
    assert not model.patch_embed.proj.bias.any()
    for drawn in (model.decoder_pred.weight, model.decoder_pred.bias):  # a 1 x 1 convolution's defaults
        bound = 384**-0.5
        assert drawn.abs().max() <= bound and drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_class_token_is_not_decayed_and_the_mask_token_is():
    model = plain()
    decayed = {id(p): group["weight_decay"] for group in pretrain_groups(model, 0.05) for p in group["params"]}
    found = {name: decayed[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    expected = {n: 0.0 if n == "cls_token" or n.endswith("bias") or "norm" in n else 0.05 for n in found}
    assert found == expected and found["mask_token"] == 0.05
    mae = small("mae")
    groups = {id(p): group["weight_decay"] for group in pretrain_groups(mae, 0.05) for p in group["params"]}
    assert groups[id(mae.cls_token)] == 0.05


def test_its_share_of_hidden_patches_is_the_papers():
    assert small("simmim").mask_ratio == 0.6 and small("simmim", mask_ratio=0.5).mask_ratio == 0.5
    assert METHODS["simmim"].model_class() is SimMIM


def test_terms_that_need_visible_patches_alone_are_refused():
    with pytest.raises(ValueError, match="needs an encoder that gets visible patches only"):
        small("simmim", terms={"neighbor": {}})
    model = small("simmim", terms={"uniformity": {}, "label": {"classes": 3}})
    images, labels, noise = batch(model)
    assert {"uniformity", "label"} < set(model(images, labels, noise=noise))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_cell": 6}, "mask_cell is 6 pixels, which patches of 4 do not fill"),
        ({"mask_cell": -4}, "mask_cell: must be at least 0, found -4"),
        ({"mask_cell": 32}, "hides 1 of the 1 cells"),
        ({"mask_ratio": 0.999}, "hides 6 of the 6 cells"),
        ({"decoder_depth": 2}, "decoder_depth is 2, but the method 'simmim' does not use it"),
        ({"predict_ratio": 0.5}, "predict_ratio is 0.5, but"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small("simmim", **changes)


def test_cells_are_for_methods_that_hide_them():
    with pytest.raises(ValueError, match="mask_cell is 8, but the method 'mae' does not use it"):
        build("mae", **SMALL, mask_cell=8)


@pytest.mark.parametrize("name", ["simmim", "maskfeat", "beit"])
def test_the_first_row_of_noise_is_the_masks(name):
    model = small(name)
    images, _, noise = batch(model)
    expected = model.observe(images, noise=noise).mask
    model.noise_rows = 2  # the second is a loss term's
    view = model.observe(images, noise=torch.cat([noise, 1 - noise], dim=1))
    assert torch.equal(view.mask, expected) and view.noise.shape == (len(images), 2, model.num_patches)
    assert torch.equal(model.predict(images, noise=view.noise)[1], expected)


def test_blocks_that_hide_all_patches_are_refused():
    model = small("maskfeat", mask_ratio=0.97)
    for grid in ((2, 8), (8, 2)):
        with pytest.raises(ValueError, match="hides 16 of 16 patches"):
            model.check_grid(grid)


def test_the_mean_over_no_hidden_patch_is_zero():
    model = small("maskfeat")
    assert model.mean_over_hidden(torch.ones(2, 3), torch.zeros(2, 3)) == 0
    error, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    assert model.mean_over_hidden(error, mask) == 2.5
