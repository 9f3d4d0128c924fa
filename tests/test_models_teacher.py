"""The teacher term against a loop, the teacher's absence from everything but the loss, and runs that resume with it."""

import argparse
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from torch import nn

from methods import build, from_checkpoint, from_options
from models_mae import block_number
from models_teacher import Teacher, TeacherTerm, encoder_weights, resolved
from models_vit import compute_digest, take
from options.teacher import TeacherOptions
from tests.runs import Training, assert_same_end, finish
from tests.small import SMALL, TEACHER, batch, options_of, small, teacher_checkpoint, write_checkpoint


def teacher_of(model):
    return model.terms["teacher"].teacher.network


def its_model():
    """The teacher as the masked autoencoder that it was."""
    model, _ = from_checkpoint(teacher_checkpoint())
    return model


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_term_is_the_mean_difference_of_unit_tokens():
    model, mae = small("dmae"), its_model()
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    taught = torch.cat([mae.cls_token.expand(4, -1, -1), take(mae.embed(images), view.ids_keep)], dim=1)
    for block in mae.blocks[:3]:  # three quarters of 4
        taught = block(taught)
    learned = torch.cat([model.cls_token.expand(4, -1, -1), take(model.embed(images), view.ids_keep)], dim=1)
    learned = model.terms["teacher"].head(model.blocks[0](learned))  # three quarters of 2, rounded down
    total, count = 0.0, 0
    for theirs, ours in zip(taught.flatten(0, 1), learned.flatten(0, 1), strict=True):
        total += (theirs / theirs.norm() - ours / ours.norm()).abs().sum().item()
        count += len(theirs)
    assert model(images, noise=noise)["teacher"].item() == pytest.approx(total / count, rel=1e-5)
    assert 0 < total / count <= 2 / 24**0.5


def test_it_is_zero_for_an_equal_teacher(tmp_path):
    mae = small("mae")
    path = write_checkpoint(tmp_path / "same.pth", mae, options_of("mae", mae))
    model = small("dmae", terms={"teacher": {"checkpoint": path}})
    head = model.terms["teacher"].head
    torch.nn.init.eye_(head.weight)
    torch.nn.init.zeros_(head.bias)
    images, _, noise = batch(model)
    assert model(images, noise=noise)["teacher"].item() == pytest.approx(0, abs=1e-7)


def test_the_blocks_that_are_compared():
    assert [block_number("", 0.75, depth) for depth in (12, 24, 4, 1)] == [9, 18, 3, 1]
    assert [block_number("", block, 12) for block in (5, 1, -1, 0.5, 0.67, 0.01)] == [5, 1, 12, 6, 8, 1]
    model = small("dmae")
    assert model.taps == (0,) and len(teacher_of(model).encoder.blocks) == 3, "no block after the one that is compared"
    other = small("dmae", terms={"teacher": {"student_block": 2, "teacher_block": 4}})
    assert other.taps == (1,) and len(teacher_of(other).encoder.blocks) == 4


def test_a_hidden_patch_is_hidden_from_the_teacher_too():
    model = small("dmae")
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    term = model.terms["teacher"]
    before = term.teacher_tokens(model, replace(view, shared={}))
    hidden = view.mask.reshape(4, 1, 4, 5).repeat_interleave(4, 2).repeat_interleave(4, 3) > 0
    view.images = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(term.teacher_tokens(model, replace(view, shared={})), before) and before.shape == (4, 6, 24)


