"""The run lock: only one process runs in a folder; the lock of an exited process does not block."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from tests.faults import inject
from tests.faults.few import few
from tests.runs import Training, finish, start_ranks
from util import lock
from util.lock import FolderInUse, RunLock

context = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.2)


def hold(folder, ready):
    """Hold the lock and start a child process that outlives this one, as a loading worker may."""
    RunLock(folder).acquire()
    child = context.Process(target=time.sleep, args=(60,))
    child.start()
    ready.put(child.pid)
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of `tmp_path`; yield it and the process id of its child."""
    ready = context.Queue()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    child = ready.get(timeout=30)
    yield process, child
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.join()


def test_the_lock_file_names_this_process_and_is_gone_after_release(tmp_path):
    held = RunLock(tmp_path)
    held.acquire()
    record = json.loads((tmp_path / lock.NAME).read_text())
    assert record["pid"] == os.getpid() and record["host"] == os.uname().nodename
    assert not held.lost()
    held.release()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_live_holder_is_respected_and_named(tmp_path, holder):
    expected = rf"process {holder[0].pid} on {os.uname().nodename} since 2\d\d\d-.*--output_dir.*run\.lock"
    with pytest.raises(FolderInUse, match=expected):
        RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == holder[0].pid


def test_a_killed_holder_does_not_block_while_it_is_a_zombie_and_its_child_lives(tmp_path, holder):
    process, child = holder
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    held = RunLock(tmp_path)
    held.acquire()
    assert not held.lost()
    held.release()
    os.kill(child, 0)


@pytest.mark.parametrize(
    "left",
    [
        '{"pid": 1, "host": "elsewhere", "since": "2026-01-01T00:00:00+00:00", "token": "0"}',
        '{"host": "vm", "boot": "b", "processes": "p", "pid": 1, "born": 3, "since": "now"}',  # of an earlier version
        '{"pid": 1, "ho',
        "",
    ],
)
def test_a_lock_file_of_an_exited_process_does_not_block(tmp_path, left):
    (tmp_path / lock.NAME).write_text(left)
    held = RunLock(tmp_path)
    held.acquire()
    assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()
    held.release()


def test_another_machine_that_acquired_the_folder_is_noticed_and_its_file_left_alone(tmp_path):
    """On some file systems, locks are not visible to other machines."""
    held = RunLock(tmp_path)
    held.acquire()
    (tmp_path / lock.NAME).unlink()
    assert not held.lost(), "a missing file belongs to nobody"
    (tmp_path / lock.NAME).write_text('{"host": "elsewhere", "token": "1"}')
    assert held.lost()
    held.release()
    assert json.loads((tmp_path / lock.NAME).read_text())["host"] == "elsewhere"


def test_of_many_that_start_together_one_wins(tmp_path):
    results, go, stop = context.Queue(), context.Event(), context.Event()

    def contend():
        go.wait()
        try:
            RunLock(tmp_path).acquire()
            results.put("held")
            stop.wait()
        except FolderInUse:
            results.put("refused")

    (tmp_path / lock.NAME).write_text('{"pid": 1}')  # a stale file: all processes try to replace it
    processes = [context.Process(target=contend) for _ in range(6)]
    for process in processes:
        process.start()
    go.set()
    assert sorted(results.get(timeout=30) for _ in processes) == ["held", *["refused"] * 5]
    stop.set()
    for process in processes:
        process.join()


def test_a_lock_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(OSError):
        RunLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_reported_and_the_run_starts(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    held = RunLock(tmp_path)
    held.acquire()
    assert "no file locks" in caplog.text and not held.lost()
    held.release()


def test_a_second_start_is_refused_and_the_first_continues(tmp_path):
    folder = tmp_path / "run"
    first = Training(folder, *few("--epochs", 400))
    first.wait_for_step(2)
    holder = json.loads((folder / lock.NAME).read_text())["pid"]
    second = [*start_ranks(2, folder, *few("--epochs", 400)), Training(folder, *few("--epochs", 1), "--overwrite")]
    assert [process.wait() for process in second] == [2, 2, 2]
    assert f"process {holder} on" in second[2].stderr
    first.send(signal.SIGTERM)
    assert first.wait() == 75
    assert not (folder / lock.NAME).exists()


def test_a_run_whose_folder_was_taken_over_stops_without_saving(tmp_path):
    """As after a long suspension during which another machine resumed the run."""
    folder = tmp_path / "run"
    training = Training(folder, *few("--epochs", 400, "--save_steps", 5))
    training.wait_for_step(2)
    (folder / "other").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    (folder / "other").rename(folder / lock.NAME)
    assert training.wait() == 4, training.stderr
    assert "another process has acquired" in training.stderr and "Traceback" not in training.stderr
    assert json.loads((folder / lock.NAME).read_text())["host"] == "elsewhere"


def test_a_kill_does_not_block_the_next_start_and_a_refusal_leaves_no_lock(tmp_path):
    folder, words = tmp_path / "run", few("--epochs", 1)
    Training(folder, *words, "--save_steps", 1).kill_at(2)
    assert (folder / lock.NAME).exists()
    refused = Training(folder, *words, "--mask_ratio", 0.5)
    assert refused.wait() == 2 and "mask_ratio" in refused.stderr
    assert not (folder / lock.NAME).exists()
    finish(folder, *words)
    assert not (folder / lock.NAME).exists()
    assert "is finished" in finish(folder, *words)
    assert not (folder / lock.NAME).exists()
    assert "is finished" in finish(folder, *words, fault=inject.read_only_folder), "nothing has to be written"
    refused = Training(folder, *words, "--overwrite", fault=inject.read_only_folder)
    assert refused.wait() == 2 and "cannot be created or written (Read-only file system)" in refused.stderr
    assert (folder / "result.json").exists()
    new = Training(tmp_path / "new", "--resume", "nowhere.pth")
    assert new.wait() == 2
    assert not (tmp_path / "new").exists(), "a start that is refused leaves nothing"
