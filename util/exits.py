"""Exit codes of the programs, their exceptions, and their messages."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch

from data.loader import NothingReadable
from util import distributed
from util.distributed import NoDevice
from util.folder import AlreadyFinished
from util.logging import log_to_terminal
from util.stepper import Unstable

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_BAD_INPUT, EXIT_UNSTABLE, EXIT_CANNOT_SAVE, EXIT_NOT_EXPORTED, EXIT_INTERRUPTED = 0, 2, 3, 4, 5, 75

Options = TypeVar("Options")


class Interrupted(Exception):
    """The run was stopped by a signal, and everything is saved."""


class CannotSave(RuntimeError):
    """Too many checkpoints in a row could not be written."""


class TooManyBadImages(ValueError):
    """More images cannot be read than the run is allowed to replace."""


class Ending(NamedTuple):
    """The end of a program that did not finish: exit code, and a message with its level."""

    code: int
    level: int
    message: str


def find_ending(error: BaseException) -> Ending | None:
    """Return the ending for an exception; None for a bug, which is reported with its traceback."""
    match error:
        case AlreadyFinished():
            return Ending(EXIT_DONE, logging.INFO, str(error))
        case Interrupted():
            return Ending(EXIT_INTERRUPTED, logging.INFO, str(error))
        case Unstable():
            return Ending(EXIT_UNSTABLE, logging.ERROR, str(error))
        case CannotSave():
            return Ending(EXIT_CANNOT_SAVE, logging.ERROR, str(error))
        case torch.OutOfMemoryError():
            what = str(error).split(". ")[0]
            advice = "Halve --batch_size and keep --total_batch_size: the run resumes and accumulates more gradients"
            return Ending(EXIT_BAD_INPUT, logging.ERROR, f"error: {what}\n{advice}")
        case ValueError():
            return Ending(EXIT_BAD_INPUT, logging.ERROR, f"error: {error}")
    return None


def is_bug(error: BaseException | None) -> bool:
    """Return whether an exception is a bug of the program although it has the type of an input error."""
    return isinstance(error, ValueError) and not isinstance(error, TooManyBadImages | NothingReadable)


def log_record(error: BaseException) -> logging.LogRecord:
    """Return the last record of a log file: the message, or the traceback of a bug."""
    ending = None if is_bug(error) else find_ending(error)
    if ending is None:
        traceback = type(error), error, error.__traceback__
        return logging.LogRecord(__name__, logging.ERROR, __file__, 0, "a bug ended the run", (), traceback)
    return logging.LogRecord(__name__, ending.level, __file__, 0, ending.message, (), None)


def run_program(run: Callable[[Options], None], options: Options) -> int:
    """Call `run(options)`, log how it ended, and return the exit code.

    Exit codes: 0 finished (or nothing to do); 2 invalid input; 3 no finite updates; 4 checkpoints cannot be written; 75
    stopped by a signal, after everything was saved or before the first step, to be started again. A second Ctrl-C exits
    immediately with 130. Other exceptions are bugs and are raised. The caller's signal handlers are restored at the
    end.
    """
    log_to_terminal(main=int(os.environ.get("RANK", "0")) == 0, keep=True)
    before = distributed.on_stop_signals(_stopped_early)  # until the run installs its own handlers
    code = None
    try:
        code = _outcome(run, options)
    finally:
        for number, act in before.items():
            # The process is about to exit: another signal must not change its exit code.
            ending = code == EXIT_INTERRUPTED and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ending else act)
    return code


def _stopped_early(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name} before the first step; nothing is lost")


def _outcome(run: Callable[[Any], None], options: Any) -> int:
    try:
        run(options)
    except Exception as error:
        if (ending := find_ending(error)) is None:
            raise
        # An error of all processes is logged once per machine; an error of one process is logged by that process.
        of_all = isinstance(error, ValueError) and not isinstance(error, NoDevice | NothingReadable)
        if not of_all or int(os.environ.get("LOCAL_RANK", "0")) == 0:
            log.log(ending.level, "%s", ending.message)
        return ending.code
    return EXIT_DONE
