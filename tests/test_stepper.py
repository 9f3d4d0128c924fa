"""The stepper, compared with a plain loop of torch calls, and skipping of non-finite updates."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from util import optim
from util.stepper import RECENT_STEPS, USUAL_STEPS, Progress, Stepper, list_bad_losses, seed_micro_step

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
    """AdamW's update does not depend on the scale of the gradient; SGD's and the logged norm do."""
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
    """Compared with a loop: the usual norm is a running mean over 20 updates, and the first 20 are never spikes."""
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


def test_a_restored_stepper_resumes_bit_for_bit():
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
    assert list_bad_losses(recent) == ["neighbor", "loss"]


def test_a_first_update_that_is_skipped_leaves_sgd_as_it_was():
    """The fused step would otherwise use momentum that nothing has set."""
    found = []
    for data in (batches(3), [torch.full((4, 3), math.nan), *batches(3)]):
        model, _ = make()
        optimizer = optim.sgd(optim.pretrain_groups(model, 0.05), 1e-2)
        schedule = optim.warmup_cosine(optimizer, epochs=9, warmup_epochs=0, steps_per_epoch=9, min_lr=1e-2)
        run(model, Stepper(model, optimizer, schedule), data)
        found.append(weights(model))
    assert torch.equal(*found)


class Dropper:
    """Hooks that remove one gradient, as DINO does for the last layer in its first epochs."""

    def __init__(self, parameter):
        self.parameter, self.taken = parameter, []

    def before_step(self, progress):
        pass

    def adjust_gradients(self, progress):
        self.parameter.grad = None

    def after_update(self, taken):
        self.taken.append(bool(taken))


def test_an_update_that_the_scaler_skips_for_a_removed_gradient_is_counted_as_skipped():
    model, _ = make()
    hooks = Dropper(model[2].bias)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=0, steps_per_epoch=2, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule, fp16=True, hooks=hooks)
    before = weights(model)
    with stepper.micro_step():
        handle = model[2].bias.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        stepper({"loss": model(batches(1)[0]).square().mean()}, INDEX)
    assert torch.equal(weights(model), before) and hooks.taken == [False] and stepper.bad_steps() == (1, 1)
    handle.remove()
    run(model, stepper, batches(1))
    assert not torch.equal(weights(model), before) and hooks.taken == [False, True] and stepper.bad_steps() == (1, 0)


class Recorder:
    """Hooks that record their calls and remove the gradient of one parameter."""

    def __init__(self, removed):
        self.calls, self.removed = [], removed

    def before_step(self, progress):
        self.calls.append(("before", progress.step, progress.fraction, progress.epoch))
        assert progress.param_groups[0]["betas"] == (0.9, 0.95)

    def adjust_gradients(self, progress):
        self.calls.append(("adjust", progress.step, self.removed.grad.clone()))
        self.removed.grad.zero_()

    def after_update(self, taken):
        self.calls.append(("after", bool(taken)))


@pytest.mark.parametrize("fp16", [False, True])
def test_hooks_are_called_around_every_step(fp16):
    model, _ = make()
    hooks = Recorder(model[2].weight)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=0, steps_per_epoch=2, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule, accum=2, fp16=fp16, hooks=hooks, total_steps=4, steps_per_epoch=2)
    first, before = batches(2), copy.deepcopy(model)
    model.register_forward_hook(lambda *_: hooks.calls.append(("forward", stepper.step)))
    run(model, stepper, first)
    run(model, stepper, [batches(1)[0], torch.full((4, 3), math.nan)])
    names = [(name, *rest[:1]) for name, *rest in hooks.calls]
    forward = [("forward", 0)] * 2, [("forward", 1)] * 2
    assert names[:5] == [("before", 0), *forward[0], ("adjust", 0), ("after", True)]
    assert names[5:] == [("before", 1), *forward[1], ("adjust", 1), ("after", False)]
    assert hooks.calls[5][2:] == (0.25, 0.5)
    torch.cat([before(each) for each in first]).square().mean().backward()
    torch.testing.assert_close(hooks.calls[3][2], before[2].weight.grad, msg="unscaled, of all micro-batches")
    assert (model[2].weight - before[2].weight * (1 - 1e-2 * 0.05)).abs().max() < 1e-6, "decayed and nothing else"


def test_the_norm_is_taken_after_gradients_are_adjusted():
    model, _ = make()
    hooks = Recorder(model[2].weight)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=0, steps_per_epoch=2, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule, hooks=hooks)
    run(model, stepper, batches(1))
    left = [p.grad for p in model.parameters() if p is not model[2].weight]
    torch.testing.assert_close(stepper.grad_norm, torch.stack([g.square().sum() for g in left]).sum().sqrt())


def test_scaled_losses_give_the_updates_of_unscaled_ones():
    results = []
    for fp16 in (False, True):
        model, stepper = make(accum=2, clip_grad=0.01, fp16=fp16)
        run(model, stepper, batches(6))
        results.append((weights(model), stepper.grad_norm, stepper.bad_steps()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_refused_update_leaves_the_running_statistics_of_its_first_micro_batch(accum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=0, steps_per_epoch=9, min_lr=0.0)
    stepper = Stepper(model, optimizer, schedule, accum=accum)
    data = batches(2 * accum)
    run(model, stepper, data[:accum])
    plain = nn.BatchNorm1d(4)
    start = nn.Linear(3, 4)
    torch.manual_seed(0)
    start.reset_parameters()
    for images in data[:accum]:
        plain(start(images))
    torch.testing.assert_close(model[1].running_mean, plain.running_mean)
    torch.testing.assert_close(model[1].running_var, plain.running_var)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    run(model, stepper, [*data[accum:-1], torch.full((4, 3), math.nan)])
    assert stepper.bad_steps() == (1, 1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Ranks(torch.nn.parallel.DistributedDataParallel):
    """A model that records whether gradients would be all-reduced, without other processes."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module, self.exchanges, self.alone = module, [], False

    @contextlib.contextmanager
    def no_sync(self):
        self.alone = True
        yield
        self.alone = False

    def forward(self, images):
        self.exchanges.append(not self.alone)
        return self.module(images)


