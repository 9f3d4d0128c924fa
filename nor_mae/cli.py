"""Run a program or a tool of the checkout by name: `nor-mae pretrain ...` is `python main_pretrain.py ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = {
    "pretrain": ("main_pretrain", "pretrain an encoder on images without labels"),
    "finetune": ("main_finetune", "train a classifier from a pretrained encoder, or evaluate one"),
    "probe": ("main_linprobe", "train a linear classifier on a frozen encoder"),
    "segment": ("main_segment", "train a segmenter from a pretrained encoder, or evaluate one"),
    "predict": ("tools.predict", "apply a classifier or segmenter to images"),
    "export": ("tools.export", "write a model for timm, Hugging Face or ONNX"),
    "embed": ("tools.embed", "write the features of images to a file"),
    "knn": ("tools.knn", "evaluate an encoder by nearest neighbours"),
    "report": ("tools.report", "write a report of one or several runs"),
    "visualize": ("tools.visualize", "draw reconstructions, neighbours and other figures"),
    "doctor": ("tools.doctor", "check machine, data and options before a run"),
    "replay": ("tools.replay", "find where the numbers of a dumped step stop being finite"),
    "pack": ("tools.pack", "write a data set into a few large files"),
    "tokenizer": ("tools.tokenizer", "fit a tokenizer for token targets"),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "usage: nor-mae COMMAND [options]\n\n" + "\n".join(lines) + "\n\nnor-mae COMMAND --help lists its options\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command named by the first word; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"error: unknown command {words[0]!r}\n{usage()}")
        return 2
    # Only the process of this command sees the checkout's modules; importing nor_mae elsewhere changes nothing.
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
