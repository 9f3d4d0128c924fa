"""The report shows the values of the records, each once, also for interrupted and resumed runs."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

import methods
import programs
from options import to_dict
from tools import records, report, report_page

OPTIONS = {"method": "nor_mae", "model": "mae_vit_tiny_patch4", "epochs": 3, "total_batch_size": 100, "blr": 1.5e-4}


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


def picture(path, shade):
    """Write a small PNG; return its bytes."""
    path.parent.mkdir(exist_ok=True)
    Image.new("L", (4, 4), shade).save(path)
    return path.read_bytes()


def test_the_table_holds_last_and_best_with_updates_and_images_beside_them(run):
    cells = report.row(records.read_run(run()))
    assert cells["epochs"] == "3 of 3"
    assert (cells["updates"], cells["images seen"]) == ("30", "3,000")
    assert (cells["last loss"], cells["last neighbor"]) == ("0.25", "-0.25")
    assert (cells["last kNN %"], cells["best kNN %"]) == ("48.00", "50.00")
    assert cells["learning rate"] == "5.859e-05", "1.5e-4 x 100 / 256, not the highest that was logged"


def test_an_unfinished_run_is_called_so(run):
    assert report.row(records.read_run(run(epochs=(1.0,), finished=False)))["epochs"] == "1 of 3, unfinished"


def test_what_a_resumed_run_computed_again_counts_once(run):
    folder = run()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"run_id": "b", "step": 30, "epoch": 2, "lr": 9.0}) + "\n")
    steps = records.read_run(folder).steps
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[-1]["lr"] == 9.0


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_inside_is_not(run):
    folder = run()
    whole = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(whole + '{"epoch": 3, "tr')
    assert len(records.read_run(folder).epochs) == 3
    (folder / "log.txt").write_text("{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        records.read_run(folder)


def test_figures_that_are_not_finite_are_not_drawn(run):
    folder = run()
    with open(folder / "log.txt", "a") as file:
        file.write(json.dumps({"epoch": 3, "step": 40, "train_loss": None, "train_neighbor": float("nan")}) + "\n")
    read = records.read_run(folder)
    assert read.last("train_loss") == 0.25
    assert read.last("train_neighbor") == -0.25


def write_lines(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def epoch_line(start, epoch, step, loss):
    return {"run_id": start, "epoch": epoch, "step": step, "train_loss": loss}


def step_lines(start, steps, epoch=0):
    return [{"run_id": start, "step": step, "epoch": epoch, "lr": 1.0} for step in steps]


def test_what_a_later_start_never_reaches_again_does_not_count(run):
    """The second start repeats from step 10 with a larger batch: its three epochs have 10, 15 and 20 steps."""
    folder = run()
    first, second = "6b0b50b9-2", "6b0b50b3-1"  # the names do not decide which is first
    epochs = [epoch_line(first, epoch, 10 * epoch + 10, 5.0) for epoch in range(5)]
    write_lines(folder / "log.txt", *epochs, epoch_line(second, 1, 15, 0.5), epoch_line(second, 2, 20, 0.25))
    write_lines(folder / "metrics.jsonl", *step_lines(first, range(1, 51)), *step_lines(second, range(11, 21)))
    write_lines(folder / "result.json", {"steps": 20, "images_seen": 2000, "last": {"train_loss": 0.25}})
    read = records.read_run(folder)
    cells, found = report.row(read), read.result
    assert (cells["updates"], cells["images seen"]) == (f"{found['steps']}", f"{found['images_seen']:,}")
    assert (cells["epochs"], cells["last loss"]) == ("3 of 3", "0.25")
    assert [(line["epoch"], line["step"]) for line in read.epochs] == [(0, 10), (1, 15), (2, 20)]
    assert [line["step"] for line in read.steps] == list(range(1, 21))
    assert [line["run_id"] for line in read.steps] == [first] * 10 + [second] * 10


def test_each_file_shows_what_is_replaced_in_the_other(run):
    """With --log_every 10 the second start, from step 20, logs an epoch at step 26 and no step before it is killed."""
    folder = run(finished=False)
    write_lines(folder / "metrics.jsonl", *step_lines("a", (10, 20, 30)))
    write_lines(folder / "log.txt", epoch_line("a", 0, 20, 1.0), epoch_line("b", 1, 26, 0.5))
    read = records.read_run(folder)
    assert [line["step"] for line in read.steps] == [10, 20] and read.updates == 26
    write_lines(folder / "metrics.jsonl", *step_lines("a", (10, 20, 30)), *step_lines("b", (20,)))
    write_lines(folder / "log.txt", epoch_line("a", 0, 20, 1.0), epoch_line("a", 1, 40, 0.5))
    read = records.read_run(folder)
    assert read.epochs == [] and read.updates == 20, "the second start has not logged the first epoch yet"


def test_starts_are_in_the_order_of_the_environment(run):
    folder = run(finished=False)
    write_lines(folder / "metrics.jsonl", *step_lines("b", (10,)))
    write_lines(folder / "log.txt", epoch_line("a", 0, 20, 1.0))
    (folder / "environment.json").write_text(json.dumps([{"run_id": "a"}, {"run_id": "b"}]))
    assert records.read_run(folder).epochs == []
    (folder / "environment.json").write_text(json.dumps([{"run_id": "b"}, {"run_id": "a"}]))
    assert len(records.read_run(folder).epochs) == 1


def test_a_run_that_was_shortened_ends_where_its_result_says(run):
    """Resumed with --epochs 2 from a checkpoint at the end of the second epoch: nothing more is logged."""
    folder = run()
    write_lines(folder / "result.json", {"steps": 20})
    read = records.read_run(folder)
    assert read.updates == 20 and read.values("train_loss") == [1.0, 0.5]


def test_epochs_of_a_run_that_resumed_in_a_new_folder_are_counted_from_its_beginning(run):
    folder = run()
    write_lines(folder / "log.txt", epoch_line("a", 2, 30, 0.25))
    read = records.read_run(folder)
    assert report.row(read)["epochs"] == "3 of 3"
    assert ("good", "Finished: 3 of 3 epochs.") in report_page.verdict(read)


def test_damaged_lines_are_skipped_with_a_warning(run, caplog):
    folder = run()
    whole = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text('{}\n{"epoch": 0}\n7\n' + whole)
    assert records.read_run(folder).values("train_loss") == [1.0, 0.5, 0.25]
    wanted = f"{folder / 'log.txt'}: skipped 3 damaged lines, without the numbers epoch and step; the first is line 1"
    assert caplog.messages == [wanted]


@pytest.mark.parametrize("name", ["result.json", "knn.json"])
def test_a_damaged_file_is_named(run, name, capsys):
    folder = run()
    (folder / name).write_text("")
    assert report.main([str(folder)]) == 2
    assert f"error: {folder / name} is not valid JSON (Expecting value" in capsys.readouterr().err


def test_damaged_records_of_the_starts_are_left_out_with_a_warning(run, caplog):
    folder = run()
    (folder / "environment.json").write_text("")
    assert report.main([str(folder)]) == 0
    assert f"the starts of the run are not reported: {folder / 'environment.json'} is not valid" in caplog.text
    assert "<h2>Environment" not in (folder / "report.html").read_text()


def test_a_run_with_empty_options_is_reported(run, capsys):
    folder = run()
    (folder / "options.yaml").write_text("")
    assert report.main([str(folder)]) == 0
    assert "0.25" in capsys.readouterr().out
    (folder / "options.yaml").write_text("epochs: [")
    assert report.main([str(folder)]) == 2
    assert f"{folder / 'options.yaml'} is not valid YAML" in capsys.readouterr().err
    (folder / "options.yaml").write_text("epo")
    assert report.main([str(folder)]) == 2
    assert "contains no options by name, but 'epo'" in capsys.readouterr().err


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_runs_of_every_program_are_reported_with_their_defaults(run, program):
    folder = run(program)
    if program == "pretrain":
        options = methods.parse_options(["--init_from", "encoder.pth", "--data_path", "images"])
    else:
        options = programs.PROGRAMS[program](init_from="encoder.pth", data_path="images")
    stored = to_dict(options)
    (folder / "options.yaml").write_text(yaml.safe_dump(stored))
    assert report.main([str(folder)]) == 0
    changed, unchanged = (folder / "report.html").read_text().split("options at their defaults")
    assert "<tr><td>init_from</td><td>encoder.pth</td><td></td></tr>" in changed
    names = re.findall(r"<tr><td>([\w.]+)</td>", changed.split("<h2>Options</h2>")[1])
    assert sorted(names) == ["data_path", "init_from"], "all others are at their defaults"
    assert f"<tr><td>input_size</td><td>{stored['input_size']}</td><td>{stored['input_size']}</td></tr>" in unchanged


def charts(runs):
    """Return the curves in the page of some runs by title, as (name, x, y)."""
    found = re.findall(r'data-series="([^"]+)"><h3>([^<]+)</h3>', report.page(runs))
    return {
        title: [(one["name"], one["x"], one["y"]) for one in json.loads(html.unescape(data))] for data, title in found
    }


def test_curves_hold_every_value_of_every_run(run):
    first, second = run("mae"), run("nor", epochs=(2.0, 1.0))
    (second / "options.yaml").write_text(yaml.safe_dump({**OPTIONS, "terms": {"neighbor": {"weight": 0.5}}}))
    drawn = charts([records.read_run(folder) for folder in (first, second)])
    loss = drawn[report.TITLES["train_loss"]]
    assert loss == [("mae", [1, 2, 3], [1.0, 0.5, 0.25]), ("nor", [1, 2], [2.0, 1.0])]
    assert len(drawn[report.TITLES["lr"]][0][2]) == 30


def test_runs_of_a_single_epoch_are_distinct_without_colour(run):
    first, second = (run(name, epochs=(1.0,)) for name in ("one", "other"))
    (second / "options.yaml").write_text(yaml.safe_dump({**OPTIONS, "terms": {"neighbor": {"weight": 0.5}}}))
    text = report.page([records.read_run(folder) for folder in (first, second)])
    radii = set(re.findall(r'<circle [^>]*r="(\d+)"', text))
    assert len(radii) == 2


def test_the_page_holds_figures_options_curves_pictures_and_environment(run):
    first, second = run("mae"), run("nor", epochs=(2.0, 1.0))
    (second / "options.yaml").write_text(yaml.safe_dump({**OPTIONS, "terms": {"neighbor": {"weight": 0.5}}}))
    (second / "knn.json").write_text(json.dumps({"accuracy": {"raw pixels": 51.25}, "protocol": "k = 20 <all>"}))
    (second / "environment.json").write_text(json.dumps([{"host": "here", "versions": {"torch": "2.x"}}]))
    (second / "bad_images.txt").write_text("a&b.png\tempty\n")
    for number in range(1, 6):
        picture(second / "samples" / f"recon_e000{number}.png", number)
    drawn = picture(first / "figures" / "neighbors.png", 9)
    text = report.page([records.read_run(first), records.read_run(second)])
    for wanted in ("<td>last loss</td><td>0.25</td><td>1</td>", "<td>best kNN %</td><td>50.00</td><td>50.00</td>"):
        assert wanted in text
    assert "<tr class='differs'><td>terms.neighbor.weight</td><td></td><td>0.5</td><td>5e-05</td></tr>" in text
    assert "<td>51.25</td>" in text and "k = 20 &lt;all&gt;" in text and "a&amp;b.png" in text
    assert "<td>versions.torch</td><td>2.x</td>" in text
    pictures = {name: base64.b64decode(data) for data, name in re.findall(r'base64,([^"]+)" alt="([^"]+)"', text)}
    samples = [f"samples/recon_e000{number}.png" for number in (5, 3, 1)]
    assert list(pictures) == ["figures/neighbors.png", *samples]
    assert pictures["figures/neighbors.png"] == drawn


def test_the_page_needs_nothing_beside_it(run):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.sources, self.tags = [], [], set()

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
            if tag not in ("meta", "img", "line", "polyline", "polygon", "circle"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert tag in ("line", "polyline", "polygon", "circle") or self.open.pop() == tag

    folder = run()
    picture(folder / "samples" / "recon_e0001.png", 1)
    text = report.page([records.read_run(folder)])
    reader = Reader()
    reader.feed(text)
    assert not reader.open  # every element is closed
    assert reader.sources and all(source.startswith("data:image/") for source in reader.sources)
    assert not reader.tags & {"link", "iframe", "object"}
    assert "url(" not in text and "@import" not in text


def test_accuracies_of_every_program_are_shown_last_and_best(run):
    folder = run()
    lines = [{"epoch": epoch, "step": 10, "test_acc1": value} for epoch, value in enumerate([70.0, 90.0, 80.0])]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cells = report.row(records.read_run(folder))
    assert (cells["last test_acc1 %"], cells["best test_acc1 %"]) == ("80.00", "90.00")
    assert "top-1 in %, test images" in charts([records.read_run(folder)])


def test_a_classifier_is_reported_by_its_test_images_last_and_best(run):
    folder = run()
    figures = {"acc1": 70.0, "mean_class_acc": 61.25}
    evaluated = {"accuracy": {"last": figures, "best": figures | {"mean_class_acc": 62.5}}, "metric": "mean_class_acc"}
    evaluated |= {"best_chosen_on": "held-out training images", "knn_acc1": 55.0}
    (folder / "result.json").write_text(json.dumps(evaluated))
    cells = report.row(records.read_run(folder))
    names = ("last epoch, test mean_class_acc %", "best epoch, test mean_class_acc %", "best epoch chosen on")
    assert [cells[name] for name in names] == ["61.25", "62.50", "held-out training images"]
    assert cells["kNN of the frozen encoder, test acc1 %"] == "55.00"


def test_the_command_writes_a_page(run, tmp_path, capsys):
    first, second = run("mae"), run("nor")
    assert report.main([str(first), str(second), "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "report.html").read_text().startswith("<!doctype html>")
    assert "| mae | nor_mae |" in capsys.readouterr().out


def test_a_run_that_logged_nothing_yet_is_reported_without_curves(run, capsys):
    folder = run(epochs=(), finished=False)
    (folder / "metrics.jsonl").unlink()
    assert report.main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "0 of 3, unfinished" in text and "<h2>Curves</h2>" not in text and "total_batch_size" in text


def test_another_folder_is_refused_with_a_message(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_a_chart_holds_the_values_that_it_shows():
    drawn = report_page.chart("loss", "epoch", [report_page.Series("a", [1, 2, 3], [4.0, 2.0, 0.0])])
    data = json.loads(html.unescape(re.search(r'data-series="([^"]+)"', drawn)[1]))
    assert data == [{"name": "a", "x": [1, 2, 3], "y": [4.0, 2.0, 0.0]}]
    points = [tuple(map(float, p.split(","))) for p in re.search(r'polyline points="([^"]+)"', drawn)[1].split()]
    assert points == [(58.0, 8.0), (284.0, 109.0), (510.0, 210.0)], "from the top left to the bottom right"
    assert report_page.chart("loss", "epoch", [report_page.Series("a", [], [])]) == ""
    long = report_page.Series("a", list(range(5000)), list(range(5000)))
    assert len(report_page.thinned(long).x) <= report_page.POINTS + 1 and report_page.thinned(long).x[-1] == 4999


def test_runs_of_several_seeds_are_shown_as_mean_and_deviation(run):
    folders = [run("mae-seed0", epochs=(1.0, 0.5)), run("mae-seed1", epochs=(3.0, 0.7)), run("other")]
    for seed, folder in enumerate(folders):
        changed = {"seed": seed, "output_dir": folder.name} | ({"epochs": 9} if folder.name == "other" else {})
        (folder / "options.yaml").write_text(yaml.safe_dump(OPTIONS | changed))
    runs = [records.read_run(folder) for folder in folders]
    both, other = report_page.grouped(runs)
    assert (both.name, other.name) == ("mae (2 seeds)", "other")
    series = both.series("train_loss", "epochs")
    assert (series.x, series.y) == ([1, 2], [2.0, 0.6]) and series.deviation[0] == pytest.approx(2**0.5)
    assert "0.6 ± 0.1414" in report.page(runs)


def test_the_verdict_compares_with_a_constant_prediction_and_the_untrained_encoder(run):
    folder = run()
    (folder / "result.json").write_text(json.dumps({"constant_loss": 0.2, "bad_steps": 2}))
    (folder / "knn.json").write_text(
        json.dumps({"accuracy": {"untrained encoder": 30.0, "pretrained encoder": 42.5}, "protocol": ""})
    )
    said = report_page.verdict(records.read_run(folder))
    assert ("good", "Finished: 3 of 3 epochs.") in said
    bad = "The loss is 0.25, 125% of the best constant prediction (0.2): nothing was learned."
    assert ("bad", f"{bad} Train longer or raise --blr.") in said
    assert (
        "good",
        "Nearest neighbours: 42.50% with the pretrained encoder, +12.50 points from the untrained one.",
    ) in said
    assert ("bad", "2 updates were refused because they were not finite.") in said
    (folder / "result.json").write_text(json.dumps({"constant_loss": 0.5}))
    assert any(
        text.startswith("The loss is 0.25, 50%")
        for kind, text in report_page.verdict(records.read_run(folder))
        if kind == "good"
    )


def test_options_that_differ_from_the_defaults_come_first(run):
    text = report.page([records.read_run(run())])
    before, after = text.split("options at their defaults")
    assert "<td>total_batch_size</td><td>100</td><td>0</td>" in before and "<td>blr</td>" in after


def test_classes_are_reported_with_their_confusions(run):
    folder = run()
    confusion = {"classes": ["cat", "dog"], "matrix": [[8, 2], [0, 5]]}
    (folder / "result.json").write_text(json.dumps({"confusion": confusion}))
    text = report.page([records.read_run(folder)])
    assert "<td>cat</td><td>80.00</td><td>10</td><td>dog (2)</td>" in text
    assert "<td>dog</td><td>100.00</td><td>5</td><td></td>" in text
