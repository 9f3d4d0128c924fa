"""Exports have the outputs of the trained model in every format, and mistakes in them are detected."""

import argparse
import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import methods
import models_classifier
from data.images import eval_transform
from data.splits import CLASSES
from options import FinetuneOptions, to_dict
from tests.small import NARROW, options_of, small, write_checkpoint
from tools import encoder as encoders
from tools import export
from util import checkpoint, extras

SIZES = dict(model="mae_vit_tiny_patch4", embed_dim=24, depth=2, num_heads=6)


def installed(name, *more):
    """Return the parameters of a format, skipped if its libraries are not installed."""
    missing = extras.missing_packages(*extras.EXPORT_PACKAGES[name])
    return pytest.param(name, *more, marks=pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"))


FORMATS = [installed(name) for name in export.FORMATS]
SETTLED = {
    "label": {"classes": 3},
    "teacher": {"embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_num_heads": 2},
}
"""Resolved options of the terms."""


def lively(model):
    """Scale the weights to the size of trained ones, so that every part of the model has an effect."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.endswith("pos_embed"):
                value.add_(0.3 * torch.randn(value.shape))
    return model.eval()


def save_run(folder, model, options, **state):
    """Write the run folder of a finished training."""
    (folder / "checkpoints").mkdir(parents=True)
    kept = {"format": checkpoint.FORMAT, "model": model.state_dict(), "options": to_dict(options), "step": 7}
    checkpoint.save(folder / "checkpoints" / "last.pth", kept | state)
    (folder / "environment.json").write_text(json.dumps([{"commit": "first"}, {"commit": "abc123"}]))
    return folder


SQUARES, RECTANGLES = "colour squares", "rectangles of 4 channels"
ON_RECTANGLES = pytest.mark.parametrize("source", [RECTANGLES])


@pytest.fixture(params=[SQUARES, RECTANGLES])
def source(request):
    return request.param


def pretrain(source, folder):
    """Return (run folder, trained model): a masked autoencoder with all terms."""
    torch.manual_seed(0)
    size, channels = {SQUARES: ((16, 16), 3), RECTANGLES: ((16, 24), 4)}[source]
    mean, std = tuple(0.1 * i + 0.1 for i in range(channels)), (0.3,) * channels
    options = methods.schema("mae")(
        **SIZES, input_size=size, in_chans=channels, mean=mean, std=std, norm_pix_loss=True, total_batch_size=32,
        decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, data_path="/home/me/photos", device="cpu",
        init_from="/home/me/weights/mae.pth", terms={"neighbor": {}},
    )  # fmt: skip
    model = lively(methods.from_options(to_dict(options)))
    return save_run(folder, model, options), model


def classifier(folder, pool, **more):
    """Return (run folder, trained classifier)."""
    torch.manual_seed(1)
    options = FinetuneOptions(**SIZES, input_size=(16, 16), num_classes=5, global_pool=pool, total_batch_size=8, aa="")
    model = models_classifier.build(**SIZES, num_classes=5, input_size=(16, 16), global_pool=pool)
    save_run(folder, lively(model), options, **more)
    (folder / CLASSES).write_text("ant\nbee\ncat\ndog\nelk\n")
    return folder, model


def images_for(shape, seed=3):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))


def run_tool(*words):
    return export.main([str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a cached function from a source to the result of `pretrain`."""
    return functools.cache(lambda source: pretrain(source, tmp_path_factory.mktemp("pretrained") / "run"))


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """Return a cached function from (source, format) to the folder of the exported encoder."""

    @functools.cache
    def folder(source, name):
        output = tmp_path_factory.mktemp("exported") / name
        assert run_tool(name, runs(source)[0], "--output", output) == 0
        return output

    return folder


@pytest.fixture
def pretrained(source, runs):
    return runs(source)


@pytest.fixture
def exported(source, exports):
    return functools.partial(exports, source)


# ---- round trips


@pytest.mark.parametrize(
    ("name", "source"),
    [
        installed("timm", SQUARES),
        installed("timm", RECTANGLES),
        installed("hf", SQUARES),
        installed("hf", RECTANGLES),
        installed("onnx", RECTANGLES),
    ],
)
def test_an_encoder_has_the_same_outputs_after_export(name, pretrained, exported):
    model = pretrained[1]
    images = images_for((model.in_chans, *model.patch_embed.img_size))
    with torch.no_grad():
        expected, found = model.encode(images), export.FORMATS[name].read(exported(name))(images)
    torch.testing.assert_close(found["tokens"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["features"], expected[:, 1:].mean(dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_the_features_of_methods_that_train_the_class_token_are_exported(name, tmp_path):
    model = small("dino")
    options = options_of("dino", model) | {"in_chans": 3, "mean": [], "std": [], "total_batch_size": 4}
    path = write_checkpoint(tmp_path / "dino.pth", model, options)
    assert run_tool(name, path, "--output", tmp_path / "out") == 0
    images = images_for((3, *model.patch_embed.img_size))
    with torch.no_grad():
        expected, found = model.eval().encode(images)[:, 0], export.FORMATS[name].read(tmp_path / "out")(images)
    torch.testing.assert_close(found["features"], expected, atol=1e-5, rtol=1e-5)
    if name == "hf":
        assert "features = tokens[:, 0]" in (tmp_path / "out" / "README.md").read_text()


@ON_RECTANGLES
@pytest.mark.parametrize("name", FORMATS)
def test_at_another_size_positions_are_resampled_as_for_fine_tuning(name, pretrained, tmp_path):
    folder, model = pretrained
    other = models_classifier.build(
        **SIZES, num_classes=0, input_size=(24, 32), in_chans=model.in_chans, global_pool="token"
    ).eval()
    weights, options = checkpoint.load_model(folder / "checkpoints" / "last.pth")
    models_classifier.load_encoder(other, weights, options)
    assert run_tool(name, folder, "--output", tmp_path / "out", "--input_size", "24x32") == 0
    images = images_for((model.in_chans, 24, 32))
    with torch.no_grad():
        expected, found = other.encode(images), export.FORMATS[name].read(tmp_path / "out")(images)
    torch.testing.assert_close(found["tokens"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "pool"),
    [installed("timm", "avg"), installed("timm", "token"), installed("hf", "token"), installed("onnx", "avg")],
)
def test_a_classifier_has_the_same_outputs_after_export(name, pool, tmp_path):
    folder, model = classifier(tmp_path / "run", pool)
    assert run_tool(name, folder) == 0
    images = images_for((3, 16, 16))
    with torch.no_grad():
        expected, found = model(images), export.FORMATS[name].read(folder / "export" / name)(images)
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-5)
    assert "ant, bee, cat, dog, elk" in (folder / "export" / name / "README.md").read_text()


@pytest.mark.parametrize("name", [installed("hf")])
def test_the_class_token_is_what_hugging_face_pools_of_a_classifier_at_every_load(name, tmp_path):
    import transformers

    folder, _ = classifier(tmp_path / "run", "token")
    assert run_tool(name, folder) == 0
    images = images_for((3, 16, 16))
    with torch.no_grad():
        class_token = encoders.load(folder).compute_outputs(images)["features"]
        for _ in range(2):
            loaded, report = transformers.AutoModel.from_pretrained(folder / "export" / name, output_loading_info=True)
            assert not report["missing_keys"]
            torch.testing.assert_close(loaded.eval()(images).pooler_output, class_token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [installed("hf")])
def test_hugging_face_is_refused_a_classifier_that_it_cannot_hold(name, tmp_path, capsys):
    folder, _ = classifier(tmp_path / "run", "avg")
    assert run_tool(name, folder) == 2
    assert "Export it for timm" in capsys.readouterr().err
    assert not list((folder / "export").iterdir())


def test_the_average_of_the_weights_is_what_leaves(tmp_path):
    average = lively(models_classifier.build(**SIZES, num_classes=5, input_size=(16, 16)))
    folder, model = classifier(tmp_path / "run", "avg", ema=average.state_dict())
    encoder = encoders.load(folder)
    assert torch.equal(encoder.model.head.weight, average.head.weight)
    assert not torch.equal(encoder.model.head.weight, model.head.weight)


def test_a_released_mae_gets_the_heads_of_its_width(tmp_path):
    """A file as released: MAE's names, a pickled Namespace besides the weights, no options of this project."""
    sizes = dict(embed_dim=384, depth=1, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = methods.build("mae", "mae_vit_small_patch16", **sizes, input_size=32).eval()
    file = tmp_path / "mae_pretrain.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="x"), "epoch": 3}, file)
    assert run_tool("timm", file, "--output", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["num_heads"] == 6
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_for((3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.encode(images)[:, 1:].mean(dim=1), atol=1e-5, rtol=0)
    assert "CC BY-NC 4.0" in (tmp_path / "out" / "README.md").read_text()


# ---- peculiarities of timm


def test_timm_gets_the_encoder_alone(pretrained, exported):
    """With a mask_token, timm would load the file as DINOv2; with decoder_*, its strict loading would fail."""
    model = pretrained[1]
    names = set(load_file(exported("timm") / "model.safetensors"))
    assert names == {name for name in model.state_dict() if not name.startswith(("decoder_", "mask_token", "terms."))}


def test_timm_gets_what_weights_do_not_show(pretrained, exported):
    model = pretrained[1]
    config = json.loads((exported("timm") / "config.json").read_text())
    channels = model.in_chans
    assert config["model_args"]["num_heads"] == 6
    assert config["pretrained_cfg"]["mean"] == pytest.approx([0.1 * i + 0.1 for i in range(channels)])
    assert config["pretrained_cfg"]["std"] == [0.3] * channels
    assert config["pretrained_cfg"]["crop_pct"] == 0.875 and config["pretrained_cfg"]["interpolation"] == "bicubic"
    assert config["pretrained_cfg"]["license"] == "other"
    assert config["pretrained_cfg"]["input_size"] == [channels, *model.patch_embed.img_size]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_timm_keeps_the_trained_norm_whatever_the_pooling(pretrained, exported, pool):
    model = pretrained[1]
    loaded = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True, global_pool=pool, num_classes=10)
    assert torch.equal(loaded.norm.weight, model.norm.weight) and isinstance(loaded.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_timm_loads_it_at_another_size(pretrained, exported, size):
    folder, model = pretrained
    loaded = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True, img_size=size).eval()
    again = methods.from_options(checkpoint.load(folder / "checkpoints" / "last.pth")["options"])
    again.load_state_dict(model.state_dict())
    again.set_input_size(size)
    images = images_for((model.in_chans, *size))
    with torch.no_grad():
        expected, found = again.eval().encode(images), loaded.forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# ---- the tool's own check


def test_a_wrong_head_count_in_timms_folder_is_noticed(pretrained, exported, tmp_path):
    folder = shutil.copytree(exported("timm"), tmp_path / "timm")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["num_heads"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(encoders.Mismatch, match="other tokens"):
        export.check(encoders.load(pretrained[0]), "timm", folder)


@ON_RECTANGLES
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_writer_gets_wrong_is_never_kept(name, pretrained, tmp_path, monkeypatch, capsys):
    """Each writer receives a model with half the number of heads."""
    right = export.FORMATS[name]

    def with_wrong_heads(encoder, folder):
        arguments = encoder.arguments | {"num_heads": 3}
        model = timm.create_model(encoder.architecture, **arguments).eval()
        model.load_state_dict(encoder.model.state_dict())
        right.write(replace(encoder, model=model, arguments=arguments), folder)

    monkeypatch.setitem(export.FORMATS, name, replace(right, write=with_wrong_heads))
    words = [name, pretrained[0], "--output", tmp_path / "out"]
    assert run_tool(*words) == 2
    assert "other tokens" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("earlier")
    assert run_tool(*words, "--overwrite") == 2
    assert [path.read_text() for path in tmp_path.rglob("*.*")] == ["earlier"]
    monkeypatch.setitem(export.FORMATS, name, right)
    assert run_tool(*words, "--overwrite") == 0
    assert json.loads((tmp_path / "out" / "export.json").read_text())["format"] == name


@ON_RECTANGLES
def test_options_with_another_head_count_than_the_run_built_are_noticed(pretrained, monkeypatch):
    monkeypatch.setattr(encoders, "attention_heads", lambda *anything, **more: 3)
    with pytest.raises(encoders.Mismatch, match="extracted from"):
        encoders.load(pretrained[0])


@ON_RECTANGLES
def test_nan_is_no_agreement(pretrained):
    encoder = encoders.load(pretrained[0])
    tokens = encoder.compute_outputs(encoder.probe())["tokens"]
    with pytest.raises(encoders.Mismatch, match="the difference is nan"):
        encoders.compare(encoder, {"tokens": torch.full_like(tokens, float("nan"))}, "it")


# ---- Hugging Face


def test_hugging_face_hands_on_the_class_token_and_prepares_images_as_evaluation_does(pretrained, exported):
    transformers = pytest.importorskip("transformers")
    folder, model = exported("hf"), pretrained[1]
    loaded, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = images_for((model.in_chans, *model.patch_embed.img_size))
    with torch.no_grad():
        found = loaded.eval()(images).pooler_output
        torch.testing.assert_close(found, model.encode(images)[:, 0], atol=1e-5, rtol=1e-5)
    if model.in_chans != 3:
        assert not (folder / "preprocessor_config.json").exists()
        return
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    prepare = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = prepare(picture, return_tensors="pt")["pixel_values"][0]
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(pixels, (eval_transform((16, 16))(picture) / 255 - mean) / 0.3, atol=1e-4, rtol=0)


def test_transformers_also_loads_timms_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, model = classifier(tmp_path / "run", "avg")
    assert run_tool("timm", folder) == 0
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder / "export" / "timm").eval()
    images = images_for((3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, model(images), atol=1e-5, rtol=1e-5)
    assert loaded.config.id2label[4] == "elk"


# ---- the facts in it


@ON_RECTANGLES
def test_the_facts_hold_what_a_user_must_know_and_nothing_of_the_machine(pretrained, tmp_path):
    folder, model = pretrained
    (folder / "knn.json").write_text(json.dumps({"accuracy": {"pretrained encoder": 42.5}, "protocol": "k = 20"}))
    assert run_tool("timm", folder, "--output", tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    height, width = model.patch_embed.img_size
    assert facts["model"]["num_heads"] == 6 and facts["model"]["features"].startswith("the average of the patch tokens")
    assert (facts["input"]["height"], facts["input"]["width"]) == (height, width)
    assert (
        facts["input"]["eval_crop"] == "keep_size"
        and facts["input"]["crop"] == 0.875
        and facts["input"]["std"] == [0.3] * model.in_chans
    )
    origin = facts["origin"]
    assert (origin["method"], origin["updates"], origin["images_seen"]) == ("nor_mae", 7, 7 * 32)
    assert origin["commit"] == "abc123"
    assert origin["options"]["norm_pix_loss"] is True and origin["options"]["init_from"] == "mae.pth"
    assert facts["largest_difference"]["tokens"] <= 1e-5
    text = (tmp_path / "out" / "README.md").read_text()
    assert "/home/me" not in text + json.dumps(facts) and "data_path" not in text
    for said in ("6 attention heads", f"{height} x {width} pixels", "abc123", "42.5", "neighbor", "Apache License 2.0"):
        assert said in text
    assert run_tool("timm", folder, "--input_size", f"{width}x{height}", "--output", tmp_path / "other") == 0
    assert "42.5" not in (tmp_path / "other" / "README.md").read_text()  # measured at the size of training


@ON_RECTANGLES
@pytest.mark.parametrize("name", [installed("onnx")])
def test_onnx_takes_any_number_of_images_and_tells_how_long_one_takes(name, pretrained, exported):
    import onnxruntime

    folder, model = exported(name), pretrained[1]
    facts = json.loads((folder / "export.json").read_text())
    assert facts["milliseconds"]["onnxruntime"] > 0
    assert f"{facts['milliseconds']['onnxruntime']:.2f} ms in ONNX Runtime" in (folder / "README.md").read_text()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inside = json.loads(session.get_modelmeta().custom_metadata_map["export.json"])
    assert inside["input"] == facts["input"]
    for count in (1, 5):
        images = np.zeros((count, model.in_chans, *model.patch_embed.img_size), np.float32)
        tokens, features = session.run(None, {"images": images})
        assert len(tokens) == len(features) == count


# ---- bad input


@ON_RECTANGLES
def test_bad_input_is_refused_with_a_message(pretrained, tmp_path, capsys):
    folder, _ = pretrained
    text, full = tmp_path / "notes.pth", tmp_path / "full"
    text.write_text("no archive")
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    empty_run = tmp_path / "run"
    empty_run.mkdir()
    no_encoder, odd, narrow = tmp_path / "probe.pth", tmp_path / "odd.pth", tmp_path / "narrow.pth"
    torch.save({"model": {"head.weight": torch.zeros(3, 4)}}, no_encoder)
    tiny = methods.build("mae", "mae_vit_tiny_patch16", depth=1, decoder_depth=1, input_size=32).state_dict()
    torch.save({"model": tiny}, narrow)
    torch.save({"model": tiny | {"rel_pos_bias.table": torch.zeros(3)}}, odd)
    long, flat = tmp_path / "long.pth", tmp_path / "flat.pth"
    torch.save({"model": tiny | {"pos_embed": torch.zeros(1, 7, 192)}}, long)
    torch.save({"model": tiny | {"patch_embed.proj.weight": torch.zeros(192, 3, 16, 8)}}, flat)
    cases = [
        ([tmp_path / "nothing"], "does not exist"),
        ([empty_run], "contains no checkpoint"),
        ([text], "notes.pth is not a checkpoint, or contains more than tensors"),
        ([no_encoder], "holds no vision transformer"),
        ([narrow], "3 in DeiT and timm"),
        ([narrow, "--num_heads", "5"], "5 heads cannot share 192 channels"),
        (
            [odd, "--num_heads", "12"],
            "They also contain relative positions (BEiT, data2vec, SimMIM): rel_pos_bias.table",
        ),
        ([long, "--num_heads", "12"], "positions for 6 patches of 16 pixels, which do not make a square"),
        ([flat, "--num_heads", "12"], "here they are squares"),
        ([folder, "--num_heads", "3"], "was trained with 6 attention heads, not with 3"),
        ([folder, "--input_size", "18"], "do not fill"),
        ([folder, "--input_size", "large"], "input_size"),
        ([folder, "--output", full], "is not empty"),
        ([folder, "--output", text], "is a file"),
    ]
    for words, message in cases:
        assert run_tool("timm", *words) == 2, words
        assert message in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["precious.txt"]
    with pytest.raises(SystemExit) as stop:
        run_tool("tflite", folder)
    assert stop.value.code == 2 and "timm" in capsys.readouterr().err


@ON_RECTANGLES
def test_missing_packages_are_named_with_the_command_that_installs_them(pretrained, monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert run_tool("onnx", pretrained[0]) == 2
    said = capsys.readouterr().err
    assert "onnx needs onnxscript" in said and "-m pip install -r " in said and "requirements/export.txt" in said


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_an_encoder_that_can_leave(method, tmp_path):
    chosen = methods.METHODS[method]
    decoder = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **NARROW}
    sizes = SIZES | ({"model": "mae_vit_tiny_patch8"} if method == "maskfeat" else {})  # suitable for HOG's cells
    options = methods.schema(method)(
        **sizes, method=method, input_size=(16, 16), total_batch_size=8,
        **chosen.defaults | {name: value for name, value in decoder.items() if name in methods.own_options(method)},
        terms={name: given | SETTLED.get(name, {}) for name, given in chosen.terms.items()},
    )  # fmt: skip
    model = methods.from_options(to_dict(options)).eval()
    if model.encoder_prefix:  # a teacher that differs from the student
        torch.nn.init.normal_(model.blocks[0].mlp.fc1.weight)
    encoder = encoders.load(save_run(tmp_path / method, model, options))
    images = images_for((3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(encoder.compute_outputs(images)["tokens"], model.encode(images), atol=1e-6, rtol=0)


def test_an_encoder_with_more_than_a_plain_one_is_refused(tmp_path, capsys):
    folder, model = classifier(tmp_path / "run", "avg")
    file = folder / "checkpoints" / "last.pth"
    state = checkpoint.load(file)
    state["model"]["blocks.0.attn.relative_position_bias_table"] = torch.zeros(9, 6)
    checkpoint.save(file, state)
    assert run_tool("timm", folder) == 2
    assert "relative_position_bias_table" in capsys.readouterr().err
