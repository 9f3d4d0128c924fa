"""tools.predict: masks and class tables compared with the evaluation of the programs, and invalid input."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import models_classifier
import models_upernet
from data.images import HEIF, HEIF_EXTRA, SUFFIXES, Pair, classifier_crop_share, eval_transform, read_image
from data.loader import EvalSamples, pixel_statistics
from data.segment_augment import eval_transform as pair_transform
from data.sources import Source
from data.splits import CLASSES
from engine_segment import make_windows, predicted_masks
from options import FinetuneOptions, SegmentOptions, to_dict
from tests.test_masks import tag
from tools import export, predict
from util import checkpoint
from util.overlay import colours

NAMES = ["sky", "grass", "a cat"]
SIZES = dict(model="mae_vit_tiny_patch4", embed_dim=24, depth=2, num_heads=2, in_chans=3)


def save(folder, model, options):
    mean, std = pixel_statistics(options.in_chans)
    state = {"format": checkpoint.FORMAT, "model": model.state_dict(), "step": 1}
    state["options"] = to_dict(options) | {"mean": list(mean), "std": list(std)}
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint.save(folder / "checkpoints" / "last.pth", state)
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in NAMES))
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    torch.manual_seed(0)
    options = SegmentOptions(**SIZES, input_size=(16, 16), num_classes=3, batch_size=2, short_side=16)
    model = models_upernet.from_options(to_dict(options), 3).eval()
    torch.nn.init.normal_(model.decode.classify.weight)  # with small weights, one class would win everywhere
    return save(tmp_path_factory.mktemp("runs") / "segmenter", model, options), model, options


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    options = FinetuneOptions(**SIZES, input_size=(16, 24), num_classes=3)
    sizes = {name: getattr(options, name) for name in (*SIZES, "input_size", "global_pool")}
    model = models_classifier.build(num_classes=3, **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    return save(tmp_path_factory.mktemp("runs") / "classifier", model, options), model


@pytest.fixture
def photos(tmp_path):
    """Create images of several sizes and kinds in nested folders, an invalid one, and one with EXIF orientation."""
    drawn = np.random.default_rng(0)
    for name, size in (("a.png", (20, 30)), ("deep/b.jpg", (40, 18)), ("deep/c.png", (16, 16))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    tag(tmp_path / "photos" / "deep" / "b.jpg", 6)
    (tmp_path / "photos" / "broken.jpg").write_text("not an image")
    return tmp_path / "photos"


def run_tool(*words):
    return predict.main(["--device", "cpu", *map(str, words)])


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_masks_are_those_of_the_programs_evaluation(segmenter, photos, tmp_path, capsys):
    folder, model, options = segmenter
    assert run_tool(folder, photos, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "3 images: masks/ and overlays/ of 3 classes" in said and "1 could not be read" in said
    files = {"a": photos / "a.png", "deep/b": photos / "deep/b.jpg", "deep/c": photos / "deep/c.png"}
    images = [read_image(str(path)) for path in files.values()]

    def read(number):
        return Pair(images[number], np.zeros(images[number].shape[:2], np.int16))

    mean, std = pixel_statistics(3)
    samples = EvalSamples(Source(list(files), read), pair_transform(16), mean=mean, std=std)
    made = predicted_masks(model, samples, range(3), windows=make_windows(options, 4), device=torch.device("cpu"),
                           autocast=torch.no_grad)  # fmt: skip
    for stem, image_HWC, (_, _, expected) in zip(files, images, made, strict=True):
        with Image.open(tmp_path / "out" / "masks" / f"{stem}.png") as mask:
            assert mask.mode == "P" and np.array_equal(np.asarray(mask), expected.numpy())
            assert mask.size == image_HWC.shape[1::-1] and len(np.unique(expected)) > 1
            assert np.array_equal(np.asarray(mask.convert("RGB")), colours(3)[expected].numpy())
        with Image.open(tmp_path / "out" / "overlays" / f"{stem}.png") as drawn:
            mixed = 0.4 * image_HWC + 0.6 * colours(3)[expected].numpy()
            assert np.abs(np.asarray(drawn) - mixed).max() <= 1
    with Image.open(tmp_path / "out/masks/deep/b.png") as mask:
        assert mask.size == (40, 18), "as viewers show the photograph, which is stored as 18 x 40"
    rows = read_table(tmp_path / "out" / "classes.csv")
    assert [row[:2] for row in rows] == [["number", "class"], ["0", "sky"], ["1", "grass"], ["2", "a cat"]]
    assert rows[1][2] == "#{:02x}{:02x}{:02x}".format(*colours(3)[0].tolist())
    assert (tmp_path / "out" / "bad_images.txt").read_text().startswith(str(photos / "broken.jpg"))


def test_classes_are_those_of_the_model(classifier, photos, tmp_path, capsys):
    folder, model = classifier
    assert run_tool(folder, photos / "deep", photos / "a.png", "--output", tmp_path / "out") == 0
    header, *rows = read_table(tmp_path / "out" / "predictions.csv")
    assert header == ["file", "predicted", "probability", *NAMES] and [row[0] for row in rows] == [
        "b.jpg",
        "c.png",
        "a.png",
    ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    transform = eval_transform((16, 24), classifier_crop_share((16, 24)))
    for row, name in zip(rows, ("deep/b.jpg", "deep/c.png", "a.png"), strict=True):
        image = (transform(read_image(str(photos / name))) / 255 - mean) / std
        with torch.no_grad():
            shares = model(image[None]).softmax(dim=1)[0]
        np.testing.assert_allclose([float(value) for value in row[3:]], shares.numpy(), atol=2e-6)
        assert row[1] == NAMES[int(shares.argmax())] and float(row[2]) == pytest.approx(float(shares.max()), abs=1e-6)


def test_files_that_are_left_out_are_logged(classifier, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.images.SUFFIXES", SUFFIXES - {*HEIF})  # as without the optional package
    for name in ("b.heic", "deep/c.HEIC", "notes.txt"):
        (photos / name).write_text("")
    assert run_tool(classifier[0], photos, "--output", tmp_path / "out") == 0
    logged = capsys.readouterr().err
    assert f"{photos}: left out: 3 files that are not images (2 .heic, 1 .txt)" in logged
    assert f"{photos}: 2 {HEIF_EXTRA}" in logged
    assert run_tool(classifier[0], photos / "b.heic", "--output", tmp_path / "out2") == 2
    assert f"b.heic is not named like an image (.jpg .png .tif .npy ...). {HEIF_EXTRA}" in capsys.readouterr().err


def test_a_classifier_distinguishes_images_by_their_suffix(classifier, segmenter, tmp_path, capsys):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    assert run_tool(classifier[0], tmp_path, "--output", tmp_path / "out") == 0
    assert [row[0] for row in read_table(tmp_path / "out" / "predictions.csv")] == ["file", "a.jpg", "a.png"]
    assert run_tool(segmenter[0], tmp_path, "--output", tmp_path / "out2") == 2
    assert f"{tmp_path}/a.jpg and {tmp_path}/a.png would both be written as a: give" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    Image.new("RGB", (24, 16)).save(tmp_path / "other" / "a.png")
    words = [classifier[0], tmp_path / "a.png", tmp_path / "a.png", tmp_path / "other"]
    assert run_tool(*words, "--output", tmp_path / "out3") == 2
    assert "would both be written as a.png: give them in two commands" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_reason_of_each_unreadable_image_is_listed(classifier, segmenter, photos, tmp_path, num_workers):
    (photos / "empty.png").write_text("")
    np.save(photos / "wide.npy", np.zeros((4, 5, 7), np.uint8))
    np.save(photos / "endless.npy", np.full((4, 5, 3), np.inf, np.float32))
    for folder in (classifier[0], segmenter[0]):
        out = tmp_path / folder.name
        # A batch of one image, so that some batches hold no readable image.
        words = ["--output", out, "--num_workers", num_workers, "--batch_size", 1]
        assert run_tool(folder, photos, *words) == 0
        found = dict(line.split("\t") for line in (out / "bad_images.txt").read_text().splitlines())
        told = {
            "broken.jpg": "not an image of a known format",
            "empty.png": "the file is empty",
            "endless.npy": "floats, and no sampled file holds any: give --value_range LOW HIGH",
            "wide.npy": "an array of shape [4, 5, 7] where [H, W, 3] is needed (--in_chans 7?)",
        }
        assert found == {str(photos / name): reason for name, reason in told.items()}


def test_the_heads_of_another_programs_classifier_can_be_given(segmenter, tmp_path, capsys):
    """Grey images, which the weights determine."""
    torch.manual_seed(0)
    sizes = SIZES | {"in_chans": 1, "num_heads": 3}
    model = models_classifier.build(num_classes=3, input_size=(16, 16), global_pool="token", **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    words = [tmp_path / "model.safetensors", tmp_path / "a.png", "--output", tmp_path / "out"]
    assert run_tool(*words) == 2
    assert "--num_heads" in capsys.readouterr().err
    assert run_tool(*words, "--num_heads", 3) == 0
    (mean,), (std,) = pixel_statistics(1)
    with torch.no_grad():
        shares = model((torch.tensor(pixels)[None, None] / 255 - mean) / std).softmax(dim=1)[0]
    found = read_table(tmp_path / "out" / "predictions.csv")[1]
    np.testing.assert_allclose([float(value) for value in found[3:]], shares.numpy(), atol=2e-6)
    assert run_tool(segmenter[0], tmp_path / "a.png", "--num_heads", 3) == 2
    assert "num_heads does not apply to a segmenter" in capsys.readouterr().err


def test_the_default_folder_is_the_runs_and_files_are_not_overwritten(classifier, photos, capsys):
    folder, _ = classifier
    assert run_tool(folder, photos / "a.png") == 0
    assert (folder / "predictions" / "predictions.csv").is_file()
    assert run_tool(folder, photos / "a.png") == 2
    assert "is not empty; name a new folder with --output" in capsys.readouterr().err


def test_more_bits_are_scaled_as_in_training(tmp_path, segmenter, capsys):
    """A darker 16-bit image, which alone would have another range."""
    _, model, options = segmenter
    folder = save(tmp_path / "run", model, replace(options, value_range=(0, 4095)))
    values = np.random.default_rng(0).integers(0, 900, (20, 20)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(np.repeat(read_image(str(tmp_path / "deep.png"), 3, (0, 4095)), 1, -1)).save(tmp_path / "eight.png")
    for name in ("deep", "eight"):
        assert run_tool(folder, tmp_path / f"{name}.png", "--output", tmp_path / name) == 0
    found = [np.asarray(Image.open(tmp_path / name / "masks" / f"{name}.png")) for name in ("deep", "eight")]
    assert np.array_equal(*found)


def test_what_cannot_be_predicted_is_refused(tmp_path, classifier, segmenter, photos, capsys):
    headless = models_classifier.build(num_classes=0, input_size=(16, 16), **SIZES)
    encoder = save(tmp_path / "encoder", headless, FinetuneOptions(**SIZES, input_size=(16, 16)))
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 9)).save(other / "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.jpg").write_text("no image")
    cases = [
        ([encoder, photos], "is an encoder without a classification head: fine-tune it first"),
        ([classifier[0], tmp_path / "nothing"], "nothing does not exist"),
        ([classifier[0], tmp_path / "empty"], "no images in"),
        ([classifier[0], segmenter[0] / CLASSES], "is not named like an image"),
        ([segmenter[0], photos, other], "would both be written as a: give them in two commands"),
        ([segmenter[0], tmp_path / "text"], "not one of 1 images can be read"),
        ([classifier[0], tmp_path / "text"], "not one of 1 images can be read"),
        ([classifier[0], photos, "--batch_size", "0"], "batch_size: must be at least 1"),
        ([tmp_path / "nowhere", photos], "nowhere: it does not exist"),
        ([classifier[0], photos, "--device", "cuda:99"], "has no GPU 99"),
    ]
    for number, (words, told) in enumerate(cases):
        assert run_tool(*words, "--output", tmp_path / f"out{number}") == 2, words
        assert told in capsys.readouterr().err


def test_masks_of_many_classes_have_sixteen_bits(tmp_path):
    mask = torch.tensor([[0, 299], [256, 3]])
    predict.write_mask(mask, 300, tmp_path / "a" / "m.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / "m.png")), mask.numpy())


# ---- export


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_an_exported_segmenter_has_the_models_logits_and_loads_in_five_lines(segmenter, tmp_path, name, capsys):
    if name == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    folder, model, _ = segmenter
    assert export.main([name, str(folder), "--output", str(tmp_path / "out")]) == 0
    assert "a segmenter of 3 classes, images of 3 x 16 x 16" in capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["classes"] == NAMES and about["largest_difference"] < 1e-4
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 6
    found = {"pixels": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    exec(code.replace("FOLDER", str(tmp_path / "out")), found)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    with torch.no_grad():
        logits, _ = model((found["pixels"] / 255 - mean) / std)
    expected = torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear").argmax(dim=1)
    assert (found["classes"] == expected).float().mean() > 0.999, "but for ties"


def test_formats_that_hold_no_segmenter_are_refused(segmenter, classifier, tmp_path, capsys):
    cases = [
        (["timm", segmenter[0]], "is a segmenter, and timm holds encoders and classifiers; .* to onnx or torch"),
        (["torch", classifier[0]], "is not a segmenter; torch is a format of segmenters"),
        (["torch", segmenter[0], "--input_size", "32"], "do not apply to a segmenter"),
    ]
    for words, told in cases:
        assert export.main([*map(str, words), "--output", str(tmp_path / "out")]) == 2
        assert re.search(told, capsys.readouterr().err) and not (tmp_path / "out").exists()
