"""Check the packages that only some options need, before training starts. This file does not import torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from options import RunOptions

PROJECT = Path(__file__).resolve().parent.parent

EXPORT_PACKAGES: dict[str, tuple[str, ...]] = {
    "timm": (),
    "hf": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
}
"""For each format of tools.export, the packages that it needs in addition to requirements.txt."""


def missing_packages(*packages: str) -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def require_packages(what: str, packages: tuple[str, ...], requirements: str) -> None:
    """Raise ValueError, with the command that installs them, if packages are not installed.

    Args:
        what: What needs the packages, for the message.
        packages: Names to import.
        requirements: The file in requirements/ that pins them.
    """
    if missing := missing_packages(*packages):
        file = PROJECT / "requirements" / requirements
        raise ValueError(f"{what} needs {', '.join(missing)}: run {sys.executable} -m pip install -r {file}")


def require_extras(options: RunOptions, main: bool = True) -> None:
    """Raise ValueError if a package that the options need is missing, or Weights & Biases has no login.

    Args:
        options: The options of a run.
        main: Whether this is the main process, the only one that logs in.
    """
    for name in getattr(options, "export", ()):
        require_packages(f"--export {name}", EXPORT_PACKAGES[name], "export.txt")
    if options.wandb:
        require_packages("--wandb", ("wandb",), "wandb.txt")
        if main:
            _require_login()


def _require_login() -> None:
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "--wandb: no API key of Weights & Biases is configured. Run `wandb login`, set WANDB_API_KEY, or log to "
            "the run folder with WANDB_MODE=offline and upload later with `wandb sync`"
        )
