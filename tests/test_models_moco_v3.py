"""MoCo-v3: its loss against a loop, closed forms and the published function; its networks, schedule and update."""

import math

import pytest
import torch

import methods
from models_mae import BatchNormOverRanks
from models_moco_v3 import MoCoV3, contrastive_loss, mlp
from models_vit import position_table
from programs import pretrain
from tests.published import needs_vectors, read
from tests.small import small as small_model
from util import optim
from util.distributed import Processes
from util.run import resolve
from util.stepper import Progress, Stepper


def small(**changes):
    return small_model("moco_v3", **changes)


def two_views(model, n=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, model.in_chans, *model.input_size, generator=generator) for _ in range(2)]


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss_by_loop(q, k, temperature, offset):
    """One query after another, with Python's numbers."""
    q, k = q.double().tolist(), k.double().tolist()
    total = 0.0
    for number, query in enumerate(q):
        length = math.hypot(*query)
        similarities = [sum(a * b for a, b in zip(query, key, strict=True)) / length / math.hypot(*key) for key in k]
        scores = [math.exp(similarity / temperature) for similarity in similarities]
        total -= math.log(scores[offset + number] / sum(scores))
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("offset", [0, 5])
def test_the_loss_equals_a_loop(offset):
    q, k = torch.randn(4, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    found = contrastive_loss(q, k, 0.2, offset)
    assert found.item() == pytest.approx(loss_by_loop(q, k, 0.2, offset), rel=1e-12)


@pytest.mark.parametrize(("M", "expected"), [(64, 3.3271), (256, 4.4361), (1024, 5.5452), (4096, 6.6542)])
def test_identical_outputs_give_four_t_log_m(M, expected):
    same = torch.ones(M, 256)
    assert 2 * contrastive_loss(same, same, 0.2).item() == pytest.approx(4 * 0.2 * math.log(M), rel=1e-5)
    assert 4 * 0.2 * math.log(M) == pytest.approx(expected, abs=1e-4)


def test_orthogonal_identical_queries_and_keys_have_a_closed_form():
    q = torch.eye(64, 256)
    T, M = 0.2, 64
    expected = 4 * T * (math.log(math.exp(1 / T) + M - 1) - 1 / T)
    assert 2 * contrastive_loss(q, q, T).item() == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(0.2830, abs=1e-4)


@pytest.mark.parametrize(("M", "measured"), [(64, 3.376), (256, 4.468), (1024, 5.593)])
def test_independent_whitened_outputs_start_at_the_known_value(M, measured):
    generator = torch.Generator().manual_seed(0)
    q, k = (BatchNormOverRanks(256, affine=False)(torch.randn(M, 256, generator=generator)) for _ in range(2))
    found = contrastive_loss(q, k, 0.2) + contrastive_loss(k, q, 0.2)
    assert found.item() == pytest.approx(measured, abs=0.06)


def test_keys_have_no_gradient_and_lengths_do_not_matter():
    q, k = torch.randn(3, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    loss = contrastive_loss(q, k, 0.2)
    loss.backward()
    assert k.grad is None and q.grad.abs().max() > 0
    torch.testing.assert_close(contrastive_loss(3 * q, 0.1 * k, 0.2), loss)


@pytest.mark.parametrize(
    ("q", "k", "offset"), [((4, 6), (4, 5), 0), ((4, 6), (3, 6), 0), ((4, 6), (8, 6), 5), ((4, 6), (8, 6), -1)]
)
def test_shapes_that_do_not_fit_are_refused(q, k, offset):
    with pytest.raises(ValueError, match="queries"):
        contrastive_loss(torch.ones(q), torch.ones(k), 0.2, offset)


@needs_vectors
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_loss_and_its_gradient_are_the_published_ones(rank, dtype, close):
    v = read("moco_v3_a")
    N = len(v["q"])
    q = v["q"].to(dtype).requires_grad_()
    loss = contrastive_loss(q, v["k"].to(dtype), v["temperature"].item(), offset=rank * N)
    loss.backward()
    assert loss.item() == pytest.approx(v[f"loss_rank{rank}"].item(), rel=close)
    expected = v[f"grad_rank{rank}"]
    assert (q.grad.double() - expected).norm() <= close * expected.norm()


# ---- the networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("D", "weights"), [(192, 18_628_608), (384, 19_415_040), (768, 20_987_904)])
def test_projector_and_predictor_have_the_known_numbers_of_weights(D, weights):
    with torch.device("meta"):
        assert sum(p.numel() for p in mlp(D, 4096, 4096, 256).parameters()) == weights
        assert sum(p.numel() for p in mlp(256, 4096, 256).parameters()) == 2_105_344


def test_projector_and_predictor_are_the_releases_layers():
    kinds = [type(layer).__name__ for layer in mlp(8, 12, 12, 6)]
    assert kinds == ["Linear", "BatchNormOverRanks", "ReLU"] * 2 + ["Linear", "BatchNormOverRanks"]
    *_, last = mlp(8, 12, 6)
    assert not last.affine and all(layer.bias is None for layer in mlp(8, 12, 6) if isinstance(layer, torch.nn.Linear))


def test_initial_weights_are_the_papers():
    model = small(embed_dim=64, num_heads=4, input_size=16)
    D, P = 64, 3 * 4 * 4
    qkv = model.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (D + D)), rel=0.02)  # not xavier of the joint matrix
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (P + D)), rel=0.02)
    for weight in (qkv, model.patch_embed.proj.weight):  # uniform
        assert weight.mean().abs() < 0.03 * weight.max()
        assert weight.std().item() == pytest.approx(weight.max().item() / math.sqrt(3), rel=0.03)
    assert model.patch_embed.proj.bias.abs().max() == 0 and 0 < model.cls_token.abs().max() < 1e-5
    fc1 = model.blocks[0].mlp.fc1
    assert fc1.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (D + 4 * D)), rel=0.02)
    first = model.projector[0].weight  # torch's default
    assert first.abs().max().item() == pytest.approx(1 / math.sqrt(D), rel=0.02)
    torch.testing.assert_close(model.pos_embed, position_table(model.grid, D))


