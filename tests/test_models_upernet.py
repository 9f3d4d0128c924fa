"""UPerNet: weights counted by a closed form, shapes, a head computed again by hand, layers' rates, loading."""

import pytest
import timm
import torch
import torch.nn.functional as F

import models_classifier
import models_upernet
from models_upernet import UPerHead, tapped_blocks
from util import optim

SMALL = dict(input_size=(32, 32), embed_dim=24, depth=4, num_heads=2)


def segmenter(num_classes=5, model="mae_vit_tiny_patch8", seed=0, **changes):
    torch.manual_seed(seed)
    return models_upernet.build(model, num_classes=num_classes, **(SMALL | changes))


def weights_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "D", "blocks"), [("tiny", 192, 12), ("small", 384, 12), ("base", 768, 12)])
def test_weights_are_as_many_as_counted_by_hand(size, D, blocks):
    K, patches = 150, 32 * 32
    with torch.device("meta"):
        model = models_upernet.build(f"mae_vit_{size}_patch16", num_classes=K, input_size=(512, 512))
    norm = 2 * D
    neck = 3 * (4 * D * D + D) + norm  # three transposed 2 x 2 convolutions
    pools, pooled = 4 * (D * D + norm), 9 * 5 * D * D + norm
    laterals, smooth, fuse = 3 * (D * D + norm), 3 * (9 * D * D + norm), 9 * 4 * D * D + norm
    assert weights_of(model.neck) == neck
    assert weights_of(model.decode) == pools + pooled + laterals + smooth + fuse + K * D + K
    assert weights_of(model.auxiliary) == 9 * D * 256 + 2 * 256 + K * 256 + K
    block = 12 * D * D + 13 * D
    encoder = (3 * 16 * 16 + 1) * D + D + (patches + 1) * D + blocks * block
    total = weights_of(model)
    assert total == encoder + sum(map(weights_of, (model.neck, model.decode, model.auxiliary)))
    assert total / 1e6 == pytest.approx({"tiny": 10.88, "small": 41.70, "base": 163.29}[size], abs=5e-3)


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3)),
                                               (2, (0, 0, 0, 1)), (1, (0, 0, 0, 0))])  # fmt: skip
def test_blocks_are_tapped_at_a_third_a_half_two_thirds_and_the_end(depth, blocks):
    assert tapped_blocks(depth) == blocks


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (8, 8)])
def test_shapes(size):
    """Logits at a quarter of a patch of 8 pixels; images of other sizes than the model's, down to one patch."""
    model = segmenter().eval()
    rows, columns = (side // 8 for side in size)
    maps = model.maps(torch.randn(2, 3, *size))
    coarse = max(1, rows // 2), max(1, columns // 2)
    expected = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns), coarse]
    assert [tuple(each.shape) for each in maps] == [(2, 24, *each) for each in expected]
    logits, auxiliary = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, 4 * rows, 4 * columns) and auxiliary.shape == (2, 5, rows, columns)


def test_maps_are_the_outputs_of_those_blocks():
    model = segmenter(depth=12).eval()
    images, outputs = torch.randn(2, 3, 32, 32), []
    for number in (3, 5, 7, 11):
        model.blocks[number].register_forward_hook(lambda module, given, output: outputs.append(output))
    found = model.maps(images)
    square = [tokens[:, 1:].transpose(1, 2).reshape(2, 24, 4, 4) for tokens in outputs]
    assert torch.equal(found[2], square[2])
    assert torch.equal(found[3], F.max_pool2d(square[3], 2))
    assert torch.equal(found[1], model.neck.scales[1](square[1]))


@pytest.mark.parametrize(("grid", "halved"), [((5, 7), (2, 3)), ((4, 6), (2, 3)), ((1, 5), (1, 2)), ((1, 1), (1, 1))])
def test_the_coarsest_map_drops_an_odd_last_row_and_column(grid, halved):
    """nn.MaxPool2d(2, 2) of mmsegmentation's ViT; a side of one patch, which it cannot halve, is kept."""
    features = torch.arange(float(grid[0] * grid[1])).reshape(1, 1, *grid)
    found = models_upernet.Neck(1).scales[3](features)
    assert found.shape[2:] == halved
    for row in range(halved[0]):
        for column in range(halved[1]):
            assert found[0, 0, row, column] == features[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].max()


