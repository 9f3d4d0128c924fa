"""Faults to put into a training process before it begins: `Training(..., fault=partial(FAULT, ...))`."""

import errno
import os
import signal
import time

import torch
from torch.utils.tensorboard import SummaryWriter

from util import data
from util.logging import JsonLines, RunLog
from util.stepper import Stepper


def count_calls(owner, name, act):
    """Call `act(number, original, *arguments)` in the place of `owner.name`; the first call has number 1."""
    original = getattr(owner, name)
    calls = 0

    def instead(*arguments, **named):
        nonlocal calls
        calls += 1
        return act(calls, original, *arguments, **named)

    setattr(owner, name, instead)


def full_disk(first, last):
    """Saves `first` to `last` end after some bytes: no space is left."""

    def act(number, original, state, file):
        if first <= number <= last:
            file.write(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    count_calls(torch, "save", act)


def signal_inside_save(number, which):
    """This process gets a signal in the middle of its save with this number."""

    def act(now, original, state, file):
        if now == number:
            file.write(b"x" * 1000)
            file.flush()
            os.kill(os.getpid(), which)
            file.seek(0)
            file.truncate()
        original(state, file)

    count_calls(torch, "save", act)


def bad_losses(first, last, gradient=False):
    """The losses of micro-batches `first` to `last` are NaN; with `gradient`, only what is propagated back."""

    def act(number, original, stepper, losses, index):
        if first <= number <= last:
            loss = losses["loss"]
            if gradient:
                loss.register_hook(lambda incoming: incoming * float("nan"))
            else:
                losses = losses | {"loss": loss * float("nan")}
        return original(stepper, losses, index)

    count_calls(Stepper, "__call__", act)


def out_of_memory(at):
    def act(number, original, *arguments):
        if number == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(*arguments)

    count_calls(Stepper, "__call__", act)


def bad_losses_and_full_disk():
    bad_losses(1, 1000)
    full_disk(1, 1000)


def killed_before_line(number):
    """SIGKILL between the update and its line in the records."""
    count_calls(RunLog, "step", lambda now, original, *a: _kill() if now == number else original(*a))


def killed_inside_line(number):
    """SIGKILL when half of a line is written."""

    def act(now, original, lines, values):
        if now == number:
            with open(lines.path, "a") as file:
                file.write('{"run_id": "x", "st')
            _kill()
        original(lines, values)

    count_calls(JsonLines, "write", act)


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def broken_tensorboard():
    def act(number, original, *arguments, **named):
        if number > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    count_calls(SummaryWriter, "add_scalar", act)


def jumping_clock():
    """The clock goes back a day at every look."""
    count_calls(time, "time", lambda number, original: original() - 86_400 * number)


def signal_at_loader_start(which):
    """A signal while workers are being started."""

    def act(number, original, *arguments, **named):
        os.kill(os.getpid(), which)
        return original(*arguments, **named)

    count_calls(data, "DataLoader", act)


def interrupted_twice_inside_save(number):
    """Two Ctrl-C in the middle of a save."""

    def act(now, original, state, file):
        if now == number:
            file.write(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(state, file)

    count_calls(torch, "save", act)
