"""The training programs: one module per command, found by the name that every checkpoint stores.

This file does not import torch, so that `--help` and the message for a wrong option do not wait for it; `load` imports
a program with everything that it needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from options import FinetuneOptions, PretrainOptions, ProbeOptions, RunOptions, SegmentOptions, parse

EXIT_BAD_INPUT = 2

PROGRAMS: dict[str, type[RunOptions]] = {
    "pretrain": PretrainOptions,
    "finetune": FinetuneOptions,
    "probe": ProbeOptions,
    "segment": SegmentOptions,
}


class Program(Protocol):
    """What every module of this package offers."""

    def run(self, options: Any) -> None:
        """Train, or evaluate where the options ask for it."""


def load(name: str) -> Any:
    """Import the program `name` (a key of `PROGRAMS`), and torch with it."""
    return importlib.import_module(f"programs.{name}")


def parse_options(name: str, argv: Sequence[str]) -> Any:
    """Parse the command line of the program `name`; torch is imported only where a checkpoint must be read.

    Raises:
        ValueError: an option is wrong, or the checkpoint that it names cannot be read.
    """
    schema = PROGRAMS[name]
    if name == "pretrain":
        import methods

        return methods.parse_options(argv)
    return parse(schema, argv, base=partial(_inherit, schema))


def _inherit(schema: type[RunOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the checkpoint named among the options `given` decides."""
    if not {"init_from", "eval"} & given.keys():
        return {}
    from util import checkpoint

    return checkpoint.inherited(schema, given)


def front_door(parse_options: Callable[[Sequence[str]], Any], name: str, argv: Sequence[str] | None = None) -> int:
    """Parse the options, then import and run the program `name`; returns the exit code.

    Exit codes: 0 done or nothing left to do, 2 wrong input, 3 too many updates that are not finite, 4 checkpoints
    cannot be written, 75 stopped by a signal and to be started again.
    """
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    program = load(name)
    from util.exits import run_program

    return run_program(program.run, options)
