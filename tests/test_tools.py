"""The tools that open a trained model: right figures from a known model, and words for what they cannot use."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_pretrain
from tools import given, knn, visualize

MODEL = (
    "--model mae_vit_tiny_patch2 --embed_dim 24 --depth 1 --num_heads 2 --decoder_embed_dim 16 --decoder_depth 1 "
    "--decoder_num_heads 2 --input_size 8 --in_chans 1 --norm_pix_loss"
).split()
RUN = "--data_path digits --epochs 1 --warmup_epochs 0 --batch_size 256 --num_workers 0 --device cpu".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few updates on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert main_pretrain.main([*MODEL, *RUN, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def subject(run):
    """Four of its images, ready for a picture."""
    trained = given.load(run, "cpu")
    images, names = given.images(trained, [], count=4, seed=0)
    return visualize.Subject(trained, images, names, seed=0)


def test_the_untrained_model_is_the_one_that_the_run_began_with(run):
    options = main_pretrain.parse_options([*MODEL, *RUN])
    torch.manual_seed(options.seed)
    begun = main_pretrain.build_model(options).state_dict()
    again = knn.untrained(given.load(run, "cpu").options).state_dict()
    assert begun.keys() == again.keys()
    assert all(torch.equal(begun[name], again[name]) for name in begun)


def test_knn_writes_three_rows_of_held_out_accuracy(run, capsys):
    assert knn.main([str(run), "--device", "cpu"]) == 0
    found = json.loads((run / "knn.json").read_text())
    assert list(found["accuracy"]) == ["raw pixels", "untrained encoder", "pretrained encoder"]
    assert found["accuracy"]["raw pixels"] > 95  # the digits are easy for pixels; a mix-up of labels or splits is not
    assert 20 < found["accuracy"]["pretrained encoder"] < 100
    assert "after 5 updates, 1,280 images seen" in found["protocol"]
    assert f"{found['accuracy']['untrained encoder']:.2f}" in capsys.readouterr().out


def test_knn_takes_labels_by_class_name_where_a_class_has_no_validation_images(run, tmp_path):
    for split, classes in {"train": "abc", "val": "ac"}.items():
        for brightness, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            shade = 80 * "abc".index(name) + brightness
            Image.fromarray(np.full((8, 8), shade, np.uint8)).save(tmp_path / split / name / "x.png")
    trained = given.load(run, "cpu")
    bank, queries = knn.splits(trained, str(tmp_path))
    assert bank.labels.tolist() == [0, 1, 2]
    assert queries.labels.tolist() == [0, 2]
    (tmp_path / "train" / "a" / "x.png").unlink()
    with pytest.raises(ValueError, match="classes that training has not: a"):
        knn.splits(trained, str(tmp_path))


def test_knn_refuses_data_without_labels_in_words(run, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    assert knn.main([str(run), "--data_path", str(tmp_path), "--device", "cpu"]) == 2
    assert "need labels" in capsys.readouterr().err


def test_displayed_pixels_are_the_files_pixels(run, tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    trained = given.load(run, "cpu")
    images, names = given.images(trained, [str(tmp_path / "ramp.png")], count=6, seed=0)
    shown = visualize.Subject(trained, images, names, seed=0).displayed(images)
    np.testing.assert_allclose(shown[0] * 255, pixels, atol=1e-3)


def test_the_reconstruction_figure_holds_what_its_titles_say(subject):
    figure = visualize.reconstruction(subject)
    panels = np.array(figure.axes).reshape(4, 4)
    assert [axis.get_title() for axis in panels[0]] == list(visualize.TITLES.values())
    original, masked, predicted, pasted = (axis.images[0].get_array().data for axis in panels[1])
    _, mask = subject.trained.model.predict(subject.images, noise=subject.noise())
    hidden = mask[1].reshape(4, 4).numpy().repeat(2, 0).repeat(2, 1).astype(bool)
    assert hidden.mean() == 0.75
    np.testing.assert_array_equal(original, subject.displayed(subject.images)[1])
    np.testing.assert_allclose(masked[~hidden], original[~hidden], atol=1e-6)
    np.testing.assert_allclose(pasted[~hidden], original[~hidden], atol=1e-6)
    np.testing.assert_allclose(pasted[hidden], predicted[hidden], atol=1e-6)
    assert np.ptp(masked[hidden]) == 0


def test_the_figure_says_that_standardised_targets_were_undone(subject):
    assert "undone" in visualize.reconstruction(subject).get_suptitle()
    subject.trained.model.norm_pix_loss = False
    assert "undone" not in visualize.reconstruction(subject).get_suptitle()


def test_a_perfect_prediction_of_standardised_patches_is_the_image(subject, monkeypatch):
    model = subject.trained.model
    mask = torch.ones(len(subject.images), model.num_patches)
    monkeypatch.setattr(model, "predict", lambda images, noise=None: (model.target(images), mask))
    _, _, predicted, _ = (axis.images[0].get_array().data for axis in visualize.reconstruction(subject).axes[:4])
    np.testing.assert_allclose(predicted, subject.displayed(subject.images)[0], atol=1e-5)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_command_writes_a_picture(run, tmp_path, suffix, capsys):
    output = tmp_path / "new" / f"picture.{suffix}"
    words = ["reconstruction", str(run / "checkpoints" / "last.pth"), "--count", "2", "--device", "cpu"]
    assert visualize.main([*words, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    if suffix == "png":
        with Image.open(output) as picture:
            assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 10
    assert output.stat().st_size > 5000


def test_the_same_seed_draws_the_same_picture(run):
    trained = given.load(run, "cpu")
    first, again, other = (given.images(trained, ["digits"], count=5, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/nothing"], "does not exist"),
        (["{tmp}"], "holds no checkpoint"),
        (["{run}", "--images", "{tmp}/nothing"], "does not exist"),
        (["{run}", "--images", "{run}/train.log", "{run}/log.txt"], "image files, or one folder"),
        (["{run}", "--count", "0"], "count: must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(run, tmp_path, capsys, words, message):
    words = [word.format(tmp=tmp_path, run=run) for word in words]
    assert visualize.main(["reconstruction", *words, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
