"""The training programs: one module per command, found by the name that every checkpoint stores.

This file does not import torch, so that `--help` and errors in options are fast; `load` imports a program with
everything that it needs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from options import (
    FinetuneOptions,
    PretrainOptions,
    ProbeOptions,
    RunOptions,
    SegmentOptions,
    default_folder,
    from_dict,
    parse,
)
from util.extras import require_extras

if TYPE_CHECKING:
    from programs.plan import Plan
    from util.distributed import Processes

EXIT_BAD_INPUT = 2

PROGRAMS: dict[str, type[RunOptions]] = {
    schema.PROGRAM: schema for schema in (PretrainOptions, FinetuneOptions, ProbeOptions, SegmentOptions)
}
PLANNED = ("pretrain", "finetune", "segment")  # programs with `make_plan`


class Program(Protocol):
    """Interface of the modules of this package, for commands and tools."""

    def run(self, options: Any) -> None:
        """Train, or evaluate if the options request it."""

    def make_plan(self, options: Any, processes: Processes, *, reading: Processes | None = None) -> Plan:
        """Create the parts of a training run; not in `programs.probe`, which trains on stored features.

        Args:
            options: Resolved options, see `util.run.resolve`.
            processes: The processes that train together.
            reading: The processes that share the checks of the data; default: `processes`.
        """


def load(name: str) -> Program:
    """Import the program `name` (a key of `PROGRAMS`), and torch with it."""
    return cast(Program, importlib.import_module(f"programs.{name}"))


def read_options(name: str, stored: Mapping[str, Any]) -> Any:
    """Read the options that a checkpoint of the program `name` stores, also those of an earlier version."""
    if name == "pretrain":
        import methods

        return methods.read_options(stored)
    return from_dict(PROGRAMS[name], stored)


def parse_options(name: str, argv: Sequence[str]) -> Any:
    """Parse the command line of the program `name`; torch is imported only if a checkpoint must be read.

    Raises:
        ValueError: An option is wrong, or the checkpoint that it names cannot be read.
    """
    schema = PROGRAMS[name]
    if name == "pretrain":
        import methods

        return methods.parse_options(argv)
    return parse(schema, argv, base=partial(_inherit, schema))


def _inherit(schema: type[RunOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are inherited from the checkpoint named in `given`."""
    if not {"init_from", "eval"} & given.keys():
        return {}
    from util import checkpoint

    return checkpoint.inherited(schema, given)


def front_door(parse_options: Callable[[Sequence[str]], Any], name: str, argv: Sequence[str] | None = None) -> int:
    """Parse the options, then import and run the program `name`; return the exit code.

    Exit codes: 0 finished or nothing to do, 2 invalid input, 3 too many non-finite updates, 4 checkpoints cannot be
    written, 5 finished but an export failed, 75 stopped by a signal and to be started again.
    """
    main = os.environ.get("RANK", "0") == "0"
    try:
        options = parse_options(sys.argv[1:] if argv is None else argv)
        options = replace(options, output_dir=options.output_dir or default_folder(options))
        require_extras(options, main)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_INPUT
    program = load(name)
    from util.exits import EXIT_DONE, run_program

    code = run_program(program.run, options)
    formats: tuple[str, ...] = getattr(options, "export", ())
    if formats and main and code == EXIT_DONE and not getattr(options, "eval", False):
        from util.exporting import export_run

        return export_run(Path(options.output_dir), formats)
    return code
