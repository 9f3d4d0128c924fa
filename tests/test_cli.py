"""The installed command runs the programs of the checkout, and the installation contains nothing else."""

import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nor_mae import cli

PROJECT = Path(__file__).resolve().parent.parent


def test_every_command_names_a_module_with_a_main():
    for module, what in cli.COMMANDS.values():
        source = (PROJECT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert "\ndef main(argv: Sequence[str] | None = None) -> int:" in source and what


def test_the_command_lists_its_commands_and_refuses_others(capsys):
    assert cli.main(["--help"]) == 0 and "pretrain" in capsys.readouterr().out
    assert cli.main(["train"]) == 2 and "unknown command 'train'" in capsys.readouterr().err


def test_a_command_runs_its_program_from_any_directory_without_importing_torch_for_a_wrong_option(tmp_path):
    code = "import sys; from nor_mae.cli import main; code = main(['pretrain', '--epoch', '3'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(code)"],
        cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean 'epochs'" in done.stderr and done.stdout.strip() == "False"


@pytest.mark.parametrize(("word", "shown"), [("--help", False), ("--help-all", True)])
def test_the_command_shows_the_help_of_its_program_without_importing_torch(tmp_path, word, shown):
    code = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    code += f"sys.argv[1:] = ['pretrain', '{word}']"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; from nor_mae.cli import main; sys.exit(main())"],
        cwd=tmp_path, env={"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    assert "--data_path" in done.stdout and ("--worker_timeout" in done.stdout) == shown


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "no-such-run", "photos"],
        ["embed", "no-such-run", "photos"],
        ["export", "timm", "no-such-run"],
        ["tokenizer", "kmeans", "no-such-folder", "--output", "tokens.pth"],
    ],
)
def test_tools_log_to_the_terminal(words, monkeypatch, tmp_path):
    root = logging.getLogger()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    assert cli.main(words) == 2
    assert root.level == logging.INFO and len(root.handlers) == 1


def test_only_the_command_is_installed():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["packages"] == ["nor_mae"]
    assert project["project"]["scripts"] == {"nor-mae": "nor_mae.cli:main"}


@pytest.mark.slow
def test_an_editable_installation_works_and_a_wheel_is_refused(tmp_path):
    python = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    refused = subprocess.run([*python, str(PROJECT)], capture_output=True, text=True)
    assert refused.returncode != 0 and "Use: pip install -e ." in refused.stderr + refused.stdout
