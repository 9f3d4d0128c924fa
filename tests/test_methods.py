"""The contract of methods, tested for every method of the registry, and building of models."""

import pytest
import torch

import methods
from methods import METHODS, TERMS, build, own_options, preset
from models_mae import MaskedAutoencoderViT, MaskedImageModel
from tests.small import SMALL, batch, options_of, small
from util import checkpoint

# ---- the contract ---------------------------------------------------------------------------------------------------


MASKED = [name for name, entry in METHODS.items() if issubclass(entry.model_class(), MaskedImageModel)]


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture(params=MASKED)
def masked(request):
    """Return a method that hides patches and predicts a target for them."""
    return request.param


def test_every_masked_method_adds_its_weighted_terms_to_the_loss_of_its_target(masked):
    model = small(masked)
    images, labels, noise = batch(model)
    losses = model(images, labels, noise=noise)
    target = [model.target.name] if model.reconstruction_weight > 0 else []
    assert list(losses) == ["loss", *target, *model.terms]
    assert list(model.terms) == list(METHODS[masked].terms)
    total = sum(t.options.weight * losses[name] for name, t in model.terms.items())
    total += sum(model.reconstruction_weight * losses[name] for name in target)
    torch.testing.assert_close(losses["loss"], total)
    for value in losses.values():
        assert value.ndim == 0 and value.isfinite() and value.dtype == torch.float32
    again = model(images, labels, noise=noise)
    assert all(torch.equal(value, again[name]) for name, value in losses.items())
    assert model(images, labels)["loss"].isfinite()  # noise drawn inside


@pytest.mark.parametrize(
    ("names", "betas"),
    [
        ("mae nor_mae u_mae cross_mae cluster_mim sup_mae dmae simmim", (0.9, 0.95)),
        ("maskfeat beit peco moco_v3 dino", (0.9, 0.999)),
        ("vq_tokenizer vqkd_tokenizer", (0.9, 0.99)),
    ],
)
def test_coefficients_of_adamw(names, betas):
    assert {name: METHODS[name].model_class().betas for name in names.split()} == dict.fromkeys(names.split(), betas)


def test_every_method_reaches_the_encoder(method):
    """Each weight has a gradient, which DistributedDataParallel requires; encoder weights have one from each term."""
    model = small(method)
    images, labels, noise = batch(model)
    losses = model(images, labels, noise=noise)
    for name in ("loss", *model.loss_terms):
        (gradient,) = torch.autograd.grad(losses[name], model.patch_embed.proj.weight, retain_graph=True)
        assert gradient.abs().max() > 0, name
    losses["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_every_method_learns(method):
    model = small(method)
    images, labels, noise = batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = model(images, labels, noise=noise)["loss"].item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(images, labels, noise=noise)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.95 * first


def test_every_method_encodes_and_shows_what_it_can(method):
    model = small(method).eval()
    images, _, noise = batch(model)
    images = images[0] if isinstance(images, list) else images
    features = model.encode(images)
    assert features.shape == (4, 21, 16) and torch.equal(features, model.encode(images))
    pictures = model.pictures(images, noise=noise)
    assert pictures is None or all(picture.shape == images.shape for picture in pictures.values())
    constant = model.constant_loss(images)
    assert constant is None or 0 < constant < 10


def test_every_masked_method_predicts(masked):
    model = small(masked).eval()
    images, _, noise = batch(model)
    if not model.predicts:
        assert model.pictures(images, noise=noise) is None and model.constant_loss(images) is None
        with pytest.raises(ValueError, match="does not predict patches: its reconstruction_weight is 0"):
            model.predict(images, noise=noise)
        return
    pred, mask = model.predict(images, noise=noise)
    assert pred.shape == (4, 20, model.target.width) and mask.shape == (4, 20)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    pictures = model.pictures(images, noise=noise)
    assert pictures is None or {*pictures} == {"original", "masked", "reconstruction", "pasted"}
    if getattr(model.target, "normalize", False):
        assert model.target.width == 48
        constant = model.target.error(torch.zeros_like(pred), model.target(images)).mean()
        assert model.constant_loss(images) == pytest.approx(constant.item(), abs=0.05)


def test_every_masked_method_tells_its_sizes_and_scales(masked):
    model = small(masked)
    assert (model.grid, model.num_patches, model.patch_pixels) == ((4, 5), 20, 3 * model.patch_size**2)
    assert model.noise_rows == 1 + (model.input_jitter > 0) + sum(term.noise_rows for term in model.terms.values())
    for term in model.terms.values():
        assert all(isinstance(value, float) for value in term.scale(model).values())


def test_every_method_is_one_graph(method):
    model = small(method)
    images, labels, noise = batch(model)
    torch.compiler.reset()  # each method is compiled separately
    found = torch.compile(model, fullgraph=True, backend="eager")(images, labels, noise=noise)
    expected = model(images, labels, noise=noise)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_every_method_trains_in_half_precision_with_checkpointing(method):
    model = small(method, grad_checkpointing=True)
    images, labels, noise = batch(model)
    full = small(method)(images, labels, noise=noise)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, labels, noise=noise)
    assert all(value.dtype == torch.float32 for value in losses.values())
    torch.testing.assert_close(losses["loss"], full, rtol=0.05, atol=0)
    losses["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_every_method_takes_another_input_size(method):
    model = small(method)
    model.set_input_size(8 * model.patch_size)
    images, labels, noise = batch(model)
    assert model(images, labels, noise=noise)["loss"].isfinite()
    images = images[0] if isinstance(images, list) else images
    assert model.encode(images).shape == (4, 65, 16)


def test_every_method_has_the_encoder_of_plain_mae(method):
    """With MAE's decoder, all of its state, so that MAE's checkpoints load; the same seed gives the same weights."""
    model = small(method)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("terms.")}
    mae = small("mae").state_dict()
    if METHODS[method].model_class() is MaskedAutoencoderViT:
        # untrained weights are left out, and a decoder whose input is an inner block has its own norm
        mae = {name: value for name, value in mae.items() if model.predicts or name in own}
        assert [name for name in own if not name.startswith("decoder_input_norm")] == list(mae)
        assert not model.predicts or all(torch.equal(own[name], value) for name, value in mae.items())
    else:
        encoder = [name for name in mae if name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))]
        assert [name for name in own if name in encoder] == encoder


