"""The stepper against a plain loop of torch's own calls, and its refusal of updates that are not finite."""

import copy
import math

import pytest
import torch
from torch import nn

from util import optim
from util.stepper import Stepper, names_of_bad_losses

INDEX = torch.arange(4)


def make(accum=1, clip_grad=0.0, epochs=10, fused=True, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1))
    groups = optim.pretrain_groups(model, 0.05)
    optimizer = optim.adamw(groups, 1e-2) if fused else torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    schedule = optim.warmup_cosine(optimizer, epochs=epochs, warmup_epochs=2, steps_per_epoch=3, min_lr=0.0)
    return model, Stepper(model, optimizer, schedule, accum=accum, clip_grad=clip_grad, **more)


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def run(model, stepper, data):
    for images in data:
        with stepper.micro_step():
            stepper({"loss": model(images).square().mean()}, INDEX)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("clip_grad", [0.0, 0.01])
@pytest.mark.parametrize("accum", [1, 3])
def test_updates_equal_a_plain_loop(accum, clip_grad):
    model, stepper = make(accum, clip_grad)
    run(model, stepper, batches(6 * accum))

    plain, _ = make()
    optimizer = torch.optim.AdamW(optim.pretrain_groups(plain, 0.05), lr=1e-2, betas=(0.9, 0.95))
    schedule = optim.warmup_cosine(optimizer, epochs=10, warmup_epochs=2, steps_per_epoch=3, min_lr=0.0)
    data = batches(6 * accum)
    for step in range(6):
        schedule.step_update(step)
        optimizer.zero_grad()
        for images in data[step * accum : (step + 1) * accum]:
            (plain(images).square().mean() / accum).backward()
        if clip_grad:
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_grad)
            assert norm > clip_grad, "the limit must bite for this to test it"
        optimizer.step()
    assert stepper.step == 6
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accum", [1, 3])
def test_gradients_are_averaged_over_micro_batches(accum):
    """AdamW's update is the same for a gradient of any scale: SGD's, and the logged norm, are not."""
    model, _ = make()
    plain = copy.deepcopy(model)
    optimizer = optim.sgd(optim.pretrain_groups(model, 0.0), 1e-1)
    schedule = optim.warmup_cosine(optimizer, epochs=9, warmup_epochs=0, steps_per_epoch=9, min_lr=1e-1)
    stepper = Stepper(model, optimizer, schedule, accum=accum)
    data = batches(accum)
    run(model, stepper, data)
    plain(torch.cat(data)).square().mean().backward()
    norm = torch.stack([p.grad.square().sum() for p in plain.parameters()]).sum().sqrt()
    torch.testing.assert_close(stepper.grad_norm, norm)
    for trained, before in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, before - 1e-1 * before.grad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_count(poison, fused):
    model, stepper = make(fused=fused)
    run(model, stepper, batches(4))
    before, moments = weights(model), [s["exp_avg"].clone() for s in stepper.optimizer.state.values()]
    adam_steps = [float(s["step"]) for s in stepper.optimizer.state.values()]
    # An additive constant has no gradient: only the loss itself shows that the step is bad.
    stepper({"loss": model(batches(1)[0]).square().mean() + poison}, INDEX)
    assert torch.equal(weights(model), before)
    for state, moment, step in zip(stepper.optimizer.state.values(), moments, adam_steps, strict=True):
        assert torch.equal(state["exp_avg"], moment)
        assert float(state["step"]) == step
    assert stepper.bad_steps() == (1, 1)
    assert stepper.step == 5
    run(model, stepper, batches(1))
    assert not torch.equal(weights(model), before)
    assert stepper.bad_steps() == (1, 0)


def test_one_bad_micro_batch_spoils_its_accumulation_only():
    model, stepper = make(accum=2)
    run(model, stepper, batches(2))
    before = weights(model)
    good, bad = batches(2)
    stepper({"loss": model(good).square().mean()}, INDEX)
    stepper({"loss": model(bad).square().mean() * math.nan}, INDEX)
    assert torch.equal(weights(model), before)
    assert stepper.bad_steps() == (1, 1)
    run(model, stepper, batches(2))
    assert stepper.bad_steps() == (1, 0)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_refused():
    model, stepper = make()
    run(model, stepper, batches(2))
    before = weights(model)
    zero = model(batches(1)[0]) * 0
    loss = zero.abs().sqrt().sum()  # 0, whose derivative is 0/0
    assert torch.isfinite(loss)
    stepper({"loss": loss}, INDEX)
    assert torch.equal(weights(model), before)
    assert stepper.bad_steps() == (1, 1)


def test_an_update_far_beyond_the_usual_is_left_out():
    """Held against a loop: the usual norm is a running mean over 20 updates, and the first 20 are never spikes."""
    model, stepper = make(epochs=20, skip_spikes=5.0)
    data = batches(40)
    for number in (3, 30, 31, 36):
        data[number] = 6 * data[number]  # 36 times the loss
    usual, refused = 0.0, []
    for number, images in enumerate(data):
        before = weights(model)
        run(model, stepper, [images])
        norm = float(stepper.grad_norm)
        spike = number >= 20 and norm > 5 * usual
        refused += [number] * spike
        if not spike:
            usual = usual + (norm - usual) / 20 if number else norm
        assert torch.equal(before, weights(model)) == (spike or number == 0), "the first rate is 0"
    assert refused == [30, 31, 36]
    assert stepper.bad_steps() == (3, 0)
    assert stepper.state_dict()["usual_norm"] == pytest.approx(usual, rel=1e-5)


def test_a_restored_stepper_goes_on_bit_for_bit():
    data = batches(8)
    model, stepper = make()
    run(model, stepper, data[:5])
    saved = copy.deepcopy({"model": model.state_dict(), "stepper": stepper.state_dict()})
    run(model, stepper, data[5:])
    again, other = make()
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["stepper"])
    run(again, other, data[5:])
    assert torch.equal(weights(again), weights(model))
    assert (other.step, other.lr) == (stepper.step, stepper.lr)


def test_what_is_asked_for_now_counts_and_not_what_was_saved():
    model, stepper = make()
    run(model, stepper, batches(5))
    saved, lr = stepper.state_dict(), stepper.lr
    _, other = make()
    other.optimizer.param_groups[1]["weight_decay"] = 0.3
    other.load_state_dict(saved)
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.0, 0.3]
    assert other.lr == lr


def test_device_randomness_depends_on_seed_step_and_process_only():
    def draw(seed, step, rank):
        model, stepper = make()
        stepper._seed, stepper._rank, stepper.step = seed, rank, step
        torch.randn(7)
        with stepper.micro_step():
            return torch.rand(3)

    assert torch.equal(draw(1, 5, 0), draw(1, 5, 0))
    others = [draw(1, 6, 0), draw(1, 5, 1), draw(2, 5, 0)]
    assert not any(torch.equal(draw(1, 5, 0), other) for other in others)


def test_recent_batches_name_what_was_not_finite():
    model, stepper = make()
    loss = model(batches(1)[0]).square().mean()
    stepper({"loss": loss * math.nan, "reconstruction": loss, "neighbor": loss * math.nan}, torch.tensor([3, 1, 2]))
    recent = stepper.recent()
    assert recent[-1]["index"] == [3, 1, 2]
    assert recent[-1]["losses"]["reconstruction"] == pytest.approx(loss.item())
    assert names_of_bad_losses(recent) == ["neighbor", "loss"]
