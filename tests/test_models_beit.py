"""BEiT, PeCo and ClusterMIM: token losses against closed forms, tokenizers from files, NoR-MAE's term on tokens."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import methods
from data.views import is_plain
from methods import METHODS, build
from models_beit import BEiT
from models_cluster_mim import ClusterMIM
from models_nor_mae import neighbor_relation
from models_targets import Tokens
from programs import pretrain
from tests.small import batch, direct, small, teacher_checkpoint, tokenizer_checkpoint
from util import checkpoint, optim
from util.distributed import Processes
from util.run import resolve


@pytest.fixture(params=["beit", "cluster_mim"])
def method(request):
    return request.param


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "weights"), [("tiny", 1_581_056), ("small", 3_153_920), ("base", 6_299_648)])
def test_the_layer_of_8192_tokens_has_the_known_number_of_weights(size, weights):
    from models_vit import encoder_sizes

    with torch.device("meta"):
        model = BEiT(**encoder_sizes(f"mae_vit_{size}_patch16", {}), options=BEiT.Options(tokens=8192))
    assert sum(p.numel() for p in model.decoder_pred.parameters()) == weights


@pytest.mark.parametrize(("width", "loss"), [(192, 9.049), (384, 9.088), (768, 9.165)])
def test_beits_loss_at_the_start(width, loss):
    """ln K, and half the variance of the logits, D x 0.02^2."""
    torch.manual_seed(0)
    model = direct(BEiT, img_size=16, patch_size=4, embed_dim=width, depth=1, num_heads=4, tokens=8192)
    logits = model.decoder_pred(F.layer_norm(torch.randn(1, 100, width), (width,)))
    target = torch.randint(0, 8192, (1, 100))
    assert model.target.error(logits, target).mean().item() == pytest.approx(loss, abs=0.06)


@pytest.mark.parametrize(
    ("width", "tokens", "loss"), [(192, 50, 4.62), (256, 50, 4.69), (512, 50, 4.84), (192, 100, 5.25)]
)
def test_cluster_mims_loss_at_the_start(width, tokens, loss):
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": width, "decoder_depth": 1, "decoder_num_heads": 4, "tokens": tokens}
    model = direct(ClusterMIM, img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=4, **sizes)
    logits = model.decoder_pred(F.layer_norm(torch.randn(1, 4000, width), (width,)))
    target = torch.randint(0, tokens, (1, 4000))
    assert model.target.error(logits, target).mean().item() == pytest.approx(loss, abs=0.12)


def test_cluster_mims_layer_starts_as_xavier_says():
    torch.manual_seed(0)
    model = direct(ClusterMIM, img_size=16, patch_size=4, embed_dim=16, num_heads=4, decoder_embed_dim=192, tokens=64)
    weight, bias = model.decoder_pred.weight, model.decoder_pred.bias
    bound = math.sqrt(6 / (192 + 64))
    assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound and (bias == 0).all()


def test_the_error_is_the_cross_entropy_with_smoothing():
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    log_share = logits - logits.exp().sum(dim=-1, keepdim=True).log()
    plain = -log_share.gather(2, tokens[:, :, None])[:, :, 0]
    torch.testing.assert_close(Tokens(7).error(logits, tokens), plain)
    torch.testing.assert_close(Tokens(7, 0.1).error(logits, tokens), 0.9 * plain - 0.1 * log_share.mean(dim=-1))
    certain = 1e4 * F.one_hot(tokens, 7).float()
    assert Tokens(7).error(certain, tokens).max() == 0


def test_the_layer_made_for_the_tokenizers_tokens_has_initial_weights(method):
    layer = small(method).decoder_pred
    assert layer.out_features == 24 and (layer.bias == 0).all()
    largest, bound = layer.weight.abs().max().item(), math.sqrt(6 / (layer.in_features + 24))
    if method == "cluster_mim":
        assert 0.95 * bound < largest <= bound
    else:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_terms_learn_the_number_of_classes():
    model = small("cluster_mim", terms={"label": {}})
    model.prepare(checkpoint.load_model, 7)
    biases = [len(p) for name, p in model.terms["label"].named_parameters() if name.endswith("bias")]
    assert biases[-1] == 7


def test_other_image_sizes(method):
    model = small(method)
    model.set_input_size((24, 32))
    images = torch.randn(2, 3, 24, 32)
    assert model.predict(images)[0].shape == (2, 48, 24) and model(images)["loss"].isfinite()
    tokenizer = Fixed(torch.zeros(2, 20, dtype=torch.long))
    model.target.hold(tokenizer, model.grid)
    model.set_input_size((16, 20))
    assert tokenizer.size == (16, 20)


class Fixed(nn.Module):
    """A tokenizer that returns given tokens."""

    patch_size, tokens = 4, 24

    def __init__(self, tokens):
        super().__init__()
        self.told = tokens

    def set_input_size(self, size):
        self.size = size

    def tokenize(self, images):
        return self.told

    def show(self, tokens):
        return None


def test_only_the_tokens_of_hidden_patches_count(method):
    model = small(method)
    images, _, noise = batch(model)
    _, mask = model.predict(images, noise=noise)
    tokens = torch.randint(0, 24, (4, 20))
    model.target.hold(Fixed(tokens), model.grid)
    loss = model(images, noise=noise)["loss"]
    others = torch.where(mask > 0, tokens, (tokens + 1) % 24)
    model.target.hold(Fixed(others), model.grid)
    assert torch.equal(loss, model(images, noise=noise)["loss"])
    others = torch.where(mask > 0, (tokens + 1) % 24, tokens)
    model.target.hold(Fixed(others), model.grid)
    assert not torch.equal(loss, model(images, noise=noise)["loss"])


def test_cluster_mims_loss_is_the_mean_over_hidden_patches():
    model = small("cluster_mim")
    images, _, noise = batch(model)
    pred, mask = model.predict(images, noise=noise)
    error = F.cross_entropy(pred[mask > 0], model.target(images)[mask > 0])
    torch.testing.assert_close(model(images, noise=noise)["tokens"], error)


def test_training_predicts_hidden_patches_only(method):
    model = small(method)
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    hidden = model.num_hidden if method == "beit" else 20 - model.num_visible
    assert view.pred.shape == (4, hidden, 24) and model.num_predicted == hidden < 20
    everywhere, mask = model.predict(images, noise=noise)
    ids = model.predicted(mask) if method == "beit" else model.hidden(view.ids_restore)
    torch.testing.assert_close(view.pred, everywhere.gather(1, ids[:, :, None].expand(-1, -1, 24)))


def test_a_constant_prediction_has_the_entropy_of_the_histogram(method):
    model = small(method)
    images, _, _ = batch(model)
    tokens = torch.arange(80).reshape(4, 20) % 3
    model.target.hold(Fixed(tokens), model.grid)
    share = torch.bincount(tokens.flatten(), minlength=24).double() / 80
    expected = F.cross_entropy(share.log().clamp(min=-1e4).float().expand(80, -1), tokens.flatten()).item()
    assert model.constant_loss(images) == pytest.approx(expected, abs=1e-5)
    assert model.constant_loss(images) == pytest.approx(math.log(3), abs=1e-3)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_the_tokenizer_is_in_no_checkpoint_and_in_the_options(method):
    model = small(method)
    assert not [name for name in model.state_dict() if "tokenizer" in name or "quantizer" in name]
    assert model.options.tokens == model.decoder_pred.out_features == 24 and len(model.options.token_digest) == 64
    assert not any(p.requires_grad for p in model.target.tokenizer.network.parameters())
    assert list(model.helpers) == [tokenizer_checkpoint()]


def test_pictures_show_the_predicted_tokens(method):
    model = small(method).eval()
    images, _, noise = batch(model)
    pred, mask = model.predict(images, noise=noise)
    shown = model.pictures(images, noise=noise)["reconstruction"]
    patches = model.target.tokenizer.network.show(pred.argmax(dim=-1))
    torch.testing.assert_close(model.target.pixels(pred, images), patches)
    assert shown.shape == images.shape and mask.shape == (4, 20)


def test_a_tokenizer_with_smaller_patches_gets_smaller_images():
    model = small("beit", model="mae_vit_tiny_patch8", input_size=(32, 40))
    images, _, noise = batch(model)
    assert model.target.tokenizer.network.input_size == (16, 20)
    assert model.target(images).shape == (4, 20) and model(images, noise=noise)["loss"].isfinite()
    assert model.pictures(images, noise=noise) is None


def test_a_model_without_its_tokenizer_encodes_and_says_so_when_trained(method):
    from methods import from_options
    from tests.small import options_of

    model = small(method)
    alone = from_options(options_of(method, model)).eval()
    alone.load_state_dict(model.state_dict())
    images, _, noise = batch(model)
    assert torch.equal(alone.encode(images), model.eval().encode(images)) and alone.pictures(images) is None
    with pytest.raises(ValueError, match="without its tokenizer"):
        alone(images, noise=noise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "no tokenizer is given"),
        ({"tokenizer": "/nowhere.pth"}, "/nowhere.pth"),
        ({"token_digest": "0" * 64}, "other weights than at the start of this run"),
        ({"tokens": 25}, "tokens is 25, and .* has 24"),
        ({"in_chans": 1}, "3 channels, in_chans is 1"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=message):
        small(method, **changes)


def test_other_checkpoints_are_no_tokenizers():
    with pytest.raises(ValueError, match="a run of the method mae, not a tokenizer"):
        small("beit", tokenizer=teacher_checkpoint())


class Explosive:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(Explosive()))
    torch.save({"model": Explosive()}, tmp_path / "tokenizer.pth")
    for name in ("encoder.pkl", "tokenizer.pth"):
        with pytest.raises(checkpoint.CheckpointError):
            build("beit", tokenizer=str(tmp_path / name))


def test_peco_is_beit_with_another_tokenizer():
    assert METHODS["peco"].model == METHODS["beit"].model and METHODS["peco"].options is METHODS["beit"].options


@pytest.mark.parametrize("method", ["beit", "peco"])
def test_colour_jitter_is_that_of_the_release(method):
    (crop,) = small(method, color_jitter=0.4).views(0.08, 0.5)
    assert crop.jitter == (0.4, 0.4, 0.4, 0.0)
    assert (crop.jitter_prob, crop.grayscale, crop.blur, crop.solarize, crop.count) == (1.0, 0.0, 0.0, 0.0, 1)
    assert crop.scale == (0.08, 1.0)
    assert is_plain(small(method).views(0.08, 0.5)[0])


def test_colour_jitter_reaches_the_batches():
    words = (
        f"--method beit --tokenizer {tokenizer_checkpoint()} --data_path digits --input_size 16 "
        "--model mae_vit_tiny_patch4 --embed_dim 24 --depth 1 --num_heads 2 --total_batch_size 16 --num_workers 0 "
        "--device cpu --hflip 0 --min_scale 1 --color_jitter "
    )
    batches = []
    for strength in ("0", "0.4"):
        options = methods.parse_options((words + strength).split())
        model = pretrain.build_model(options)
        source = pretrain.open_images(options, model)
        made = pretrain.make_batches(resolve(options), model, source, Processes(0, 1, 0, torch.device("cpu")))
        batches.append(next(iter(made.epoch(0))))
    plain, jittered = batches
    assert plain.images.shape == jittered.images.shape and torch.equal(plain.noise, jittered.noise)
    assert not torch.equal(plain.images, jittered.images)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_of_colour_jitter_outside_0_and_1_is_refused(strength):
    with pytest.raises(ValueError, match="color_jitter"):
        BEiT.Options(color_jitter=strength)


def test_drop_path_rises_to_its_rate():
    model = small("beit", depth=3, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("method", ["beit", "peco", "simmim"])
def test_the_class_token_is_not_decayed_and_the_mask_token_is(method):
    model = small(method)
    groups = optim.pretrain_groups(model, 0.05)
    decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decayed[id(model.cls_token)] == 0.0 and decayed[id(model.mask_token)] == 0.05


def test_a_key_bias_changes_nothing():
    """So the release, which has none, is no other network."""
    model = small("beit").eval()
    images, _, _ = batch(model)
    before = model.encode(images)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[16:32] += torch.randn(16)
    torch.testing.assert_close(model.encode(images), before)


# ---- NoR-MAE's term on tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["pixels", "embedding"])
def test_the_neighbour_term_relates_logits_or_embeddings_of_hidden_patches(space):
    model = small("cluster_mim", terms={"neighbor": {"space": space, "weight": 1e-3}})
    images, _, noise = batch(model)
    losses = model(images, noise=noise)
    view, term = model.observe(images, noise=noise), model.terms["neighbor"]
    second = term.second_pass(model, view) if space == "pixels" else term.second_decoded(model, view)
    first = view.pred if space == "pixels" else view.decoded
    assert second.shape == first.shape == (4, 15, 24 if space == "pixels" else 12)
    torch.testing.assert_close(losses["neighbor"], neighbor_relation(first, second))
    torch.testing.assert_close(losses["loss"], losses["tokens"] + 1e-3 * losses["neighbor"])
    width = first.shape[-1]
    assert list(term.scale(model).values()) == [pytest.approx(1e-3 * (width - 1))]
    (gradient,) = torch.autograd.grad(losses["neighbor"], model.patch_embed.proj.weight)
    assert gradient.abs().max() > 0


def test_the_neighbour_term_of_visible_tokens_is_refused():
    with pytest.raises(ValueError, match="use 'all'"):
        small("cluster_mim", terms={"neighbor": {"tokens": "visible"}})
