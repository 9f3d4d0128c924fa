"""DINO: its loss against a loop, closed forms and the published function; its head, schedules, gradients and update."""

import math

import pytest
import torch
import torch.nn.functional as F

import methods
from methods import build
from models_classifier import build as build_classifier
from models_classifier import load_encoder
from models_dino import (
    DINOHead,
    clip_each,
    cosine_schedule,
    distillation_loss,
    move_center,
    resampling_matrix,
    teacher_temperature,
)
from models_vit import load_matching
from tests.published import needs_vectors, read
from tests.small import options_of, write_checkpoint
from tests.small import small as small_model
from util.stepper import Progress

SIZES = {"input_size": (16, 20), "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(**changes):
    return small_model("dino", **changes)


def crops(model, n=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [crop.size for crop in model.views(0.4, 0.5) for _ in range(crop.count)]
    return [torch.randn(n, model.in_chans, *size, generator=generator) for size in sizes]


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss_by_loop(student, teacher, center, student_temp, teacher_temp):
    """Every pair of views, one image after another, with Python's numbers."""
    N = len(teacher) // 2
    views = [student[v * N : (v + 1) * N].double().tolist() for v in range(len(student) // N)]
    center = center.double().flatten().tolist()
    losses = []
    for t in range(2):
        for v, view in enumerate(views):
            if v == t:
                continue
            for n in range(N):
                row = teacher[t * N + n].double().tolist()
                p = [math.exp((value - c) / teacher_temp) for value, c in zip(row, center, strict=True)]
                q = [math.exp(value / student_temp) for value in view[n]]
                losses.append(-sum(a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("V", [2, 3, 6])
def test_the_loss_equals_a_loop(V):
    generator = torch.Generator().manual_seed(V)
    student, teacher = (torch.randn(n * 3, 7, dtype=torch.float64, generator=generator) for n in (V, 2))
    center = torch.randn(1, 7, dtype=torch.float64, generator=generator)
    expected = loss_by_loop(student, teacher, center, 0.1, 0.07)
    assert distillation_loss(student, teacher, center, 0.1, 0.07).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("K", "expected"), [(65536, 11.0904), (1024, 6.9315)])
def test_uniform_distributions_give_log_k(K, expected):
    found = distillation_loss(torch.zeros(8, K), torch.zeros(4, K), torch.zeros(1, K), 0.1, 0.04).item()
    assert found == pytest.approx(math.log(K), rel=1e-6) == pytest.approx(expected, abs=1e-4)


def test_a_constant_added_to_teacher_and_center_changes_nothing():
    student, teacher, center = torch.randn(12, 9), torch.randn(6, 9), torch.randn(1, 9)
    shift = torch.randn(1, 9)
    loss = distillation_loss(student, teacher, center, 0.1, 0.04)
    torch.testing.assert_close(distillation_loss(student, teacher + shift, center + shift, 0.1, 0.04), loss)
    torch.testing.assert_close(distillation_loss(student, teacher + 3, center, 0.1, 0.04), loss)  # of every output
    torch.testing.assert_close(distillation_loss(student + 3, teacher, center, 0.1, torch.tensor(0.04)), loss)


def test_the_teacher_has_no_gradient():
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    distillation_loss(student, teacher, torch.zeros(1, 5), 0.1, 0.04).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("student", "teacher"), [((6, 5), (5, 5)), ((7, 5), (4, 5)), ((2, 5), (4, 5)), ((6, 4), (4, 5))]
)
def test_shapes_that_do_not_fit_are_refused(student, teacher):
    with pytest.raises(ValueError, match="views x images"):
        distillation_loss(torch.ones(student), torch.ones(teacher), torch.zeros(1, 5), 0.1, 0.04)


@pytest.mark.parametrize(("same", "measured"), [(True, 10.317), (False, 11.278)])
def test_the_loss_at_initialisation_is_the_known_one(same, measured):
    """Random unit vectors of 256 channels and 65,536 outputs."""
    torch.manual_seed(0)
    weight = F.normalize(torch.randn(65536, 256), dim=1)
    first, second = (F.linear(F.normalize(torch.randn(32, 256), dim=1), weight).repeat(2, 1) for _ in range(2))
    found = distillation_loss(first, first if same else second, torch.zeros(1, 65536), 0.1, 0.04).item()
    assert found == pytest.approx(measured, abs=0.05)


@needs_vectors
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_loss_its_gradient_and_the_center_are_the_published_ones(dtype, close):
    v = read("dino_a")
    student, teacher, center = (v[name].to(dtype) for name in ("student", "teacher", "center"))
    student.requires_grad_()
    loss = distillation_loss(student, teacher, center, v["student_temp"].item(), v["teacher_temp"].item())
    loss.backward()
    assert loss.item() == pytest.approx(v["loss"].item(), rel=close)
    assert (student.grad - v["grad_student"]).norm() <= close * v["grad_student"].norm()
    moved = move_center(center, teacher.mean(dim=0, keepdim=True), 0.9)
    assert (moved - v["new_center"]).norm() <= close * v["new_center"].norm()


# ---- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("D", "weights"), [(192, 21_958_912), (384, 22_352_128), (768, 23_138_560)])
def test_the_head_has_the_known_number_of_weights(D, weights):
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(D, 65536).parameters()) == weights


def test_the_head_equals_torchs_weight_norm_and_reads_its_names():
    head = DINOHead(6, 9, hidden=8, bottleneck=5)
    torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    layer = torch.nn.Linear(5, 9, bias=False)
    torch.nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    layer.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    x = torch.randn(4, 6)
    expected = layer(F.normalize(head.mlp(x), dim=-1))
    torch.testing.assert_close(head(x), expected)

    other = DINOHead(6, 9, hidden=8, bottleneck=5)
    names = {f"last_layer.{name}": value for name, value in layer.state_dict().items()}
    other.load_state_dict({name: v for name, v in head.state_dict().items() if "last_layer" not in name} | names)
    torch.testing.assert_close(other(x), expected)


def test_initial_weights_of_the_head():
    head = DINOHead(192, 4096)
    assert all(layer.weight.std().item() == pytest.approx(0.02, rel=0.05) for layer in head.mlp[::2])
    assert all(layer.bias.abs().max() == 0 for layer in head.mlp[::2])
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
    assert torch.equal(head.last_layer.weight_g, torch.ones(4096, 1)) and not head.last_layer.weight_g.requires_grad
    assert DINOHead(192, 64, norm_last_layer=False).last_layer.weight_g.requires_grad


@needs_vectors
def test_the_head_gives_the_published_outputs():
    v = read("dino_a")
    head = DINOHead(8, 16, hidden=20, bottleneck=12).double()
    head.load_state_dict({n.removeprefix("head_state:"): t for n, t in v.items() if n.startswith("head_state:")})
    assert (head(v["head_input"]) - v["head_output"]).norm() <= 1e-10 * v["head_output"].norm()


# ---- schedules and gradients ----------------------------------------------------------------------------------------


def test_schedules_by_hand():
    assert [cosine_schedule(1.0, 0.2, step, 12, 3) for step in (0, 1, 2, 3)] == pytest.approx([0, 0.5, 1, 1])
    assert cosine_schedule(0.996, 1.0, 50, 100) == pytest.approx(0.998)
    assert cosine_schedule(0.04, 0.4, 0, 100) == pytest.approx(0.04)
    found = [teacher_temperature(epoch, 0.04, 0.07, 3) for epoch in range(5)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert teacher_temperature(0, 0.01, 0.04, 0) == 0.04
    assert [teacher_temperature(epoch, 0.04, 0.07, 2) for epoch in range(3)] == pytest.approx([0.04, 0.07, 0.07])
    assert [teacher_temperature(epoch, 0.04, 0.07, 1) for epoch in range(2)] == pytest.approx([0.04, 0.07])
    assert [cosine_schedule(1.0, 0.2, step, 12, 2) for step in range(3)] == pytest.approx([0, 1, 1])
    assert [cosine_schedule(1.0, 0.2, step, 12, 1) for step in range(2)] == pytest.approx([0, 1])
    assert [cosine_schedule(1.0, 0.2, step, 2, 1) for step in (1, 2)] == pytest.approx([1, 0.2])


@needs_vectors
def test_schedules_are_the_published_ones():
    v = read("dino_a")
    base, final, epochs, steps, warmup = v["schedule_args"].tolist()
    found = [cosine_schedule(base, final, i, int(epochs * steps), int(warmup * steps)) for i in range(70)]
    assert found == pytest.approx(v["schedule"].tolist(), rel=1e-10)
    found = [teacher_temperature(epoch, 0.04, 0.07, 3) for epoch in range(10)]
    assert found == pytest.approx(v["teacher_temp_schedule"].tolist(), rel=1e-10)


def test_each_gradient_is_clipped_by_its_own_norm():
    long, short, bad = torch.full((4,), 5.0), torch.full((4,), 0.5), torch.tensor([1.0, math.nan])
    clip_each([long, short, bad], 3.0)
    assert long.norm().item() == pytest.approx(3.0, rel=1e-6) and torch.equal(short, torch.full((4,), 0.5))
    assert bad.isnan().any()
    clip_each([], 3.0)


@needs_vectors
def test_clipping_is_the_published_one():
    v = read("dino_a")
    gradients = [v["clip_in_weight"].clone(), v["clip_in_bias"].clone()]
    clip_each(gradients, v["clip"].item())
    for found, name in zip(gradients, ("weight", "bias"), strict=True):
        torch.testing.assert_close(found, v[f"clip_out_{name}"], rtol=1e-5, atol=1e-7)


def test_positions_of_small_crops_are_resampled_with_the_releases_scale():
    table = torch.randn(1, 5, 14, 14)
    expected = F.interpolate(table, scale_factor=(6.1 / 14, 6.1 / 14), mode="bicubic")
    assert expected.shape[-2:] == (6, 6)
    matrix = resampling_matrix((14, 14), (6, 6))
    torch.testing.assert_close((matrix @ table.flatten(2)[0].T).T.view(1, 5, 6, 6), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(36))
    assert resampling_matrix((4, 6), (2, 2)).shape == (4, 24)


# ---- the method -----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_student_and_teacher():
    model = small()
    views = crops(model)
    assert [tuple(view.shape[-2:]) for view in views] == [(16, 20)] * 2 + [(8, 8)] * 3
    found = model(views)
    one_by_one = torch.cat([model.head(model.class_tokens(model, view)) for view in views])
    teacher = torch.cat([model.teacher.head(model.class_tokens(model.teacher, view)) for view in views[:2]])
    expected = distillation_loss(one_by_one, teacher, torch.zeros(1, 32), 0.1, 0.04)
    torch.testing.assert_close(found["loss"], expected)
    assert list(found) == ["loss", "distillation"]


def test_class_tokens_of_large_crops_are_those_of_the_encoder():
    model = small().eval()
    images = crops(model)[0]
    torch.testing.assert_close(model.class_tokens(model, images), model.forward_features(images)[:, 0])


def test_features_are_the_teachers():
    model = small().eval()
    images = crops(model)[0]
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    torch.testing.assert_close(model.encode(images), model.teacher.forward_features(images))
    assert not torch.allclose(model.encode(images), model.forward_features(images))


def test_teacher_and_center_move_only_with_updates_that_were_made():
    model = small()
    progress = Progress(1, 10, 5, [])
    model.before_step(progress)
    teacher = model.teacher_scores(crops(model))
    model(crops(model))
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_update(torch.tensor(False))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.after_update(torch.tensor(True))
    torch.testing.assert_close(model.center, 0.1 * teacher.mean(dim=0, keepdim=True))
    keep, own = cosine_schedule(0.996, 1, 1, 10), dict(model.named_parameters())
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, keep * before[name] + (1 - keep) * own[name], msg=name)


def test_accumulated_batches_move_the_center_as_one_batch_does():
    whole, parts = small(), small()
    views = crops(whole)
    for model, count in ((whole, 1), (parts, 2)):
        model.before_step(Progress(0, 10, 5, []))
        for share in zip(*(view.chunk(count) for view in views), strict=True):
            model(list(share))
        model.after_update(torch.tensor(True))
    torch.testing.assert_close(parts.center, whole.center)


def test_the_teacher_follows_another_image_size():
    model = small()
    side = 2 * model.input_size[0]
    model.set_input_size(side)
    images = torch.randn(2, model.in_chans, side, side)
    assert model.encode(images).shape == (2, 1 + model.num_patches, model.embed_dim)
    torch.testing.assert_close(model.encode(images), model.forward_features(images))  # equal weights before training
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert model(crops(model))["loss"].isfinite()


def test_the_state_has_the_center_and_nothing_that_follows_from_the_step():
    model = small()
    assert model.state_dict().keys() - dict(model.named_parameters()).keys() == {"center"}


def test_the_center_is_a_moving_average_over_updates():
    model = small()
    expected = torch.zeros_like(model.center)
    for step in range(3):
        model.before_step(Progress(step, 10, 5, []))
        views = [torch.randn_like(view) for view in crops(model)]
        expected = 0.9 * expected + 0.1 * model.teacher_scores(views).mean(dim=0, keepdim=True)
        model(views)
        model.after_update(torch.tensor(True))
    torch.testing.assert_close(model.center, expected)


def test_the_last_layer_is_frozen_in_the_first_epoch_and_its_gradient_clipped_later():
    model = small(norm_last_layer=False)
    for step, frozen in ((0, True), (4, True), (5, False)):
        model.zero_grad()
        (1000 * model(crops(model))["loss"]).backward()
        model.adjust_gradients(Progress(step, 10, 5, []))
        last = [model.head.last_layer.weight_g, model.head.last_layer.weight_v]
        assert all((p.grad is None) == frozen for p in last)
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert max(norms) <= 3.0 + 1e-4 and len(norms) > 10


def test_schedules_follow_the_training():
    model = small(warmup_teacher_temp=0.02, warmup_teacher_temp_epochs=3)
    decayed = {"params": [torch.ones(2, 2)], "weight_decay": 0.04}
    others = {"params": [torch.ones(2)], "weight_decay": 0.0}
    found = []
    for step in (0, 5, 10, 20):
        model.before_step(Progress(step, 20, 5, [others, decayed]))
        found.append((model.teacher_temp.item(), decayed["weight_decay"], others["weight_decay"]))
    assert [temperature for temperature, *_ in found] == pytest.approx([0.02, 0.03, 0.04, 0.04])
    assert [decay for _, decay, _ in found] == pytest.approx(
        [cosine_schedule(0.04, 0.4, s, 20) for s in (0, 5, 10, 20)]
    )
    assert {none for *_, none in found} == {0.0}


def test_drop_path_is_the_students():
    model = small(drop_path=0.2, depth=3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in model.teacher.blocks)


def test_batch_norm_in_the_head_is_that_of_torch():
    head = DINOHead(8, 16, hidden=20, bottleneck=12, batch_norm=True)
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "BatchNormOverRanks", "GELU"] * 2 + ["Linear"]
    x = torch.randn(32, 8)
    hidden = x
    for number in (0, 3):
        weight, bias = (head.state_dict()[f"mlp.{number}.{name}"] for name in ("weight", "bias"))
        hidden = F.linear(hidden, weight, bias)
        hidden = F.gelu((hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(head(x), head.last_layer(F.normalize(head.mlp[6](hidden), dim=-1)))
    assert head.mlp[1].running_mean.abs().sum() > 0


def test_batch_norm_removes_what_scores_of_all_images_have_in_common():
    """Without it, the scores of images whose features are alike are alike, and the loss teaches that constant first."""
    x = torch.randn(1, 64) + 0.3 * torch.randn(256, 64)
    shares = []
    for batch_norm in (False, True):
        torch.manual_seed(0)
        scores = DINOHead(64, 512, hidden=256, bottleneck=64, batch_norm=batch_norm)(x)
        shares.append((scores.mean(0).square().mean() / scores.square().mean()).item())
    plain, normed = shares
    assert plain > 0.8 and normed < 0.3


def test_the_teachers_batch_norm_has_its_own_statistics():
    model = small(head_batch_norm=True)
    assert model.images_together == "ranks" and small().images_together == ""
    model.before_step(Progress(0, 10, 5, []))
    model(crops(model))["loss"].backward()
    own, teachers = model.head.mlp[1], model.teacher.head.mlp[1]
    assert own.num_batches_tracked == teachers.num_batches_tracked == 1
    assert not torch.equal(own.running_mean, teachers.running_mean)  # the teacher sees large crops only
    assert "teacher.head.mlp.1.running_mean" in model.state_dict()


def test_initial_weights_are_dinos():
    model = small(embed_dim=64, num_heads=4)
    for weight in (model.blocks[0].attn.qkv.weight, model.blocks[1].mlp.fc2.weight, model.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.pos_embed.requires_grad and not model.teacher.pos_embed.requires_grad
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.teacher.state_dict().items())


def test_other_views_are_refused():
    model = small()
    with pytest.raises(ValueError, match="2 views of 16 x 20 pixels and 3 of 8, found a tensor"):
        model(crops(model)[0])
    with pytest.raises(ValueError, match="found"):
        model(crops(model)[:4])
    with pytest.raises(ValueError, match="do not fill"):
        small(local_size=10)


@pytest.mark.parametrize("local_crops", [0, 2])
def test_views_are_the_papers(local_crops):
    model = build("dino", "mae_vit_tiny_patch16", depth=1, out_dim=8, local_crops=local_crops)
    first, second, *local = model.views(0.4, 0.5)
    assert (first.size, first.scale, first.blur, second.blur, second.solarize) == ((224, 224), (0.4, 1.0), 1, 0.1, 0.2)
    assert [(crop.size, crop.scale, crop.count, crop.blur) for crop in local] == [
        ((96, 96), (0.05, 0.4), 2, 0.5)
    ] * bool(local_crops)
    assert second.scale == (0.4, 1.0) and first.solarize == 0
    for crop in (first, second, *local):
        assert crop.interpolation == "bicubic" and crop.hflip == 0.5
        assert (crop.jitter, crop.jitter_prob, crop.grayscale) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)


def test_other_programs_start_from_the_teachers_encoder(tmp_path):
    """Fine-tuning, probes, segmentation, teachers of other methods and tools read weights by these functions."""
    model = small()
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.weight)  # the student's
    options = options_of("dino", model)
    weights, made_with = methods.load_pretrained(write_checkpoint(tmp_path / "last.pth", model, options))
    teacher = model.teacher.state_dict()
    assert weights.keys() == {name for name in teacher if not name.startswith("head.")}
    assert all(torch.equal(value, teacher[name]) for name, value in weights.items())
    assert made_with["method"] == "dino" and methods.feature_pool(made_with) == "token"
    other = build_classifier(num_classes=3, model="mae_vit_tiny_patch4", **SIZES)
    load_encoder(other, weights, made_with)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.teacher.blocks[0].mlp.fc1.weight)


def test_a_run_starts_from_another_methods_encoder():
    """The student gets the weights that are loaded, and the teacher gets them before the first step."""
    model, other = small(), small_model("mae")
    load_matching(model, other.state_dict())
    model.before_step(Progress(0, 10, 5, []))
    for network in (model, model.teacher):
        assert torch.equal(network.blocks[1].attn.qkv.weight, other.blocks[1].attn.qkv.weight)