# ---- the teacher is no part of the model ----------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_in_no_state():
    model = small("dmae").train()
    teacher = teacher_of(model)
    assert not teacher.training and not any(block.training for block in teacher.encoder.blocks)
    assert [name for name in model.state_dict() if name.startswith("terms.")] == [
        "terms.teacher.head.weight",
        "terms.teacher.head.bias",
    ]
    mine = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
    assert not mine & ({id(p) for p in teacher.parameters()} | {id(m) for m in teacher.modules()})
    before = copy.deepcopy(teacher.state_dict())
    images, _, noise = batch(model)
    model(images, noise=noise)["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_goes_where_the_model_goes():
    model = small("dmae").to(torch.float64)
    assert {p.dtype for p in teacher_of(model).parameters()} == {torch.float64}
    images, _, noise = batch(model)
    assert model(images.double(), noise=noise)["teacher"].dtype == torch.float64
    assert {p.device.type for p in teacher_of(model.to("meta")).parameters()} == {"meta"}
    twin = copy.deepcopy(small("dmae"))
    assert teacher_of(twin) is not teacher_of(small("dmae"))


def test_another_image_size_is_the_teachers_too():
    model = small("dmae")
    model.set_input_size(32)
    assert teacher_of(model).encoder.patch_embed.grid_size == (8, 8)
    assert not any(p.requires_grad for p in teacher_of(model).parameters())


def test_a_trained_model_needs_no_teacher(tmp_path):
    model = small("dmae")
    options = options_of("dmae", model)
    options["terms"]["teacher"]["checkpoint"] = "/nowhere/teacher.pth"
    again, found = from_checkpoint(write_checkpoint(tmp_path / "last.pth", model, options))
    images, _, noise = batch(model)
    assert torch.equal(again.encode(images), model.encode(images)) and found["terms"]["teacher"]["embed_dim"] == 24
    assert torch.equal(again.pictures(images, noise=noise)["pasted"], model.pictures(images, noise=noise)["pasted"])
    with pytest.raises(ValueError, match="without its teacher"):
        again(images, noise=noise)


# ---- whose weights --------------------------------------------------------------------------------------------------


def test_a_released_checkpoint_teaches(tmp_path):
    """As MAE's authors publish theirs: weights under `model`, a pickled Namespace beside them."""
    path = tmp_path / "mae_visualize.pth"
    torch.save({"model": its_model().state_dict(), "args": argparse.Namespace(model="mae_vit_large_patch16")}, path)
    with pytest.raises(ValueError, match="weights do not show .* Give --terms.teacher.num_heads"):
        small("dmae", terms={"teacher": {"checkpoint": str(path)}})
    model = small("dmae", terms={"teacher": {"checkpoint": str(path), "num_heads": 3}})
    ours = small("dmae")
    images, _, noise = batch(model)
    assert torch.equal(model(images, noise=noise)["teacher"], ours(images, noise=noise)["teacher"])
    assert model.terms["teacher"].options.digest == ours.terms["teacher"].options.digest


def test_the_sizes_that_only_a_name_tells():
    weights = encoder_weights(dict(its_model().state_dict()), "")
    wide = weights | {"cls_token": torch.zeros(1, 1, 192)}
    with pytest.raises(ValueError, match="weights do not show .* Give --terms.teacher.num_heads"):
        resolved(TeacherOptions(), wide, {})  # 12 in this family, 3 in DeiT
    assert resolved(TeacherOptions(num_heads=3), wide, {}).num_heads == 3
    assert resolved(TeacherOptions(), wide, {"model": "mae_vit_small_patch16", "num_heads": 0}).num_heads == 6
    assert resolved(TeacherOptions(), wide, {"model": "mae_vit_tiny_patch16", "num_heads": 4}).num_heads == 4


def test_weights_are_known_by_their_digest():
    weights = {"b": torch.ones(2), "a": torch.zeros(3)}
    assert compute_digest(weights) == compute_digest(dict(reversed(weights.items())))
    assert compute_digest(weights) == compute_digest({name: value.double() for name, value in weights.items()})
    assert compute_digest({"a": torch.zeros(2, 3)}) != compute_digest({"b": torch.zeros(2, 3)})
    assert compute_digest({"a": torch.zeros(2, 3)}) != compute_digest({"a": torch.zeros(3, 2)})
    assert compute_digest(weights) != compute_digest(weights | {"a": torch.tensor([0.0, 1e-30, 0.0])})


def test_a_teacher_of_another_grid_has_its_positions_resampled(tmp_path):
    options = TEACHER | {"input_size": (32, 16)}
    path = write_checkpoint(tmp_path / "tall.pth", build("mae", **options), {"method": "mae"} | options)
    model = small("dmae", terms={"teacher": {"checkpoint": path}})
    assert teacher_of(model).encoder.pos_embed.shape == (1, 21, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": ""}, "term 'teacher': no teacher is given: --terms.teacher.checkpoint FILE"),
        ({"checkpoint": "/nowhere.pth"}, "term 'teacher': no checkpoint at /nowhere.pth"),
        ({"embed_dim": 32}, "embed_dim is 32, and the teacher in checkpoint .* has 24"),
        ({"num_heads": 2}, "num_heads: the teacher in .* was trained with 3 attention heads, not with 2"),
        ({"digest": "beef"}, "digest is beef, and the teacher"),
        ({"student_block": 3}, "student_block is 3, but there are 2 blocks"),
        ({"teacher_block": 5}, "teacher_block is 5, but there are 4 blocks"),
        ({"student_block": -2}, "student_block is -2; it can be"),
        ({"teacher_block": 1.5}, "teacher_block is 1.5; it can be"),
        ({"weight": float("nan")}, "weight is nan"),
    ],
)
def test_what_cannot_teach_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small("dmae", terms={"teacher": options})


