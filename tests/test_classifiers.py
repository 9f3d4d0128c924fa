"""The table of classifiers: rows, labels and updates are those that the runs have recorded."""

import json

import pytest

from tools import classifiers, report
from tools.records import read_run

KNN = {"raw pixels": 98.2, "untrained encoder": 54.0, "pretrained encoder": 87.2}


def record(folder, labels, metric="acc1", last=70.0, options=None, **more):
    folder.mkdir(parents=True)
    accuracy = {
        name: {"acc1": value, "mean_class_acc": value - 1, "miou": value}
        for name, value in (("last", last), ("best", 71.5))
    }
    result = {"accuracy": accuracy, "metric": metric, "best_chosen_on": "held-out training images"}
    (folder / "result.json").write_text(json.dumps(result | {"steps": 1200, "images_seen": 76800} | more))
    (folder / "images_train.txt").write_bytes("a\u2028b\t0\n".encode() * labels)  # a line separator in a name
    if options is not None:
        (folder / "options.yaml").write_text(json.dumps(options))


@pytest.fixture
def quickstart(tmp_path):
    """Write the results of a pretrained encoder and its classifiers."""
    (tmp_path / "result.json").write_text(json.dumps({"steps": 9}))  # pretraining, not a classifier
    (tmp_path / "knn.json").write_text(json.dumps({"accuracy": KNN, "protocol": "k = 20"}))
    record(tmp_path / "segmented", 100, metric="miou")  # not a classifier
    record(tmp_path / "finetuned", 100, options={"init_from": "last.pth", "from_scratch": False}, last=88.76)
    record(tmp_path / "linprobe", 100, options={"init_from": "last.pth"}, metric="mean_class_acc", knn_acc1=64.4)
    record(tmp_path / "scratch", 100, options={"init_from": "last.pth", "from_scratch": True}, last=64.5)
    return tmp_path


def test_rows_are_what_the_runs_recorded(quickstart, capsys):
    assert classifiers.main([str(quickstart)]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    common = ["71.50", "held-out training images", "100", "1,200", "76,800"]
    assert rows[2:6] == [
        ["fine-tuned", "finetuned", "88.76", *common],
        ["linear layer on the frozen encoder (mean per class)", "linprobe", "69.00", "70.50", *common[1:]],
        ["nearest neighbours of the frozen encoder", "linprobe", "64.40", "", "", "100", "", ""],
        ["from scratch", "scratch", "64.50", *common],
    ]
    assert rows[8:] == [[name, f"{value:.2f}"] for name, value in KNN.items()], "nearest neighbours come last"
    assert (
        "Trained with 100 labels: 88.76% fine-tuned from this encoder, 64.50% from scratch, a difference of +24.26"
        in text
    )
    assert classifiers.PIXELS_NOTE in text and "k = 20" in text


def test_runs_with_other_updates_labels_or_metrics_are_not_compared(tmp_path):
    for number, more in enumerate(({}, {"steps": 600}, {"labels": 50}, {"metric": "mean_class_acc"})):
        folder = tmp_path / str(number)
        record(folder / "a", 100, options={"init_from": "last.pth", "from_scratch": False})
        record(folder / "b", **{"labels": 100} | more, options={"init_from": "", "from_scratch": False}, last=60.0)
        gain = classifiers.compare_with_scratch(classifiers.rows_below([folder]))
        assert (gain is None) == bool(more)
    assert classifiers.compare_with_scratch(classifiers.rows_below([tmp_path / "0", tmp_path / "1"])) is None


def test_the_report_leads_with_the_classifiers_then_nearest_neighbours(quickstart):
    (quickstart / "options.yaml").write_text(json.dumps({"method": "nor_mae", "model": "mae_vit_tiny_patch16"}))
    page = report.page([read_run(quickstart)])
    parts = ("a difference of +24.26", "from scratch</h2>", "k nearest neighbours</h2>", classifiers.PIXELS_NOTE[:30])
    places = [page.index(part) for part in (*parts, "Numbers</h2>", "Options</h2>")]
    assert places == sorted(places)


def test_the_note_about_raw_pixels_is_given_where_they_are_better():
    assert classifiers.pixels_note(KNN) == classifiers.PIXELS_NOTE
    assert classifiers.pixels_note({"raw pixels": 37.6, "pretrained encoder": 40.6}) == ""


def test_a_folder_without_a_classifier_is_reported(tmp_path, capsys):
    assert classifiers.main([str(tmp_path)]) == 2
    assert "no finished classifier" in capsys.readouterr().err


def test_a_classifier_with_empty_options_has_no_kind(tmp_path):
    record(tmp_path / "run", 100)
    (tmp_path / "run" / "options.yaml").write_text("")
    assert [(row.kind, row.last) for row in classifiers.rows_below([tmp_path])] == [("", 70.0)]


@pytest.mark.parametrize("name", ["run/result.json", "knn.json"])
def test_a_damaged_file_is_named(tmp_path, name, capsys):
    record(tmp_path / "run", 100)
    (tmp_path / name).write_text("")
    assert classifiers.main([str(tmp_path)]) == 2
    assert f"error: {tmp_path / name} is not valid JSON" in capsys.readouterr().err