def test_gradients_are_exchanged_in_the_last_micro_batch_only():
    model, stepper = make(accum=3)
    stepper.model = ranks = Ranks(model)
    run(ranks, stepper, batches(6))
    assert ranks.exchanges == [False, False, True] * 2


def test_the_highest_loss_is_that_since_the_last_question():
    model, stepper = make()
    found = []
    for losses in ((3.0, 5.0, 4.0), (2.0, 1.0), (math.nan, 1.5)):
        for value in losses:
            stepper({"loss": model(torch.ones(1, 3)).sum() * 0 + value}, INDEX)
        found.append(stepper.highest_loss())
    assert found == [5.0, 2.0, 1.5]


def test_the_seed_of_a_micro_batch_is_the_one_of_earlier_versions():
    """Another formula would change the random numbers of resumed runs."""
    seed_micro_step(3, 5, 2)
    expected = (3 * 1_000_003 + 5) * 65_537 + 2
    assert torch.initial_seed() == expected
    assert np.random.get_state()[1][0] == expected % 2**32
    for seed in (2**32 - 1, 2**32 - 2, 2**28):  # whose last 64 bits are more and less than 2**63
        seed_micro_step(seed, 10**6, 7)
        assert torch.initial_seed() == ((seed * 1_000_003 + 10**6) * 65_537 + 7) % 2**63


def test_refused_updates_are_counted_in_all_and_in_a_row():
    model, stepper = make()
    good, bad = batches(1)[0], torch.full((4, 3), math.nan)
    found = []
    for images in (bad, good, bad, bad, good):
        run(model, stepper, [images])
        found.append(stepper.bad_steps())
    assert found == [(1, 1), (1, 0), (2, 1), (3, 2), (3, 0)]


def test_a_restored_stepper_scales_losses_as_before():
    model, stepper = make(fp16=True)
    run(model, stepper, batches(2))
    stepper._scaler.update(2.0**7)
    _, other = make(fp16=True)
    other.load_state_dict(stepper.state_dict())
    assert other._scaler.get_scale() == 2.0**7
    _, plain = make()
    plain.load_state_dict(stepper.state_dict() | {"optimizer": make()[1].optimizer.state_dict()})
    assert plain.state_dict()["scaler"] == {}


def test_a_restored_stepper_knows_the_usual_norm():
    model, stepper = make(skip_spikes=3.0, epochs=100)
    assert stepper.grad_norm == 0
    run(model, stepper, batches(25))
    other_model, other = make(skip_spikes=3.0, epochs=100)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(stepper.state_dict())
    assert other.state_dict()["usual_norm"] == stepper.state_dict()["usual_norm"] > 0
    run(other_model, other, [1000 * batches(1)[0], batches(1)[0]])
    assert other.bad_steps() == (1, 0)


