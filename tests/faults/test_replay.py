"""`tools.replay`: repeat the batch of a dump and report where its values become non-finite."""

import json
import math
from functools import partial

import pytest
import torch

from tests.faults import inject
from tests.faults.few import CLASSIFIER, few
from tests.runs import Training, start_ranks
from tools import replay
from util import checkpoint

WORDS = few("--epochs", 1, "--max_bad_steps", 2)


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """The dump of a run whose losses are NaN from the third step on, with two micro-batches per step."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    training = Training(folder, *WORDS, "--batch_size", 4, fault=partial(inject.bad_losses, 5, 1000))
    assert training.wait() == 3, training.stderr
    path = next((folder / "debug").glob("*.json"))
    assert f"python -m tools.replay {path}" in training.stderr
    return path


def run(capsys, *words):
    """Return the exit code and the output of the tool."""
    code = replay.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out + said.err


def changed(dump, tmp_path, **changes):
    """Copy the dump, fill the named weights with a value, and return the path of the copy."""
    (tmp_path / dump.name).write_text(dump.read_text())
    state = checkpoint.load(dump.with_suffix(".pth"))
    for name, value in changes.items():
        state["model"][name.replace("__", ".")].fill_(value)
    checkpoint.save(tmp_path / dump.with_suffix(".pth").name, state)
    return tmp_path / dump.name


def test_the_replayed_batch_has_the_losses_of_the_run(dump):
    """The reconstruction losses are equal; the NaN in the run's total loss was injected."""
    again = replay.Replay(dump, device="cpu", amp="", data_path="")
    with torch.no_grad():
        losses = [again.model(b.images, b.labels, noise=b.noise) for _, b in again.micro_batches()]
    recent = json.loads(dump.read_text())["recent_by_process"][0][-2:]
    assert len(losses) == 2
    for mine, runs in zip(losses, recent, strict=True):
        assert float(mine["reconstruction"]) == pytest.approx(runs["losses"]["reconstruction"], rel=1e-6)
        assert runs["losses"]["loss"] == "nan"


def test_what_is_finite_here_is_reported(dump, capsys):
    code, said = run(capsys, dump, "--device", "cpu")
    assert code == replay.ALL_FINITE
    assert "Everything is finite on cpu" in said and "--amp" in said


def test_the_first_module_is_named(dump, tmp_path, capsys):
    code, said = run(capsys, changed(dump, tmp_path, blocks__1__mlp__fc1__weight=3e38), "--device", "cpu")
    assert code == 0
    assert "blocks.1.mlp.fc1 (Linear), whose inputs are finite" in said
    assert "loss reconstruction is nan" in said


def test_weights_that_are_bad_already_are_named(dump, tmp_path, capsys):
    code, said = run(capsys, changed(dump, tmp_path, decoder_embed__bias=math.nan), "--device", "cpu")
    assert code == 0 and "weights are not finite before the step: decoder_embed.bias" in said


def test_a_gradient_that_is_bad_under_finite_losses_is_named(dump, monkeypatch, capsys):
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 0

    def spoil(self, *arguments, original=replay.Replay.__init__, **named):
        original(self, *arguments, **named)
        self.model.blocks[0].norm2.register_forward_hook(lambda module, inputs, output: Root.apply(output))

    monkeypatch.setattr(replay.Replay, "__init__", spoil)
    code, said = run(capsys, dump, "--device", "cpu")
    assert code == 0
    assert "every output and loss is finite" in said and "that of blocks.0.norm2" in said


def test_a_term_whose_weight_is_too_large_is_named(tmp_path, capsys):
    ranks = start_ranks(2, tmp_path / "run", *WORDS, "--terms.neighbor.weight", "1e300")
    assert [rank.wait() for rank in ranks] == [3, 3]
    code, said = run(capsys, next((tmp_path / "run" / "debug").glob("*.json")), "--device", "cpu")
    assert code == 0
    assert "process 0" in said and "process 1" in said
    assert "term neighbor is" in said and "not finite x weight 1e+300" in said


def test_a_classifiers_batch_is_mixed_again_as_it_was(tmp_path, capsys):
    """Images, mixing and drop path equal the run's; the NaN injected into its gradients is absent."""
    fault = partial(inject.bad_losses, 3, 1000, gradient=True)
    words = few(*CLASSIFIER, "--batch_size", 4, "--max_bad_steps", 2)
    training = Training(tmp_path / "run", *words, script="main_finetune", fault=fault)
    assert training.wait() == 3, training.stderr
    path = next((tmp_path / "run" / "debug").glob("*.json"))
    recent = json.loads(path.read_text())["recent_by_process"][0][-2:]
    again = replay.Replay(path, device="cpu", amp="", data_path="")
    with torch.no_grad():
        losses = [float(again.trained(batch.images, batch.labels)["loss"]) for _, batch in again.micro_batches()]
    assert losses == pytest.approx([entry["losses"]["loss"] for entry in recent], rel=1e-6)
    code, said = run(capsys, path, "--device", "cpu")
    assert code == replay.ALL_FINITE and "Everything is finite on cpu" in said
    code, said = run(capsys, changed(path, tmp_path, head__bias=math.nan), "--device", "cpu")
    assert code == 0 and "weights are not finite before the step: head.bias" in said
    code, said = run(capsys, changed(path, tmp_path, blocks__0__mlp__fc1__weight=3e38), "--device", "cpu")
    assert code == 0 and "blocks.0.mlp.fc1 (Linear), whose inputs are finite" in said


def test_what_is_not_a_dump_is_refused(dump, tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    for words, told in (
        ([tmp_path / "x.json"], "is not a dump"),
        ([tmp_path / "none.json"], "is not a dump"),
        ([dump, "--device", "cpu", "--amp", "fp16"], "--amp fp16 needs"),
    ):
        code, said = run(capsys, *words)
        assert code == 2 and told in said
    record = json.loads(dump.read_text())
    record["recent_by_process"][0][-1]["index"][0] += 1
    other = changed(dump, tmp_path)
    other.write_text(json.dumps(record))
    code, said = run(capsys, other, "--device", "cpu")
    assert code == 2 and "are not those of the run" in said


def test_a_dump_that_cannot_be_written_hides_nothing(tmp_path):
    training = Training(tmp_path / "run", *WORDS, fault=inject.bad_losses_and_full_disk)
    assert training.wait() == 3, training.stderr
    assert "2 steps in a row" in training.stderr and "could not be written" in training.stderr
    assert "No space left" in training.stderr and "Traceback" not in training.stderr
