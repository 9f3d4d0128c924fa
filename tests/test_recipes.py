"""Recipes: they match their headers, contain only differences, are divisible among usual machines, and build models."""

import functools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import methods
from main_pretrain import parse_options
from options import resolve_batch, to_dict
from programs.pretrain import build_model

PROJECT = Path(__file__).resolve().parent.parent
RECIPES = sorted(PROJECT.glob("configs/pretrain/*.yaml"))
NAMES = [path.stem for path in RECIPES]

STRENGTH = 0.0384  # of the paper's patch 16: 5e-5 x (P - 1), with P = 768 values of a patch

# Options of recipes that follow the release of another method.
DMAE = {"norm_pix_loss": False, "decoder_depth": 0, "blr": 1.5e-4, "warmup_epochs": 20, "total_batch_size": 4096}
BEIT = {
    "lr": 1.5e-3,
    "min_lr": 1e-5,
    "clip_grad": 3,
    "drop_path": 0.1,
    "warmup_epochs": 10,
    "total_batch_size": 2048,
    "min_scale": 0.08,
}
VQKD = {  # 5e-5 for 128 images
    "codes": 8192,
    "code_dim": 32,
    "decoder_depth": 3,
    "blr": 1e-4,
    "weight_decay": 1e-4,
    "total_batch_size": 512,
    "min_scale": 0.08,
}
MOCO_V3 = {"min_scale": 0.08, "weight_decay": 0.1, "blr": 1.5e-4, "min_lr": 0, "warmup_epochs": 40, "temperature": 0.2}
DINO = {
    "min_scale": 0.4,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "blr": 5e-4,
    "min_lr": 1e-6,
    "warmup_epochs": 10,
    "clip_param": 3,
    "local_crops": 8,
    "local_size": 96,
    "out_dim": 65536,
    "drop_path": 0.1,
}
RELEASES = {
    "moco_v3": MOCO_V3,
    "dino": DINO,
    "sup_mae": {
        "norm_pix_loss": True,
        "decoder_depth": 1,
        "warmup_epochs": 20,
        "total_batch_size": 2048,
        "epochs": 400,
    },
    "u_mae": {"norm_pix_loss": True, "decoder_depth": 0, "warmup_epochs": 40, "total_batch_size": 1024, "epochs": 200},
    "dmae": DMAE,
    "mae_lite_distill": {"norm_pix_loss": True, "decoder_depth": 1, "epochs": 400, "total_batch_size": 4096},
    "d2_mae": {"norm_pix_loss": True, "decoder_depth": 1, "epochs": 400, "reconstruct_block": 0.67},
    "tiny_mim": {"mask_ratio": 0, "reconstruction_weight": 0, "epochs": 300, "total_batch_size": 2048, "blr": 1.5e-4},
    "g2sd": {"reconstruction_weight": 0, "decoder_depth": 4, "epochs": 300, "min_lr": 2.5e-6, "blr": 1.5e-4},
    "amd": {"mask_ratio": 0.9, "norm_pix_loss": True},
    "proteus": {"mask_ratio": 0, "epochs": 300, "total_batch_size": 512, "blr": 2.5e-4, "warmup_epochs": 5},
    "nor_dmae": DMAE,
    "cross_mae": {"norm_pix_loss": True, "decoder_depth": 12, "blr": 5e-5},  # 1.5e-4 x 0.25 / 0.75
    "simmim": {"norm_pix_loss": False, "mask_ratio": 0.6, "blr": 5e-5, "clip_grad": 5, "min_scale": 0.67},
    "maskfeat": {
        "mask_ratio": 0.4,
        "blr": 2e-4,
        "clip_grad": 0.02,
        "min_scale": 0.5,
        "warmup_epochs": 30,
        "total_batch_size": 2048,
    },
    "beit": BEIT,
    "peco": BEIT,
    "vq_tokenizer": VQKD,
    "vqkd_tokenizer": VQKD,
    "cluster_mim": {"mask_ratio": 0.75, "decoder_depth": 0, "label_smoothing": 0.0, "total_batch_size": 2048},
}
RELEASED = (
    "sup_mae_vit_base_in1k_released",
    "perceptual_tokenizer_vit",
    *(f"{method}_vit" for method in RELEASES if method != "sup_mae"),
)
OWN = (
    "quickstart",
    "my_images",
    "few_images",
    "cpu_images",
    *(name for name in NAMES if name.endswith("_vit_cpu_cifar10")),
)  # our settings
OTHERS = [name for name in NAMES if name.startswith(RELEASED) and name not in OWN]

