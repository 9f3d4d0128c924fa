"""Runs in real processes: kills, signals, damaged files, other options."""

import contextlib
import errno
import functools
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import main_pretrain
import util.exits
import util.folder
import util.run
from tests.runs import TINY, Training, assert_same_end, final, finish, losses, metrics
from util import checkpoint
from util.distributed import STOP_SIGNALS
from util.folder import RunFolder
from util.records import Records

STEPS_PER_EPOCH = 5
LAST_STEP = 3 * STEPS_PER_EPOCH


@pytest.fixture(scope="module")
def completed(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("completed") / "run"
    finish(folder)
    return folder


def test_the_folder_of_a_finished_run_is_complete(completed):
    names = {path.name for path in completed.iterdir()}
    assert {"options.yaml", "environment.json", "train.log", "log.txt", "metrics.jsonl", "result.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (completed / "checkpoints").iterdir()} == {
        "last.pth",
        "previous.pth",
        "epoch-0003.pth",
    }
    assert [line["step"] for line in metrics(completed)] == list(range(1, LAST_STEP + 1))
    assert {"loss", "reconstruction", "neighbor", "lr", "grad_norm", "images_per_s", "data_wait"} <= metrics(completed)[
        0
    ].keys()
    epochs = [json.loads(line) for line in (completed / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    mean = sum(line["loss"] for line in metrics(completed)[:STEPS_PER_EPOCH]) / STEPS_PER_EPOCH
    assert epochs[0]["train_loss"] == pytest.approx(mean, rel=1e-6)
    result = json.loads((completed / "result.json").read_text())
    assert (result["steps"], result["images_seen"]) == (LAST_STEP, LAST_STEP * 256)
    options = yaml.safe_load((completed / "options.yaml").read_text())
    assert options["terms"]["neighbor"]["weight"] == 5e-5
    assert options["total_batch_size"] == 256 and options["mean"] == [0.5], "every default is spelled out"
    assert torch.load(completed / "checkpoints" / "last.pth", weights_only=True)["epoch"] == 3


def test_the_loss_of_a_step_is_the_reconstruction_plus_the_weighted_term(completed):
    for line in metrics(completed):
        assert line["loss"] == pytest.approx(line["reconstruction"] + 5e-5 * line["neighbor"], abs=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_anywhere_ends_like_an_uninterrupted_one(completed, tmp_path, workers):
    chance = random.Random(workers)
    folder = tmp_path / "run"
    for kill in sorted(chance.sample(range(1, LAST_STEP), 3)):
        Training(folder, "--num_workers", workers, "--save_steps", 2).kill_at(kill)
    finish(folder, "--num_workers", workers, "--save_steps", 2)
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)
    starts = json.loads((folder / "environment.json").read_text())
    assert {line["run_id"] for line in metrics(folder)} <= {start["run_id"] for start in starts}
    assert ["seconds" in start for start in starts] == [False] * (len(starts) - 1) + [True]  # of starts that ended
    assert 0 < starts[-1]["cpu_seconds"] < 60 and 0 < starts[-1]["seconds"] < 600


def test_epoch_means_do_not_depend_on_an_interruption(completed, tmp_path):
    Training(tmp_path / "run", "--save_steps", 1).kill_at(STEPS_PER_EPOCH + 3)
    finish(tmp_path / "run", "--save_steps", 1)

    def means(folder):
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "run_id"} for line in lines]

    assert means(tmp_path / "run") == means(completed)


def test_a_kill_inside_a_save_leaves_a_checkpoint_to_resume_from(completed, tmp_path):
    folder = tmp_path / "run"
    Training(folder, "--save_steps", 2).kill_at(4)
    leftover = folder / "checkpoints" / ".last.pth.tmp"
    leftover.write_bytes((folder / "checkpoints" / "last.pth").read_bytes()[:1000])
    said = finish(folder, "--save_steps", 2)
    assert "removed .last.pth.tmp" in said
    assert not leftover.exists()
    assert_same_end(completed, folder)


def last_line(run):
    return (run / "train.log").read_text().splitlines()[-1]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_once_and_exits_with_75(completed, tmp_path, number):
    training = Training(tmp_path / "run")
    training.wait_for_step(3)
    training.send(number)
    assert training.wait() == 75
    assert training.stderr.count(words := f"stopped by {signal.Signals(number).name} after step") == 1
    assert f"INFO {words}" in last_line(tmp_path / "run")
    saved = final(tmp_path / "run")
    assert saved["step"] == metrics(tmp_path / "run")[-1]["step"]
    finish(tmp_path / "run")
    assert_same_end(completed, tmp_path / "run")


@pytest.mark.parametrize("error", [None, ValueError("bad input"), KeyError("defect")])
def test_a_caller_who_lives_on_has_its_signals_back(error):
    def train(argv):
        assert signal.getsignal(signal.SIGINT) not in before
        if error:
            raise error

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(KeyError) if isinstance(error, KeyError) else contextlib.nullcontext():
        assert util.exits.run_program(train, []) == (2 if error else 0)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_signal_after_the_one_that_stopped_a_run_does_not_change_its_exit_code():
    def train(argv):
        signal.raise_signal(signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert util.exits.run_program(train, []) == 75
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, act in before.items():
            signal.signal(number, act)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeroed"])
def test_a_damaged_checkpoint_is_stepped_back_from(completed, tmp_path, damage):
    folder = tmp_path / "run"
    Training(folder, "--save_steps", 2).kill_at(8)
    last = folder / "checkpoints" / "last.pth"
    data = bytearray(last.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        data = bytearray(len(data))
    last.unlink()  # so that a second hard link is not damaged
    last.write_bytes(data)
    said = finish(folder, "--save_steps", 2)
    assert "previous.pth instead" in said
    assert_same_end(completed, folder)


def test_a_folder_with_only_damaged_checkpoints_is_refused_and_kept(tmp_path):
    folder = tmp_path / "run"
    Training(folder, "--save_steps", 2).kill_at(4)
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
        path.write_bytes(b"nothing")
    training = Training(folder)
    assert training.wait() == 2
    assert "is valid" in training.stderr and "--overwrite" in training.stderr
    assert (folder / "checkpoints" / "last.pth").read_bytes() == b"nothing"


def test_a_finished_run_is_finished(completed):
    before = (completed / "checkpoints" / "last.pth").stat().st_mtime_ns
    assert "is finished" in finish(completed)
    assert (completed / "checkpoints" / "last.pth").stat().st_mtime_ns == before


def test_other_options_are_refused_in_a_table_and_machine_options_are_not(completed, tmp_path):
    before = (completed / "checkpoints" / "last.pth").read_bytes()
    training = Training(completed, "--mask_ratio", "0.5", "--terms.neighbor.weight", "1e-4", "--depth", "1")
    assert training.wait() == 2
    for words in ("mask_ratio", "0.75 -> 0.5", "terms.neighbor.weight", "5e-05 -> 0.0001", "depth", "2 -> 1"):
        assert words in training.stderr
    assert "allow_change" not in training.stderr, "a model of another shape cannot be accepted"
    assert (completed / "checkpoints" / "last.pth").read_bytes() == before
    assert "is finished" in finish(completed, "--log_every", "7", "--num_workers", "1")


def test_a_change_that_is_accepted_by_name_resumes(tmp_path):
    folder = tmp_path / "run"
    finish(folder, "--epochs", "1")
    training = Training(folder, "--epochs", "2")
    assert training.wait() == 2
    assert "--allow_change epochs" in training.stderr
    finish(folder, "--epochs", "2", "--allow_change", "epochs")
    assert final(folder)["step"] == 2 * STEPS_PER_EPOCH
    assert yaml.safe_load((folder / "options.yaml").read_text())["epochs"] == 2


def test_another_total_batch_size_resumes_after_as_many_images(tmp_path):
    accepted = ["--total_batch_size", "512", "--allow_change", "total_batch_size"]
    Training(tmp_path / "run", "--save_steps", 1).kill_at(8)
    step = final(tmp_path / "run")["step"] - STEPS_PER_EPOCH  # of the second epoch
    said = finish(tmp_path / "run", *accepted)
    finish(tmp_path / "completed", *accepted)
    first = 1352 // 512 + step * 256 // 512
    assert f"step {STEPS_PER_EPOCH + step} becomes step {first}" in said
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path / "completed")}
    run_id = metrics(tmp_path / "run")[-1]["run_id"]
    there = {line["step"]: line["lr"] for line in metrics(tmp_path / "run") if line["run_id"] == run_id}
    assert there == {step: rate for step, rate in rates.items() if step > first}
    assert max(there) == 3 * (1352 // 512)


def contents(folder):
    """Return the bytes of every file in a folder, except the lock file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_term_of_another_shape_is_refused_with_a_message_and_nothing_is_changed(tmp_path):
    words = ["--method", "sup_mae", "--epochs"]
    finish(tmp_path / "run", *words, 1, "--terms.label.hidden", 16)
    before = contents(tmp_path / "run")
    accepted = ["--terms.label.hidden", 8, "--allow_change", "epochs", "terms.label.hidden"]
    training = Training(tmp_path / "run", *words, 2, *accepted)
    assert training.wait() == 2
    assert "is of another model" in training.stderr and "terms.label.head" in training.stderr
    assert contents(tmp_path / "run") == before
    last = tmp_path / "run" / "checkpoints" / "last.pth"
    training = Training(tmp_path / "other", *words, 2, *accepted, "--resume", last)
    assert training.wait() == 2 and "is of another model" in training.stderr
    assert contents(tmp_path / "other") == {}


def test_fewer_epochs_than_are_done_are_refused_and_an_earlier_file_is_named(tmp_path):
    folder, fewer = tmp_path / "run", ["--epochs", 1, "--allow_change", "epochs"]
    Training(folder, "--save_steps", 1, "--save_every", 1).kill_at(STEPS_PER_EPOCH + 3)
    step, before = final(folder)["step"], contents(folder)
    training = Training(folder, *fewer)
    assert training.wait() == 2
    first = folder / "checkpoints" / "epoch-0001.pth"
    assert f"step {step} is beyond the 5 steps of --epochs 1: resume an earlier file, --resume {first}, or" in (
        training.stderr
    )
    assert contents(folder) == before
    finish(folder, *fewer, "--resume", first)
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == result["last"]["step"] == final(folder)["step"] == STEPS_PER_EPOCH
    assert "is finished" in finish(folder, *fewer)
    finish(folder, "--epochs", 2, "--allow_change", "epochs")
    first.unlink()
    training = Training(folder, *fewer)
    assert training.wait() == 2 and "step 10 is beyond the 5 steps of --epochs 1: give more epochs" in training.stderr


def started(folder, *words, data="digits"):
    """Return the folder of a run that has just been started in this process."""
    run = RunFolder(main_pretrain.parse_options([*TINY, "--output_dir", str(folder), *words]))
    run.find_start(data)
    run.begin(data)
    run.leave()
    return run


def test_a_finished_run_without_its_checkpoints_is_refused_and_kept(tmp_path):
    started(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    before = contents(tmp_path)
    for words in ([], ["--lr", "1"]):
        with pytest.raises(ValueError, match=r"is finished .*, but its checkpoints are gone: use another --output_dir"):
            started(tmp_path, *words)
        assert contents(tmp_path) == before
    started(tmp_path, "--overwrite")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("own", "beside", "kept", "removed"),
    [
        ({"best.pth": (2, 50)}, {}, (2, 50), False),
        ({"best.pth": (3, 60)}, {}, None, True),  # of a later epoch, which is discarded
        ({"best.pth": (2, 70)}, {}, None, True),  # of the same epoch in another run
        ({"best.pth": (3, 60)}, {"epoch-0002.pth": (2, 50)}, (2, 50), False),
        ({"best.pth": (2, 50, 12)}, {}, None, True),  # after more steps of the same epoch
        ({}, {"best.pth": (2, 50)}, (2, 50), False),
        ({}, {"best.pth": (3, 60)}, None, False),
        ({"best.pth": None}, {"best.pth": (2, 50)}, (2, 50), False),  # damaged
    ],
)
def test_the_best_checkpoint_is_of_the_best_epoch_that_the_run_resumes_with(
    own, beside, kept, removed, tmp_path, caplog
):
    def save(path, number, value, step=10):
        best = {"name": "acc1", "value": value, "epoch": number - 1, "step": 10}
        checkpoint.save(path, {"format": 1, "epoch": number, "step": step, "best": best})

    folder = started(tmp_path / "run")
    start = tmp_path / "other" / "epoch-0004.pth"
    start.parent.mkdir()
    start.write_bytes(b"start")
    for place, files in ((folder.checkpoints, own), (start.parent, beside)):
        for name, saved in files.items():
            save(place / name, *saved) if saved else (place / name).write_bytes(b"")
    folder.adopt(start, {"name": "acc1", "value": 50, "epoch": 1, "step": 10}, is_best=False)
    best = folder.checkpoints / "best.pth"
    found = checkpoint.load(best) if best.exists() else None
    assert (found and (found["epoch"], found["best"]["value"])) == kept
    assert (f"removed {best}: it is not of the best epoch that {start} records" in caplog.text) == removed
    assert (folder.checkpoints / "last.pth").read_bytes() == b"start"
    folder.adopt(start, {"name": "acc1", "value": 60, "epoch": 3, "step": 20}, is_best=True)
    assert best.read_bytes() == b"start"


@pytest.mark.parametrize(
    ("words", "data", "dropped"),
    [
        (["--num_workers", "1"], "digits", ""),
        (["--lr", "1", "--mask_ratio", "0.5"], "digits", "lr, mask_ratio"),
        ([], "other", "data (files and labels)"),
    ],
)
def test_curves_of_another_run_that_saved_no_checkpoint_are_removed(words, data, dropped, tmp_path, caplog):
    started(tmp_path)
    curves = [tmp_path / name for name in ("log.txt", "metrics.jsonl", "events.out.tfevents.1")]
    for path in (*curves, tmp_path / "train.log"):
        path.write_text("earlier\n")
    started(tmp_path, *words, data=data)
    assert [path.exists() for path in curves] == [not dropped] * 3
    said = f"removed log.txt of an earlier start, not saved, with another {dropped}"
    assert (said in caplog.text) == bool(dropped)
    assert (tmp_path / "train.log").exists()
    (tmp_path / "log.txt").write_text("saved\n")
    checkpoint.save(tmp_path / "checkpoints" / "last.pth", {"format": 1})
    run = RunFolder(main_pretrain.parse_options([*TINY, "--output_dir", str(tmp_path), "--seed", "5"]))
    run.begin(data)
    assert (tmp_path / "log.txt").exists(), "the options of a checkpoint are compared, and its lines are kept"


def test_a_run_stopped_just_before_its_result_has_the_same_result(tmp_path):
    finish(tmp_path / "run", "--epochs", 1)
    path = tmp_path / "run" / "result.json"
    before = json.loads(path.read_text())
    path.unlink()
    finish(tmp_path / "run", "--epochs", 1)
    after = json.loads(path.read_text())
    assert after["last"] == before["last"] and after["last"]["epoch"] == 0
    assert after["steps"] == before["steps"]


def test_another_precision_on_another_device_is_reported(tmp_path):
    finish(tmp_path / "run", "--epochs", 1)
    saved = final(tmp_path / "run")
    assert saved["amp"] == "none"
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pth", saved | {"amp": "bf16"})
    said = finish(tmp_path / "run", "--epochs", 2, "--allow_change", "epochs")
    assert "resuming with precision full instead of bf16" in said


def test_overwrite_starts_from_scratch_and_leaves_other_files(completed, tmp_path):
    folder = tmp_path / "run"
    finish(folder, "--epochs", "1", "--seed", "7")
    (folder / "notes.md").write_text("mine")
    finish(folder, "--overwrite")
    assert (folder / "notes.md").read_text() == "mine"
    assert_same_end(completed, folder)
    assert len(metrics(folder)) == LAST_STEP


def test_overwrite_also_clears_folders_that_are_links(tmp_path):
    (tmp_path / "scratch" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "samples" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "run" / "samples" / "latest").symlink_to(tmp_path / "scratch")
    (tmp_path / "run" / "notes.md").write_text("mine")
    checkpoint.save(tmp_path / "run" / "checkpoints" / "last.pth", {"format": 1})
    folder = util.folder.RunFolder(SimpleNamespace(output_dir=tmp_path / "run"))
    folder._clear()
    assert checkpoint.candidates(folder.checkpoints) == [] and os.listdir(tmp_path / "scratch") == []
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "notes.md"], "a link stays, a folder does not"


def test_a_launcher_that_starts_again_does_not_overwrite_again(completed, tmp_path):
    folder = tmp_path / "run"
    finish(folder, "--epochs", "1", "--seed", "7")

    def attempt(number, job="a"):
        environment = {"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_RESTART_COUNT": str(number)}
        return Training(folder, "--overwrite", "--save_steps", 1, environment=environment)

    attempt(0).kill_at(7)
    second = attempt(1)
    assert second.wait() == 0 and "resuming from" in second.stderr
    assert_same_end(completed, folder)
    assert losses(folder) == losses(completed)
    third = attempt(1, job="b")
    assert third.wait() == 0 and "resuming from" not in third.stderr, "another job's words are meant as they stand"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"jpg")
    training = Training(tmp_path / "photos")
    assert training.wait() == 2
    assert "cat.jpg" in training.stderr
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_a_start_that_was_killed_at_once_is_not_in_the_way(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".options.yaml.tmp").write_text("seed: ")  # before anything else is written
    finish(folder, "--epochs", "1")


def test_a_power_cut_that_empties_the_records_does_not_end_a_run(tmp_path):
    finish(tmp_path / "run", "--epochs", "1")
    (tmp_path / "run" / "environment.json").write_text("")
    finish(tmp_path / "run", "--epochs", "2", "--allow_change", "epochs")
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 1


def no_space():
    def refuse(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    util.folder.write_text = refuse


def test_a_disk_that_is_full_at_the_start_is_reported(tmp_path):
    training = Training(tmp_path / "run", fault=no_space)
    assert training.wait() == 2
    assert "--output_dir" in training.stderr and "No space left" in training.stderr
    assert "Traceback" not in training.stderr


def last_save_fails():
    def refuse(path, state):
        if state["epoch"] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state)

    save, checkpoint.save = checkpoint.save, refuse


def test_a_run_whose_end_could_not_be_saved_is_not_finished(tmp_path):
    training = Training(tmp_path / "run", "--epochs", "1", "--save_steps", 2, fault=last_save_fails)
    assert training.wait() == 4
    assert training.stderr.count(words := "training is done, but its end could not be saved") == 1
    assert f"ERROR {words}" in last_line(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    finish(tmp_path / "run", "--epochs", "1")
    assert final(tmp_path / "run")["epoch"] == 1


def step_is_defective(error):
    def fail(run):
        raise error

    util.run.Run.after_step = fail


@pytest.mark.parametrize("error", [KeyError("a key"), ValueError("a value")])
def test_a_defect_leaves_its_traceback_in_the_log(tmp_path, error):
    """A ValueError of training itself is not invalid input: it has a traceback too."""
    training = Training(tmp_path / "run", fault=functools.partial(step_is_defective, error))
    assert training.wait() == 1
    said = (tmp_path / "run" / "train.log").read_text()
    assert "ERROR a bug ended the run\nTraceback (most recent call last):\n" in said and ", in fail\n" in said
    assert said.endswith(f"{type(error).__name__}: {error}\n")


def test_weights_alone_are_no_run_to_resume(completed, tmp_path):
    saved = final(completed)
    checkpoint.save(tmp_path / "weights.pth", {name: saved[name] for name in ("format", "model", "options")})
    training = Training(tmp_path / "run", "--resume", tmp_path / "weights.pth")
    assert training.wait() == 2
    assert "use --init_from" in training.stderr and "Traceback" not in training.stderr


def test_a_wrong_resume_lists_what_there_is(completed):
    training = Training(completed, "--resume", "nowhere.pth")
    assert training.wait() == 2
    assert "nowhere.pth" in training.stderr and "last.pth" in training.stderr


def test_resuming_from_a_named_checkpoint_of_another_folder(completed, tmp_path):
    finish(tmp_path / "first", "--save_every", "1")
    finish(tmp_path / "second", "--resume", tmp_path / "first" / "checkpoints" / "epoch-0001.pth")
    assert_same_end(completed, tmp_path / "second")
    assert [line["step"] for line in metrics(tmp_path / "second")][0] == STEPS_PER_EPOCH + 1


def test_a_complete_checkpoint_of_another_folder_is_resumed_in_a_new_one(completed, tmp_path):
    finish(tmp_path / "run", "--resume", completed / "checkpoints" / "epoch-0003.pth")
    assert_same_end(completed, tmp_path / "run")
    assert "is finished" in finish(tmp_path / "run")


def test_only_the_newest_epoch_files_are_kept(tmp_path):
    finish(tmp_path / "run", "--save_every", "1", "--keep", "2")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert names == ["epoch-0002.pth", "epoch-0003.pth"]


def test_a_loss_that_stays_bad_stops_with_a_dump(tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, "--terms.neighbor.weight", "1e300", "--max_bad_steps", "3")
    code = training.wait()
    assert code == 3, training.stderr
    assert training.stderr.count(words := "3 steps in a row") == 1
    assert f"ERROR {words}" in last_line(folder)
    record = json.loads(next((folder / "debug").glob("bad-step-*.json")).read_text())
    newest = record["recent_by_process"][0][-1]
    assert len(newest["files"]) == 256 and newest["files"][0].startswith("digits")
    assert record["not_finite"] == ["loss"]
    saved = checkpoint.load(next((folder / "debug").glob("bad-step-*.pth")))
    assert all(torch.isfinite(value).all() for value in saved["model"].values())
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("seconds", "step", "device", "logged"),
    [(60, 2, "cpu", True), (2, 2, "cpu", False), (60, 3, "cpu", False), (60, 2, "meta", False)],
)
def test_slow_steps_on_a_cpu_log_how_long_the_run_takes(seconds, step, device, logged, caplog, monkeypatch):
    monkeypatch.setattr("util.records.time.monotonic", lambda: 1000.0)
    records = Records.__new__(Records)
    records.state = SimpleNamespace(stepper=SimpleNamespace(step=step))
    records.processes = SimpleNamespace(device=torch.device(device))
    records.options = SimpleNamespace(log_every=20)
    records._first_step_at, records._first_step, records._total_steps = 1000.0 - seconds, 0, 62
    with caplog.at_level("INFO"):
        records._announce_slow_steps()
    assert ("a step takes 60 s: the remaining 60 steps take about 1:00:00 at this speed" in caplog.text) == logged
