"""The convolutional patch stem: its values, that hidden patches do not leak, and its way through programs and tools."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import main_finetune
import main_linprobe
import main_pretrain
import methods
import models_classifier
import models_upernet
from models_tokenizer import encoder_from
from models_vit import ConvStem, for_channels, load_from_run, load_matching, read_patch_size
from options import FinetuneOptions, OptionError, describe_model
from tests.runs import LIGHT, TINY, Training, assert_same_end, finish
from tests.small import SMALL, batch, options_of, small, write_checkpoint
from tests.test_export import installed
from tools import export, knn
from tools.encoder import load, load_encoder
from util import checkpoint, optim

METHODS = [name for name in methods.METHODS if methods.METHODS[name].model_class().takes_conv_stem]


def perturbed(module):
    """The module with other biases and norms than zeros and ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "strides", "left"),
    [(2, (1, 1), 2), (4, (1, 1), 4), (8, (2, 1), 4), (14, (2, 2), 4), (16, (2, 2), 4), (32, (2, 2), 8)],
)
def test_the_stem_is_that_of_a_loop_over_patches(side, strides, left):
    torch.manual_seed(0)
    stem = perturbed(ConvStem(side, in_chans=3, embed_dim=24))
    own = stem.state_dict()
    images = torch.randn(2, 3, 2 * side, 3 * side)
    found = stem(images)
    assert found.shape == (2, 24, 2, 3) and own["6.weight"].shape == (24, 6, left, left)
    for n in range(2):
        for row in range(2):
            for column in range(3):
                x = images[n : n + 1, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
                for layer, stride in zip((0, 3), strides, strict=True):
                    x = F.conv2d(F.pad(x, (1, 1, 1, 1)), own[f"{layer}.weight"], own[f"{layer}.bias"], stride)
                    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
                    scale, shift = own[f"{layer + 1}.weight"], own[f"{layer + 1}.bias"]
                    x = F.gelu(x * scale[:, None, None] + shift[:, None, None])
                token = torch.einsum("dcyx,cyx->d", own["6.weight"], x[0]) + own["6.bias"]
                torch.testing.assert_close(found[n, :, row, column], token, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["mae", "nor_mae"])
def test_pixels_of_hidden_patches_change_no_visible_token(method):
    model = perturbed(small(method, patch_stem="conv"))
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    hidden = view.mask.view(-1, 1, *model.grid).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3) > 0
    assert hidden.sum() == 4 * 15 * 16, "15 of 20 patches"
    other = torch.where(hidden, 10 * torch.randn(images.shape), images)
    changed = model.observe(other, noise=noise)
    assert torch.equal(changed.latent, view.latent) and torch.equal(changed.pred, view.pred)
    before, after = model.embed(images), model.embed(other)
    visible = view.mask == 0
    assert torch.equal(after[visible], before[visible])
    assert (after != before).any(dim=-1).equal(~visible), "every hidden token changes"
    assert view.tokens.shape == ((0,) if method == "mae" else (4, 20, 16)), "embedded only where a term reads them"


