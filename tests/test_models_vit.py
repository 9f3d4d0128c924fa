"""Sizes, positions and initial weights against numbers computed by hand, and weights that come from other models."""

import logging
import math

import pytest
import torch
from timm.layers import SwiGLUPacked
from torch import nn

from models_vit import (
    SIZES,
    VisionTransformer,
    attention_heads,
    encoder_sizes,
    for_channels,
    initialize,
    load_from_run,
    load_matching,
    parse_name,
    patch_grid,
    position_table,
    require_plain_encoder,
    set_drop_path,
)


def loop_positions(grid, dim):
    """One patch and one frequency at a time."""
    rows, columns = grid
    table = [[0.0] * dim]
    for y in range(rows):
        for x in range(columns):
            rates = [10000 ** (-i / (dim // 4)) for i in range(dim // 4)]
            table.append(
                [math.sin(x * rate) for rate in rates]
                + [math.cos(x * rate) for rate in rates]
                + [math.sin(y * rate) for rate in rates]
                + [math.cos(y * rate) for rate in rates]
            )
    return torch.tensor(table)[None]


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (14, 14), (7, 1)])
@pytest.mark.parametrize("dim", [8, 192])
def test_positions_are_those_of_the_loop(grid, dim):
    torch.testing.assert_close(position_table(grid, dim), loop_positions(grid, dim), atol=2e-6, rtol=0)


def test_positions_put_the_column_first():
    table = position_table((3, 3), 8)[0]
    assert table[0].abs().max() == 0  # the class token's
    expected = torch.tensor([0.8415, 0.01, 0.5403, 1.0, 0.0, 0.0, 1.0, 1.0])  # row 0, column 1
    torch.testing.assert_close(table[1 + 1], expected, atol=6e-5, rtol=0)
    torch.testing.assert_close(table[1 + 3], expected.roll(4), atol=6e-5, rtol=0)  # row 1, column 0
    torch.testing.assert_close(table[1:].square().sum(dim=-1), torch.full((9,), 4.0))


def test_positions_refuse_channels_that_4_does_not_divide():
    with pytest.raises(ValueError, match="30"):
        position_table((3, 3), 30)


@pytest.mark.parametrize(
    ("size", "classes", "weights"),
    [
        ("tiny", 0, 5_524_416),
        ("tiny", 100, 5_543_716),
        ("tiny", 1000, 5_717_416),
        ("small", 0, 21_665_664),
        ("small", 1000, 22_050_664),
        ("base", 0, 85_798_656),
        ("base", 100, 85_875_556),
    ],
)
def test_sizes_have_the_known_numbers_of_weights(size, classes, weights):
    sizes = SIZES[size]
    with torch.device("meta"):
        model = VisionTransformer(
            embed_dim=sizes.embed_dim,
            depth=sizes.depth,
            num_heads=sizes.num_heads,
            num_classes=classes,
            weight_init="skip",
        )
    assert sum(p.numel() for p in model.parameters()) == weights


def test_names():
    assert parse_name("mae_vit_tiny_patch16") == ("tiny", 16)
    assert parse_name("mae_vit_huge_patch14") == ("huge", 14)
    for wrong in (
        "vit_tiny_patch16",
        "mae_vit_giant_patch16",
        "mae_vit_tiny_patch0",
        "mae_vit_tiny",
        "mae_vit_tiny_patch16_224",
    ):
        with pytest.raises(ValueError, match="tiny|small"):
            parse_name(wrong)


def test_grids_of_squares_and_rectangles():
    assert patch_grid(224, 16) == (14, 14)
    assert patch_grid((160, 96), 32) == (5, 3)


@pytest.mark.parametrize(("size", "patch"), [(224, 15), ((224, 230), 16), (0, 16), ((-16, 16), 16), (8, 16)])
def test_grids_refuse_what_does_not_fit_and_name_the_sizes(size, patch):
    with pytest.raises(ValueError, match=str(patch)):
        patch_grid(size, patch)


def test_initial_weights():
    torch.manual_seed(0)
    linear, convolution, norm = nn.Linear(300, 200), nn.Conv2d(3, 64, 8), nn.LayerNorm(5)
    nn.init.ones_(linear.bias)
    nn.init.zeros_(norm.weight)
    for module in (linear, convolution, norm):
        initialize(module)
    assert linear.bias.abs().max() == 0 and norm.weight.min() == 1
    for weight, inputs, outputs in ((linear.weight, 300, 200), (convolution.weight, 3 * 8 * 8, 64)):
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def vit(**changes):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0} | changes
    return VisionTransformer(**sizes)


def test_weights_go_where_their_names_are():
    source, model = vit(num_classes=10), vit()
    report = load_matching(model, source.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.forward_features(images), source.forward_features(images), atol=0, rtol=0)
    assert report.unused == ["head.weight", "head.bias"] and report.missing == report.resampled == []
    assert str(report) == f"{len(report.loaded)} tensors loaded; not in the model, ignored: head.* (2)"
    report = load_matching(source, model.state_dict())
    assert report.missing == ["head.weight", "head.bias"]


