"""Features of a folder: equal to the encoder's, one for each readable image, with the right name."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

import methods
import models_classifier
from data.loader import pixel_statistics
from data.splits import CLASSES
from options import FinetuneOptions, to_dict
from tools import embed
from util import checkpoint

SIZES = dict(model="mae_vit_tiny_patch4", embed_dim=24, depth=1, num_heads=2)


def save(file, model, options):
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"format": checkpoint.FORMAT, "model": model.state_dict(), "options": to_dict(options), "step": 1}
    checkpoint.save(file, state)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return (run folder, its masked autoencoder)."""
    torch.manual_seed(0)
    options = methods.schema("mae")(
        **SIZES, input_size=(16, 24), decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, method="mae",
        total_batch_size=8,
    )  # fmt: skip
    model = methods.from_options(to_dict(options)).eval()
    folder = tmp_path_factory.mktemp("runs") / "run"
    save(folder / "checkpoints" / "last.pth", model, options)
    return folder, model


@pytest.fixture
def photos(tmp_path):
    """Create a folder with the classes ants and bees; one of five files is not an image."""
    shades = np.random.default_rng(0)
    for name in ("ant/a.png", "ant/b.png", "bee/c.png", "bee/ü.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shades.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(file)
    (tmp_path / "photos" / "ant" / "aa.jpg").write_text("not an image")
    return tmp_path / "photos"


def pixels(path):
    """Return the normalised pixels of a file that has the input size."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    return (torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1) / 255 - mean) / std


def run_tool(*words):
    return embed.main([*map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_image_has_the_average_of_its_patch_tokens_beside_its_name(run, photos, capsys, batch_size):
    folder, model = run
    assert run_tool(folder, photos, "--batch_size", batch_size) == 0
    assert "4 images, 1 could not be read; 24 values each" in capsys.readouterr().out
    found = np.load(folder / "features.npz")
    assert found["names"].tolist() == ["ant/a.png", "ant/b.png", "bee/c.png", "bee/ü.png"]
    assert found["labels"].tolist() == [0, 0, 1, 1] and found["classes"].tolist() == ["ant", "bee"]
    for name, features in zip(found["names"], found["features"], strict=True):
        with torch.no_grad():
            tokens = model.encode(pixels(photos / name)[None])
        np.testing.assert_allclose(features, tokens[0, 1:].mean(dim=0), atol=1e-5)


def test_eval_crop_is_the_runs_or_the_one_given(run, photos, tmp_path, capsys):
    assert run_tool(run[0], photos, "--output", tmp_path / "kept.npz") == 0
    assert "eval_crop keep_size" in capsys.readouterr().out
    assert run_tool(run[0], photos, "--output", tmp_path / "mae.npz", "--eval_crop", "mae") == 0
    assert "eval_crop mae: resized to cover 18 x 27, centre crop 16 x 24\n" in capsys.readouterr().out
    kept, cropped = (np.load(tmp_path / name)["features"] for name in ("kept.npz", "mae.npz"))
    image = torch.tensor(np.asarray(Image.open(photos / "ant" / "a.png"))).permute(2, 0, 1)
    inner = F.resize(image, [18, 27], interpolation=F.InterpolationMode.BICUBIC, antialias=True)[:, 1:17, 2:26]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    with torch.no_grad():
        expected = run[1].encode(((inner / 255 - mean) / std)[None])[0, 1:].mean(dim=0)
    np.testing.assert_allclose(cropped[0], expected, atol=1e-4)
    assert abs(kept[0] - cropped[0]).max() > 1e-2


def test_a_flat_folder_has_no_labels_and_another_size_is_resized_to(run, photos, tmp_path):
    assert run_tool(run[0], photos / "bee", "--output", tmp_path / "new" / "bees.npz", "--input_size", 32) == 0
    found = np.load(tmp_path / "new" / "bees.npz")
    assert set(found) == {"features", "names"} and found["features"].shape == (2, 24)


def test_a_classifier_also_tells_its_logits(photos, tmp_path):
    torch.manual_seed(0)
    options = FinetuneOptions(**SIZES, input_size=(16, 24), num_classes=3, total_batch_size=8)
    model = models_classifier.build(**SIZES, input_size=(16, 24), num_classes=3).eval()
    save(tmp_path / "run" / "checkpoints" / "best.pth", model, options)
    (tmp_path / "run" / CLASSES).write_text("x\ny\nz\n")
    assert run_tool(tmp_path / "run" / "checkpoints" / "best.pth", photos) == 0
    found = np.load(tmp_path / "run" / "features.npz")
    with torch.no_grad():
        expected = model(pixels(photos / "ant" / "b.png")[None])
    np.testing.assert_allclose(found["logits"][1], expected[0], atol=1e-5)
    assert found["logit_classes"].tolist() == ["x", "y", "z"] and found["features"].shape == (4, 24)


@pytest.fixture
def splits(tmp_path, photos):
    """Create training images of ants, bees and wasps, and validation images of bees and wasps."""
    for split, names in {"train": ("ant", "bee", "wasp"), "val": ("bee", "wasp")}.items():
        for name in names:
            shutil.copytree(photos / "bee", tmp_path / "splits" / split / name)
    return tmp_path / "splits"


def save_classifier(folder, classes):
    torch.manual_seed(0)
    options = FinetuneOptions(**SIZES, input_size=(16, 24), num_classes=len(classes), total_batch_size=8)
    model = models_classifier.build(**SIZES, input_size=(16, 24), num_classes=len(classes))
    save(folder / "checkpoints" / "last.pth", model, options)
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    return folder


def labels_of(model, images, split, file):
    """Return the class name and the label of each image, and the names of the classes."""
    assert run_tool(model, images, "--split", split, "--output", file) == 0
    found = np.load(file)
    named = [(name.split("/")[0], label) for name, label in zip(found["names"], found["labels"].tolist(), strict=True)]
    return named, found["classes"].tolist()


def test_labels_of_a_classifier_are_the_indices_of_its_logits(splits, tmp_path):
    classes = ["wasp", "fly", "Bee", "ant"]
    model = save_classifier(tmp_path / "run", classes)
    for split in ("train", "val"):
        named, found = labels_of(model, splits, split, tmp_path / "e.npz")
        expected = {"wasp": 0, "bee": 2, "ant": 3}
        assert all(label == expected[name] for name, label in named) and len(named) == (6 if split == "train" else 4)
        assert found == classes == np.load(tmp_path / "e.npz")["logit_classes"].tolist()


def test_labels_of_both_splits_are_numbered_alike(run, splits, tmp_path, capsys):
    bird = save_classifier(tmp_path / "birds", ["bee", "swift"])
    for model in (run[0], bird):
        train, of_train = labels_of(model, splits, "train", tmp_path / "train.npz")
        val, of_val = labels_of(model, splits, "val", tmp_path / "val.npz")
        assert of_train == of_val == ["ant", "bee", "wasp"]
        assert dict(train) == {"ant": 0, "bee": 1, "wasp": 2} and dict(val) == {"bee": 1, "wasp": 2}
        told = "not the indices of the logits, do not compare them: the model has no class wasp (it has bee, swift)"
        assert (told in capsys.readouterr().err) == (model == bird)


@pytest.mark.parametrize("training", ["others", "unlabelled", "none"])
def test_labels_that_cannot_be_numbered_as_the_training_images_are_logged(run, splits, tmp_path, capsys, training):
    shutil.rmtree(splits / "train" / "wasp")
    if training == "unlabelled":
        shutil.rmtree(splits / "train" / "ant")
    elif training == "none":
        shutil.rmtree(splits / "train")
        (splits / "train").mkdir()
    named, found = labels_of(run[0], splits, "val", tmp_path / "val.npz")
    assert dict(named) == {"bee": 0, "wasp": 1} and found == ["bee", "wasp"]
    of_train = "the training images have no"
    reason = {"others": f"{of_train} class wasp", "unlabelled": f"{of_train} labels", "none": "no images in"}
    told = f"labels: not numbered as those of the training images, do not compare them: {reason[training]}"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/nothing", "{photos}"], "does not exist"),
        (["{tmp}", "{photos}"], "contains no checkpoint"),
        (["{run}", "{tmp}/nothing"], "does not exist"),
        (["{run}", "{photos}", "--split", "val"], "no val images"),
        (["{run}", "{photos}", "--output", "{tmp}/features.csv"], "must end in .npz"),
        (["{run}", "{photos}", "--batch_size", "0"], "batch_size: must be at least 1"),
        (["{run}", "{photos}", "--input_size", "18"], "do not fill"),
        (["{run}", "{empty}"], "no images"),
    ],
)
def test_bad_input_is_refused_with_a_message(run, photos, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "photos": photos, "run": run[0], "empty": tmp_path / "empty"}
    assert run_tool(*(word.format(**places) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))
