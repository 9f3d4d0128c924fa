"""Losses and gradients that are not finite or jump; constant images, batches of one, and lack of memory."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.faults import inject
from tests.faults.few import STEPS_PER_EPOCH, few
from tests.runs import Training, assert_same_end, final, finish, losses, metrics

STEPS = STEPS_PER_EPOCH["main_pretrain"]
ONE = few("--epochs", 1)


def bad_steps(folder):
    return [line["bad_steps"] for line in metrics(folder)]


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_one_bad_step_is_left_out_and_counted(tmp_path, gradient):
    """The third update is skipped: the fourth step uses the weights after the second."""
    folder = tmp_path / "run"
    finish(folder, *ONE, fault=partial(inject.bad_losses, 3, 3, gradient=gradient))
    assert bad_steps(folder) == [0, 0, 1, 1, 1, 1, 1]
    assert json.loads((folder / "result.json").read_text())["bad_steps"] == 1
    state = final(folder)
    assert state["step"] == STEPS
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {STEPS - 1}


def test_fewer_bad_steps_in_a_row_than_allowed_do_not_stop(tmp_path):
    folder = tmp_path / "run"
    finish(folder, *ONE, "--max_bad_steps", 3, fault=partial(inject.bad_losses, 2, 3))
    assert bad_steps(folder) == [0, 1, 2, 2, 2, 2, 2]


def test_a_loss_that_jumps_is_reported_and_trained_on(tmp_path):
    """20 times the loss in one of the two micro-batches of step 9: the mean loss is 10.5 times the usual."""
    words = few("--batch_size", 4)
    said = finish(tmp_path / "run", *words, fault=partial(inject.loss_spike, 18, 20))
    told = [line for line in said.splitlines() if "times the usual" in line]
    assert len(told) == 1 and told[0].startswith("step 9: a loss of") and "--clip_grad" in told[0]
    assert bad_steps(tmp_path / "run")[-1] == 0 and all("grad_norm" in line for line in metrics(tmp_path / "run"))
    said = finish(tmp_path / "calm", *words, fault=partial(inject.loss_spike, 18, 5))
    assert "times the usual" not in said


def test_a_gradient_that_jumps_is_left_out_where_asked_also_after_a_kill(tmp_path):
    words = few("--epochs", 4, "--skip_spikes", 5, "--save_steps", 1)
    fault = partial(inject.loss_spike, 24, 1000)
    finish(tmp_path / "whole", *words, fault=fault)
    assert bad_steps(tmp_path / "whole") == [0] * 23 + [1] * 5
    Training(tmp_path / "run", *words, fault=fault).kill_at(26)
    finish(tmp_path / "run", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert 0 < final(tmp_path / "run")["usual_norm"] == final(tmp_path / "whole")["usual_norm"]
    stays = partial(inject.loss_spike, 24, 1000, 30)
    training = Training(tmp_path / "stays", *words, "--max_bad_steps", 2, fault=stays)
    assert training.wait() == 3 and "2 updates in a row up to step 25 were skipped by --skip_spikes" in training.stderr


def test_gradients_that_stay_bad_stop_with_3_and_say_that_losses_are_finite(tmp_path):
    fault = partial(inject.bad_losses, 2, 1000, gradient=True)
    training = Training(tmp_path / "run", *ONE, "--max_bad_steps", 2, fault=fault)
    assert training.wait() == 3, training.stderr
    assert "the gradient (every loss is finite) is not finite" in training.stderr
    assert list((tmp_path / "run" / "debug").glob("*.pth"))


@pytest.mark.parametrize("shade", [0, 127, 255])
def test_images_of_one_colour_in_batches_of_one_train(tmp_path, shade):
    """All patches have zero variance, and all neighbours are equally close."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.full((8, 8), shade, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    words = ["--dataset", "folder", "--data_path", tmp_path / "images", "--total_batch_size", 1, "--epochs", 1]
    for name in ("one", "two"):
        finish(tmp_path / name, *words)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "one").values())
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert bad_steps(tmp_path / "one") == [0, 0, 0]


def test_out_of_memory_gives_advice_and_half_the_batch_resumes(tmp_path):
    words = [*ONE, "--save_steps", 1]
    training = Training(tmp_path / "run", *words, fault=partial(inject.out_of_memory, 3))
    assert training.wait() == 2
    assert "CUDA out of memory" in training.stderr and "Halve --batch_size" in training.stderr
    assert "Traceback" not in training.stderr
    assert final(tmp_path / "run")["step"] == 2
    finish(tmp_path / "run", *words, "--batch_size", 4)
    assert final(tmp_path / "run")["step"] == STEPS
