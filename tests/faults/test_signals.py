"""Signals before the first step, inside a step and inside an evaluation; and a second Ctrl-C."""

import json
import signal
from functools import partial

import pytest

from tests.faults import inject
from tests.faults.few import CLASSIFIER, LAST_STEP, STEPS_PER_EPOCH, few
from tests.runs import Training, assert_same_end, final, finish, losses

PRETRAIN, FINETUNE, PROBE = "main_pretrain", "main_finetune", "main_linprobe"
STEPS = STEPS_PER_EPOCH[FINETUNE]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The arguments of each program."""
    trained = ["--init_from", tmp_path_factory.mktemp("completed") / PRETRAIN / "checkpoints" / "last.pth"]
    return {
        PRETRAIN: few("--knn_every", 1),
        FINETUNE: few(*CLASSIFIER, *trained, "--ema", 0.9),
        PROBE: few(*CLASSIFIER, *trained),
    }


@pytest.fixture(scope="module")
def completed(words):
    """A folder with an uninterrupted run of each program."""
    folder = words[PROBE][-1].parent.parent.parent
    for script in (PRETRAIN, FINETUNE, PROBE):
        finish(folder / script, *words[script], script=script)
    return folder


def epochs(folder):
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "run_id"} for line in lines]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def assert_same_run(completed, folder):
    """Assert that weights, losses and the metrics of every epoch are equal."""
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)
    assert epochs(folder) == epochs(completed)
    assert result(folder).get("accuracy") == result(completed).get("accuracy")


def test_a_signal_inside_an_evaluation_abandons_it_and_it_is_begun_again(completed, words, tmp_path):
    """The epoch's steps are saved; its metrics are not logged, because the evaluation is incomplete."""
    folder = tmp_path / "run"
    fault = partial(inject.signals_inside_evaluation, 2, signal.SIGTERM)
    training = Training(folder, *words[FINETUNE], script=FINETUNE, fault=fault)
    assert training.wait() == 75, training.stderr
    state = final(folder)
    assert (state["epoch"], state["sampler"]["offset"], state["step"]) == (1, STEPS, 2 * STEPS)
    assert len(epochs(folder)) == 1
    finish(folder, *words[FINETUNE], script=FINETUNE)
    assert_same_run(completed / FINETUNE, folder)


def test_a_signal_inside_the_last_evaluation_leaves_the_last_weights_as_they_are(completed, words, tmp_path):
    """The fourth evaluation is of the best epoch: the model holds its weights, which must not be saved as the last."""
    folder, complete = tmp_path / "run", tmp_path / "complete"
    stop = partial(inject.signals_inside_evaluation, 4, signal.SIGUSR1)
    for place, then, code in ((complete, None, 0), (folder, stop, 75), (folder, None, 0)):
        fault = partial(inject.first_epoch_is_best, then)
        training = Training(place, *words[FINETUNE], script=FINETUNE, fault=fault)
        assert training.wait() == code, training.stderr
        assert_same_end(complete, place)
        assert (place / "result.json").exists() == (code == 0)
    assert_same_run(complete, folder)
    assert result(folder)["accuracy"]["best"] != result(folder)["accuracy"]["last"]


def test_a_signal_during_the_knn_evaluation_is_handled_after_it(completed, words, tmp_path):
    folder = tmp_path / "run"
    fault = partial(inject.signals_inside_evaluation, 1, signal.SIGTERM)
    training = Training(folder, *words[PRETRAIN], fault=fault)
    assert training.wait() == 75, training.stderr
    assert final(folder)["epoch"] == 1 and len(epochs(folder)) == 1
    finish(folder, *words[PRETRAIN])
    assert_same_run(completed / PRETRAIN, folder)


@pytest.mark.parametrize(("script", "number"), [(FINETUNE, 2), (PRETRAIN, 3)])
def test_a_second_interrupt_inside_an_evaluation_leaves_at_once(completed, words, tmp_path, script, number):
    """In the evaluation of the second epoch; the kNN evaluation reads two sets of images."""
    folder = tmp_path / "run"
    fault = partial(inject.signals_inside_evaluation, number, signal.SIGINT, signal.SIGINT)
    training = Training(folder, *words[script], script=script, fault=fault)
    assert training.wait() == 130, training.stderr
    assert final(folder)["epoch"] == 1
    finish(folder, *words[script], script=script)
    assert_same_run(completed / script, folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_second_interrupt_inside_a_step_leaves_at_once(completed, words, tmp_path, workers):
    folder, more = tmp_path / "run", ["--save_steps", 2, "--num_workers", workers]
    fault = partial(inject.signals_inside_step, 6, signal.SIGINT, signal.SIGINT)
    training = Training(folder, *words[PRETRAIN], *more, fault=fault)
    assert training.wait() == 130, training.stderr
    assert final(folder)["step"] == 4, "the latest checkpoint is valid"
    finish(folder, *words[PRETRAIN], *more)
    assert_same_run(completed / PRETRAIN, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_the_first_step_leaves_nothing_and_asks_to_be_queued_again(words, tmp_path, number):
    fault = partial(inject.signals_before_training, number)
    training = Training(tmp_path / "run", *words[PRETRAIN], fault=fault)
    assert training.wait() == 75, training.stderr
    assert "before the first step" in training.stderr and "Traceback" not in training.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_while_features_are_encoded_ends_the_probe_for_now(completed, words, tmp_path):
    fault = partial(inject.signals_inside_evaluation, 2, signal.SIGTERM)
    training = Training(tmp_path / "run", *words[PROBE], script=PROBE, fault=fault)
    assert training.wait() == 75, training.stderr
    assert "Traceback" not in training.stderr
    finish(tmp_path / "run", *words[PROBE], script=PROBE)
    assert_same_run(completed / PROBE, tmp_path / "run")
    assert final(tmp_path / "run")["step"] == LAST_STEP[PROBE]