# Fine-tuning accuracy after 200 epochs of pretraining, as printed in the paper.
PAPER = {
    "Table 1": {"patch2": "83.56", "patch4": "83.58", "patch8": "79.24", "patch32": "74.73"},
    "Table 2": {
        "moco_v3_vit_tiny_in1k": "70.09",
        "moco_v3_vit_small_in1k": "79.46",
        "moco_v3_vit_base_in1k": "83.14",
        "dino_vit_tiny_in1k": "68.17",
        "dino_vit_base_in1k": "82.80",
        "mae_vit_tiny_in1k": "66.60",
        "mae_vit_small_in1k": "79.00",
        "mae_vit_base_in1k": "83.30",
        "nor_mae_vit_tiny_in1k": "70.24",
        "nor_mae_vit_small_in1k": "80.13",
        "nor_mae_vit_base_in1k": "83.42",
        "sup_mae_vit_tiny_in1k": "67.88",
        "sup_mae_vit_small_in1k": "79.27",
        "sup_mae_vit_base_in1k": "83.60",
        "sup_nor_mae_vit_tiny_in1k": "70.63",
        "sup_nor_mae_vit_small_in1k": "80.16",
        "sup_nor_mae_vit_base_in1k": "83.70",
        "u_mae_vit_base_in1k": "83.00",
        "dmae_vit_tiny_in1k": "70.00",
        "dmae_vit_small_in1k": "79.30",
        "dmae_vit_base_in1k": "84.00",
        "nor_dmae_vit_base_in1k": "84.22",
        "cross_mae_vit_small_in1k": "79.30",
        "cross_mae_vit_base_in1k": "83.60",
        "simmim_vit_tiny_in1k": "66.08",
        "simmim_vit_base_in1k": "83.50",
    },
    "Table 3": {
        "mae_vit_tiny_in100": "71.04",
        "mae_vit_small_in100": "81.82",
        "mae_vit_base_in100": "86.80",
        "nor_mae_vit_tiny_in100": "78.26",
        "nor_mae_vit_small_in100": "84.28",
        "nor_mae_vit_base_in100": "87.56",
        "cross_mae_vit_tiny_in100": "70.82",
        "cross_mae_vit_base_in100": "86.29",
        "u_mae_vit_base_in100": "86.80",
        "maskfeat_vit_small_in100": "82.80",
        "peco_vit_small_in100": "83.60",
        "beit_vit_base_in100": "86.10",
    },
    "Table 8": {"random_asymmetry_mae_vit_tiny_in100": "72.15"},
    "Table 9": {"noa_mae_vit_tiny_in100": "72.52"},
}


@functools.cache
def recipe(name):
    return parse_options(["-c", str(PROJECT / f"configs/pretrain/{name}.yaml")])


@functools.cache
def model_of(name):
    options = recipe(name)
    with torch.device("meta"):  # shapes without data
        if hasattr(options, "tokenizer"):
            return methods.from_options(to_dict(replace(options, tokens=8192)))
        if options.method.endswith("tokenizer"):
            return methods.from_options(to_dict(options))
        if "teacher" not in options.terms:
            return build_model(options)
        size = {
            "embed_dim": 1024,
            "depth": 24,
            "num_heads": 16,
            "decoder_embed_dim": 512,
        }  # of a teacher that is not available
        return methods.from_options(to_dict(replace(options, terms={"teacher": size, "neighbor": None})))


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("#")]


