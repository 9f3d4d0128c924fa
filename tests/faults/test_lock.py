"""One run in a folder at a time: living holders are respected, dead ones are not in the way."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.faults import inject
from tests.faults.few import few
from tests.runs import Training, finish, start_ranks
from util import lock
from util.lock import FolderInUse, RunLock


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.02)


def write(folder, **holder):
    (folder / lock.NAME).write_text(json.dumps(holder))


def held_by(process, **changes):
    return {**lock._here(), **lock._process(process), "since": "now", **changes}


@pytest.fixture
def other():
    """A process that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_it_names_this_process_and_is_gone_after_release(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    words = json.loads((tmp_path / lock.NAME).read_text())
    assert words["pid"] == os.getpid() and words["host"] == os.uname().nodename
    assert not held.lost()
    held.release()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_living_process_of_this_machine_is_respected_at_once(tmp_path, other):
    write(tmp_path, **held_by(other.pid))
    with pytest.raises(FolderInUse, match=rf"process {other.pid} on .*--output_dir.*run\.lock"):
        RunLock(tmp_path).take()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == other.pid


def test_dead_zombie_and_renumbered_processes_are_not_in_the_way(tmp_path, other):
    renumbered = held_by(other.pid)
    renumbered["born"] -= 1
    before = held_by(other.pid)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked about it: a zombie
    for holder in (before, renumbered, held_by(os.getpid())):
        write(tmp_path, **holder)
        held = RunLock(tmp_path)
        held.take()
        assert not held.lost()
        held.release()
    other.wait()
    write(tmp_path, **before)
    held = RunLock(tmp_path)
    held.take()
    held.release()


@pytest.mark.parametrize("holder", [{"host": "elsewhere", "pid": 1, "born": 1}, {}])
def test_a_holder_elsewhere_without_a_sign_of_life_is_followed(tmp_path, holder):
    write(tmp_path, **holder)
    began = time.monotonic()
    held = RunLock(tmp_path)
    held.take()
    assert time.monotonic() - began >= 0.4, "it was watched"
    held.release()


def test_a_holder_elsewhere_that_gives_signs_of_life_is_respected(tmp_path, monkeypatch):
    held = RunLock(tmp_path)
    held.take()
    monkeypatch.setattr(lock, "_here", lambda: {"host": "elsewhere"})
    with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        RunLock(tmp_path).take()
    held.release()


def test_a_restarted_machine_counts_as_another(tmp_path, other):
    write(tmp_path, **held_by(other.pid, boot="an earlier one"))
    held = RunLock(tmp_path)
    held.take()
    held.release()


def test_one_that_was_taken_for_dead_notices_and_leaves_the_new_lock_alone(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    (tmp_path / lock.NAME).unlink()
    assert not first.lost(), "a file that vanished was taken by nobody"
    second.take()
    assert first.lost() and not second.lost()
    first.release()
    assert (tmp_path / lock.NAME).exists()
    second.release()


def test_of_many_that_start_together_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    results, go, stop = context.Queue(), context.Event(), context.Event()

    def contend():
        go.wait()
        try:
            RunLock(tmp_path).take()
            results.put("held")
            stop.wait()
        except FolderInUse:
            results.put("refused")

    processes = [context.Process(target=contend) for _ in range(6)]
    for process in processes:
        process.start()
    go.set()
    assert sorted(results.get(timeout=30) for _ in processes) == ["held", *["refused"] * 5]
    stop.set()
    for process in processes:
        process.join()


def test_a_lock_that_cannot_be_read_is_an_error_and_no_waiting(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(OSError):
        RunLock(tmp_path).take()


def test_signs_of_life_end_with_the_release(tmp_path):
    held = RunLock(tmp_path)
    held.take()
    before = (tmp_path / lock.NAME).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / lock.NAME).stat().st_mtime_ns > before
    held.release()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "run lock"]


def test_a_second_start_is_refused_and_the_first_goes_on(tmp_path):
    folder = tmp_path / "run"
    first = Training(folder, *few("--epochs", 400))
    first.wait_for_step(2)
    holder = json.loads((folder / lock.NAME).read_text())["pid"]
    second = [*start_ranks(2, folder, *few("--epochs", 400)), Training(folder, *few("--epochs", 1), "--overwrite")]
    assert [process.wait() for process in second] == [2, 2, 2]
    assert f"process {holder} on" in second[2].said
    first.send(signal.SIGTERM)
    assert first.wait() == 75
    assert not (folder / lock.NAME).exists()


def test_a_run_whose_folder_was_taken_over_stops_without_saving(tmp_path):
    """It slept so long that another machine went on in its place."""
    folder = tmp_path / "run"
    training = Training(folder, *few("--epochs", 400, "--save_steps", 5))
    training.wait_for_step(2)
    (folder / "other").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    (folder / "other").rename(folder / lock.NAME)
    assert training.wait() == 4, training.said
    assert "another process has taken over" in training.said and "Traceback" not in training.said
    assert json.loads((folder / lock.NAME).read_text())["host"] == "elsewhere"


def test_a_kill_does_not_block_the_next_start_and_a_refusal_leaves_no_lock(tmp_path):
    folder, words = tmp_path / "run", few("--epochs", 1)
    Training(folder, *words, "--save_steps", 1).kill_at(2)
    assert (folder / lock.NAME).exists()
    refused = Training(folder, *words, "--mask_ratio", 0.5)
    assert refused.wait() == 2 and "mask_ratio" in refused.said
    assert not (folder / lock.NAME).exists()
    finish(folder, *words)
    assert not (folder / lock.NAME).exists()
    assert "is finished" in finish(folder, *words)
    assert not (folder / lock.NAME).exists()
    assert "is finished" in finish(folder, *words, fault=inject.read_only_folder), "nothing need be written"
    refused = Training(folder, *words, "--overwrite", fault=inject.read_only_folder)
    assert refused.wait() == 2 and "cannot be made or written (Read-only file system)" in refused.said
    assert (folder / "result.json").exists()
    new = Training(tmp_path / "new", "--resume", "nowhere.pth")
    assert new.wait() == 2
    assert not (tmp_path / "new").exists(), "a start that is refused leaves nothing"