def test_positions_of_another_size_are_resampled_without_antialiasing():
    source = vit()
    square, rectangle = vit(img_size=48), vit(img_size=(16, 48))
    report = load_matching(square, source.state_dict())
    assert report.resampled == ["pos_embed"]
    assert str(report) == f"{len(report.loaded)} tensors loaded; resampled to this model's grid: pos_embed"
    table = source.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = nn.functional.interpolate(table, size=(6, 6), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(square.pos_embed, torch.cat([source.pos_embed[:, :1], larger], dim=1))

    load_matching(rectangle, source.state_dict())
    with pytest.raises(ValueError, match="12"):
        load_matching(square, rectangle.state_dict())
    assert load_matching(square, rectangle.state_dict(), grid=(2, 6)).resampled == ["pos_embed"]


@pytest.mark.parametrize(
    ("options", "embed_dim", "given", "heads"),
    [
        ({"model": "mae_vit_tiny_patch16", "num_heads": 0}, 192, 0, 12),
        ({"model": "mae_vit_tiny_patch16", "num_heads": 3}, 192, 3, 3),
        ({}, 768, 0, 12),
        ({}, 768, 6, 6),
    ],
)
def test_attention_heads_come_from_the_run_else_from_the_user_else_from_the_width(
    options, embed_dim, given, heads, caplog
):
    caplog.set_level(logging.INFO)
    assert attention_heads(options, embed_dim, given) == heads
    assert bool(caplog.records) == (not options and not given)  # an assumption is logged


@pytest.mark.parametrize(
    ("options", "embed_dim", "given", "message"),
    [
        (
            {"model": "mae_vit_tiny_patch16"},
            192,
            3,
            "my_heads: the file was trained with 12 attention heads, not with 3",
        ),
        ({}, 192, 0, "my_heads: .* its width 192: 12 in NoR-MAE and MAE-Lite, 3 in DeiT and timm. Give --my_heads"),
        (
            {},
            100,
            0,
            "my_heads: weights do not show .* the file does not contain it for its width 100. Give --my_heads",
        ),
        ({}, 192, 5, "my_heads: 5 heads cannot share 192 channels"),
        ({}, 192, -3, "my_heads: -3 heads cannot share 192 channels"),
    ],
)
def test_attention_heads_that_are_unknown_or_wrong_are_refused(options, embed_dim, given, message):
    with pytest.raises(ValueError, match=message):
        attention_heads(options, embed_dim, given, option="my_heads", file="the file")


def test_weights_of_a_run_come_with_its_grid_and_its_heads():
    source, upright = vit(img_size=(16, 48)), vit(img_size=(48, 16))  # as many patches, otherwise laid out
    heads = source.blocks[0].attn.num_heads
    made_with = {"model": "mae_vit_tiny_patch8", "num_heads": heads, "input_size": [16, 48]}
    assert load_from_run(upright, source.state_dict(), made_with).resampled == ["pos_embed"]
    assert load_from_run(upright, source.state_dict(), {}).resampled == [], "nothing is known"
    with pytest.raises(ValueError, match=f"12 attention heads, the model has {heads}"):
        load_from_run(upright, source.state_dict(), made_with | {"num_heads": 0})  # a ViT-Tiny's own


def test_a_grey_image_gives_the_output_of_three_equal_channels(caplog):
    source, grey = vit(), vit(in_chans=1)
    with caplog.at_level("INFO"):
        load_matching(grey, for_channels(source.state_dict(), 1))
    assert caplog.messages == ["in_chans 1: the first layer's weights are for 3 channels and are summed over them"]
    images = torch.randn(2, 1, 32, 32)
    expected = source.forward_features(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("theirs", "wanted"), [(3, 4), (3, 7), (4, 3), (1, 3)])
def test_other_channels_take_the_weights_in_turn(theirs, wanted):
    weights = vit(in_chans=theirs).state_dict()
    found = for_channels(weights, wanted)["patch_embed.proj.weight"]
    assert found.shape == (16, wanted, 8, 8)
    for channel in range(wanted):
        turn = weights["patch_embed.proj.weight"][:, channel % theirs] * theirs / wanted
        torch.testing.assert_close(found[:, channel], turn)
    assert for_channels(weights, theirs) is weights


@pytest.mark.parametrize("changes", [{"embed_dim": 32}, {"patch_size": 16}, {"in_chans": 1}, {"depth": 3}])
def test_weights_of_another_model_are_refused_and_change_nothing(changes):
    model = vit(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="sizes|encoder"):
        load_matching(model, vit().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


OTHERS = {
    "layer scale": {"init_values": 1e-5},
    "normalised queries and keys": {"qk_norm": True},
    "register tokens": {"reg_tokens": 4},
    "a norm|further norms": {"pre_norm": True},
    "model: blocks.*.attn.qkv.bias \\(2\\) missing": {"qkv_bias": False},
    "cls_token missing": {"class_token": False, "global_pool": "avg"},
    "pos_embed missing": {"pos_embed": "none"},
    "gated MLP|other sizes": {"mlp_layer": SwiGLUPacked},
}


@pytest.mark.parametrize("logged", OTHERS)
def test_an_encoder_of_another_architecture_is_refused_by_name(logged):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = vit(**OTHERS[logged]).state_dict()
    for load in (lambda: load_matching(model, weights), lambda: load_from_run(model, weights, {})):
        with pytest.raises(ValueError, match=logged.replace(".*", r"\.\*")):
            load()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("blocks.0.gamma_1", "layer scale"),
        ("blocks.1.ls2.gamma", r"layer scale .*: blocks\.\*\.ls2\.gamma \(1\)"),
        ("register_tokens", "register tokens .*: register_tokens"),
        ("storage_tokens", "register tokens"),
        ("rope_embed.periods", "rotary positions"),
        ("blocks.0.mlp.w12.weight", "gated MLP"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("rel_pos_bias.relative_position_bias_table", "relative positions"),
        ("blocks.0.attn.q_bias", "another attention"),
        ("dist_token", "distillation token"),
        ("attn_pool.latent", "attention pooling"),
        ("blocks.0.0.norm1.weight", "in chunks"),
        ("blocks.0.adapter.weight", "other layers"),
    ],
)
def test_one_tensor_that_a_plain_encoder_lacks_is_enough(name, logged):
    with pytest.raises(ValueError, match=logged):
        require_plain_encoder([*vit().state_dict(), name], where="the file x.pth")
    require_plain_encoder([*vit().state_dict(), name], own=[name])


def test_heads_decoders_and_masks_of_known_checkpoints_are_no_problem():
    others = (
        "head.weight fc_norm.bias mask_token decoder_blocks.0.ls1.gamma decode.classify.weight neck.scales.0.0.bias"
    )
    require_plain_encoder([*vit().state_dict(), *others.split(), "projector.0.weight", "teacher.reg_token"])


def test_names_of_other_programs_are_explained():
    weights = vit().state_dict()
    with pytest.raises(ValueError, match="names start with 'module.encoder.'"):
        load_matching(vit(), {f"module.encoder.{name}": value for name, value in weights.items()})
    with pytest.raises(ValueError, match="Hugging Face"):
        load_matching(vit(), {"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(1)})


def test_a_deeper_encoder_is_refused_and_an_unknown_number_of_heads_is_reported(caplog):
    with pytest.raises(ValueError, match="an encoder with 3 blocks, the model has 2"):
        load_from_run(vit(), vit(depth=3).state_dict(), {})
    tiny = vit(embed_dim=192, num_heads=12, depth=1)
    load_from_run(tiny, vit(embed_dim=192, num_heads=3, depth=1).state_dict(), {})
    assert "the model has 12, and encoders of 192 channels have 12 in NoR-MAE and MAE-Lite, 3 in DeiT" in caplog.text


def test_sizes_are_the_models_unless_they_are_given():
    sizes = encoder_sizes("mae_vit_small_patch14", {"depth": 3, "input_size": (28, 42), "num_heads": 0})
    assert {name: sizes[name] for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth")} == {
        "img_size": (28, 42),
        "patch_size": 14,
        "in_chans": 3,
        "embed_dim": 384,
        "depth": 3,
    }
    given = {"embed_dim": 64, "num_heads": 4, "mlp_ratio": 2.0, "in_chans": 5}
    assert encoder_sizes("mae_vit_tiny_patch16", given).items() >= given.items()
    heads = {size: encoder_sizes(f"mae_vit_{size}_patch16", {})["num_heads"] for size in ("tiny", "small", "base")}
    assert heads == {"tiny": 12, "small": 6, "base": 12}
    with pytest.raises(ValueError, match="one side in pixels, or height and width"):
        encoder_sizes("mae_vit_tiny_patch16", {"input_size": (16, 16, 16)})


def test_stochastic_depth_rises_linearly_over_the_blocks_or_is_uniform():
    def rates(**how):
        blocks = vit(embed_dim=8, num_heads=2, depth=4).blocks
        set_drop_path(blocks, **how)
        return [tuple(getattr(path, "drop_prob", 0.0) for path in (b.drop_path1, b.drop_path2)) for b in blocks]

    assert rates(rate=0.3) == [(pytest.approx(rate), pytest.approx(rate)) for rate in (0, 0.1, 0.2, 0.3)]
    assert rates(rate=0.3, uniform=True) == [(0.3, 0.3)] * 4
    assert rates(rate=0.0) == [(0, 0)] * 4
