"""torchrun with two agents on one machine, as on two nodes: one is lost and restarted. torchrun that is terminated."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.few import LAST_STEP, few
from tests.runs import TINY, assert_same_end, children, final, losses, metrics, start_ranks

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parent.parent.parent
STEPS = LAST_STEP["main_pretrain"]


def torchrun(folder, words, *place):
    """Start pretraining under torchrun with the launcher's arguments `place`."""
    command = [sys.executable, "-m", "torch.distributed.run", *place, "main_pretrain.py", *TINY]
    command += ["--output_dir", folder, "--save_steps", 1, *words]
    # Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE (torch 2.14), the second rendezvous with a restarted node fails.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=PROJECT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder, step, *agents):
    """Wait until the step is logged; all agents must still be running."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics(folder)):
        for agent in agents:
            assert agent.poll() is None, agent.communicate()[1][-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(*agents):
    """Wait for the agents and assert that their exit codes are 0."""
    said = [agent.communicate(timeout=180)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n-----\n".join(text[-4000:] for text in said)


def assert_equals_an_undisturbed_run(folder, words, tmp_path):
    ranks = start_ranks(2, tmp_path / "whole", *words)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    assert_same_end(tmp_path / "whole", folder)
    assert losses(folder) == losses(tmp_path / "whole")
    assert len(losses(folder)) == STEPS


def test_a_node_that_is_lost_and_comes_back_ends_in_the_same_curve(tmp_path):
    """The second node's agent and worker are killed; the first node's agent waits for a new one, and both resume."""
    folder, words = tmp_path / "run", few()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    place = "--nnodes=2 --nproc_per_node=1 --max-restarts=3 --rdzv_backend=c10d --rdzv_id=two --local-addr=127.0.0.1"
    place = [*place.split(), f"--rdzv_endpoint={meet}"]
    patience = "keep_alive_interval=1,keep_alive_max_attempt=3"
    stays = [*place, f"--rdzv_conf=is_host=true,{patience}"]
    goes = [*place, f"--rdzv_conf=is_host=false,{patience}"]
    first, second = torchrun(folder, words, *stays), torchrun(folder, words, *goes)
    wait_for_step(folder, 4, first, second)
    for pid in (second.pid, *children(second.pid)):
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    kept = final(folder)["step"]
    again = torchrun(folder, words, *goes)
    ended(first, again)
    assert 3 <= kept < STEPS, "killed before the end"
    assert len(json.loads((folder / "environment.json").read_text())) >= 2, "started twice"
    assert_equals_an_undisturbed_run(folder, words, tmp_path)


def test_torchrun_that_is_asked_to_stop_saves_and_resumes_later(tmp_path):
    folder, words = tmp_path / "run", few()
    place = ["--standalone", "--nproc_per_node=2"]
    launcher = torchrun(folder, words, *place)
    wait_for_step(folder, 3, launcher)
    launcher.terminate()
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert 3 <= final(folder)["step"] == metrics(folder)[-1]["step"] < STEPS
    assert not (folder / "run.lock").exists(), "the lock was released"
    ended(torchrun(folder, words, *place))
    assert_equals_an_undisturbed_run(folder, words, tmp_path)