# ---- building a model -----------------------------------------------------------------------------------------------


def test_the_menu():
    assert {"mae", "nor_mae", "nor_mae_released", "noa_mae", "random_asymmetry_mae"} <= set(METHODS)
    assert preset("mae") == {"terms": {}} and preset("noa_mae") == {"terms": {"neighbor": {"relation": "alignment"}}}
    assert small("noa_mae").terms["neighbor"].options.weight == 5e-5
    assert small("nor_mae_released").terms["neighbor"].options.border == "wrap"
    assert all(entry.note for entry in METHODS.values())


def test_presets_have_the_papers_numbers():
    assert preset("moco_v3") == {"terms": {}, "min_scale": 0.08, "weight_decay": 0.1}
    dino = {"min_scale": 0.4, "weight_decay": 0.04, "blr": 5e-4, "min_lr": 1e-6, "warmup_epochs": 10}
    assert preset("dino") == {"terms": {}, **dino}
    weights = {
        method: [term.get("weight", 1.0) for term in preset(method)["terms"].values()]
        for method in ("dmae", "mae_lite_distill", "d2_mae", "tiny_mim", "g2sd", "amd", "proteus")
    }
    # AMD: one mean over the visible tokens of two blocks, and the generator's error
    assert weights.pop("amd") == [0.5, 0.5, 1.0] and weights.pop("tiny_mim") == weights.pop("proteus")[:2] == [1.0, 1.0]
    assert all(found == [1.0] for found in weights.values())


def test_a_preset_is_a_copy():
    preset("noa_mae")["terms"]["neighbor"]["relation"] = "diagonal"
    assert preset("noa_mae")["terms"]["neighbor"]["relation"] == "alignment"


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("mae_vit_tiny_patch16", 9_231_360),
        ("mae_vit_small_patch16", 28_204_800),
        ("mae_vit_base_patch16", 111_655_680),
    ],
)
def test_sizes_have_the_known_numbers_of_weights(model, weights):
    with torch.device("meta"):
        built = build("nor_mae", model)
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == weights
    assert built.grid == (14, 14) and built.mask_ratio == 0.75 and not built.options.norm_pix_loss


def test_large_and_huge():
    with torch.device("meta"):
        large, huge = build("mae", "mae_vit_large_patch16"), build("mae", "mae_vit_huge_patch14")
    assert (large.embed_dim, len(large.blocks), large.blocks[0].attn.num_heads) == (1024, 24, 16)
    assert (huge.embed_dim, len(huge.blocks), huge.grid) == (1280, 32, (16, 16))
    assert len(huge.decoder_blocks) == 8 and huge.decoder_blocks[0].attn.num_heads == 16


def test_overrides():
    model = build("mae", **SMALL, mask_ratio=0.5, mlp_ratio=2, in_chans=1)
    assert model.grid == (4, 5) and model.patch_pixels == 16 and model.num_visible == 10
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (16, 2, 2)
    assert model.blocks[0].mlp.fc1.out_features == 32
    assert (model.decoder_pred.in_features, len(model.decoder_blocks)) == (12, 1)
    assert model.decoder_blocks[0].attn.num_heads == 3 and model.options.norm_pix_loss
    own = dict.fromkeys(("input_size", "embed_dim", "depth", "num_heads", "decoder_depth", "in_chans", "mlp_ratio"), 0)
    with torch.device("meta"):
        assert len(build("mae", **own, decoder_embed_dim=None, terms=None, mask_ratio=None).blocks) == 12
    assert small("mae", input_size=[16, 20]).grid == (4, 5)


