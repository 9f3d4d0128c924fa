"""CrossMAE against its release's counts and a plain restatement of its decoder."""

import pytest
import torch
import torch.nn.functional as F

from methods import build
from models_cross_mae import CrossAttention, CrossMAE
from models_mae import patchify
from tests.small import batch, direct, small


@pytest.mark.parametrize(("size", "weights"), [("tiny", 10_978_140), ("small", 32_060_316), ("base", 127_034_268)])
def test_sizes_have_the_known_numbers_of_weights(size, weights):
    with torch.device("meta"):
        model = build("cross_mae", f"mae_vit_{size}_patch16", decoder_depth=12)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == weights
    assert model.feature_mix.weight.shape == (12, 13)


@pytest.mark.parametrize(("predict_ratio", "predicted"), [(0.0, 49), (0.25, 49), (0.75, 147), (0.5, 98)])
def test_how_many_patches_are_predicted(predict_ratio, predicted):
    with torch.device("meta"):
        model = build("cross_mae", "mae_vit_tiny_patch16", predict_ratio=predict_ratio)
    assert model.num_predicted == predicted and model.num_visible == 49


def test_predicted_patches_are_hidden_and_chosen_at_random():
    model = small("cross_mae")
    noise = torch.rand(400, 20)
    mask = (noise.argsort(dim=1).argsort(dim=1) >= model.num_visible).float()
    chosen = torch.zeros(400, 20).scatter(1, model.predicted(noise.argsort(dim=1).argsort(dim=1)), 1.0)
    assert chosen.sum(dim=1).tolist() == [model.num_predicted] * 400 and (chosen <= mask).all()
    assert (chosen.mean(dim=0) - 0.25).abs().max() < 0.08


def attention(x, memory, layer):
    """One head at a time, one query at a time."""
    width = x.shape[-1] // layer.num_heads
    q, (k, v) = layer.q(x), layer.kv(memory).chunk(2, dim=-1)
    rows = []
    for query in q:
        heads = []
        for head in range(layer.num_heads):
            part = slice(head * width, (head + 1) * width)
            share = F.softmax(torch.stack([query[part] @ key[part] for key in k]) / width**0.5, dim=0)
            heads.append(sum(s * value[part] for s, value in zip(share, v, strict=True)))
        rows.append(torch.cat(heads))
    return layer.proj(torch.stack(rows))


def test_cross_attention():
    torch.manual_seed(0)
    layer = CrossAttention(12, 8, 3)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 8)
    expected = torch.stack([attention(*pair, layer) for pair in zip(x, memory, strict=True)])
    torch.testing.assert_close(layer(x, memory), expected)


def test_the_decoder_is_as_described():
    """Each block's memory is the normed mixture of all feature maps; queries carry a hidden patch's position."""
    model = small("cross_mae", decoder_depth=2)
    images, _, noise = batch(model, n=2)
    noise = noise[:, 0]
    order = noise.argsort(dim=1)
    for n in range(2):
        visible, queries = order[n, : model.num_visible], order[n, model.num_visible :][: model.num_predicted]
        tokens = model.patch_embed(images[n : n + 1])[0] + model.pos_embed[0, 1:]
        x = torch.cat([model.cls_token[0], tokens[visible]])[None]
        maps = [x]
        for block in model.blocks:
            maps.append(block(maps[-1]))
        decoded = model.mask_token[0] + model.decoder_pos_embed[0, 1 + queries]
        for index, block in enumerate(model.decoder_blocks):
            mixed = sum(w * m[0] for w, m in zip(model.feature_mix.weight[index], maps, strict=True))
            memory = model.feature_norms[index](mixed)
            decoded = decoded + attention(block.norm1(decoded), memory, block.attn)
            decoded = decoded + block.mlp(block.norm2(decoded))
        pred = model.decoder_pred(model.decoder_norm(decoded))
        view = model.observe(images, noise=noise)
        torch.testing.assert_close(view.pred[n], pred, rtol=1e-4, atol=1e-5)
        if n == 0:
            target = patchify(images, 4)[0, queries]
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            alone = model(images[:1], noise=noise[:1])["loss"]
            torch.testing.assert_close(alone, (pred - target).square().mean(), rtol=1e-4, atol=1e-5)


def test_pictures_show_every_patch_and_training_predicts_the_same():
    model = small("cross_mae")
    images, _, noise = batch(model)
    pred, mask = model.predict(images, noise=noise)
    view = model.observe(images, noise=noise)
    assert pred.shape == (4, 20, 48) and mask.sum(dim=1).tolist() == [15.0] * 4
    assert view.pred.shape == (4, 5, 48)
    ids = model.predicted(view.ids_restore)
    assert (mask.gather(1, ids) == 1).all()
    torch.testing.assert_close(pred.gather(1, ids[:, :, None].expand(-1, -1, 48)), view.pred)


@pytest.mark.parametrize("companion", ["closest", "random"])
@pytest.mark.parametrize("space", ["pixels", "embedding"])
def test_the_neighbour_term_relates_the_predicted_patches(companion, space):
    """Both passes predict the same patches, and with equal tokens in both the correlation is 1."""
    options = {"companion": companion, "space": space, "relation": "alignment", "normalize": "none"}
    model = small("cross_mae", terms={"neighbor": options})
    images, _, noise = batch(model)
    losses = model(images, noise=noise)
    assert losses["neighbor"] > 0
    term = model.terms["neighbor"]
    assert term.second_pass(model, model.observe(images, noise=noise)).shape == (4, 5, 48)
    if companion == "random":
        noise[:, 1] = noise[:, 0]  # the same mask twice
        assert model(images, noise=noise)["neighbor"].item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("tokens", ["visible", "masked"])
def test_the_neighbour_term_cannot_ask_for_patches_that_are_not_predicted(tokens):
    with pytest.raises(ValueError, match=f"tokens is '{tokens}'; this decoder predicts hidden patches only"):
        small("cross_mae", terms={"neighbor": {"tokens": tokens}})


@pytest.mark.parametrize("term", ["label", "uniformity", "teacher"])
def test_the_other_terms_join(term):
    from tests.small import teacher_checkpoint

    options = {"teacher": {"checkpoint": teacher_checkpoint()}, "label": {"classes": 3}}.get(term, {})
    model = small("cross_mae", terms={term: options})
    images, labels, noise = batch(model)
    model(images, labels, noise=noise)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("ratio", [0.8, 1e-17])
def test_an_impossible_share_is_refused(ratio):
    with pytest.raises(ValueError, match=f"at most mask_ratio 0.75 and at least one of 20 patches, not {ratio}"):
        direct(CrossMAE, img_size=(16, 20), patch_size=4, embed_dim=16, num_heads=2, predict_ratio=ratio)


def test_other_methods_have_no_share():
    with pytest.raises(ValueError, match="predict_ratio is 0.25, but the method 'mae' does not use it"):
        small("mae", predict_ratio=0.25)
