"""Linear probing: LARS and the head compared with MAE's, the order of features, and complete runs."""

import json
import shutil

import pytest
import torch
from torch import nn

from methods import build
from models_classifier import LinearProbe
from models_vit import compute_digest
from tests.runs import Training, assert_same_end, finish, losses, start_ranks
from tests.small import options_of, write_checkpoint
from util import optim
from util.features import FeatureSamples, interleaved, pooled

SCRIPT = "main_linprobe"


def test_lars_is_maes():
    """Matrices: g x .001 |p| / |g|; vectors: g unchanged. Then momentum .9, in a loop over five steps."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = optim.lars(model, 0.7, weight_decay=0.0)
    ours = {name: value.detach().clone() for name, value in model.named_parameters()}
    moments = {name: torch.zeros_like(value) for name, value in ours.items()}
    for step in range(5):
        gradients = {name: torch.sin(value + step) for name, value in ours.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
            direction = gradients[name]
            if direction.ndim > 1:
                direction = direction * 0.001 * ours[name].norm() / direction.norm()
            moments[name] = 0.9 * moments[name] + direction
            ours[name] = ours[name] - 0.7 * moments[name]
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), ours[name], rtol=1e-6, atol=1e-9)


def test_the_head_standardises_features_without_weights_of_its_own():
    torch.manual_seed(0)
    probe = LinearProbe(6, 4)
    assert {name for name, _ in probe.named_parameters()} == {"head.weight", "head.bias"}
    assert 0.005 < probe.head.weight.std() < 0.02 and not probe.head.bias.any()
    features = torch.randn(9, 6) * 3 + 5
    standard = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(probe(features), standard @ probe.head.weight.T, rtol=1e-4, atol=1e-6)


def test_shares_of_features_come_back_in_the_images_order():
    features, labels = torch.arange(14.0).view(7, 2), torch.arange(7)
    shares = [(features[rank::3], labels[rank::3]) for rank in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(interleaved(shares), (features, labels), strict=True))
    shares[1] = (shares[1][0][:1], shares[1][1][:1])  # an image that could not be read
    features_there, labels_there = interleaved(shares)
    assert labels_there.tolist() == [0, 3, 6, 1, 2, 5] and torch.equal(features_there, features[labels_there])
    batch = FeatureSamples(features, labels).__getitems__([(4, 5), (4, 0)])
    assert batch.labels.tolist() == [5, 0] and torch.equal(batch.images, features[[5, 0]])


def test_pooling():
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(pooled(tokens, "token"), tokens[:, 0])
    torch.testing.assert_close(pooled(tokens, "avg"), (tokens[:, 1] + tokens[:, 2] + tokens[:, 3] + tokens[:, 4]) / 4)
    assert torch.equal(pooled(tokens, "both"), torch.cat([pooled(tokens, "avg"), pooled(tokens, "token")], dim=1))


@pytest.fixture(scope="module")
def completed(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("completed") / "run"
    finish(folder, "--init_from", pretrained, "--lr", 20, "--epochs", 12, script=SCRIPT)
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_probe_learns_and_tells_neighbours_too(completed):
    found = result(completed)
    assert losses(completed)[60] < losses(completed)[1]
    assert found["accuracy"]["last"]["acc1"] > 20 and found["accuracy"]["best"]["images"] == 445
    assert found["knn_acc1"] > 20 and found["eval_crop"] == "keep_size"
    weights = torch.load(completed / "checkpoints" / "last.pth", weights_only=True)["model"]
    assert weights["head.weight"].shape == (10, 24) and not any("blocks" in name for name in weights)


@pytest.mark.parametrize("words", [[], ["--augment", "--global_pool", "token"]])
def test_a_killed_probe_ends_like_an_uninterrupted_one(pretrained, tmp_path, words):
    words = ["--init_from", pretrained, *words, "--save_steps", 1]
    finish(tmp_path / "completed", *words, script=SCRIPT)
    Training(tmp_path / "run", *words, script=SCRIPT).kill_at(7)
    finish(tmp_path / "run", *words, script=SCRIPT)
    assert_same_end(tmp_path / "completed", tmp_path / "run")
    assert result(tmp_path / "run")["accuracy"] == result(tmp_path / "completed")["accuracy"]


def test_two_ranks_have_the_features_and_neighbours_of_one(completed, pretrained, tmp_path):
    """Batch norm uses each rank's half of the batch, as in MAE, so losses agree only approximately."""
    words = ["--init_from", pretrained, "--lr", 20, "--epochs", 12]
    ranks = start_ranks(2, tmp_path / "two", *words, script=SCRIPT)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert result(tmp_path / "two")["knn_acc1"] == pytest.approx(result(completed)["knn_acc1"], abs=100 / 445)
    assert result(tmp_path / "two")["accuracy"]["last"]["images"] == 445
    assert losses(tmp_path / "two")[1] == pytest.approx(losses(completed)[1], rel=0.1)


