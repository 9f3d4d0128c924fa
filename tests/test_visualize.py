"""tools.visualize: any model and images, valid files, TensorBoard, and messages for unsupported input."""

import os
import re
import socket
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
import methods
from tools import visualize
from tools.figures import collapse, models, relations, style, subject
from tools.records import read_run

RUN = (
    "--model mae_vit_tiny_patch2 --embed_dim 24 --depth 1 --num_heads 2 --decoder_embed_dim 16 --decoder_depth 1 "
    "--decoder_num_heads 2 --input_size 8 --in_chans 1 --norm_pix_loss --data_path digits --epochs 2 --warmup_epochs 0 "
    "--batch_size 256 --num_workers 0 --device cpu --terms.neighbor.weight 0.01"
).split()
PROJECT = Path(__file__).resolve().parent.parent
SMALL = "mae_vit_tiny_patch16"  # with --input_size 64 its 16 patches are quick to draw


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run of a few updates on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main_pretrain.main([*RUN, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def offline(monkeypatch):
    """Let all network connections fail."""

    def refuse(*_):
        raise AssertionError("something wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(style, "DPI", 150)  # a quarter of the pixels
    return tmp_path


def assert_opens(path):
    """Assert that the file is a valid image of its format, and not blank."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            assert picture.width > 600
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
    elif path.suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        content = path.read_bytes()
        assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    assert path.stat().st_size > 5000


def images_in_tensorboard(folder):
    board = EventAccumulator(str(folder))
    board.Reload()
    return board.Tags()["images"]


# ---- every figure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", visualize.PICTURES)
def test_every_picture_is_drawn_without_a_run_images_or_a_network(name, here, offline):
    assert visualize.main([name, SMALL, "--input_size", "64", "--device", "cpu"]) == 0
    folder = here / "output" / "figures"
    assert_opens(folder / f"{name}.png")
    assert_opens(folder / f"{name}.svg")
    assert images_in_tensorboard(folder) == [f"figures/{name}"]


def test_the_histogram_is_drawn_and_its_figures_are_printed(here, offline, capsys):
    assert visualize.main(["similarity", SMALL, "--input_size", "64", "--output", "s.png", "--no_tensorboard"]) == 0
    assert_opens(here / "s.png")
    assert [path.name for path in here.iterdir()] == ["s.png"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == list(subject.SPACES)
    assert all("share >= 0.99" in line and line.endswith("32 patches") for line in lines[:3])


def test_a_runs_pictures_go_into_its_folder_with_its_updates(run, capsys):
    assert visualize.main(["reconstruction", str(run), "--count", "2", "--device", "cpu"]) == 0
    assert_opens(run / "figures" / "reconstruction.png")
    board = EventAccumulator(str(run / "figures"))
    board.Reload()
    (image,) = board.Images("figures/reconstruction")
    assert image.step == 10
    assert str(run / "figures" / "reconstruction.svg") in capsys.readouterr().out


def test_the_relations_of_runs_are_drawn_from_their_folders(run, here):
    assert visualize.main(["relations", str(run), str(run), "--output", "r.pdf", "r.png", "--no_tensorboard"]) == 0
    assert_opens(here / "r.pdf")
    assert_opens(here / "r.png")
    read = read_run(run)
    figure = relations.relations([run])
    panels = {axis.get_title(): axis.lines[0].get_ydata() for axis in figure.axes}
    assert list(panels["reconstruction loss"]) == [record["train_reconstruction"] for record in read.epochs]
    weighted = [0.01 * record["train_neighbor"] for record in read.epochs]
    assert list(panels["weight x neighbour term"]) == pytest.approx(weighted)


def test_a_relation_is_named_by_what_tells_it_apart(run):
    read = read_run(run)
    assert relations.describe_relation(read) == "off diagonal, weight 0.01"
    assert relations.make_labels([read, read])[0] == "off diagonal, weight 0.01 (digits)"
    changed = {"relation": "token_off_diagonal", "companion": "random", "normalize": "feature"}
    term = read.options["terms"]["neighbor"] | changed
    other = type(read)(**{**vars(read), "options": {**read.options, "terms": {"neighbor": term}}})
    assert relations.describe_relation(other) == "token off diagonal, random mask, by feature, weight 0.01"
    without = type(read)(**{**vars(read), "options": {**read.options, "method": "mae", "terms": {}}})
    assert relations.describe_relation(without) == "no neighbour term (mae)"


def test_the_same_figure_is_the_same_file(here):
    words = ["closeup", SMALL, "--input_size", "64", "--no_tensorboard", "--output"]
    for name in ("one.svg", "other.svg"):
        assert visualize.main([*words, name]) == 0
    assert (here / "one.svg").read_bytes() == (here / "other.svg").read_bytes()


def test_the_house_style_does_not_depend_on_a_users_settings():
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "text.usetex": True}):
        with style.house_style():
            assert matplotlib.rcParams["font.size"] == 8 and not matplotlib.rcParams["text.usetex"]
        assert matplotlib.rcParams["font.size"] == 30


def test_every_script_of_a_figure_draws_a_picture_that_exists():
    scripts = sorted((PROJECT / "scripts").glob("figure?.sh"))
    assert [path.stem for path in scripts] == [f"figure{number}" for number in (1, 2, 3, 4, 6, 7, 8, 9)]
    for path in scripts:
        (picture,) = re.findall(r'figure\.sh" (\w+)', path.read_text())
        assert picture in {*visualize.PICTURES, "similarity", "relations", "figure9"}
        assert path.stat().st_mode & 0o100


@pytest.mark.parametrize(
    ("words", "models"), [("", "mae_vit_tiny_patch4 "), ("--seed 1", "mae_vit_tiny_patch4 "), ("a b", "")]
)
def test_figure_8_is_of_patches_of_4_pixels_unless_models_are_named(words, models, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    python.chmod(0o755)
    script = ["bash", str(PROJECT / "scripts" / "figure8.sh"), *words.split()]
    told = subprocess.run(script, env=os.environ | {"NOR_MAE_PYTHON": str(python)}, capture_output=True, text=True)
    assert told.stdout.strip().endswith(f"visualize separation {models}{words}".strip())


# ---- models ---------------------------------------------------------------------------------------------------------


def test_a_model_by_name_is_the_fresh_one_of_its_seed(offline):
    shown = models.load("mae_vit_tiny_patch16", seed=3, device="cpu", input_size=(64, 96))
    torch.manual_seed(3)
    expected = methods.build("mae", "mae_vit_tiny_patch16", input_size=(64, 96))
    assert shown.size == (3, 64, 96) and shown.grid == (4, 6)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, shown.model.state_dict()[name])
    assert shown.about == "random weights, seed 3"


def test_a_timm_model_has_random_weights_its_own_statistics_and_any_input_size(offline):
    shown = models.load("vit_tiny_patch16_224.augreg_in21k", device="cpu", input_size=(64, 64))
    assert shown.statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert shown.grid == (4, 4)
    assert "random weights" in shown.about


def test_weights_of_a_file_are_taken_with_their_decoders_depth(tmp_path):
    torch.manual_seed(5)
    trained = methods.build("mae", "mae_vit_tiny_patch16", decoder_depth=2)
    torch.save({"model": trained.state_dict()}, tmp_path / "mae.pth")
    shown = models.load(f"mae_vit_tiny_patch16={tmp_path / 'mae.pth'}", device="cpu")
    assert len(shown.model.decoder_blocks) == 2 and shown.decoder_trained
    assert all(torch.equal(value, shown.model.state_dict()[name]) for name, value in trained.state_dict().items())
    assert shown.about == "weights of mae.pth, 12 heads"
    encoder = {name: value for name, value in trained.state_dict().items() if not name.startswith("decoder")}
    torch.save(encoder, tmp_path / "encoder.pth")
    for name in ("mae_vit_tiny_patch16", "vit_tiny_patch16_224"):
        shown = models.load(f"{name}={tmp_path / 'encoder.pth'}", device="cpu")
        weight = shown.model.blocks[3].mlp.fc1.weight
        assert torch.equal(weight, trained.blocks[3].mlp.fc1.weight)
    assert not models.load(f"mae_vit_tiny_patch16={tmp_path / 'encoder.pth'}", device="cpu").decoder_trained


def test_a_checkpoint_is_named_after_its_run(run):
    assert models.load(str(run), device="cpu").label == "digits"
    kept = models.load(str(run / "checkpoints" / "epoch-0002.pth"), device="cpu")
    assert kept.label == "digits (epoch-0002.pth)"
    assert kept.about == "nor_mae, mae_vit_tiny_patch2, 10 updates"


def test_a_fine_tuned_classifier_shows_its_encoder_and_cannot_reconstruct(run, tmp_path, capsys):
    words = RUN[: RUN.index("--decoder_embed_dim")] + RUN[RUN.index("--input_size") : RUN.index("--norm_pix_loss")]
    words += (
        "--data_path digits --epochs 1 --warmup_epochs 0 --batch_size 256 --num_workers 0 --device cpu --aa=".split()
    )
    folder = tmp_path / "tuned"
    assert (
        main_finetune.main([*words, "--init_from", str(run / "checkpoints/last.pth"), "--output_dir", str(folder)]) == 0
    )
    shown = models.load(str(folder), device="cpu")
    assert shown.label == "tuned" and shown.about.startswith("classifier, mae_vit_tiny_patch2, ")
    pixels, _ = subject.read_images(subject.open_images([], [shown])[0], shown.size, [0, 1])
    assert collapse.measure(shown, pixels)[1][0] > 1
    assert visualize.main(["reconstruction", str(folder), "--output", str(tmp_path / "x.png")]) == 2
    assert "without a decoder" in capsys.readouterr().err
    assert visualize.main(["relations", str(folder)]) == 2
    assert "no finished epoch of pretraining in tuned" in capsys.readouterr().err


# ---- images ---------------------------------------------------------------------------------------------------------


def test_without_paths_a_runs_held_out_images_are_shown_and_else_the_photos(run, caplog):
    of_run, fresh = models.load(str(run), device="cpu"), models.load(SMALL, device="cpu")
    source, listed = subject.open_images([], [of_run])
    assert len(source) == 445 and not listed
    source, listed = subject.open_images([], [fresh])
    assert list(source.names) == ["china.jpg", "flower.jpg"] and listed
    assert source.read(0).shape == (427, 640, 3)
    source, _ = subject.open_images(["photos"], [of_run])
    assert source.read(1).shape == (427, 640, 1)
    of_run.origin.options["dataset"], of_run.origin.options["data_path"] = "folder", "/gone"
    assert list(subject.open_images([], [of_run])[0].names) == ["china.jpg", "flower.jpg"]
    assert "showing scikit-learn's photos instead" in caplog.text


def test_listed_files_are_all_shown_in_order_and_a_folders_are_drawn_by_the_seed(tmp_path):
    paths = []
    for number in range(9):
        paths.append(str(tmp_path / f"{8 - number}.png"))
        Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8)).save(paths[-1])
    shown = models.load(SMALL, device="cpu")
    source, listed = subject.open_images(paths, [shown])
    pixels, names = subject.read_images(source, (3, 8, 8), subject.chosen(source, None, 0))
    assert listed and names == paths and pixels[:, 0, 0, 0].tolist() == list(range(0, 90, 10))
    source, listed = subject.open_images([str(tmp_path)], [shown])
    first, again, other = (subject.chosen(source, 4, seed) for seed in (1, 1, 2))
    assert not listed and first == again != other and len(set(first)) == 4
    assert subject.chosen(source, 100, 0) == list(range(9))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["neighbors", "{tmp}/nothing"], "does not exist"),
        (["neighbors", "{tmp}"], "contains no checkpoint"),
        (["neighbors", "{tmp}/other.pth"], "mae_vit_base_patch16={tmp}/other.pth"),
        (["neighbors", "vit_tiny_patch16_225"], "did you mean 'vit_tiny_patch16_224'?"),
        (["neighbors", "mae_vit_mini_patch16"], "unknown model"),
        (["neighbors", "vit_tiny_patch16_224", "--input_size", "100"], "do not fill images of 100 x 100"),
        (["neighbors", "resnet18"], "is a ResNet; these pictures are of plain vision transformers"),
        (["neighbors", "{run}", "{run}"], "this figure shows one model; found digits, digits"),
        (["similarity", "{run}", "{run}"], "the histogram shows one model"),
        (["separation", "{run}", SMALL], "digits 1 x 8 x 8, mae_vit_tiny_patch16 3 x 224 x 224"),
        (["separation", *["{run}"] * 5], "5 models do not fit side by side; at most 4"),
        (["neighbors", "{run}", "--images", "{tmp}/none"], "does not exist"),
        (["neighbors", "{run}", "--images", "{tmp}/other.pth", "{tmp}"], "takes image files, or one folder"),
        (["neighbors", "{run}", "--mask_ratio", "0.999"], "leaves"),
        (["reconstruction", "{run}", "--mask_ratio", "1.5"], "--mask_ratio: must be more than 0 and less than 1"),
        (["neighbors", "{run}", "--output", "{tmp}/x.bmp"], "a figure is written as .png, .svg, .pdf"),
        (["relations", "{tmp}"], "not a run folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_message(run, tmp_path, capsys, words, message):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "other.pth")
    words = [word.format(tmp=tmp_path, run=run) for word in words]
    assert visualize.main(words) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count: must be at least 1, found 0"),
        (["--input_size", "8xx"], "--input_size: expected"),
        (["--similarity", "colour"], "--similarity: invalid choice: 'colour'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(words, message, capsys):
    try:
        assert visualize.main(["neighbors", "no-such-model", *words]) == 2
    except SystemExit:  # argparse
        pass
    assert message in capsys.readouterr().err
