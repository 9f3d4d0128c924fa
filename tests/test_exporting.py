"""Runs that are exported when they are finished; unsupported exports are refused before training."""

import sys
from types import SimpleNamespace

import pytest

import main_finetune
import main_pretrain
import main_segment
from tests.runs import LIGHT, TINY, TINY_CLASSIFIER, TINY_SEGMENTER
from tools import export
from util import exporting, extras

WORDS = {
    main_pretrain: TINY,
    main_finetune: [*TINY_CLASSIFIER, *LIGHT],
    main_segment: [*TINY_SEGMENTER, "--data_path", "scenes"],
}


@pytest.fixture
def started(monkeypatch):
    """Run tools.export in this process; return the list of its arguments."""
    calls = []

    def run(words, cwd):
        assert words[:3] == [sys.executable, "-m", "tools.export"] and (cwd / "tools" / "export.py").is_file()
        calls.append(words[3:])
        return SimpleNamespace(returncode=export.main(words[3:]))

    monkeypatch.setattr(exporting, "subprocess", SimpleNamespace(run=run))
    return calls


def start(main, folder, *words):
    return main.main([*WORDS[main], "--epochs", "1", "--output_dir", str(folder), *words])


@pytest.mark.parametrize(
    "main, name",
    [
        (main_pretrain, "timm"),
        (main_finetune, "timm"),
        pytest.param(main_segment, "torch", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_is_exported_once(main, name, tmp_path, started):
    folder = tmp_path / "run"
    assert start(main, folder, "--export", name) == 0
    assert started == [[name, str(folder), "--overwrite"]]
    made = folder / "export" / name
    assert (made / "export.json").is_file() and (made / "README.md").is_file()
    assert start(main, folder, "--export", name) == 0 and len(started) == 1, "finished, and exported"


def test_a_failed_export_does_not_lose_the_run_and_is_repeated(tmp_path, started, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(export, "main", lambda words: 1)
        assert start(main_pretrain, folder, "--export", "timm") == 5
    said = capsys.readouterr().err
    assert f"the run in {folder} is complete, but its export to timm failed with exit code 1" in said
    assert f"python -m tools.export timm {folder}" in said
    assert (folder / "result.json").is_file() and (folder / "checkpoints" / "last.pth").is_file()
    assert start(main_pretrain, folder, "--export", "timm") == 0 and exporting.is_exported(folder, "timm")


def test_a_run_from_scratch_replaces_its_export(tmp_path, started):
    folder = tmp_path / "run"
    for words in ([], ["--overwrite"]):
        assert start(main_pretrain, folder, "--export", "timm", *words) == 0
    assert len(started) == 2


@pytest.mark.parametrize(
    "main, words, message",
    [
        (main_pretrain, ["--export", "tflite"], "export: expected a list, each one of timm, hf, onnx, found 'tflite'"),
        (main_segment, ["--export", "onnx,hf"], "export: expected a list, each one of onnx, torch"),
        (main_finetune, ["--export", "hf"], "hf has no classifier with average pooling"),
    ],
)
def test_formats_that_do_not_fit_are_refused_before_work(main, words, message, tmp_path, capsys):
    assert start(main, tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_missing_package_is_refused_before_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert start(main_pretrain, tmp_path / "run", "--export", "timm", "onnx") == 2
    said = capsys.readouterr().err
    assert "--export onnx needs onnxruntime: run " in said and "requirements/export.txt" in said
    assert not (tmp_path / "run").exists()


def test_only_the_main_process_exports_and_evaluations_do_not(tmp_path, started, monkeypatch):
    folder = tmp_path / "run"
    assert start(main_finetune, folder) == 0 and not started
    monkeypatch.setenv("RANK", "1")
    assert start(main_finetune, folder, "--export", "timm") == 0 and not started
    monkeypatch.delenv("RANK")
    assert main_finetune.main(["--eval", "--resume", str(folder), "--export", "timm", "--num_workers", "0"]) == 0
    assert not started


@pytest.mark.slow
def test_the_export_is_a_process_of_its_own(tmp_path):
    assert start(main_pretrain, tmp_path / "run", "--export", "timm") == 0
    assert exporting.is_exported(tmp_path / "run", "timm")
