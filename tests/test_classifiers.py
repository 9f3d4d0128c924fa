"""The table of classifiers: rows, labels and updates as the runs recorded them."""

import json

from tools import classifiers


def record(folder, labels, metric="acc1", **more):
    folder.mkdir(parents=True)
    accuracy = {name: {"acc1": value, "mean_class_acc": value - 1} for name, value in (("last", 70.0), ("best", 71.5))}
    result = {"accuracy": accuracy, "metric": metric, "best_chosen_on": "held-out training images"}
    (folder / "result.json").write_text(json.dumps(result | {"steps": 1200, "images_seen": 76800} | more))
    (folder / "images_train.txt").write_text("a\t0\n" * labels)


def test_rows_are_what_the_runs_recorded(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps({"steps": 9}))  # of pretraining: no classifier
    (tmp_path / "knn.json").write_text(json.dumps({"accuracy": {"raw pixels": 98.2}}))
    record(tmp_path / "finetuned", 1000)
    record(tmp_path / "linprobe", 100, metric="mean_class_acc", knn_acc1=64.4)
    assert classifiers.main([str(tmp_path)]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[2:] == [
        ["nearest neighbours, raw pixels", "98.20", "", "", "all", "", ""],
        ["finetuned", "70.00", "71.50", "held-out training images", "1,000", "1,200", "76,800"],
        ["linprobe: nearest neighbours", "64.40", "", "", "100", "", ""],
        ["linprobe (mean per class)", "69.00", "70.50", "held-out training images", "100", "1,200", "76,800"],
    ]


def test_a_folder_without_a_classifier_is_reported(tmp_path, capsys):
    assert classifiers.main([str(tmp_path)]) == 2
    assert "no finished classifier" in capsys.readouterr().err
