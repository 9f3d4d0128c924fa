"""Faults that a test injects into a training process before it starts: `Training(..., fault=partial(FAULT, ...))`."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable

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
    """Replace `owner.name` by `act(number, original, *arguments)`; `number` counts the calls from 1."""
    original = getattr(owner, name)
    calls = 0

    def instead(*arguments, **named):
        nonlocal calls
        calls += 1
        return act(calls, original, *arguments, **named)

    setattr(owner, name, instead)


def full_disk(first, last, number=errno.ENOSPC):
    """Let saves number `first` to `last` fail after some bytes, with ENOSPC or another `errno` value."""

    def act(now, original, state, file):
        if first <= now <= last:
            file.write(b"x" * 1000)
            raise OSError(number, os.strerror(number))
        original(state, file)

    count_calls(torch, "save", act)


def full_device(first, last):
    """Write saves number `first` to `last` to /dev/full, so that `torch.save` raises its own error."""

    def act(now, original, state, file):
        if first <= now <= last:
            with open("/dev/full", "wb") as full:
                original(state, full)
        original(state, file)

    count_calls(torch, "save", act)


def read_only_folder():
    """Let the run folder appear to be on a read-only file system."""

    def act(number, original, path, *arguments, **named):
        if os.path.basename(path) == LOCK:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, *arguments, **named)

    count_calls(os, "open", act)


def signal_inside_save(number, which):
    """Send this process the signal `which` in the middle of save number `number`."""

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
    """Kill this process when the fraction `share` of the bytes of save number `number` is written."""

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
    """Kill this process just before, or just `after`, the call number `number` of `os.replace`."""

    def act(now, original, *arguments):
        if now == number and not after:
            _kill()
        original(*arguments)
        if now == number:
            _kill()

    count_calls(os, "replace", act)


def signals_inside_evaluation(number, *which):
    """Send signals at the first batch of evaluation number `number`; the kNN evaluation has two: bank and queries."""

    def act(now, original, *arguments, **named):
        for position, batch in enumerate(original(*arguments, **named)):
            if now == number and position == 0:
                send_to_self(*which)
            yield batch

    for module in (features, runs):
        count_calls(module, "eval_batches", act)


def signals_inside_step(number, *which):
    """Send signals to this process at the start of step number `number`."""

    def act(now, original, *arguments):
        if now == number:
            send_to_self(*which)
        return original(*arguments)

    count_calls(Stepper, "__call__", act)


def signals_before_training(*which):
    """Send signals to this process while it opens the data."""

    def act(now, original, *arguments):
        send_to_self(*which)
        return original(*arguments)

    count_calls(pretrain, "open_images", act)


def send_to_self(*which):
    for number in which:
        os.kill(os.getpid(), number)


def loss_spike(at, times, count=1):
    """Multiply the losses of `count` micro-batches by `times`, starting with micro-batch number `at`."""

    def act(number, original, stepper, losses, index):
        if at <= number < at + count:
            losses = losses | {"loss": losses["loss"] * times}
        return original(stepper, losses, index)

    count_calls(Stepper, "__call__", act)


def impatient_loader():
    """Let the loader check for exited workers every 0.2 seconds."""
    _MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)


def bad_losses(first, last, gradient=False):
    """Set the losses of micro-batches `first` to `last` to NaN; with `gradient`, only their gradients."""

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
    """Raise an out-of-memory error at micro-batch number `at`."""

    def act(number, original, *arguments):
        if number == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(*arguments)

    count_calls(Stepper, "__call__", act)


def bad_losses_and_full_disk():
    bad_losses(1, 1000)
    full_disk(1, 1000)


def killed_before_line(number):
    """Kill this process after update number `number`, before its line is written to the records."""
    count_calls(RunLog, "step", lambda now, original, *a: _kill() if now == number else original(*a))


def killed_inside_line(number):
    """Kill this process when half of line number `number` is written."""

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
    """Let TensorBoard fail after five values."""

    def act(number, original, *arguments, **named):
        if number > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments, **named)

    count_calls(SummaryWriter, "add_scalar", act)


def missing_tensorboard():
    """Let the import of TensorBoard fail."""
    sys.modules["torch.utils.tensorboard"] = None


def jumping_clock():
    """Let `time.time` go back by one day at every call."""
    count_calls(time, "time", lambda number, original: original() - 86_400 * number)


def signal_at_loader_start(which):
    """Send a signal to this process while it starts its workers."""

    def act(number, original, *arguments, **named):
        os.kill(os.getpid(), which)
        return original(*arguments, **named)

    count_calls(data, "DataLoader", act)


def interrupted_twice_inside_save(number):
    """Send SIGINT (Ctrl-C) twice in the middle of save number `number`."""

    def act(now, original, state, file):
        if now == number:
            file.write(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(state, file)

    count_calls(torch, "save", act)


def first_epoch_is_best(then: Callable[[], None] | None = None) -> None:
    """Let the first epoch be the best; then call `then`."""
    from util.run import Run

    record_best = Run.record_best
    Run.record_best = lambda self, name, value: None if self.state.best else record_best(self, name, value)
    if then:
        then()
