"""Weights & Biases logs the same curves as TensorBoard, with one run per run folder, and never stops a run."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from tests.runs import TINY, Training, start_ranks
from util import extras
from util.boards import WeightsAndBiases
from util.folder import RunFolder
from util.logging import RunLog


class FakeRun:
    def __init__(self, calls, **how):
        self.calls, self.how, self.rows, self.axes, self.code = calls, how, [], {}, None

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, row):
        if self.calls.get("broken"):
            raise OSError("no connection")
        self.rows.append(row)

    def finish(self, exit_code):
        self.code = exit_code

    def points(self):
        """Return (name, step, value) of all logged values."""
        found = set()
        for row in self.rows:
            (axis,) = (name for name in row if name.endswith("/step"))
            group = axis.removesuffix("/step")
            for name in row.keys() - {axis}:
                assert self.axes[name if name == group else f"{group}/*"] == axis and axis in self.axes
                found.add((name, row[axis], None if name == group else row[name]))
        return found


def fake_wandb(calls):
    """Return a mock of wandb: `calls["runs"]` are the started runs, `calls["key"]` whether there is a login."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Settings = lambda **settings: settings
    module.Image = lambda array: array
    module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
    module.login = lambda prompt, verify: calls.get("key", False)

    def init(**how):
        if calls.get("unreachable"):
            raise TimeoutError("no connection")
        calls.setdefault("runs", []).append(FakeRun(calls, **how))
        return calls["runs"][-1]

    module.init = init
    return module


@pytest.fixture
def calls(monkeypatch):
    calls = {}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return calls


def write_everything(folder, **more):
    records = RunLog(folder, "run", step=0, total_steps=40, wandb_project="team/mine", config={"lr": 0.1}, **more)
    records.step(20, 0, {"loss": 0.5, "lr": 1e-3})
    records.scalars("strength_neighbor", {"weight x (P-1)": 0.25}, 0)
    records.epoch({"epoch": 0, "step": 20, "train_loss": 0.5})
    records.picture("reconstruction", torch.zeros(4, 4, 3, dtype=torch.uint8), 1)
    records.step(40, 1, {"loss": 0.25, "lr": 5e-4})
    records.close()


def test_names_steps_and_values_are_those_of_tensorboard(tmp_path, calls):
    write_everything(tmp_path)
    (run,) = calls["runs"]
    board = EventAccumulator(str(tmp_path)).Reload()
    expected = {
        (name, point.step, point.value) for name in board.Tags()["scalars"] for point in board.Scalars(name)
    } | {(name, picture.step, None) for name in board.Tags()["images"] for picture in board.Images(name)}
    rounded = {(name, step, value if value is None else round(value, 7)) for name, step, value in expected}
    assert len(rounded) == 7 and run.points() == rounded
    assert (run.how["entity"], run.how["project"], run.how["name"]) == ("team", "mine", tmp_path.name)
    assert run.how["config"] == {"lr": 0.1} and run.code == 0


def test_a_run_folder_stays_one_run_of_its_project(tmp_path, calls):
    for project in ("mine", "mine", "other", "other"):
        WeightsAndBiases(tmp_path, project, {}).close(False)
    ids = [run.how["id"] for run in calls["runs"]]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert all(run.how["resume"] == "allow" for run in calls["runs"])
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"project": "other", "id": ids[3]}
    (tmp_path / "wandb.json").write_text('{"project"')
    WeightsAndBiases(tmp_path, "other", {})
    assert calls["runs"][-1].how["id"] not in ids


def test_a_failed_run_is_shown_as_failed(tmp_path, calls):
    records = RunLog(tmp_path, "run", step=0, total_steps=4, wandb_project="mine")
    records.failed = True
    records.close()
    assert calls["runs"][0].code == 1


@pytest.mark.parametrize(
    "fault, message", [("broken", "cannot write to Weights & Biases"), ("unreachable", "no Weights")]
)
def test_a_board_that_fails_is_one_warning_and_the_other_is_complete(tmp_path, calls, caplog, fault, message):
    calls[fault] = True
    write_everything(tmp_path)
    assert caplog.text.count(message) == 1
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [20, 40]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_package_is_refused_before_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    assert main_pretrain.main([*TINY, "--output_dir", str(tmp_path / "run"), "--wandb", "mine"]) == 2
    said = capsys.readouterr().err
    assert "--wandb needs wandb" in said and "-m pip install -r " in said and "requirements/wandb.txt" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_login_is_refused_before_work_by_the_main_process_only(tmp_path, monkeypatch, capsys, calls):
    words = [*TINY, "--output_dir", str(tmp_path / "run"), "--wandb", "mine"]
    assert main_pretrain.main(words) == 2
    assert "no API key" in capsys.readouterr().err and not (tmp_path / "run").exists()
    options = main_pretrain.parse_options(words)
    extras.require_extras(options, main=False)
    calls["key"] = True
    extras.require_extras(options)
    calls["key"] = False
    monkeypatch.setenv("WANDB_MODE", "offline")
    extras.require_extras(options)


@pytest.mark.parametrize("project", ["a/b/c", "/b", "a/", "what?"])
def test_a_project_is_a_name_or_entity_and_name(project):
    with pytest.raises(ValueError, match="wandb: expected PROJECT or ENTITY/PROJECT"):
        main_pretrain.parse_options([*TINY, "--wandb", project])


def install_fake():
    """Replace wandb, in the process of a run, by a module that writes its calls to a file when it is closed."""
    calls = {}
    module = fake_wandb(calls)
    plain = module.init

    def init(**how):
        run = plain(**how)
        path = f"{how['dir']}/fake.jsonl"

        def finish(exit_code):
            with open(path, "a") as file:
                file.write(json.dumps({"id": how["id"], "code": exit_code, "points": sorted(run.points())}) + "\n")

        run.finish = finish
        return run

    module.init = init
    sys.modules["wandb"] = module


def test_of_two_processes_the_main_one_logs(tmp_path):
    words = ["--epochs", "1", "--wandb", "mine"]
    environment = {"WANDB_MODE": "offline"}
    ranks = start_ranks(2, tmp_path / "run", *words, faults={0: install_fake, 1: install_fake}, more=environment)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    (line,) = (tmp_path / "run" / "fake.jsonl").read_text().splitlines()
    assert {name for name, _, _ in json.loads(line)["points"]} >= {"train/loss", "epoch/train_loss"}


def records_of(path):
    """Return the records of a wandb file: blocks of 32 KiB with chunks of checksum, length, type and data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_package_logs_offline_and_resumes_the_same_run(tmp_path):
    folder, environment = tmp_path / "run", {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for words in (["--epochs", "1"], ["--epochs", "2", "--allow_change", "epochs"]):
        training = Training(folder, *words, "--wandb", "mine", environment=environment)
        assert training.wait() == 0, training.stderr
        assert "Weights & Biases" not in training.stderr
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    found = {}
    for file in files:
        for record in records_of(file):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                found[row["train/step"]] = row["train/loss"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found == {line["step"]: line["loss"] for line in lines} and len(found) == 10


def test_starting_from_scratch_starts_another_run(tmp_path):
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb.json").write_text("{}")
    RunFolder(main_pretrain.parse_options([*TINY, "--output_dir", str(tmp_path)]))._clear()
    assert not list(tmp_path.iterdir())