def test_the_patch_embedding_is_frozen_unless_it_is_trained():
    frozen = {
        name
        for name, p in small(freeze_patch_embed=True).named_parameters()
        if not p.requires_grad and "teacher." not in name
    }
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    trained = {name for name, p in small(freeze_patch_embed=False).named_parameters() if p.requires_grad}
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias"} <= trained


def test_the_key_network_starts_as_a_copy():
    model = small()
    own, state = model.state_dict(), model.teacher.state_dict()
    assert {name.split(".")[0] for name in state} >= {"cls_token", "blocks", "projector"}
    assert "predictor" not in {name.split(".")[0] for name in state}
    assert all(torch.equal(value, own[name]) for name, value in state.items())


# ---- the method -----------------------------------------------------------------------------------------------------


def test_the_loss_contrasts_each_view_with_the_other():
    model = small()
    first, second = two_views(model)
    found = model([first, second])
    q1, q2, k1, k2 = model.queries(first), model.queries(second), model.keys(first), model.keys(second)
    expected = contrastive_loss(q1, k2, 0.2) + contrastive_loss(q2, k1, 0.2)
    torch.testing.assert_close(found["loss"], expected)
    assert list(found) == ["loss", "contrastive"]


def test_queries_and_keys_come_from_the_class_token():
    model = small()
    tokens = torch.full((4, 1 + model.num_patches, model.embed_dim), math.nan)
    tokens[:, 0] = torch.randn(4, model.embed_dim)
    model.encode = model.teacher.forward_features = lambda images: tokens
    assert model.queries(torch.empty(0)).isfinite().all() and model.keys(torch.empty(0)).isfinite().all()


def test_swapping_the_views_changes_nothing_without_a_predictor():
    model = small()
    model.predictor = torch.nn.Identity()
    first, second = two_views(model)
    torch.testing.assert_close(model([first, second])["loss"], model([second, first])["loss"])


@pytest.mark.parametrize("views", [1, 3])
def test_another_number_of_views_is_refused(views):
    model = small()
    images = two_views(model)[0]
    with pytest.raises(ValueError, match="two views"):
        model([images] * views)
    with pytest.raises(ValueError, match="two views"):
        model(images)


def test_the_momentum_rises_to_one_along_half_a_cosine():
    model = small()
    assert [model.momentum(share) for share in (0, 0.5, 1, 1.5)] == pytest.approx([0.99, 0.995, 1.0, 1.0])


def test_the_key_network_follows_after_updates_that_were_made():
    model = small(momentum=0.9)
    model.before_step(Progress(3, 10, 5, []))
    keep = model.momentum(0.4)
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    model.after_update(torch.tensor(False))
    assert all(torch.equal(p, before[name]) for name, p in model.teacher.named_parameters())
    model.after_update(torch.tensor(True))
    own = dict(model.named_parameters())
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, keep * before[name] + (1 - keep) * own[name], msg=name)


def test_weights_that_were_loaded_reach_the_key_network_before_the_first_step():
    model = small()
    torch.nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    model.before_step(Progress(0, 10, 5, []))
    assert torch.equal(model.teacher.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_views_are_the_papers():
    first, second = small().views(0.08, 0.5)
    assert first.scale == second.scale == (0.08, 1.0) and first.interpolation == "bilinear"
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert first.jitter == (0.4, 0.4, 0.2, 0.1) and first.jitter_prob == 0.8 and first.grayscale == 0.2


def test_the_class_reads_its_options():
    assert MoCoV3.feature_pool == "token" and MoCoV3.decays_vectors and MoCoV3.encoder_prefix == ""


def test_keys_come_from_the_network_that_the_release_would_have():
    """Its key network moves at the start of each step, by that step's momentum; ours at the end of the step before."""
    model = small(momentum=0.5)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.1), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=1, warmup_epochs=0, steps_per_epoch=4, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule, hooks=model, total_steps=4, steps_per_epoch=4)
    expected = {name: p.clone() for name, p in model.teacher.named_parameters()}
    for step in range(4):
        own = dict(model.named_parameters())
        keep = 1 - 0.5 * (1 + math.cos(math.pi * step / 4)) / 2
        expected = {name: keep * p + (1 - keep) * own[name].detach() for name, p in expected.items()}
        with stepper.micro_step():
            losses = model(two_views(model, seed=step))
        for name, p in model.teacher.named_parameters():
            torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        stepper(losses, torch.arange(4))
    assert (model.teacher.norm.weight - model.norm.weight).abs().max() > 1e-4


def test_everything_is_decayed_in_one_group():
    model = small()
    (group,) = optim.pretrain_groups(model, 0.1)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == trained and group["weight_decay"] == 0.1


def test_views_are_not_cut_on_the_device():
    options = methods.parse_options(
        "--method moco_v3 --data_path digits --input_size 8 --in_chans 1 --model mae_vit_tiny_patch2 --embed_dim 24 "
        "--depth 1 --num_heads 2 --total_batch_size 64 --num_workers 0 --device cpu --data_on_device "
        "--proj_hidden_dim 16".split()
    )
    model = pretrain.build_model(options)
    source = pretrain.open_images(options, model)
    with pytest.raises(ValueError, match="data_on_device: the method moco_v3 trains on 2 augmented views"):
        pretrain.make_batches(resolve(options), model, source, Processes(0, 1, 0, torch.device("cpu")))
