"""`load_encoder`: pooled features of a run, a checkpoint and an export, the same as those of `tools.embed`."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
import main_finetune
import main_pretrain
import methods
from data.loader import pixel_statistics
from tools import embed, encoder, export
from tools.encoder import load_encoder

MODEL = "--model mae_vit_tiny_patch4 --embed_dim 24 --depth 2 --num_heads 3 --input_size 16x24".split()
DECODER = "--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --method mae".split()
RUN = "--total_batch_size 4 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Create six images in folders of two classes; one has the encoder's size."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(6):
        for split in ("train", "val"):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (16, 24) if number == 0 else (30, 40)
            Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    assert main_pretrain.main([*MODEL, *DECODER, *RUN, "--data_path", str(photos), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, photos, run):
    folder = tmp_path_factory.mktemp("runs") / "finetuned"
    words = ["--init_from", run / "checkpoints/last.pth", "--data_path", photos, "--output_dir", folder, "--mixup", "0"]
    assert main_finetune.main([*RUN, *map(str, words), "--cutmix", "0", "--eval_crop", "mae"]) == 0
    return folder


def features(path, photos, **options):
    """Return pooled features of the training images in the order of their names."""
    model, transform = load_encoder(path, **options)
    files = sorted((photos / "train").rglob("*.png"))
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(file)) for file in files]))


@pytest.mark.parametrize("which", ["run", "classifier"])
def test_the_features_are_those_of_embed(which, photos, tmp_path, request):
    folder = request.getfixturevalue(which)
    assert embed.main([str(folder), str(photos), "--output", str(tmp_path / "f.npz"), "--device", "cpu"]) == 0
    expected = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    torch.testing.assert_close(features(folder, photos), expected, rtol=0, atol=1e-6)


def test_the_features_are_the_mean_patch_token_after_the_norm(run, photos):
    """Compared with the run's model and a separate transform, on an image that needs no resizing."""
    image = np.random.default_rng(1).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pixel_statistics(3))
    by_hand = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    model, transform = load_encoder(run)
    torch.testing.assert_close(transform(image), by_hand)
    trained, _ = methods.from_checkpoint(run / "checkpoints/last.pth")
    with torch.inference_mode():
        expected = trained.encode(by_hand[None])[:, 1:].mean(dim=1)
        torch.testing.assert_close(model(by_hand[None]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["run", "classifier"])
def test_a_checkpoint_and_an_export_give_the_features_of_the_run(which, photos, tmp_path, request):
    folder = request.getfixturevalue(which)
    expected = features(folder, photos)
    assert torch.equal(features(folder / "checkpoints/last.pth", photos), expected)
    assert export.main(["timm", str(folder), "--output", str(tmp_path / "timm")]) == 0
    torch.testing.assert_close(features(tmp_path / "timm", photos), expected, rtol=0, atol=1e-5)
    other = features(folder, photos, input_size=32)
    torch.testing.assert_close(features(tmp_path / "timm", photos, input_size=32), other, rtol=0, atol=1e-5)


def test_the_transform_reads_files_and_arrays_and_can_be_pickled(run, photos):
    _, transform = load_encoder(str(run))
    file = next((photos / "train").rglob("*.png"))
    pixels = transform(Image.open(file))
    assert pixels.shape == (3, 16, 24) and pixels.dtype == torch.float32
    for same in (transform(file), transform(str(file)), transform(np.asarray(Image.open(file)))):
        assert torch.equal(same, pixels)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(file), pixels)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_encoder(tmp_path / "nothing")
    (tmp_path / "export.json").write_text(json.dumps({"format": "onnx"}))
    with pytest.raises(ValueError, match="export for onnx"):
        load_encoder(tmp_path)
    model = methods.build("mae", input_size=32, depth=1, decoder_depth=1)  # 192 channels: 3 or 12 heads
    torch.save({"model": model.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="num_heads"):
        load_encoder(tmp_path / "other.pth")
    assert load_encoder(tmp_path / "other.pth", num_heads=12)[0].blocks[0].attn.num_heads == 12


def test_torch_hub_loads_it_from_a_checkout(run):
    project = str(encoder.__file__).removesuffix("tools/encoder.py")
    model, transform = torch.hub.load(project, "load_encoder", str(run), source="local")
    assert model(transform(Image.new("RGB", (50, 40)))[None]).shape == (1, 24)


def test_torch_hub_builds_a_method_as_documented():
    command = next(line for line in hubconf.__doc__.splitlines() if '"build"' in line)
    names = {"torch": torch, "CHECKOUT": str(encoder.__file__).removesuffix("tools/encoder.py")}
    exec(command, names)
    model = names["model"]
    assert list(model.loss_terms) == ["neighbor"]
    assert (model.embed_dim, model.patch_size, model.input_size) == (192, 16, (224, 224))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Return a folder of 12-bit images, and a run that was trained on them with a value range."""
    folder = tmp_path_factory.mktemp("deep")
    random = np.random.default_rng(0)
    for number in range(6):
        path = folder / "images" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (16, 24) if number == 0 else (30, 40)
        Image.fromarray(random.integers(0, 4096, size, dtype=np.uint16)).save(path)
    words = [*MODEL, *DECODER, *RUN, "--in_chans", "1", "--value_range", "0", "4095"]
    words += ["--data_path", str(folder / "images"), "--output_dir", str(folder / "run")]
    assert main_pretrain.main(words) == 0
    return folder / "images", folder / "run"


@pytest.mark.parametrize("given", ["a path", "a picture", "an array"])
def test_images_of_more_than_8_bits_are_scaled_as_in_training(deep, given, tmp_path):
    photos, run = deep
    assert embed.main([str(run), str(photos), "--output", str(tmp_path / "f.npz"), "--device", "cpu"]) == 0
    expected = torch.from_numpy(np.load(tmp_path / "f.npz")["features"])
    assert export.main(["timm", str(run), "--output", str(tmp_path / "timm")]) == 0
    assert json.loads((tmp_path / "timm" / "export.json").read_text())["input"]["value_range"] == [0, 4095]
    assert "0 to 4095 of others, scaled to 0 to 1" in (tmp_path / "timm" / "README.md").read_text()
    opened = {"a path": str, "a picture": Image.open, "an array": lambda file: np.asarray(Image.open(file))}[given]
    for path in (run, tmp_path / "timm"):
        model, transform = load_encoder(path)
        files = sorted((photos / "train").rglob("*.png"))
        with torch.inference_mode():
            found = model(torch.stack([transform(opened(file)) for file in files]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