def test_the_visible_patches_alone_get_the_tokens_that_they_have_among_all():
    model = small("mae", patch_stem="conv")
    images, _, noise = batch(model)
    ids = noise[:, 0].argsort(dim=1)[:, :5]
    expected = model.embed(images).gather(1, ids[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(model.embed_visible(images, ids), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["mae", "simmim", "dino", "moco_v3"])
def test_the_linear_stem_is_the_default_and_unchanged(method):
    default, linear = small(method).state_dict(), small(method, patch_stem="linear").state_dict()
    assert default.keys() == linear.keys()
    assert all(torch.equal(value, linear[name]) for name, value in default.items())
    names = {name for name in default if name.startswith("patch_embed.")}
    assert names == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert default["patch_embed.proj.weight"].shape == (16, 3, 4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_with_the_common_encoder_trains_it(method):
    model = small(method, patch_stem="conv")
    images, labels, noise = batch(model)
    model(images, labels, noise=noise)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.patch_embed.parameters())
    loaded = methods.from_options(options_of(method, model) | {"patch_stem": "conv"})
    loaded.load_state_dict(model.state_dict())
    one = images[0] if isinstance(images, list) else images
    assert torch.equal(loaded.eval().encode(one), model.eval().encode(one))


def test_methods_and_tools_that_have_no_use_for_it_refuse_it(tmp_path):
    assert set(methods.METHODS) - set(METHODS) == {"moco_v3", "vq_tokenizer", "vqkd_tokenizer"}
    for method in set(methods.METHODS) - set(METHODS):
        with pytest.raises(ValueError, match=f"patch_stem is conv, and the method '{method}' only works with linear"):
            small(method, patch_stem="conv")
    with pytest.raises(ValueError, match="unknown patch_stem 'cnn': it is linear or conv"):
        small("mae", patch_stem="cnn")
    with pytest.raises(ValueError, match=r"x\.pth has a convolutional patch stem, which encoders of tokenizers"):
        encoder_from(small("mae", patch_stem="conv").state_dict(), {}, "x.pth", 3)


# ---- its weights -----------------------------------------------------------------------------------------------------


def classifier(**more):
    sizes = {name: SMALL[name] for name in ("model", "embed_dim", "depth", "num_heads")}
    return models_classifier.build(num_classes=3, **sizes | {"input_size": (16, 20), "patch_stem": "conv"} | more)


def test_it_has_the_lowest_learning_rate_and_its_biases_and_norms_are_not_decayed():
    for model, groups in (
        (pretrained := small("mae", patch_stem="conv"), optim.pretrain_groups(pretrained, 0.05)),
        (tuned := classifier(), optim.finetune_groups(tuned, 0.05, layer_decay=0.5)),
    ):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        seen = 0
        for group in groups:
            for parameter in group["params"]:
                if names[id(parameter)].startswith("patch_embed."):
                    assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)
                    assert group.get("lr_scale", 0.5**3) == 0.5**3, "two blocks and the head are above it"
                    seen += 1
        assert seen == 10


def test_weights_with_another_stem_are_refused_with_the_option_to_give():
    conv, linear = small("mae", patch_stem="conv"), small("mae")
    for model, weights, found, own in ((linear, conv, "conv", "linear"), (conv, linear, "linear", "conv")):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = f"an encoder with patch_stem {found}, the model has {own}: give --patch_stem {found}"
        for load_into in (load_matching, lambda *both: load_from_run(*both, SMALL)):
            with pytest.raises(ValueError, match=expected):
                load_into(model, weights.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_without_their_options_do_not_tell_the_patch_size():
    weights = small("mae", patch_stem="conv").state_dict()
    assert read_patch_size(weights, SMALL) == 4
    with pytest.raises(ValueError, match="do not contain the patch size.*use the checkpoint"):
        read_patch_size(weights, {})


def test_a_grey_image_gives_the_output_of_three_equal_channels_and_positions_are_resampled():
    coloured, grey = small("mae", patch_stem="conv"), classifier(in_chans=1)
    models_classifier.load_encoder(grey, for_channels(coloured.state_dict(), 1), SMALL)
    images = torch.randn(2, 1, 16, 20)
    tokens = coloured.patch_embed(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.patch_embed(images), tokens, atol=1e-5, rtol=1e-5)
    larger = classifier(input_size=(24, 32))
    assert models_classifier.load_encoder(larger, coloured.state_dict(), SMALL).resampled == ["pos_embed"]
    assert larger(torch.randn(2, 3, 24, 32)).shape == (2, 3)


def test_a_segmenter_starts_from_it_and_is_built_again_from_its_options():
    pretrained = small("mae", patch_stem="conv")
    options = SMALL | {"in_chans": 3, "patch_stem": "conv"}
    segmenter = models_upernet.from_options(options, classes=4)
    models_upernet.load_pretrained(segmenter, pretrained.state_dict(), options)
    images = torch.randn(2, 3, 16, 20)
    assert torch.equal(segmenter.patch_embed(images).flatten(1, 2), pretrained.patch_embed(images))  # rows x columns
    again = models_upernet.from_options(options, classes=4)
    models_upernet.load_segmenter(again, segmenter.state_dict(), options)
    assert torch.equal(again.eval()(images)[0], segmenter.eval()(images)[0])
    assert again(torch.randn(1, 3, 24, 32))[1].shape == (1, 4, 6, 8), "at any size"


def test_an_encoder_and_a_classifier_with_it_can_be_teachers(tmp_path):
    pretrained = small("mae", patch_stem="conv")
    path = write_checkpoint(tmp_path / "mae.pth", pretrained, {"method": "mae", "patch_stem": "conv"} | SMALL)
    student = small("dmae", terms={"teacher": {"checkpoint": path, "student_block": 1, "teacher_block": 1}})
    images = batch(student)[0]
    teacher = student.terms["teacher"].teacher.network.encoder
    assert torch.equal(teacher.patch_embed(images), pretrained.patch_embed(images))
    trained = classifier().eval()
    plain = (0.5,) * 3, (0.5,) * 3
    made_with = SMALL | {"patch_stem": "conv", "mean": plain[0], "std": plain[1]}
    imitated = models_classifier.load_teacher(trained.state_dict(), made_with, 3, plain)
    assert torch.equal(imitated(images), trained(images))


# ---- programs and tools ----------------------------------------------------------------------------------------------

SHORT = "--total_batch_size 256 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu".split()
CONV = ["--method", "mae", "--patch_stem", "conv", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert main_pretrain.main([*TINY, *CONV, "--output_dir", str(folder)]) == 0
    return folder


def tune(folder, run, *words):
    """Fine-tune from the run on the digits, without naming its sizes."""
    start = ["--init_from", str(run), "--data_path", "digits", *LIGHT, "--output_dir", str(folder)]
    return main_finetune.main([*start, *SHORT, *words])


def test_the_run_is_described_with_its_stem(run):
    log = (run / "train.log").read_text()
    assert "mae_vit_tiny_patch2 with embed_dim 24, depth 2, num_heads 2, patch_stem conv: " in log
    assert f"next: python -m tools.export onnx {run}" in log
    assert describe_model({"model": "m", "embed_dim": 0, "patch_stem": "linear"}) == "m", "as of earlier versions"


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_after_sigkill(tmp_path):
    words = [*CONV, "--save_steps", "2"]
    finish(tmp_path / "one", *words)
    Training(tmp_path / "killed", *words).kill_at(4)
    finish(tmp_path / "killed", *words)
    assert_same_end(tmp_path / "one", tmp_path / "killed")


def test_fine_tuning_uses_the_stem_of_the_checkpoint(run, tmp_path, capsys):
    assert tune(tmp_path / "tuned", run) == 0
    state = checkpoint.load(tmp_path / "tuned/checkpoints/last.pth")
    assert state["options"]["patch_stem"] == "conv" and "patch_embed.proj.6.weight" in state["model"]
    assert "learning rate" in (tmp_path / "tuned/train.log").read_text()
    assert main_finetune.main(["--eval", "--resume", str(tmp_path / "tuned"), "--num_workers", "0"]) == 0
    assert math.isfinite(json.loads(capsys.readouterr().out)["acc1"])
    found = load(tmp_path / "tuned")
    assert found.classes == 10 and found.patch_stem == "conv"


def test_another_stem_than_that_of_the_checkpoint_is_refused(run, tmp_path, capsys):
    assert tune(tmp_path / "tuned", run, "--patch_stem", "linear") == 2
    assert "with patch_stem conv, the model has linear: give --patch_stem conv" in capsys.readouterr().err
    other = [*TINY, "--method", "mae", "--init_from", str(run), "--output_dir", str(tmp_path / "other")]
    assert main_pretrain.main(other) == 2
    assert "give --patch_stem conv" in capsys.readouterr().err


def test_probes_and_nearest_neighbours_evaluate_it(run, tmp_path):
    probed = ["--init_from", str(run), "--data_path", "digits", "--output_dir", str(tmp_path / "probe")]
    assert main_linprobe.main([*probed, *SHORT]) == 0
    expected = json.loads((tmp_path / "probe/result.json").read_text())["knn_acc1"]
    assert knn.main([str(run), "--device", "cpu"]) == 0
    found = json.loads((run / "knn.json").read_text())["accuracy"]["pretrained encoder"]
    assert found == pytest.approx(expected, abs=5), "of other images"


def test_the_tools_load_its_encoder_at_any_size(run):
    trained, _ = methods.from_checkpoint(run / "checkpoints/last.pth")
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(load_encoder(run)[0](images), trained.encode(images)[:, 1:].mean(dim=1))
    assert load_encoder(run, input_size=(8, 12))[0](torch.randn(2, 1, 8, 12)).shape == (2, 24)


@pytest.mark.parametrize("name", ["timm", installed("hf")])
def test_formats_with_a_linear_stem_are_refused_before_work(name, run, tmp_path, capsys):
    assert export.main([name, str(run), "--output", str(tmp_path / "exported")]) == 2
    assert "has no convolutional patch stem, which this encoder has: export it to onnx" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    assert main_pretrain.main([*TINY, *CONV, "--export", name, "--output_dir", str(tmp_path / "run")]) == 2
    assert "timm and transformers have no convolutional patch stem: use onnx" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(OptionError, match="export"):
        dataclasses.replace(FinetuneOptions(patch_stem="conv", global_pool="token"), export=(name,))


@pytest.mark.parametrize("name", [installed("onnx")])
def test_the_onnx_export_agrees_and_its_card_names_the_stem(name, run, tmp_path):
    folder = tmp_path / "exported"
    assert export.main([name, str(run), "--output", str(folder)]) == 0
    encoder = load(run)
    images = torch.randn(5, 1, 8, 8)
    for output, expected in encoder.compute_outputs(images).items():
        torch.testing.assert_close(export.read_onnx(folder)(images)[output], expected, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "export.json").read_text())["model"]["patch_stem"] == "conv"
    assert "patches of 2 x 2 pixels, embedded by convolutions within each patch" in (folder / "README.md").read_text()
