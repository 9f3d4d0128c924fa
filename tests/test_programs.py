"""The programs' command lines: options are parsed without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import programs

PROJECT = Path(__file__).resolve().parent.parent
WITHOUT_TORCH = """
import sys
import {script}
try:
    {script}.main({argv!r})
except SystemExit:
    pass
slow = {{"torch", "timm", "torchvision", "numpy"}} & sys.modules.keys()
assert not slow, f"imported: {{slow}}"
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["--help-all"], ["--epocs", "3"], ["--epochs", "three"], ["-c", "missing.yaml"]]
)
@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune", "main_linprobe", "main_segment"])
def test_help_and_wrong_options_do_not_import_torch(script, argv):
    code = WITHOUT_TORCH.format(script=script, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert argv[0].startswith("--help") or done.stderr.startswith("error: "), done.stderr


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_every_program_can_be_loaded_by_its_name(name):
    assert callable(programs.load(name).run)