def test_neighbours_have_the_pooling_of_the_pretraining_method(tmp_path):
    """For DINO the class token, independent of the linear layer's input; averages for the latter are warned about."""
    sizes = {
        "input_size": (8, 8),
        "in_chans": 1,
        "model": "mae_vit_tiny_patch2",
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    model = build("dino", **sizes, out_dim=32, head_hidden_dim=24, head_bottleneck_dim=12, local_crops=0)
    torch.nn.init.normal_(model.teacher.cls_token, std=2.0)
    path = write_checkpoint(tmp_path / "dino.pth", model, sizes | options_of("dino", model) | sizes)
    found = {}
    for pool in ("avg", "token"):
        words = ["--init_from", path, "--epochs", 1, "--warmup_epochs", 0, "--global_pool", pool]
        said = finish(tmp_path / pool, *words, script=SCRIPT)
        found[pool] = result(tmp_path / pool)["knn_acc1"], said or (tmp_path / pool / "train.log").read_text()
    assert found["avg"][0] == pytest.approx(found["token"][0])
    assert ["--global_pool token is usually better" in said for _, said in found.values()] == [True, False]
    assert all("k nearest neighbours (class token" in said for _, said in found.values())


def test_another_encoder_than_the_checkpoints_is_refused(pretrained, tmp_path):
    training = Training(tmp_path / "run", "--init_from", pretrained, "--depth", 1, script=SCRIPT)
    assert training.wait() == 2
    assert (
        "2 blocks, the model has 1. The checkpoint is of mae_vit_tiny_patch2 with embed_dim 24, depth 2"
        in training.stderr
    )


@pytest.fixture
def probed(pretrained, tmp_path):
    """Return a run of one epoch, the copy of the checkpoint that it probes, and the words that resume it."""
    folder, encoder = tmp_path / "run", tmp_path / "encoder.pth"
    shutil.copy(pretrained, encoder)
    finish(folder, "--init_from", encoder, "--epochs", 1, script=SCRIPT)
    return folder, encoder, ["--init_from", encoder, "--epochs", 2, "--allow_change", "epochs"]


def stored_digest(folder):
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["options"].get("encoder_digest")


def change(path, name="blocks.0.mlp.fc1.bias"):
    """Change one value of an encoder; return the digest of the changed encoder, without its positions."""
    state = torch.load(path, weights_only=True)
    state["model"][name].view(-1)[0] += 1
    torch.save(state, path)
    own = {k: v for k, v in state["model"].items() if "decoder" not in k and k not in ("mask_token", "pos_embed")}
    return compute_digest(own)


def test_a_probe_is_not_resumed_with_another_encoder(probed):
    folder, encoder, words = probed
    then, now = stored_digest(folder), change(encoder)
    assert len(then) == 64 and then != now
    refused = Training(folder, *words, script=SCRIPT)
    assert refused.wait() == 2 and f"encoder_digest  '{then}' -> '{now}'" in refused.stderr
    assert len(losses(folder)) == 5, "a refused start changes nothing"
    finish(folder, *words, "encoder_digest", script=SCRIPT)
    assert stored_digest(folder) == now


def test_a_probe_resumes_with_the_same_encoder_in_another_file(probed, pretrained):
    folder, encoder, words = probed
    then = stored_digest(folder)
    change(encoder, "decoder_pred.bias")  # another file, the same encoder
    finish(folder, *words, script=SCRIPT)
    assert stored_digest(folder) == then and result(folder)["epochs"] == 2


def test_a_probe_that_has_not_recorded_its_encoder_resumes(probed):
    """As an earlier version wrote it; --overwrite records the encoder, as every new run."""
    folder, encoder, words = probed
    for path in (folder / "checkpoints").glob("*.pth"):
        state = torch.load(path, weights_only=True)
        state["options"].pop("encoder_digest", None)  # several names are links to one file
        torch.save(state, path)
    now = change(encoder)
    for epochs in (2, 3):  # also when it is resumed again
        finish(folder, *words, "--epochs", epochs, script=SCRIPT)
        assert stored_digest(folder) == "" and result(folder)["epochs"] == epochs
    assert (folder / "train.log").read_text().count("did not record the encoder") == 2
    finish(folder, *words, "--overwrite", script=SCRIPT)
    assert stored_digest(folder) == now


def test_a_probe_without_an_encoder_is_refused(tmp_path):
    training = Training(tmp_path / "run", script=SCRIPT)
    assert training.wait() == 2
    assert "init_from: must be given" in training.stderr
