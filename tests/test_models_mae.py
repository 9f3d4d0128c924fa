"""The masked autoencoder against a plain restatement, published counts, and what a term or a decoder may rely on."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import build
from models_mae import (
    ENCODER_INPUT,
    BatchNormOverRanks,
    MaskedAutoencoderViT,
    Masking,
    Term,
    random_masking,
)
from models_targets import patchify, standardize, unpatchify
from models_vit import SIZES, VisionTransformer, position_table
from options.crop import Crop
from options.mae import MAEOptions
from tests.published import assert_as_published, model_of, needs_vectors, read
from tests.small import direct

SMALL = {
    "img_size": (24, 32),
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
}


def small(**changes):
    torch.manual_seed(0)
    return direct(MaskedAutoencoderViT, **(SMALL | changes))


def batch(model, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, model.in_chans, *model.patch_embed.img_size, generator=generator, dtype=dtype)
    return images, torch.rand(n, model.num_patches, generator=generator)


# ---- patches and masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (1, 1, 4, 4), (2, 5, 12, 4)])
def test_patches_are_ordered_by_row_column_channel(shape):
    images = torch.randn(shape)
    patches = patchify(images, 4)
    columns = shape[3] // 4
    for patch in range(patches.shape[1]):
        top, left = 4 * (patch // columns), 4 * (patch % columns)
        values = [images[:, c, top + p, left + q] for p in range(4) for q in range(4) for c in range(shape[1])]
        assert torch.equal(patches[:, patch], torch.stack(values, dim=1))
    assert torch.equal(unpatchify(patches, 4, (shape[2] // 4, columns)), images)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [
        *[(196, ratio, visible) for ratio, visible in ((0.5, 98), (0.6, 78), (0.75, 49), (0.85, 29), (0.9, 19))],
        (64, 0.75, 16),
        (49, 0.75, 12),
        (144, 0.75, 36),
        (100, 0.9, 9),  # 100 * (1 - 0.9) is a little less than 10
    ],
)
def test_as_many_patches_are_visible_as_in_mae(patches, ratio, visible):
    side = round(patches**0.5)
    model = small(img_size=4 * side, patch_size=4, mask_ratio=ratio)
    _, noise = batch(model)
    masking = random_masking(noise, model.num_visible)
    assert model.num_visible == masking.ids_keep.shape[1] == visible
    assert masking.mask.sum(dim=1).tolist() == [patches - visible] * 3


def test_the_mask_hides_the_patches_of_the_largest_noise():
    noise = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.9, 0.5, 0.5]])
    masking = random_masking(noise, 2)
    assert masking.ids_keep.tolist() == [[1, 3], [0, 2]]  # in order of noise; of equals the first
    assert masking.mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert masking.ids_restore.tolist() == [[3, 0, 2, 1], [0, 3, 1, 2]]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99, 1e-17, -0.5, 1.5, float("nan")])
def test_a_mask_that_keeps_or_hides_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        small(mask_ratio=ratio)
    assert small(mask_ratio=0.5).num_visible == 6


def test_the_refusal_names_the_numbers():
    with pytest.raises(ValueError, match="keeps 0 and hides 12 of 12"):
        small(mask_ratio=0.95)


@pytest.mark.parametrize(
    "wrong",
    [
        {"img_size": 30},
        {"embed_dim": 18},
        {"num_heads": 3},
        {"decoder_num_heads": 5},
        {"decoder_embed_dim": 6},
        {"depth": 0},
        {"decoder_depth": -1},
        {"in_chans": 0},
        {"patch_size": 1, "in_chans": 1, "norm_pix_loss": True},
    ],
)
def test_sizes_that_do_not_go_together_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\d|single"):
        small(**wrong)


# ---- the objective --------------------------------------------------------------------------------------------------


def test_standardize_is_the_mean_and_the_unbiased_deviation():
    x = torch.randn(4, 7, 48) * 3 + 1
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    torch.testing.assert_close(standardize(x), (x - mean) / (variance + 1e-6).sqrt())
    assert standardize(torch.full((1, 12), 0.3)).abs().max() < 1e-4  # no variance: nothing left
    square = standardize(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).square().sum().item()
    assert square == pytest.approx(2.999998, abs=1e-6)
    flat = torch.tensor([[0.5, 0.5 + 1e-3, 0.5]], dtype=torch.float64)  # where eps weighs as much as the variance
    variance, mean = torch.var_mean(flat, dim=-1, keepdim=True)
    torch.testing.assert_close(standardize(flat), (flat - mean) / (variance + 1e-6).sqrt())


def plain_mae(model, images, noise):
    """MAE, one image at a time and one patch at a time: loss, predictions, masks."""
    errors, preds, masks = [], [], []
    visible = int(model.num_patches * (1 - model.mask_ratio))
    for image, order in zip(images, noise.argsort(dim=1).tolist(), strict=True):
        tokens = model.patch_embed(image[None])[0]
        sequence = [model.cls_token[0, 0]] + [tokens[i] + model.pos_embed[0, 1 + i] for i in order[:visible]]
        x = torch.stack(sequence)[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        sequence = [x[0]]
        for i in range(model.num_patches):
            sequence.append(x[1 + order.index(i)] if i in order[:visible] else model.mask_token[0, 0])
        x = torch.stack(sequence)[None] + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        pred = model.decoder_pred(model.decoder_norm(x))[0, 1:]
        for i in order[visible:]:
            target = patchify(image[None], model.patch_size)[0, i]
            if model.target.normalize:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((pred[i] - target).square().mean())
        preds.append(pred)
        masks.append([float(i in order[visible:]) for i in range(model.num_patches)])
    return torch.stack(errors).mean(), torch.stack(preds), torch.tensor(masks)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("changes", [{}, {"in_chans": 1, "img_size": 16, "patch_size": 4}, {"in_chans": 5}])
def test_loss_prediction_and_gradients_are_those_of_plain_mae(norm_pix_loss, changes):
    model = small(norm_pix_loss=norm_pix_loss, **changes)
    images, noise = batch(model)
    loss, pred, mask = plain_mae(model, images, noise)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    losses = model(images, noise=noise)
    losses["loss"].backward()
    assert set(losses) == {"loss", "reconstruction"}
    torch.testing.assert_close(losses["loss"], loss, rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (name in expected)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)
    found_pred, found_mask = model.predict(images, noise=noise)
    torch.testing.assert_close(found_pred, pred, rtol=1e-4, atol=1e-5)
    assert torch.equal(found_mask, mask)


def test_noise_may_come_with_rows_for_terms_that_are_not_there():
    model = small()
    images, noise = batch(model)
    rows = torch.stack([noise, torch.rand_like(noise)], dim=1)
    assert torch.equal(model(images, noise=rows)["loss"], model(images, noise=noise)["loss"])
    with pytest.raises(ValueError, match=r"\[3, 11\]"):
        model(images, noise=noise[:, 1:])


def test_without_noise_the_mask_is_random():
    model = small()
    images, _ = batch(model)
    torch.manual_seed(0)
    first = model.predict(images)[1]
    assert not torch.equal(first, model.predict(images)[1])
    torch.manual_seed(0)
    assert torch.equal(first, model.predict(images)[1])


def test_images_of_another_shape_are_refused():
    model = small()
    for wrong in (torch.zeros(2, 3, 32, 24), torch.zeros(2, 1, 24, 32), torch.zeros(3, 24, 32)):
        for use in (model, model.encode):
            with pytest.raises(ValueError, match="3, 24, 32"):
                use(wrong)


def test_half_precision_is_left_before_the_loss():
    model = small(norm_pix_loss=True)
    images, noise = batch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, noise=noise)
        pred, mask = model.predict(images, noise=noise)
    assert losses["loss"].dtype == pred.dtype == torch.float32
    error = (pred - model.target(images)).square().mean(dim=-1)
    torch.testing.assert_close(losses["loss"], (error * mask).sum() / mask.sum(), rtol=1e-6, atol=0)
    losses["loss"].backward()


def test_double_precision_stays():
    model = small().double()
    images, noise = batch(model, dtype=torch.float64)
    assert model(images, noise=noise)["loss"].dtype == torch.float64


def test_checkpointing_blocks_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        images, noise = batch(model)
        model(images, noise=noise)["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- the model as timm's --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "channels", "heads"),
    [("tiny_patch16", 192, 12), ("small_patch16", 256, 8), ("base_patch16", 512, 16), ("huge_patch14", 512, 16)],
)
def test_default_decoders(model, channels, heads):
    with torch.device("meta"):
        made = build("mae", f"mae_vit_{model}")
    assert made.decoder_embed.out_features == channels
    assert [block.attn.num_heads for block in made.decoder_blocks] == [heads] * 8


@pytest.mark.parametrize(
    ("size", "decoder", "depth", "trained", "frozen"),
    [
        ("tiny", (192, 12), 1, 6_117_312, 75_648),
        ("tiny", (192, 12), 4, 7_451_904, 75_648),
        ("tiny", (192, 12), 8, 9_231_360, 75_648),
        ("tiny", (192, 12), 12, 11_010_816, 75_648),
        ("small", (256, 8), 1, 22_676_480, 126_080),
        ("small", (256, 8), 8, 28_204_800, 126_080),
        ("base", (512, 16), 4, 99_046_144, 252_160),
        ("base", (512, 16), 8, 111_655_680, 252_160),
        ("base", (512, 16), 12, 124_265_216, 252_160),
    ],
)
def test_the_known_numbers_of_weights(size, decoder, depth, trained, frozen):
    sizes, (channels, heads) = SIZES[size], decoder
    with torch.device("meta"):
        options = MAEOptions(
            decoder_embed_dim=channels, decoder_depth=depth, decoder_num_heads=heads, norm_pix_loss=True
        )
        model = MaskedAutoencoderViT(224, 16, 3, sizes.embed_dim, sizes.depth, sizes.num_heads, options=options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == frozen


def test_positions_are_fixed_and_initial_weights_are_maes():
    model = small()
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    assert torch.equal(model.pos_embed, position_table((3, 4), 16))
    assert torch.equal(model.decoder_pos_embed, position_table((3, 4), 12))
    tokens = torch.cat([t.flatten() for t in (model.cls_token, model.mask_token)])
    assert 0.01 < tokens.std() < 0.03
    for module in model.modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound and module.bias.abs().max() == 0
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6


def test_the_state_has_maes_names():
    parts = {name.split(".")[0] for name in small().state_dict()}
    encoder = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    decoder = {"decoder_embed", "mask_token", "decoder_pos_embed", "decoder_blocks", "decoder_norm", "decoder_pred"}
    assert parts == encoder | decoder


def test_features_are_timms_on_whole_images():
    model = small()
    plain = VisionTransformer(img_size=(24, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    own = model.state_dict()
    plain.load_state_dict({name: own[name] for name in plain.state_dict()})
    images, _ = batch(model)
    features = model.encode(images)
    assert features.shape == (3, 13, 16)
    assert torch.equal(features, plain.forward_features(images)) and torch.equal(features, model.encode(images))
    assert torch.equal(features, model.forward_features(images))

    for size in ((48, 32), 16):
        model.set_input_size(size)
        plain.set_input_size(size if isinstance(size, tuple) else (size, size))
        images, noise = batch(model)
        assert torch.equal(model.encode(images), plain.forward_features(images))


def test_another_input_size_covers_both_tables():
    model = small()
    model.set_input_size((48, 32))
    assert model.grid == (6, 4) and model.num_patches == 24 and model.num_visible == 6
    for table in (model.pos_embed, model.decoder_pos_embed):
        assert table.shape[1] == 25 and not table.requires_grad and table[:, 0].abs().max() == 0
    images, noise = batch(model)
    model(images, noise=noise)["loss"].backward()
    model.set_input_size(16)
    assert model.grid == (2, 2) and model.decoder_pos_embed.shape == (1, 5, 12)
    model.set_input_size()
    assert model.grid == (2, 2)


def test_another_input_size_can_be_impossible():
    model = small()
    for wrong, message in (((24, 30), "24 x 30"), (8, "hides 1 of 1"), ((-8, 8), "positive")):
        with pytest.raises(ValueError, match=message):
            model.set_input_size(wrong)
        assert model.grid == (3, 4) and model.pos_embed.shape[1] == 13
    with pytest.raises(ValueError, match="patches of 8"):
        model.set_input_size(32, patch_size=16)


def test_there_is_no_classifier_to_reset():
    with pytest.raises(ValueError, match="num_classes"):
        small().reset_classifier(10)


def test_decay_is_maes():
    from timm.optim import param_groups_weight_decay

    model = small()
    assert model.no_weight_decay() == set()
    free, decayed = param_groups_weight_decay(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {"cls_token", "mask_token", "patch_embed.proj.weight"} <= decayed_names
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in free["params"])
    assert not {"pos_embed", "decoder_pos_embed"} & (decayed_names | {names[id(p)] for p in free["params"]})


# ---- looking at the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_is_pasted_as_the_original(norm_pix_loss, monkeypatch):
    model = small(norm_pix_loss=norm_pix_loss)
    images, noise = batch(model)
    mask = random_masking(noise, model.num_visible).mask
    monkeypatch.setattr(model, "predict", lambda images, noise: (model.target(images), mask))
    pictures = model.pictures(images, noise=noise)
    assert list(pictures) == ["original", "masked", "reconstruction", "pasted"]
    assert torch.equal(pictures["original"], images)
    for name in ("reconstruction", "pasted"):
        torch.testing.assert_close(pictures[name], images, rtol=0, atol=1e-5)
    hidden = unpatchify(mask[:, :, None].expand(-1, -1, model.patch_pixels), 8, model.grid)
    assert torch.equal(pictures["masked"], images * (1 - hidden))


def test_a_reconstruction_keeps_what_was_visible():
    model = small(norm_pix_loss=True)
    images, noise = batch(model)
    pictures = model.pictures(images, noise=noise)
    assert all(picture.shape == images.shape and picture.dtype == torch.float32 for picture in pictures.values())
    assert not any(picture.requires_grad for picture in pictures.values())
    pred, mask = model.predict(images, noise=noise)
    shown = patchify(pictures["pasted"], 8)
    assert torch.equal(shown[mask == 0], patchify(images, 8)[mask == 0])
    patches = patchify(images, 8)
    undone = pred * patches.std(dim=-1, keepdim=True) + patches.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(shown[mask == 1], undone[mask == 1].detach(), rtol=1e-4, atol=1e-5)


def test_the_constant_loss_is_that_of_the_best_constant():
    model = small()
    images, _ = batch(model)
    patches = patchify(images, 8)
    best = (patches - patches.mean(dim=(0, 1))).square().mean()
    assert model.constant_loss(images) == pytest.approx(best.item(), rel=1e-6)
    assert small(norm_pix_loss=True).constant_loss(images) == pytest.approx(191 / 192, abs=1e-4)


# ---- terms and decoders ---------------------------------------------------------------------------------------------


class Spy(Term):
    """Keeps the view; its value is a linear readout of a tap, so that it has weights of its own."""

    name: ClassVar[str] = "spy"

    @dataclass(frozen=True)
    class Options:
        """The options of a spy."""

        weight: float = 0.5

    def __init__(self, options, taps=(ENCODER_INPUT, 1), noise_rows=2, needs_labels=True):
        super().__init__(options)
        self.taps, self.noise_rows, self.needs_labels = taps, noise_rows, needs_labels

    def attach(self, model):
        self.head = nn.Linear(model.embed_dim, 1)

    def check(self, model):
        if model.num_patches == 4:
            raise ValueError("a spy hates four")

    def forward(self, model, view):
        self.view = view
        return self.head(view.taps[self.taps[-1]]).mean() + view.labels.float().mean()


def test_a_term_trains_the_complete_encoder_unless_it_says_that_it_does_not():
    spy = Spy(Spy.Options())
    losses = small(terms={"spy": spy}, reconstruction_weight=0.0)(torch.randn(3, 3, 24, 32), torch.arange(3))
    torch.testing.assert_close(losses["loss"], 0.5 * losses["spy"])
    spy = Spy(Spy.Options())
    spy.reads_features = False
    with pytest.raises(ValueError, match="no loss uses the encoder's output"):
        small(terms={"spy": spy}, reconstruction_weight=0.0)


def test_a_term_sees_the_pass_and_adds_to_the_loss():
    model = small(terms={"first": Spy(Spy.Options()), "spy": Spy(Spy.Options(weight=2.0))})
    assert model.noise_rows == 5 and model.terms["spy"].noise_row == 3
    assert {"terms.spy.head.weight", "terms.first.head.bias"} <= set(model.state_dict())
    images, noise = batch(model)
    rows = torch.cat([noise[:, None], torch.rand(3, 4, 12)], dim=1)
    labels = torch.tensor([3, 1, 2])
    losses = model(images, labels, noise=rows)
    assert list(losses) == ["loss", "reconstruction", "first", "spy"]
    total = losses["reconstruction"] + 0.5 * losses["first"] + 2.0 * losses["spy"]
    torch.testing.assert_close(losses["loss"], total)
    torch.testing.assert_close(losses["reconstruction"], small()(images, noise=noise)["loss"], rtol=0, atol=0)

    view = model.terms["spy"].view
    assert view.images is images and view.labels is labels and torch.equal(view.noise, rows)
    masking = random_masking(noise, 3)
    for name in Masking._fields:
        assert torch.equal(getattr(view, name), getattr(masking, name))
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    assert torch.equal(view.tokens, tokens) and view.latent.shape == (3, 4, 16)
    x = view.taps[ENCODER_INPUT]
    assert torch.equal(x[:, 1:], tokens.gather(1, view.ids_keep[:, :, None].expand(-1, -1, 16)))
    x = model.blocks[1](model.blocks[0](x))
    assert torch.equal(view.taps[1], x) and torch.equal(view.latent, model.norm(x))
    assert view.decoded.shape == (3, 12, 12) and torch.equal(view.pred, model.decoder_pred(view.decoded))


def test_noise_that_a_term_lacks_is_drawn():
    model = small(terms={"spy": Spy(Spy.Options())})
    images, noise = batch(model)
    model(images, torch.zeros(3), noise=noise)
    view = model.terms["spy"].view
    assert view.noise.shape == (3, 3, 12) and torch.equal(view.noise[:, 0], noise)
    assert not torch.equal(view.noise[:, 1], view.noise[:, 2])


def test_terms_are_checked():
    model = small(terms={"spy": Spy(Spy.Options())})
    with pytest.raises(ValueError, match="needs labels"):
        model(batch(model)[0])
    with pytest.raises(ValueError, match="hates four"):
        model.set_input_size(16)
    with pytest.raises(ValueError, match="0 to 1"):
        small(terms={"spy": Spy(Spy.Options(), taps=(2,))})


class MeanDecoder(MaskedAutoencoderViT):
    """Predicts every patch from the mean of the first block's output."""

    decoder_taps = (0,)

    def build_decoder(self):
        super().build_decoder()
        self.decoder_blocks = nn.ModuleList()

    def decode(self, latent, masking, taps):
        x = self.decoder_embed(taps[0].mean(dim=1, keepdim=True)) + self.mask_token + self.decoder_pos_embed[:, 1:]
        return self.decoder_norm(x)