def test_there_is_a_recipe_for_every_row():
    sizes, sets = ("tiny", "small", "base"), ("in1k", "in1k_released", "in100")
    expected = {f"{method}_vit_{size}_{data}" for method in ("mae", "nor_mae") for size in sizes for data in sets}
    expected |= {f"nor_mae_vit_tiny_patch{patch}_in100{kind}" for patch in (2, 4, 8, 32) for kind in ("", "_matched")}
    expected |= {"noa_mae_vit_tiny_in100", "random_asymmetry_mae_vit_tiny_in100"}
    expected |= {"mae_lite_vit_tiny_in1k", "mae_lite_vit_small_in1k"}
    small, sets = ("tiny", "tiny8"), ("cifar10", "cifar100")
    expected |= {f"{method}_vit_{size}_{data}" for method in ("mae", "nor_mae") for size in small for data in sets}
    expected |= {"mae_vit_cpu_cifar10", "my_images", "few_images", "cpu_images", "quickstart"}
    assert expected <= set(NAMES)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_headers_command_runs_this_recipe(path):
    commands = [line for line in header(path) if line.startswith("#   ")]
    assert len(commands) == 1
    words = shlex.split(commands[0].lstrip("# "))
    given = words[words.index("main_pretrain.py") + 1 :]
    assert given[:2] == ["-c", str(path.relative_to(PROJECT))]
    assert parse_options(["-c", str(path), *given[2:]]).data_path
    assert words[0] in ("python", "torchrun")


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_holds_only_what_differs(path):
    """Except for the method and the model, which it always contains."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    defaults, resolved = to_dict(parse_options(["--method", given["method"]])), to_dict(recipe(path.stem))
    assert {"method", "model"} <= set(given)
    assert not [name for name in given if name not in ("method", "model") and resolved[name] == defaults[name]]
    for term, options in given.get("terms", {}).items():
        brought = to_dict(parse_options(["--method", given["method"]]))["terms"].get(term, {})
        assert not [name for name in options if resolved["terms"][term][name] == brought.get(name)]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_the_batch_divides(name, processes):
    options = recipe(name)
    resolved = resolve_batch(options, processes)
    assert resolved.total_batch_size == options.total_batch_size > 0
    assert resolved.batch_size >= 16 or "_cpu_" in name or name in ("few_images", "cpu_images")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_made_of_it(name):
    options, model = recipe(name), model_of(name)
    assert set(model.loss_terms) <= set(options.terms) and bool(model.loss_terms) == bool(options.terms)
    rows, columns = (side // int(options.model.rpartition("patch")[2]) for side in options.input_size)
    assert model.num_patches == rows * columns and tuple(model.grid) == (rows, columns)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, rows in PAPER.items() for name in rows])
def test_the_expected_number_is_that_of_the_paper(table, name):
    number = PAPER[table][name]
    stems = [f"nor_mae_vit_tiny_{name}_in100"] if table == "Table 1" else [name]
    if table == "Table 2" and name.startswith(("mae", "nor_mae")):
        stems.append(f"{name}_released")
    for stem in stems:
        text = " ".join(header(PROJECT / f"configs/pretrain/{stem}.yaml"))
        assert re.search(rf"[Tt]he paper reports {number}% .*\(its {table}\)", text), stem


@pytest.mark.parametrize("name", OTHERS)
def test_the_settings_are_those_of_the_methods_release(name):
    wanted = RELEASES[recipe(name).method]
    assert {option: getattr(recipe(name), option) for option in wanted} == wanted
    assert recipe(name).class_list == ("imagenet100" if "in100" in name else "")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*OWN, *OTHERS)])
def test_the_settings_are_the_papers(name):
    options = recipe(name)
    assert options.norm_pix_loss and options.mask_ratio == 0.75
    assert (options.blr, options.weight_decay, options.warmup_epochs) == (1.5e-4, 0.05, 40)
    if "lite" in name or "cifar" in name:
        assert options.epochs == (1600 if "tiny8" in name else 400)
        return
    assert options.epochs == 200 and options.decoder_depth == 12 and options.input_size == (224, 224)
    assert options.total_batch_size == (4096 if name.endswith("_in1k") else 2048)
    assert options.class_list == ("imagenet100" if "in100" in name else "")
    released = name.startswith("nor") and name.endswith("_released")
    assert options.method == name.partition("_vit")[0] + ("_released" if released else "")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart" and "neighbor" in recipe(name).terms])
def test_the_strength_of_the_neighbour_term(name):
    """The literal 5e-5, or the weight that gives the correlation the same strength as with patch size 16."""
    options, P = recipe(name), model_of(name).patch_pixels
    weight = options.terms["neighbor"]["weight"]
    if options.method == "noa_mae":
        assert weight == pytest.approx(5e-5 * P / 2)
    elif name.endswith(("_matched", "_cifar10", "_cifar100", "cpu_images")):
        assert weight * (P - 1) == pytest.approx(STRENGTH, rel=1e-3)
    else:
        assert weight == 5e-5
