"""Logs of a run: JSON lines that survive a kill, and the names of curves."""

import json
import logging
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_checkpoint import disk_full_after
from util.logging import JsonLines, RunLog, log_file, log_to_terminal


def test_half_a_line_left_by_a_kill_is_cut_off_and_nothing_else(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    JsonLines(path).write({"step": 2, "loss": 0.25})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    JsonLines(tmp_path / "x.jsonl").write({"nan": math.nan, "inf": math.inf, "one": 1.0})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"nan": None, "inf": None, "one": 1.0}


def test_a_log_that_cannot_be_written_warns_once_and_stops_nothing(tmp_path, caplog):
    lines = JsonLines(tmp_path / "gone" / "metrics.jsonl")
    for step in range(3):
        lines.write({"step": step})
    assert caplog.text.count("cannot write") == 1


def test_a_disk_that_was_full_leaves_complete_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 0})
    with disk_full_after(16):
        for step in (1, 2):
            lines.write({"step": step})
    lines.write({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 3}\n'


def test_a_log_file_that_cannot_be_opened_warns_and_stops_nothing(tmp_path, caplog):
    (tmp_path / "train.log").mkdir()
    with log_file(tmp_path / "train.log"):
        logging.getLogger("test").warning("trained")
    assert "cannot write" in caplog.text and "training continues" in caplog.text and "trained" in caplog.text


def test_curves_have_plain_names_and_the_values_given(tmp_path):
    records = RunLog(tmp_path, "run", step=0, total_steps=4)
    records.step(1, 0, {"loss": 0.5, "lr": 1e-3})
    records.scalars("strength_neighbor", {"weight x (P-1)": 0.0384}, 0)
    records.close()
    curves = EventAccumulator(str(tmp_path)).Reload()
    assert set(curves.Tags()["scalars"]) == {"train/loss", "train/lr", "strength_neighbor/weight_x_P-1"}
    assert abs(curves.Scalars("strength_neighbor/weight_x_P-1")[0].value - 0.0384) < 1e-7


def test_the_log_file_takes_any_name(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's handlers do not support such names
    with log_file(tmp_path / "train.log"):
        logging.getLogger("test").warning("K\u00e4se and \udcff.jpg")
    assert "Käse and \\udcff.jpg" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_the_log_file_begins_with_earlier_messages(tmp_path, monkeypatch):
    """Messages of an earlier attempt that was refused before it had a file are not included."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for said in ("refused", "data"):
        log_to_terminal(main=True, keep=True)
        logging.info(said)
    log_to_terminal(main=True)
    with log_file(tmp_path / "train.log"):
        logging.info("epoch")
    logging.info("later")
    with log_file(tmp_path / "other.log"):
        pass
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["data", "epoch"]
    assert (tmp_path / "other.log").read_text() == ""


def test_the_terminal_gets_a_line_every_few_seconds_and_the_last_one(tmp_path, caplog, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.5, 4.0, 4.5])
    monkeypatch.setattr("util.logging.time.monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO)
    records = RunLog(tmp_path, "run", step=0, total_steps=6, epochs=2)
    for step in range(1, 7):
        records.step(step, (step - 1) // 3, {"loss": 0.5})
        records.advance(step)
    records.close()
    said = [line.split(":")[0] for line in caplog.messages if line.startswith("epoch")]
    assert said == ["epoch 1/2 step 1/6", "epoch 2/2 step 4/6", "epoch 2/2 step 6/6"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6, "the files get every step"


def test_every_evaluation_is_printed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    records = RunLog(tmp_path, "run", step=0, total_steps=60, epochs=20)
    for epoch in range(3):
        records.epoch({"epoch": epoch, "step": 3 * epoch, "train_loss": 0.5, "test_acc1": 50.0})
        records.epoch({"epoch": epoch, "step": 3 * epoch, "train_loss": 0.5})
    records.close()
    assert sum("test_acc1" in line for line in caplog.messages) == 3
    assert sum(line.startswith("epoch") for line in caplog.messages) <= 4
