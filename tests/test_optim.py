"""Learning rates and parameter groups, compared with MAE's formulas."""

import math

import pytest
import torch
from torch import nn

from tests.small import small
from util import optim


def mae_rate(step, *, rate, min_rate, epochs, warmup, steps_per_epoch):
    """Return the rate of MAE's schedule: linear warm-up, then half a cosine, at the step's fractional epoch."""
    epoch = step / steps_per_epoch
    if epoch < warmup:
        return rate * epoch / warmup
    return min_rate + (rate - min_rate) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize("min_lr", [0.0, 1e-6])
@pytest.mark.parametrize(("epochs", "warmup"), [(20, 4), (20, 2.5), (7.3, 0.35), (5, 0)])
def test_every_step_has_the_rate_of_maes_formula(min_lr, epochs, warmup):
    """Also if the warm-up, or the run, is not an integer number of steps."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}], lr=1.2e-3)
    schedule = optim.warmup_cosine(optimizer, epochs=epochs, warmup_epochs=warmup, steps_per_epoch=7, min_lr=min_lr)
    for step in range(int(epochs * 7)):
        schedule.step_update(step)
        expected = mae_rate(step, rate=1.2e-3, min_rate=min_lr, epochs=epochs, warmup=warmup, steps_per_epoch=7)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_layer_scales_multiply_the_rate_and_its_minimum():
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.25}], lr=1.0)
    schedule = optim.warmup_cosine(optimizer, epochs=4, warmup_epochs=0, steps_per_epoch=1, min_lr=0.4)
    schedule.step_update(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25)
    schedule.step_update(4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up_only_warms_up(caplog):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=40, steps_per_epoch=10, min_lr=0.0)
    schedule.step_update(19)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(19 / 400)
    assert caplog.text == "", "timm has nothing to say about a cosine that is never reached"


def test_the_base_rate_is_for_256_images():
    assert optim.absolute_lr(0.0, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert optim.absolute_lr(7e-4, 1.5e-4, 4096) == 7e-4


def test_vectors_and_biases_are_not_decayed_tokens_and_matrices_are():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False)
            self.norm = nn.LayerNorm(4)
            self.linear = nn.Linear(4, 4)

    model = Model()
    groups = {group["weight_decay"]: set(map(id, group["params"])) for group in optim.pretrain_groups(model, 0.05)}
    assert groups[0.05] == {id(model.cls_token), id(model.linear.weight)}
    assert groups[0.0] == {id(model.norm.weight), id(model.norm.bias), id(model.linear.bias)}


@pytest.mark.parametrize(("steps", "warmup"), [(20, 5), (4, 2)])
def test_every_step_of_the_polynomial_schedule(steps, warmup):
    """Linear warm-up from 0, then (1 - share of the other steps) ** power, down to the smallest rate."""
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(2))], "lr_scale": 1.0}], lr=0.3)
    schedule = optim.warmup_poly(optimizer, steps=steps, warmup_steps=warmup, power=0.9, min_lr=0.01)
    for step in range(steps):
        schedule.step_update(step)
        expected = (
            0.3 * step / warmup if step < warmup else 0.01 + 0.29 * (1 - (step - warmup) / (steps - warmup)) ** 0.9
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("make", ["cosine", "poly"])
def test_a_decay_of_one_step_gives_no_warning(make, caplog):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    if make == "cosine":
        schedule = optim.warmup_cosine(optimizer, epochs=3, warmup_epochs=2, steps_per_epoch=1, min_lr=0.0)
    else:
        schedule = optim.warmup_poly(optimizer, steps=3, warmup_steps=2, power=1.0, min_lr=0.0)
    schedule.step_update(2)
    assert optimizer.param_groups[0]["lr"] == 1.0 and not caplog.records


def test_a_run_of_an_earlier_version_decays_the_parameters_that_it_did():
    model = small("simmim")
    optimizer = torch.optim.AdamW(optim.pretrain_groups(model, 0.05))
    now = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    optim.restore_groups(optimizer, model, [{"params": list(range(len(group)))} for group in now])
    assert now == [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    sizes = [len(now[0]) - 1, len(now[1]) + 1]  # the class token was decayed
    optim.restore_groups(optimizer, model, [{"params": list(range(size))} for size in sizes])
    plain, decayed = ([id(p) for p in group["params"]] for group in optimizer.param_groups)
    assert id(model.cls_token) in decayed and [len(plain), len(decayed)] == sizes
    assert sorted(plain + decayed) == sorted(now[0] + now[1])