def test_the_head_is_what_the_paper_draws():
    """Computed again from its weights: batch norm by running statistics, one step after another."""
    torch.manual_seed(0)
    head, D = UPerHead(6, 4).eval(), 6
    for name, buffer in head.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    maps = [torch.randn(2, D, side, side) for side in (32, 16, 8, 4)]

    def unit(block, x):
        conv, norm = block[-3], block[-2]
        x = F.conv2d(x, conv.weight, padding=conv.weight.shape[-1] // 2)
        shift, scale = (each.view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var.add(norm.eps).rsqrt()))
        return F.relu((x - shift) * scale * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))

    def up(x, side):
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)

    pools = [up(unit(head.pools[i], F.adaptive_avg_pool2d(maps[3], side)), 4) for i, side in enumerate((1, 2, 3, 6))]
    four = unit(head.pooled, torch.cat([maps[3], *pools], dim=1))
    three = unit(head.lateral[2], maps[2]) + up(four, 8)
    two = unit(head.lateral[1], maps[1]) + up(three, 16)
    one = unit(head.lateral[0], maps[0]) + up(two, 32)
    levels = [unit(head.smooth[0], one), unit(head.smooth[1], two), unit(head.smooth[2], three), four]
    fused = unit(head.fuse, torch.cat([up(level, 32) for level in levels], dim=1))
    expected = F.conv2d(fused, head.classify.weight, head.classify.bias)
    torch.testing.assert_close(head(maps), expected, atol=1e-5, rtol=1e-5)


def test_every_weight_learns():
    """None is left without a gradient: several processes would wait for it."""
    model = segmenter(depth=2).train()
    logits, auxiliary = model(torch.randn(2, 3, 32, 32))
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_layers_have_the_rates_of_fine_tuning_and_the_heads_the_whole_rate():
    model = segmenter(depth=4)
    found = {}
    for group in optim.finetune_groups(model, 0.05, 0.5):
        for parameter in group["params"]:
            found[id(parameter)] = group["lr_scale"], group["weight_decay"]
    for name, parameter in model.named_parameters():
        stem, block = name.startswith(("cls_token", "pos_embed", "patch_embed")), name.startswith("blocks.")
        layer = 0 if stem else int(name.split(".")[1]) + 1 if block else 5
        decay = 0.0 if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else 0.05
        assert found[id(parameter)] == (0.5 ** (5 - layer), decay), name


# ---- loading


def test_a_classifier_of_timms_begins_it_at_another_size():
    theirs = timm.create_model("vit_tiny_patch16_224", num_heads=2, embed_dim=24, depth=4, img_size=32, patch_size=8)
    model = segmenter(input_size=(48, 48))
    report = models_upernet.load_pretrained(model, theirs.state_dict(), {})
    assert report.resampled == ["pos_embed"] and model.pos_embed.shape == (1, 37, 24)
    assert torch.equal(model.blocks[3].mlp.fc2.weight, theirs.blocks[3].mlp.fc2.weight)
    assert {name.split(".")[0] for name in report.missing} == {"neck", "decode", "auxiliary"}


def test_a_segmenter_for_other_classes_gives_all_but_its_last_layers():
    source, model = segmenter(num_classes=5), segmenter(num_classes=3, seed=1)
    report = models_upernet.load_pretrained(model, source.state_dict(), {})
    assert torch.equal(model.decode.fuse[0].weight, source.decode.fuse[0].weight)
    assert {name.partition(".classify")[0] for name in report.missing} == {"decode", "auxiliary"}


def test_what_is_no_fitting_segmenter_is_refused():
    weights = segmenter(num_classes=5).state_dict()
    with pytest.raises(ValueError, match="are for 5 classes, the data has 3"):
        models_upernet.load_segmenter(segmenter(num_classes=3), weights, {})
    encoder = models_classifier.build("mae_vit_tiny_patch8", num_classes=5, **SMALL)
    with pytest.raises(ValueError, match="not of a segmenter"):
        models_upernet.load_segmenter(segmenter(), encoder.state_dict(), {})
    with pytest.raises(ValueError, match="missing neck"):
        part = {name: value for name, value in weights.items() if not name.startswith("neck.")}
        models_upernet.load_segmenter(segmenter(), part, {})
    with pytest.raises(ValueError, match="2 attention heads, the model has 4"):
        made_with = {"input_size": [32, 32], "model": "mae_vit_tiny_patch8", "num_heads": 2}
        models_upernet.load_pretrained(segmenter(num_heads=4), weights, made_with)
    whole = segmenter(seed=3)
    models_upernet.load_segmenter(whole, weights, {})
    assert all(torch.equal(value, weights[name]) for name, value in whole.state_dict().items())


def test_the_encoder_inside_begins_a_classifier():
    """Names stay flat, so that what a segmenter learned serves elsewhere."""
    source = segmenter()
    model = models_classifier.build("mae_vit_tiny_patch8", num_classes=7, **SMALL)
    models_classifier.load_encoder(model, source.state_dict(), {})
    assert torch.equal(model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)


def test_initial_weights_of_the_heads():
    model = segmenter()
    for last in (model.decode.classify, model.auxiliary.classify):
        assert (last.bias == 0).all() and last.weight.std().item() == pytest.approx(0.01, rel=0.2)
    layer = model.auxiliary.conv[0]
    assert layer.weight.std().item() == pytest.approx((2 / (layer.out_channels * 9)) ** 0.5, rel=0.05)
