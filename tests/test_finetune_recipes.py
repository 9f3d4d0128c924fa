"""Recipes of classifiers: the command in the header runs, and options differ from the defaults and match the source."""

import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import main_finetune
import main_linprobe
from options import FinetuneOptions, ProbeOptions, resolve_batch
from options.schema import get_default
from util.optim import absolute_lr

PROJECT = Path(__file__).resolve().parent.parent
SCRIPTS = {"finetune": (main_finetune, FinetuneOptions), "linprobe": (main_linprobe, ProbeOptions)}
RECIPES = sorted(path for room in SCRIPTS for path in PROJECT.glob(f"configs/{room}/*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


@pytest.fixture
def options(weights):
    def of(name):
        room = name.split("/")[0]
        path = PROJECT / f"configs/{name}.yaml"
        teacher = ["--distill_from", weights] if "distill_token" in path.read_text(encoding="utf-8") else []
        return SCRIPTS[room][0].parse_options(["-c", str(path), "--init_from", weights, *teacher])

    return of


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_headers_command_runs_this_recipe(path, weights):
    lines = path.read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("#   ")]
    assert len(commands) == 1
    words = shlex.split(commands[0].lstrip("# "))
    module = SCRIPTS[path.parent.name][0]
    given = words[words.index(f"{module.__name__}.py") + 1 :]
    assert given[:2] == ["-c", str(path.relative_to(PROJECT))]
    there = [weights if word.endswith(("CHECKPOINT", ".pth")) else word for word in given[2:]]
    parsed = module.parse_options(["-c", str(path), *there])
    assert parsed.data_path
    assert bool(parsed.init_from) == ("from scratch, as" not in lines[0])


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_holds_only_what_differs(path, options):
    """Except for the model, which it may contain in any case."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults = {field.name: get_default(field) for field in fields(SCRIPTS[path.parent.name][1])}
    resolved = options(f"{path.parent.name}/{path.stem}")
    assert not [name for name in given if name != "model" and getattr(resolved, name) == defaults[name]]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", [name for name in NAMES if "quickstart" not in name])
def test_the_batch_divides_on_any_usual_machine(name, processes, options):
    resolved = resolve_batch(options(name), processes)
    assert resolved.batch_size >= 8 and resolved.batch_size % 2 == 0


def rate(found):
    return absolute_lr(found.lr, found.blr, found.total_batch_size)


def test_the_released_script_and_mae_differ_in_batch_and_rate(options):
    script, base = options("finetune/nor_mae_tiny_in1k_released"), options("finetune/mae_base_in1k")
    for found in (script, base):
        assert (found.epochs, found.warmup_epochs, found.layer_decay, found.drop_path) == (100, 5, 0.65, 0.1)
        assert (found.mixup, found.cutmix, found.smoothing, found.reprob) == (0.8, 1.0, 0.1, 0.25)
        assert (found.weight_decay, found.min_lr, found.clip_grad, found.aa) == (0.05, 1e-6, 0, "rand-m9-mstd0.5-inc1")
    assert (script.total_batch_size, rate(script)) == (512, pytest.approx(1e-3))
    assert (base.total_batch_size, rate(base)) == (1024, pytest.approx(2e-3))
    assert options("finetune/nor_mae_tiny_in1k").blr == 1e-3


def test_mae_lites_settings(options):
    found = options("finetune/mae_lite_tiny_in1k")
    assert (found.epochs, found.blr, found.layer_decay, found.aa) == (300, 1e-3, 0.85, "rand-m10-mstd0.5-inc1")
    assert (found.mixup, found.cutmix, found.smoothing, found.drop_path, found.reprob) == (0.2, 0, 0, 0, 0)


def test_mae_lites_first_settings(options):
    found, base = options("finetune/mae_lite_tiny_in1k_100epochs"), options("finetune/mae_base_in1k")
    assert (found.epochs, found.blr, found.layer_decay, found.warmup_epochs) == (100, 1e-3, 0.85, 5)
    assert (found.aa, found.global_pool) == ("rand-m9-mstd0.5-inc1", "avg")
    for name in ("mixup", "cutmix", "smoothing", "drop_path", "reprob", "min_lr", "total_batch_size", "aa"):
        assert getattr(found, name) == getattr(base, name)


def test_the_specific_stage_of_g2sd(options):
    found = options("finetune/g2sd_small_in1k")
    assert (found.epochs, found.layer_decay, found.distill_weight) == (200, 0.75, 0.5)
    assert (found.distill_token, found.distill_labels, found.global_pool) == (True, "hard", "token")


def test_the_supplements_transfer(options):
    found = options("finetune/transfer_sgd")
    assert (found.optimizer, found.steps, found.lr, found.total_batch_size) == ("sgd", 10_000, 0.1, 64)
    assert found.weight_decay == 0
    other = options("finetune/transfer")
    assert (other.optimizer, other.epochs, other.steps) == ("adamw", 100, 0)


def test_maes_linear_probe(options):
    found = options("linprobe/mae_base_in1k")
    assert (found.epochs, found.warmup_epochs, found.weight_decay, found.min_lr) == (90, 10, 0, 0)
    assert (found.global_pool, found.augment, found.min_scale) == ("token", True, 0.08)
    assert rate(found) == pytest.approx(6.4)
