"""The Slurm script with mocks of Slurm's commands: after a signal it saves, is requeued, and resumes automatically."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import TINY, final, losses, metrics

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cluster(tmp_path):
    """Create a folder with mocks of Slurm's commands for one task."""
    folder = tmp_path / "bin"
    folder.mkdir()
    srun = '#!/bin/bash\nshift\nexport SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1\nexec "$@"\n'
    scontrol = f'#!/bin/bash\necho "$@" >>{tmp_path}/scontrol.log\n[[ "$1" == show ]] && echo localhost\nexit 0\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "MASTER_ADDR": "localhost",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }


def submit(cluster, folder, *words):
    command = ["bash", "scripts/slurm.sh", *TINY, "--output_dir", str(folder), *words]
    return subprocess.Popen(
        command, cwd=PROJECT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_job_that_is_preempted_requeues_itself_and_resumes(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", "--epochs", "16")
    deadline = time.monotonic() + 120
    while len(metrics(tmp_path / "run")) < 3:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=180)
    assert job.returncode == 0, err
    assert "is requeued" in out
    assert "requeue 17" in (tmp_path / "scontrol.log").read_text()
    stopped_at = final(tmp_path / "run")["step"]
    assert 0 < stopped_at < 80

    again = submit(cluster, tmp_path / "run", "--epochs", "16")
    out, err = again.communicate(timeout=180)
    assert again.returncode == 0, err
    assert f"step {stopped_at}" in err, "it resumed from there"
    assert sorted(losses(tmp_path / "run")) == list(range(1, 81))
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1


def test_a_job_that_fails_is_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path / "run", "--epochs", "nonsense")
    _, err = job.communicate(timeout=180)
    assert job.returncode == 2
    assert "nonsense" in err
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