def test_another_decoder_overrides_two_methods():
    torch.manual_seed(0)
    model = direct(MeanDecoder, **SMALL)
    images, noise = batch(model)
    pred, _ = model.predict(images, noise=noise)
    assert pred.shape == (3, 12, 192)
    model(images, noise=noise)["loss"].backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0


# ---- the published implementation -----------------------------------------------------------------------------------


@needs_vectors
def test_the_published_outputs():
    vectors = read("mae")
    model, tables = model_of(vectors)
    for name, table in tables.items():
        torch.testing.assert_close(table, vectors[f"state:{name}"], rtol=0, atol=2e-6)
    images, noise = vectors["imgs"], vectors["noise"]
    view, loss = model.observe(images, noise=noise), model(images, noise=noise)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, vectors["loss"], rtol=1e-5, atol=0)
    assert torch.equal(view.mask, vectors["mask"])
    assert assert_as_published({"latent": view.latent, "pred": view.pred}, model, vectors) == 5
    assert F.mse_loss(view.pred, vectors["pred"]) < 1e-10


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_ranks_equals_torchs_on_one_process(affine):
    own, torchs = BatchNormOverRanks(5, affine=affine), torch.nn.BatchNorm1d(5, affine=affine)
    if affine:
        for norm in (own, torchs):
            torch.nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = (10 + torch.randn(7, 5)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for _ in range(2):
        found, expected = own(x), torchs(y)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.eval()(x), torchs.eval()(y), rtol=1e-5, atol=1e-5)


def test_batch_norm_over_ranks_computes_in_float32_under_autocast():
    x = 100 + torch.randn(64, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BatchNormOverRanks(3, affine=False)(x)
    torch.testing.assert_close(found, F.batch_norm(x, None, None, training=True), rtol=1e-4, atol=1e-4)


def test_one_crop_of_the_input_size_is_the_view():
    assert small().views(0.2, 0.5) == (Crop((24, 32), (0.2, 1.0), hflip=0.5),)