def test_progress_counts_epochs_of_any_length():
    assert Progress(3, 4, 1, []).epoch == 3 and Progress(3, 12, 2, []).epoch == 1.5
    assert Progress(0, 0, 0, []).fraction == 0 == Progress(0, 0, 0, []).epoch
    assert Progress(3, 4, 1, []).fraction == 0.75


@pytest.mark.parametrize(("steps", "refused"), [(USUAL_STEPS - 1, 0), (USUAL_STEPS, 1)])
def test_the_first_updates_are_never_spikes(steps, refused):
    model, stepper = make(epochs=100, skip_spikes=3.0)
    run(model, stepper, [*batches(1) * steps, 1000 * batches(1)[0]])
    assert stepper.bad_steps() == (refused, refused)


def test_a_parameter_without_a_gradient_is_not_decayed():
    model, _ = make()
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=9, warmup_epochs=0, steps_per_epoch=9, min_lr=1e-2)
    stepper = Stepper(model, optimizer, schedule)
    run(model, stepper, batches(1))
    before = model[0].weight.clone()
    stepper({"loss": model[2](torch.ones(1, 4)).square().mean()}, INDEX)
    assert torch.equal(model[0].weight, before)


def test_a_new_stepper_belongs_to_the_only_process_and_limits_nothing():
    stepper = Stepper(*(getattr(make()[1], part) for part in ("model", "optimizer", "schedule")))
    assert stepper.progress() == Progress(0, 1, 1, stepper.optimizer.param_groups)
    assert (stepper.accum, stepper.clip_grad, stepper.skip_spikes, stepper.bad_steps()) == (1, 0.0, 0.0, (0, 0))
    assert stepper.taken.item() is True and stepper.grad_norm == stepper.state_dict()["usual_norm"] == 0
    assert stepper.highest_loss() == -math.inf
    stepper.step = 3
    with stepper.micro_step():
        assert torch.initial_seed() == 3 * 65_537, "seed 0, rank 0"


def test_the_whole_training_is_done_after_its_only_step():
    assert Progress(1, 1, 1, []).fraction == Progress(1, 1, 1, []).epoch == 1.0


def test_micro_batches_have_numbers_of_their_own_and_the_last_ends_the_step():
    model, stepper = make(accum=3, seed=2, rank=1)
    seeds, ended = [], []
    for images in batches(6):
        with stepper.micro_step():
            seeds.append(torch.initial_seed())
            ended.append(stepper({"loss": model(images).square().mean()}, INDEX))
    assert seeds == [(2 * 1_000_003 + number) * 65_537 + 1 for number in range(6)]
    assert ended == [False, False, True] * 2


def test_the_latest_32_micro_batches_are_kept():
    model, stepper = make()
    loss = model(batches(1)[0]).square().mean()
    for number in range(40):
        stepper({"loss": loss.detach().requires_grad_() * 1.0}, torch.tensor([number]))
    assert RECENT_STEPS == 32
    assert [entry["index"] for entry in stepper.recent()] == [[number] for number in range(8, 40)]


def test_a_norm_at_the_limit_is_not_a_spike():
    model, _ = make()
    optimizer = optim.sgd(optim.pretrain_groups(model, 0.0), 1e-3)
    schedule = optim.warmup_cosine(optimizer, epochs=9, warmup_epochs=0, steps_per_epoch=9, min_lr=1e-3)
    stepper = Stepper(model, optimizer, schedule, skip_spikes=1.0)
    for _ in range(USUAL_STEPS + 2):
        stepper({"loss": sum(p.sum() for p in model.parameters())}, INDEX)  # a gradient of ones at every step
    assert stepper.bad_steps() == (0, 0)


@pytest.mark.parametrize("fp16", [False, True])
def test_the_counts_and_the_loss_scale_are_restored(fp16):
    model, stepper = make(fp16=fp16)
    bad = torch.full((4, 3), math.nan)
    run(model, stepper, [bad, *batches(1), bad, bad])
    saved = copy.deepcopy(stepper.state_dict())
    for other_fp16 in (fp16, not fp16):  # another precision starts with its own loss scale
        _, other = make(fp16=other_fp16)
        initial = other.state_dict()["scaler"]
        other.load_state_dict(saved)
        assert other.bad_steps() == (3, 2) and other.step == 4
        assert other.state_dict()["scaler"] == (saved["scaler"] if other_fp16 == fp16 else initial)
