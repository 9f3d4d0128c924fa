"""Faults to put into a training process before it begins: `Training(..., fault=partial(FAULT, ...))`."""

import errno
import io
import os
import signal
import sys
import time

import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torch.utils.tensorboard import SummaryWriter

from data import loader as data
from programs import pretrain
from util import features
from util import run as runs
from util.lock import NAME as LOCK
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


def full_disk(first, last, number=errno.ENOSPC):
    """Saves `first` to `last` end after some bytes: no space is left, or another number of an error."""

    def act(now, original, state, file):
        if first <= now <= last:
            file.write(b"x" * 1000)
            raise OSError(number, os.strerror(number))
        original(state, file)

    count_calls(torch, "save", act)


def full_device(first, last):
    """Saves `first` to `last` go to a device that is full, and fail in the way that torch makes of it."""

    def act(now, original, state, file):
        if first <= now <= last:
            with open("/dev/full", "wb") as full:
                original(state, full)
        original(state, file)

    count_calls(torch, "save", act)


def read_only_folder():
    """The run's folder is on a file system that cannot be written."""

    def act(number, original, path, *arguments, **named):
        if os.path.basename(path) == LOCK:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, *arguments, **named)

    count_calls(os, "open", act)


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


def killed_inside_save(number, share):
    """SIGKILL when that share of a save's bytes is written."""

    def act(now, original, state, file):
        if now == number:
            whole = io.BytesIO()
            original(state, whole)
            file.write(whole.getvalue()[: int(share * whole.tell())])
            file.flush()
            _kill()
        original(state, file)

    count_calls(torch, "save", act)


def killed_at_rename(number, after):
    """SIGKILL just before, or just `after`, a file is renamed into its place."""

    def act(now, original, *arguments):
        if now == number and not after:
            _kill()
        original(*arguments)
        if now == number:
            _kill()

    count_calls(os, "replace", act)


def signals_inside_evaluation(number, *which):
    """Signals at the first batch of the evaluation, or of the nearest neighbours, with this number."""

    def act(now, original, *arguments, **named):
        for position, batch in enumerate(original(*arguments, **named)):
            if now == number and position == 0:
                send_to_self(*which)
            yield batch

    for module in (features, runs):
        count_calls(module, "eval_batches", act)


def signals_inside_step(number, *which):
    def act(now, original, *arguments):
        if now == number:
            send_to_self(*which)
        return original(*arguments)

    count_calls(Stepper, "__call__", act)


def signals_before_training(*which):
    """Signals while the data is being opened."""

    def act(now, original, *arguments):
        send_to_self(*which)
        return original(*arguments)

    count_calls(pretrain, "open_images", act)


def send_to_self(*which):
    for number in which:
        os.kill(os.getpid(), number)


def loss_spike(at, times, count=1):
    """Multiply the losses of `count` micro-batches from number `at` on."""

    def act(number, original, stepper, losses, index):
        if at <= number < at + count:
            losses = losses | {"loss": losses["loss"] * times}
        return original(stepper, losses, index)

    count_calls(Stepper, "__call__", act)


def impatient_loader():
    """Look for dead workers every fifth of a second."""
    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)


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


def missing_tensorboard():
    sys.modules["torch.utils.tensorboard"] = None


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
