"""The report shows what the records say, each thing once, also of a run that was cut off or taken up again."""

import json

import pytest
import yaml
from PIL import Image

from tools import report

OPTIONS = {"method": "nor_mae", "model": "mae_vit_tiny_patch4", "epochs": 3, "total_batch_size": 100}


@pytest.fixture
def run(tmp_path):
    def make(name="first", epochs=(1.0, 0.5, 0.25), finished=True):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "options.yaml").write_text(yaml.safe_dump(OPTIONS))
        lines = [
            {"epoch": e, "step": 10 * e + 10, "train_loss": loss, "train_neighbor": -loss, "knn_acc1": 50 - e}
            for e, loss in enumerate(epochs)
        ]
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
        steps = [{"step": s, "epoch": s // 10, "lr": s * 1e-4, "images_per_s": 100.0 + s} for s in range(1, 31)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        if finished:
            (folder / "result.json").write_text("{}")
        return folder

    return make


def test_the_table_holds_last_and_best_with_updates_and_images_beside_them(run):
    cells = report.row(report.read_run(run()))
    assert cells["epochs"] == "3 of 3"
    assert (cells["updates"], cells["images seen"]) == ("30", "3,000")
    assert (cells["last loss"], cells["last neighbor"]) == ("0.25", "-0.25")
    assert (cells["last kNN %"], cells["best kNN %"]) == ("48.00", "50.00")
    assert cells["learning rate"] == "3.00e-03"


def test_an_unfinished_run_is_called_so(run):
    assert report.row(report.read_run(run(epochs=(1.0,), finished=False)))["epochs"] == "1 of 3, unfinished"


def test_what_a_resumed_run_computed_again_counts_once(run):
    folder = run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"run_id": "b", "step": 30, "epoch": 2, "lr": 9.0}) + "\n")
    records = report.read_run(folder).steps
    assert [record["step"] for record in records] == list(range(1, 31))
    assert records[-1]["lr"] == 9.0


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_inside_is_not(run):
    folder = run()
    whole = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(whole + '{"epoch": 3, "tr')
    assert len(report.read_run(folder).epochs) == 3
    (folder / "log.txt").write_text("{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        report.read_run(folder)


def test_figures_that_are_not_finite_are_not_drawn(run):
    folder = run()
    with open(folder / "log.txt", "a") as file:
        file.write(json.dumps({"epoch": 3, "step": 40, "train_loss": None, "train_neighbor": float("nan")}) + "\n")
    read = report.read_run(folder)
    assert read.last("train_loss") == 0.25
    assert read.last("train_neighbor") == -0.25


def test_curves_hold_every_value_of_every_run(run):
    runs = [report.read_run(run("mae")), report.read_run(run("nor", epochs=(2.0, 1.0)))]
    figure = report.curves(runs)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    loss = panels[report.TITLES["train_loss"]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[1.0, 0.5, 0.25], [2.0, 1.0]]
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3], [1, 2]]
    assert len(panels[report.TITLES["lr"]].lines[0].get_ydata()) == 30
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["mae", "nor"]


def test_the_command_writes_the_report_and_a_picture_that_opens(run, tmp_path, capsys):
    first, second = run("mae"), run("nor")
    (second / "knn.json").write_text(json.dumps({"accuracy": {"raw pixels": 50.0}, "protocol": "k = 20"}))
    assert report.main([str(first), str(second), "--output", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "| mae | nor_mae |" in text and "| raw pixels | 50.00 |" in text
    with Image.open(tmp_path / "both" / "curves.png") as picture:
        assert picture.width > 600


def test_another_folder_is_refused_in_words(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
