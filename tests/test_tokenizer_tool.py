"""The k-means tool, compared with scikit-learn on the same batches; interrupted fits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans

from data.sources import open_source
from models_tokenizer import load_tokenizer
from tests.small import options_of, small, teacher_checkpoint, write_checkpoint
from tools import tokenizer as tool
from util import checkpoint

DIGITS = "digits --input_size 8 --in_chans 1 --patch_size 4 --num_workers 0 --batch_size 512 --device cpu".split()


def run_tool(output, *words):
    return tool.main(["kmeans", *DIGITS, "--output", str(output), *map(str, words)])


def fit(output, *words):
    assert run_tool(output, *words) == 0
    return checkpoint.load(output)


def patches(index):
    """Return normalised patches of digits, computed separately."""
    source = open_source("digits", "", "train", in_chans=1)
    pixels = np.stack([source.read(int(i)) for i in index]).astype(np.float32)[..., 0]
    pixels = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    return pixels.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 16)


def test_the_centres_are_those_of_scikit_learn_on_the_same_batches(tmp_path):
    found = fit(tmp_path / "km.pth", "--tokens", 12, "--epochs", 2, "--seed", 3)
    count, kmeans = found["options"]["images"], MiniBatchKMeans(12, random_state=3, batch_size=512 * 4, n_init="auto")
    for epoch in range(2):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))
        for part in order.split(512):
            kmeans.partial_fit(patches(part))
    np.testing.assert_allclose(found["model"]["centers"].numpy(), kmeans.cluster_centers_, rtol=0, atol=1e-5)
    tokens = kmeans.predict(patches(range(count)))
    share = np.bincount(tokens, minlength=12) / len(tokens)
    assert found["counts"].sum() == 4 * count
    np.testing.assert_allclose(found["counts"].numpy() / (4 * count), share, atol=2e-3)
    entropy = -sum(p * math.log(p) for p in share if p)
    assert found["options"]["entropy"] == pytest.approx(entropy, abs=5e-3)
    assert found["options"]["data"] == open_source("digits", "", "train", in_chans=1).fingerprint
    loaded, digest, options = load_tokenizer(checkpoint.load_model, str(tmp_path / "km.pth"))
    assert loaded.tokens == 12 and loaded.grid == (2, 2) and len(digest) == 64 and options["mean"] == [0.5]


def test_a_stopped_fit_resumes_to_the_same_centres(tmp_path, monkeypatch, capsys):
    whole = fit(tmp_path / "whole.pth", "--tokens", 12, "--epochs", 2)
    plain, seen = MiniBatchKMeans.partial_fit, []

    def stopping(self, vectors):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(len(vectors))
        return plain(self, vectors)

    monkeypatch.setattr(MiniBatchKMeans, "partial_fit", stopping)
    monkeypatch.setattr(tool, "SAVE_SECONDS", -1.0)  # after every batch
    with pytest.raises(KeyboardInterrupt):
        run_tool(tmp_path / "parts.pth", "--tokens", 12, "--epochs", 2)
    monkeypatch.undo()
    assert (tmp_path / "parts.pth.partial").exists() and not (tmp_path / "parts.pth").exists()
    assert run_tool(tmp_path / "parts.pth", "--tokens", 13, "--epochs", 2) == 2
    assert "another tokens" in capsys.readouterr().err
    parts = fit(tmp_path / "parts.pth", "--tokens", 12, "--epochs", 2)
    assert torch.equal(whole["model"]["centers"], parts["model"]["centers"])
    assert torch.equal(whole["counts"], parts["counts"]) and not (tmp_path / "parts.pth.partial").exists()


def test_features_of_an_encoder_are_clustered(tmp_path):
    words = "digits --in_chans 3 --input_size 16x20 --patch_size 4 --num_workers 0 --batch_size 64 --device cpu".split()
    words += ["--tokens", "8", "--epochs", "1", "--encoder", teacher_checkpoint(), "--cosine"]
    assert tool.main(["kmeans", *words, "--output", str(tmp_path / "km.pth")]) == 0
    tokenizer, _, options = load_tokenizer(checkpoint.load_model, str(tmp_path / "km.pth"))
    assert tokenizer.centers.shape == (8, 24) and options["cosine"] and tokenizer.encoder.heads == 3
    images = torch.randn(2, 3, 16, 20)
    tokens, (features,) = tokenizer.tokenize(images), tokenizer.encoder.features(images)
    torch.testing.assert_close(tokenizer.centers.norm(dim=1), torch.ones(8))
    assert torch.equal(tokens, F.cosine_similarity(features[:, :, None], tokenizer.centers, dim=-1).argmax(dim=-1))


def test_the_features_of_a_dino_run_are_its_teachers(tmp_path, capsys):
    model = small("dino")
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    options = options_of("dino", model) | {"in_chans": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    path = write_checkpoint(tmp_path / "dino.pth", model, options)
    words = "digits --in_chans 3 --input_size 16x20 --patch_size 4 --num_workers 0 --batch_size 64 --device cpu".split()
    words += ["--tokens", "8", "--epochs", "1", "--encoder", path, "--output", str(tmp_path / "km.pth")]
    assert tool.main(["kmeans", *words]) == 2
    assert "was made for images with another mean: give --mean 0.1,0.2,0.3" in capsys.readouterr().err
    assert tool.main(["kmeans", *words, "--mean", "0.1,0.2,0.3", "--std", "0.5,0.5,0.5"]) == 0
    tokenizer, _, _ = load_tokenizer(checkpoint.load_model, str(tmp_path / "km.pth"))
    images = torch.randn(2, 3, 16, 20)
    torch.testing.assert_close(tokenizer.encoder.features(images)[0], model.eval().encode(images)[:, 1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "1"], "tokens: must be at least 2"),
        (["--tokens", "5000"], "tokens is 5000, and a batch has 2048 patches"),
        (["--patch_size", "3"], "do not fill"),
        (["--mean", "0.1,0.2"], "mean: 2 values for in_chans 1"),
        (["--input_size", "x"], "input_size"),
        (["--encoder", "/nowhere.pth"], "/nowhere.pth"),
        (["--encoder", "TEACHER"], "takes 3 channels, not 1"),
        (["--cosine"], "cosine and encoder_heads have no effect without --encoder"),
    ],
)
def test_bad_input_is_refused(tmp_path, capsys, words, message):
    words = [teacher_checkpoint() if word == "TEACHER" else word for word in words]
    assert run_tool(tmp_path / "km.pth", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "km.pth").exists()


def test_an_existing_file_is_kept_unless_it_may_be_replaced(tmp_path, capsys):
    (tmp_path / "km.pth").write_text("precious")
    assert run_tool(tmp_path / "km.pth", "--tokens", 4, "--epochs", 1) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "km.pth").read_text() == "precious"
    assert run_tool(tmp_path / "km.pth", "--tokens", 4, "--epochs", 1, "--overwrite") == 0
