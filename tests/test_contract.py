"""A new method is one class and one entry in the registry: it trains, resumes and skips bad updates as all methods."""

import math

import pytest
import torch
from torch import nn

import methods
from tests import toys
from tests.runs import Training, assert_same_end, finish, losses
from util import optim
from util.stepper import Stepper, running_statistics

SIZES = {"model": "mae_vit_tiny_patch4", "input_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
TOYS = {
    "brightness_mae": ["--decoder_embed_dim", 16, "--decoder_depth", 1, "--decoder_num_heads", 2],
    "twin": ["--momentum", 0.8],
}
WORDS = (
    "--data_path digits --input_size 8 --in_chans 1 --model mae_vit_tiny_patch2 --embed_dim 24 --depth 2 --num_heads 2 "
    "--total_batch_size 256 --epochs 2 --warmup_epochs 1 --num_workers 0 --device cpu --log_every 1 --save_minutes 0 "
    "--save_steps 3"
).split()


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    toys.register()


VIEWS = {  # options of the methods with several views
    "moco_v3": {"proj_hidden_dim": 32, "proj_dim": 16},
    "dino": {
        "out_dim": 64,
        "head_hidden_dim": 32,
        "head_bottleneck_dim": 16,
        "local_size": 4,
        "local_crops": 2,
        "head_batch_norm": True,
    },
}


@pytest.mark.parametrize(
    "method", [pytest.param("twin", marks=pytest.mark.slow), pytest.param("moco_v3", marks=pytest.mark.slow), "dino"]
)
def test_a_method_with_several_views_resumes_bit_for_bit_after_sigkill(method, tmp_path):
    """DINO trains its last layer from the second epoch on; before, the optimizer has no moments for it."""
    own = [word for name, value in VIEWS.get(method, {}).items() for word in (f"--{name}", value)]
    words = [*WORDS, "--method", method, *TOYS.get(method, own)]
    finish(tmp_path / "one", *words, tiny=False, fault=toys.register)
    Training(tmp_path / "killed", *words, tiny=False, fault=toys.register).kill_at(5)
    finish(tmp_path / "killed", *words, tiny=False, fault=toys.register)
    assert_same_end(tmp_path / "one", tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "one")


@pytest.mark.parametrize("method", ["brightness_mae"])
def test_a_new_method_trains_and_resumes_bit_for_bit_after_sigkill(method, tmp_path):
    words = [*WORDS, "--method", method, *TOYS[method]]
    finish(tmp_path / "one", *words, tiny=False, fault=toys.register)
    Training(tmp_path / "killed", *words, tiny=False, fault=toys.register).kill_at(5)
    finish(tmp_path / "killed", *words, tiny=False, fault=toys.register)
    assert_same_end(tmp_path / "one", tmp_path / "killed")
    curve = losses(tmp_path / "one")
    assert losses(tmp_path / "killed") == curve and curve[max(curve)] < curve[1]


def test_a_method_refuses_the_options_of_others(registry):
    with pytest.raises(ValueError, match="the method brightness_mae does not use it; methods that do: .*twin"):
        methods.parse_options(["--method", "brightness_mae", "--momentum", "0.5"])
    with pytest.raises(ValueError, match="mask_ratio.*the method twin does not use it"):
        methods.parse_options(["--method", "twin", "--mask_ratio", "0.5"])
    with pytest.raises(ValueError, match="takes no loss terms, found uniformity"):
        methods.build("twin", **SIZES, terms={"uniformity": {}})
    assert methods.parse_options(["--method", "twin", "--momentum", "0.5"]).momentum == 0.5


@pytest.mark.parametrize(
    ("method", "moves"),
    [("twin", "predictor.1.running_mean"), ("moco_v3", "projector.1.running_var"), ("dino", "center")],
)
def test_a_refused_update_leaves_the_whole_state_unchanged(method, moves, registry):
    torch.manual_seed(0)
    model = methods.build(method, **SIZES | VIEWS.get(method, {}))
    stepper = make_stepper(model)
    step(stepper, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(stepper, model, poison=math.nan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert stepper.bad_steps() == (1, 1)
    step(stepper, model)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.startswith("teacher.") for name in moved) and moves in moved


def test_the_statistics_of_all_micro_batches_are_dropped_with_the_update():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    stepper = make_stepper(model, accum=2)
    for poison in (0.0, math.nan):
        with stepper.micro_step():
            loss = model(torch.randn(8, 3)).square().mean() + poison
        stepper({"loss": loss}, torch.arange(8))
    assert [float(buffer.sum()) for buffer in running_statistics(model)] == [0.0, 3.0, 0.0]


def test_hooks_see_the_progress_of_the_training():
    class Spy(nn.Linear):
        seen: list = []

        def before_step(self, progress):
            self.seen.append(("before", progress.step, progress.fraction, progress.epoch))

        def adjust_gradients(self, progress):
            self.weight.grad.mul_(0)

        def after_update(self, taken):
            self.seen.append(("after", bool(taken)))

    model = Spy(3, 3)
    stepper = make_stepper(model, hooks=model, total_steps=8, steps_per_epoch=4, accum=2)
    for _ in range(4):
        with stepper.micro_step():
            loss = model(torch.ones(1, 3)).square().mean()
        stepper({"loss": loss}, torch.arange(1))
    assert model.seen == [("before", 0, 0, 0), ("after", True), ("before", 1, 1 / 8, 1 / 4), ("after", True)]
    assert stepper.grad_norm == pytest.approx(model.bias.grad.norm().item()), "taken after the adjustment"


def make_stepper(model, **more):
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-2)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=0, steps_per_epoch=4, min_lr=0.0)
    hooks = model if hasattr(model, "before_step") else None
    return Stepper(model, optimizer, schedule, **{"hooks": hooks} | more)


def step(stepper, model, poison=0.0):
    images = [torch.randn(8, 3, *crop.size) for crop in model.views(0.2, 0.5) for _ in range(crop.count)]
    with stepper.micro_step():
        loss = model(images)["loss"] + poison
    stepper({"loss": loss}, torch.arange(8))