def test_every_part_that_a_tap_may_use_is_in_the_digest(tmp_path):
    sizes = TEACHER | {"num_heads": 3}
    model = its_model()
    plain = compute_digest(encoder_weights(dict(model.state_dict()), ""))
    found = small("g2sd").terms["teacher"].options.digest
    with torch.no_grad():
        model.norm.weight.add_(0.5)
    other = write_checkpoint(tmp_path / "norm.pth", model, {"method": "mae"} | sizes)
    with pytest.raises(ValueError, match="digest is .*, and the teacher"):
        small("g2sd", terms={"teacher": {"checkpoint": other, "digest": found}})
    # A run that was started before the norm counted resumes, and stores the new digest.
    options = small("g2sd", terms={"teacher": {"digest": plain}}).terms["teacher"].options
    assert options.digest == found != plain


def test_features_need_a_norm_before_the_average(tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": (16, 20), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    for pool in ("avg", "token"):
        torch.save(timm.models.VisionTransformer(**sizes, global_pool=pool).state_dict(), tmp_path / f"{pool}.pth")
    given = {"checkpoint": str(tmp_path / "avg.pth"), "num_heads": 3}
    with pytest.raises(ValueError, match="no norm before its tokens are averaged.*'block' with teacher_block -1"):
        small("proteus", terms={"teacher": given})
    small("proteus", terms={"teacher": given | {"checkpoint": str(tmp_path / "token.pth")}})
    small("dmae", terms={"teacher": given})


def test_other_files_and_encoders_are_refused(tmp_path):
    path = tmp_path / "blocks.pth"
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3, 1)}, path)
    with pytest.raises(
        ValueError, match="does not contain a plain vision transformer: it lacks cls_token, pos_embed, patch_embed"
    ):
        small("dmae", terms={"teacher": {"checkpoint": str(path)}})
    with pytest.raises(ValueError, match="need an encoder that gets only the visible patches"):
        small("simmim", terms={"teacher": {"checkpoint": teacher_checkpoint()}})
    with pytest.raises(ValueError, match="channels are not known"):
        from_options({"method": "dmae", "terms": {"teacher": {}}} | SMALL)
    assert TeacherTerm(TeacherOptions()).scale(None) == {}


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_resumes_with_its_teacher_and_with_no_other(tmp_path):
    finish(tmp_path / "teacher", "--method", "mae", "--embed_dim", 32, "--depth", 4, "--epochs", 1)
    file = tmp_path / "teacher.pth"
    file.write_bytes((tmp_path / "teacher/checkpoints/last.pth").read_bytes())
    words = ["--method", "nor_dmae", "--terms.teacher.checkpoint", file, "--save_steps", 2, "--epochs", 2]
    finish(tmp_path / "whole", *words)
    Training(tmp_path / "cut", *words).kill_at(7)
    finish(tmp_path / "cut", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "cut")

    finish(tmp_path / "other", "--method", "mae", "--embed_dim", 32, "--depth", 4, "--epochs", 1, "--seed", 1)
    file.write_bytes((tmp_path / "other/checkpoints/last.pth").read_bytes())
    refused = Training(tmp_path / "cut", *words, "--epochs", 3, "--allow_change", "epochs")
    assert refused.wait() == 2 and "terms.teacher.digest" in refused.stderr

    file.unlink()
    model, _ = from_checkpoint(tmp_path / "cut/checkpoints/last.pth")
    assert model.encode(torch.randn(2, 1, 8, 8)).shape == (2, 17, 24)


def test_a_teacher_with_parts_that_would_be_left_out_is_refused():
    teacher = {
        "cls_token": torch.zeros(1, 1, 8),
        "pos_embed": torch.zeros(1, 5, 8),
        "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
        "blocks.0.attn.qkv.weight": torch.zeros(24, 8),
    }
    assert encoder_weights(teacher, "t.pth").keys() == teacher.keys()
    with pytest.raises(ValueError, match=r"checkpoint t\.pth are not .* layer scale .*blocks\.\*\.ls1\.gamma"):
        encoder_weights({**teacher, "blocks.0.ls1.gamma": torch.ones(8)}, "t.pth")


def test_masks_of_varying_size_make_a_mean_over_the_images_of_a_device():
    """So a run warns where a batch is smaller than an update."""
    terms = small("proteus", terms={"teacher": {"checkpoint": teacher_checkpoint()}}).terms.values()
    assert [term.images_together for term in terms if term.options.masked_images < 1] == ["device"]
    assert {term.images_together for term in terms if term.options.masked_images == 1} == {""}


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_grouped_queries_share_keys_and_values(num_kv_heads):
    """Queries, keys and values give timm's attention, also where several heads share keys and values."""
    torch.manual_seed(0)
    attention = AttentionRope(
        24, num_heads=4, num_kv_heads=num_kv_heads, qkv_fused=False, qk_norm=True, norm_layer=nn.LayerNorm
    )
    block = SimpleNamespace(attn=attention.eval(), norm1=nn.LayerNorm(24))
    x = torch.randn(2, 5, 24)
    found = Teacher.queries_keys_values(SimpleNamespace(), block, x, None)
    q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in found.chunk(3, dim=-1))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(attended), attention(block.norm1(x)))
