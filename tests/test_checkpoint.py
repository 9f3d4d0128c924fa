"""Checkpoints: written atomically, verified, and safe to load."""

import argparse
import contextlib
import os
import pickle
import resource

import pytest
import torch

from data.files import link
from options import OptionError
from tests.test_sources import put
from util import checkpoint
from util.checkpoint import CheckpointError


def state(value=1.0):
    return {"format": 1, "model": {"weight": torch.full((100,), value)}, "epoch": 3}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "last.pth", state())
    loaded = checkpoint.load(tmp_path / "last.pth")
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["model"]["weight"], torch.ones(100))
    assert os.listdir(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("after_bytes", [0, 100, 700])
def test_a_save_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, after_bytes):
    path = tmp_path / "last.pth"
    checkpoint.save(path, state(1.0))

    def broken(value, file):
        file.write(b"x" * after_bytes)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, state(2.0))
    monkeypatch.undo()
    assert checkpoint.load(path)["model"]["weight"][0] == 1.0
    assert os.listdir(tmp_path) == ["last.pth"]


@contextlib.contextmanager
def disk_full_after(size):
    """Let every file end at `size` bytes: a write fails as on a full disk, after a part of it was written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 5_000, 100_000, 500_001])
def test_a_disk_that_becomes_full_inside_a_save_is_an_oserror(tmp_path, size):
    """torch.save raises a RuntimeError, whose context is the error of the disk, for some of these sizes."""
    large = {f"w{number}": torch.zeros(100, 1000) for number in range(2)}
    with disk_full_after(size), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path / "last.pth", state() | {"model": large})
    assert os.listdir(tmp_path) == []


def test_an_error_of_torch_itself_is_not_an_oserror(tmp_path, monkeypatch):
    def broken(value, file):
        raise RuntimeError("not the disk")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="not the disk"):
        checkpoint.save(tmp_path / "last.pth", state())


def test_a_link_that_exists_is_replaced_without_leftovers(tmp_path):
    """After a restart `best.pth` may already be a link to `last.pth`."""
    checkpoint.save(tmp_path / "last.pth", state())
    for _ in range(2):
        assert link(tmp_path / "last.pth", tmp_path / "best.pth", or_copy=True)
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "last.pth"]
    assert os.path.samefile(tmp_path / "last.pth", tmp_path / "best.pth")


def test_the_previous_file_stays_beside_the_last(tmp_path):
    for value in (1.0, 2.0, 3.0):
        checkpoint.keep_previous(tmp_path)
        checkpoint.save(tmp_path / "last.pth", state(value))
    assert checkpoint.load(tmp_path / "last.pth")["model"]["weight"][0] == 3.0
    assert checkpoint.load(tmp_path / "previous.pth")["model"]["weight"][0] == 2.0


def test_the_newest_epochs_are_kept_and_come_first_whatever_their_number(tmp_path):
    for epoch in (9980, 9999, 10000, 10020):
        checkpoint.save(tmp_path / f"epoch-{epoch:04d}.pth", state())
    checkpoint.drop_old_epochs(tmp_path, 3)
    names = [path.name for path in checkpoint.candidates(tmp_path)]
    assert names == ["epoch-10020.pth", "epoch-10000.pth", "epoch-9999.pth"]


def test_the_rest_of_an_interrupted_save_is_removed_by_name(tmp_path):
    (tmp_path / ".last.pth.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path / "last.pth", state())
    (tmp_path / ".last.pth.tmp").write_bytes(b"half")
    assert checkpoint.remove_leftovers(tmp_path) == [".last.pth.tmp"]
    assert os.listdir(tmp_path) == ["last.pth"]


def test_every_flipped_bit_of_the_data_is_noticed(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, state())
    good = path.read_bytes()
    payload = torch.ones(100).numpy().tobytes()
    start = good.index(payload)
    for offset in (0, 1, 200, 399):
        bad = bytearray(good)
        bad[start + offset] ^= 4
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 1, 50, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = tmp_path / "last.pth"
    checkpoint.save(path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.raises(CheckpointError, match="valid checkpoint"):
        checkpoint.load(path)


def test_a_missing_unknown_or_newer_file_is_refused_with_advice(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save({"model": {}}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match="--init_from"):
        checkpoint.load(tmp_path / "mae.pth")
    torch.save({"format": 99}, tmp_path / "future.pth")
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(tmp_path / "future.pth")
    torch.save({"format": "another's"}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="format another's"):
        checkpoint.load(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(CheckpointError, match="text.pth"):
        checkpoint.load(tmp_path / "text.pth")
    (tmp_path / "text.pth").write_text("# a heading\n")
    with pytest.raises(CheckpointError, match="nothing was loaded: Unsupported operand"):
        checkpoint.load_weights(tmp_path / "text.pth")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.load_weights])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, read):
    marker = tmp_path / "ran"
    torch.save({"format": 1, "model": Evil(marker)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        read(tmp_path / "evil.pth")
    with open(tmp_path / "plain.pth", "wb") as file:
        pickle.dump(Evil(marker), file)
    with pytest.raises(CheckpointError):
        read(tmp_path / "plain.pth")
    assert not marker.exists()


def test_weights_of_the_usual_files_are_found(tmp_path):
    weights = {"blocks.0.w": torch.ones(2)}
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0), "epoch": 4}, tmp_path / "mae.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "ddp.pth")
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"model": weights}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "timm.safetensors")
    for name in ("mae.pth", "ddp.pth", "bare.pth", "old.pth", "timm.safetensors"):
        loaded = checkpoint.load_weights(tmp_path / name)
        assert list(loaded) == ["blocks.0.w"], name
        assert torch.equal(loaded["blocks.0.w"], torch.ones(2))


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="epoch"):
        checkpoint.load_weights(tmp_path / "x.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(CheckpointError, match="safetensors"):
        checkpoint.load_weights(tmp_path / "bad.safetensors")


def test_a_run_folder_stands_for_its_latest_checkpoint(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="contains no checkpoint"):
        checkpoint.find_file(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints" / "last.pth"
    checkpoint.save(
        last, {"format": checkpoint.FORMAT, "model": {"w": torch.ones(1)}, "options": {"method": "mae"}, "epoch": 3}
    )
    assert checkpoint.find_file(tmp_path) == last and checkpoint.load(tmp_path)["epoch"] == 3
    assert checkpoint.load_model(tmp_path)[1] == {"method": "mae"}
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint at"):
        checkpoint.find_file(tmp_path / "nowhere")


# ---- what a checkpoint decides --------------------------------------------------------------------------------------


class Schema:
    """The option names that a program inherits."""

    INHERITS = ("model", "in_chans", "mean", "std")
    INHERITS_EVAL = ("model",)


OPTIONS = {"model": "tiny", "in_chans": 3, "mean": [0.1, 0.2, 0.6], "std": [0.5, 0.5, 0.2], "lr": 1.0, "data_path": "D"}


@pytest.fixture
def trained(tmp_path):
    """Return the checkpoint of a run folder."""
    path = tmp_path / "run" / "checkpoints" / "last.pth"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, state() | {"options": OPTIONS, "ema": {"weight": torch.full((100,), 7.0)}})
    return path


def test_options_are_inherited_by_name(trained, tmp_path):
    inherited = checkpoint.inherited
    assert inherited(Schema, {"init_from": trained}) == {name: OPTIONS[name] for name in Schema.INHERITS}
    assert inherited(Schema, {}) == {}
    torch.save({"model": {"weight": torch.ones(2)}}, tmp_path / "weights.pth")
    assert inherited(Schema, {"init_from": tmp_path / "weights.pth"}) == {}


@pytest.mark.parametrize(("channels", "mean", "std"), [("1", [0.3], [0.4]), ("2", [0.3, 0.3], [0.4, 0.4])])
def test_other_channels_have_the_average_statistics(trained, channels, mean, std):
    found = checkpoint.inherited(Schema, {"init_from": trained, "in_chans": channels})
    assert found["mean"] == pytest.approx(mean) and found["std"] == pytest.approx(std)


def test_equal_channels_keep_their_statistics(trained):
    assert checkpoint.inherited(Schema, {"init_from": trained, "in_chans": "3"})["mean"] == OPTIONS["mean"]


def test_an_evaluation_inherits_the_data_unless_they_are_given(trained):
    given = {"eval": "true", "resume": trained}
    assert checkpoint.inherited(Schema, given) == {"model": "tiny", "data_path": "D"}
    assert checkpoint.inherited(Schema, given | {"data_path": "other"}) == {"model": "tiny"}


@pytest.mark.parametrize(
    ("folders", "dataset", "kept"),
    [
        (["val/a", "val/c", "train/a"], "auto", True),
        (["NAME/train/a", "NAME/val/a"], "folder", True),
        (["a", "b", "c"], "auto", True),
        (["a", "c"], "auto", False),  # of a folder without splits all listed classes are read
        (["val/1", "val/2", "train/a", "train/b"], "auto", False),
        (["a", "b", "c"], "torch/cifar10", False),
    ],
)
def test_an_evaluation_of_other_data_inherits_a_class_list_that_selects_folders_of_them(
    trained, tmp_path, folders, dataset, kept
):
    (tmp_path / "classes.txt").write_text("b\na\n")
    options = OPTIONS | {"class_list": str(tmp_path / "classes.txt")}
    checkpoint.save(trained, state() | {"options": options})
    for folder in folders:
        put(tmp_path / "data", f"{folder}/1.png")
    given = {"eval": "true", "resume": trained, "data_path": str(tmp_path / "data"), "dataset": dataset}
    assert checkpoint.inherited(Schema, given).get("class_list") == (options["class_list"] if kept else None)
    (tmp_path / "classes.txt").unlink()
    assert "class_list" not in checkpoint.inherited(Schema, given)


def test_the_evaluated_checkpoint_is_named_or_in_the_run_folder(trained, tmp_path):
    evaluated, run = checkpoint.evaluated_checkpoint, trained.parent.parent
    for given in (
        {"resume": trained},
        {"init_from": trained},
        {"output_dir": run},
        {"resume": "auto", "init_from": run},
    ):
        assert evaluated(given) == str(trained)
    with pytest.raises(OptionError, match="eval needs a checkpoint or a run folder"):
        evaluated({})
    with pytest.raises(OptionError, match="eval needs a checkpoint: .* contains no checkpoint.*name one with --resume"):
        evaluated({"output_dir": tmp_path})


def test_the_average_is_loaded_if_it_is_asked_for(trained):
    assert checkpoint.load_model(trained)[0]["weight"][0] == 1
    assert checkpoint.load_model(trained, averaged=True)[0]["weight"][0] == 7
    assert checkpoint.load_model(trained)[1] == OPTIONS
    run = trained.parent.parent
    assert checkpoint.find_run(trained) == run and checkpoint.find_file(run) == trained


def test_programs_are_stored_or_follow_from_the_options():
    assert checkpoint.find_program({"program": "probe", "options": {"method": "mae"}}) == "probe"
    assert checkpoint.find_program({"options": {"method": "mae"}}) == "pretrain"
    assert checkpoint.find_program({"options": {"mixup": 0.0}}) == "finetune"
    assert checkpoint.find_program({"options": {}}) == "probe"


def test_damaged_weights_are_refused(trained, tmp_path):
    content = bytearray(trained.read_bytes())
    place = content.index(torch.ones(100).numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "damaged.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.load_model(tmp_path / "damaged.pth")


def test_a_save_is_flushed_to_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), fsync(number)))
    checkpoint.save(tmp_path / "last.pth", state())
    assert synced