def test_terms_go_over_the_preset_option_by_option():
    model = small("noa_mae", terms={"neighbor": {"weight": 1e-3}})
    assert model.terms["neighbor"].options == TERMS["neighbor"].Options(weight=1e-3, relation="alignment")
    assert "neighbor" in small("mae", terms={"neighbor": {}}).terms
    assert not small("nor_mae", terms={"neighbor": None}).terms


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: build("nor_maee"), "did you mean 'nor_mae'"),
        (lambda: preset("ibot"), "mae, nor_mae"),
        (lambda: own_options("ibot"), "mae, nor_mae"),
        (lambda: build("mae", "mae_vit_tny_patch16"), "tiny"),
        (lambda: build("mae", patchsize=3), "option 'patchsize'"),
        (lambda: build("mae", input_sise=3), "did you mean 'input_size'"),
        (lambda: build("mae", terms={"neighbour": {}}), "did you mean 'neighbor'"),
        (lambda: build("nor_mae", terms={"neighbor": {"wieght": 1}}), "option of the term 'neighbor'.*'weight'"),
        (lambda: build("nor_mae", terms={"neighbor": {"relation": "trace"}}), "term 'neighbor': relation is 'trace'"),
        (lambda: build("mae", "mae_vit_tiny_patch15"), "15.*224"),
        (lambda: build("mae", "mae_vit_tiny_patch16", input_size=(224, 224, 3)), "height and width"),
        (lambda: build("mae", mask_ratio=0.999), "0.999 keeps 0"),
        (lambda: build("nor_mae", "mae_vit_tiny_patch1", input_size=4, in_chans=1), "more than one value"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_message(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


# ---- from a run -----------------------------------------------------------------------------------------------------


def resolved(method, **changes):
    """Return the resolved options of a run: all values, with resolved terms."""
    model = small(method, **changes)
    return model, {"method": method, "epochs": 3} | options_of(method, model)


@pytest.mark.parametrize("change", [{}, None, {"weight": 0.5}], ids=["as it is", "without terms", "weighted"])
def test_a_model_comes_back_from_a_runs_options(method, change):
    terms = dict.fromkeys(METHODS[method].terms, change)
    if change is None and METHODS[method].defaults.keys() & {"reconstruction_weight", "reconstruct_block"}:
        with pytest.raises(ValueError, match="no loss uses the encoder's output"):
            resolved(method, terms=terms)
        return
    model, options = resolved(method, terms=terms)
    again = methods.from_options(options)
    assert {name: term.options for name, term in again.loss_terms.items()} == {
        name: term.options for name, term in model.loss_terms.items()
    }
    assert again.options == model.options
    again.load_state_dict(model.state_dict())


def test_a_model_comes_back_from_a_checkpoint(tmp_path):
    from util import checkpoint

    model, options = resolved("nor_mae_released")
    checkpoint.save(
        tmp_path / "last.pth", {"format": checkpoint.FORMAT, "model": model.state_dict(), "options": options}
    )
    again, found = methods.from_checkpoint(tmp_path / "last.pth")
    assert not again.training and found["method"] == "nor_mae_released" and list(again.terms) == ["neighbor"]
    images, _, noise = batch(model)
    for mine, other in zip(again.predict(images, noise=noise), model.predict(images, noise=noise), strict=True):
        assert torch.equal(mine, other)


def test_images_of_whole_numbers_are_refused_with_advice():
    model = small("mae")
    with pytest.raises(ValueError, match=r"images are uint8; .*\(images / 255 - mean\) / std"):
        model.encode(torch.zeros(1, 3, 16, 20, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": 0.8}, "contains a fine-tuned model. tools.encoder.load_encoder"),
        ({"max_class_share": 0.75}, "contains a segmenter. Give the checkpoint that it was trained from"),
        ({}, "contains a linear classifier without its encoder. Give the checkpoint that it was trained on"),
    ],
)
def test_a_checkpoint_of_another_program_is_refused_with_advice(tmp_path, options, message):
    checkpoint.save(tmp_path / "last.pth", {"format": checkpoint.FORMAT, "model": {}, "options": options})
    with pytest.raises(ValueError, match=message):
        methods.from_checkpoint(tmp_path / "last.pth")


def test_another_model_starts_from_the_averaged_weights(tmp_path):
    parts = {"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}
    checkpoint.save(tmp_path / "last.pth", {"format": checkpoint.FORMAT, "options": {"mixup": 0.8}} | parts)
    assert methods.load_pretrained(tmp_path / "last.pth")[0]["a"] == 1


def test_an_option_of_other_methods_is_refused_with_the_first_three_of_them():
    users = [name for name in METHODS if "decoder_depth" in methods.own_options(name)]
    assert len(users) > 3 and "dino" not in users
    named = f"methods that do: {users[0]}, {users[1]}, {users[2]} and {len(users) - 3} more"
    with pytest.raises(ValueError, match=named):
        methods.parse_options(["--method", "dino", "--decoder_depth", "2", "--data_path", "x"])
    users = [name for name in METHODS if "mask_cell" in methods.own_options(name)]
    assert len(users) <= 3
    with pytest.raises(ValueError, match=f"methods that do: {', '.join(users)}$"):
        methods.parse_options(["--method", "dino", "--mask_cell", "2", "--data_path", "x"])
