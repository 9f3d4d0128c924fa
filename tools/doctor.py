"""Check everything that a long run needs before it starts, and estimate its time, memory and price.

    python -m tools.doctor -c configs/pretrain/nor_mae_vit_tiny_in1k.yaml --data_path IMAGENET --price 3.19

It takes the options of main_pretrain.py, or with --program those of main_finetune.py or main_segment.py, checks
packages, images and masks, shared memory, disk and GPUs, and measures time and memory by training on a few batches as
the run would. It writes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import programs
from data.decode import first_line, torchcodec_jpeg
from data.images import BadImage, Pair
from data.loader import Source, allowed_bad, pixel_statistics
from engine_pretrain import train_one_epoch
from options import RunOptions, resolve_batch
from options.schema import require_number
from programs import parse_options
from programs.plan import Plan
from tools.command import reports_errors, require_at_least
from util import optim, precision
from util.compiler import compiles
from util.distributed import Processes, pick_device
from util.extras import require_extras
from util.logging import log_to_terminal
from util.meters import Means
from util.stepper import Stepper

PROJECT = Path(__file__).resolve().parent.parent

log = logging.getLogger("doctor")

GOOD, DOUBTFUL, WRONG = "ok", "doubtful", "WRONG"
LOOKED_AT = 64  # images that are read
WARM_UP = 2  # batches before the measurement
PREFETCHED = 2  # batches that each worker keeps in shared memory
GB = 1e9
SHARED_MEMORY = Path("/dev/shm")
EXIT_WRONG = 1
COMMANDS = {"main_pretrain.py": "pretrain", "main_finetune.py": "finetune", "main_segment.py": "segment"}


def make_first_plan(options: RunOptions, processes: int, device: torch.device) -> Plan:
    """Create the plan of rank 0 of `processes`; this process checks all data itself. The model is on the device."""
    alone, first = Processes(0, 1, 0, device), Processes(0, processes, 0, device)
    plan = programs.load(options.PROGRAM).make_plan(options, first, reading=alone)
    plan.model.to(device)
    return plan


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def checkpoint_bytes(plan: Plan, optimizer: torch.optim.Optimizer) -> int:
    """Return the size of a checkpoint: weights, their moving average if there is one, and optimizer state."""
    averaged = bool(getattr(plan.options, "ema", 0))
    moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
    return count_bytes(plan.model.state_dict()) * (1 + averaged) + moments * count_bytes(learned(plan.model))


def checkpoint_files(options: RunOptions) -> int:
    """Return the maximum number of checkpoint files: kept epochs, the last two, the one being written, and the best."""
    return options.keep + (3 if options.PROGRAM == "pretrain" else 4)


def count_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


@dataclass(frozen=True)
class Finding:
    verdict: str
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<9} {self.what:<14} {self.text}"


def packages(requirements: Path = PROJECT / "requirements.txt") -> Iterator[Finding]:
    """Compare installed versions with the pinned ones, and test two packages that may fail although installed."""
    missing, other = [], []
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", requirements.read_text(), re.MULTILINE)
    for name, pin in pinned:
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            missing.append(name)
            continue
        if found != pin:
            other.append(f"{name} {found} (tested with {pin})")
    if missing:
        yield Finding(WRONG, "packages", f"missing: {', '.join(missing)}; pip install -r {requirements.name}")
    if other:
        yield Finding(DOUBTFUL, "packages", ", ".join(other))
    if not missing and not other:
        text = f"Python {platform.python_version()}, all {len(pinned)} of {requirements.name} as pinned"
        yield Finding(GOOD, "packages", text)
    if torchcodec_jpeg() is None:
        yield Finding(DOUBTFUL, "torchcodec", "cannot be used: JPEG files are decoded by Pillow, more slowly")
    try:
        import torch.utils.tensorboard  # noqa: F401  may be absent
    except ImportError as error:
        yield Finding(DOUBTFUL, "tensorboard", f"no curves there, metrics.jsonl has them ({error})")


def images(source: Source, max_bad_fraction: float) -> Finding:
    """Count the images, and check that a sample of them can be read, with their masks if they have any."""
    indices = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist()
    bad, masked, began = [], False, time.monotonic()
    for index in indices:
        try:
            masked |= isinstance(source.read(index), Pair)
        except BadImage as error:
            bad.append(f"{error.path} ({error.reason})")
    each = (time.monotonic() - began) / len(indices)
    text = f"{len(source):,} images"
    if source.classes is not None:
        text += f" of {len(source.classes)} classes"
    what = "read with masks" if masked else "read"
    text += f"; {len(indices) - len(bad)} of {len(indices)} {what}, {1000 * each:.1f} ms each"
    if not bad:
        return Finding(GOOD, "images", text)
    # The sample is small: a fraction that training accepts is reported as doubtful, not as wrong.
    allowed = max(allowed_bad(max_bad_fraction, len(source)), allowed_bad(max_bad_fraction, len(indices)))
    verdict = DOUBTFUL if len(bad) <= allowed else WRONG
    return Finding(verdict, "images", f"{text}; not read: {'; '.join(bad[:3])}")


def shared_memory(options: RunOptions, image_bytes: int, processes: int) -> Finding:
    """Check that the batches that workers prepare fit into shared memory."""
    workers = 0 if getattr(options, "data_on_device", False) else options.num_workers
    needed = processes * workers * PREFETCHED * options.batch_size * image_bytes
    if not needed:
        return Finding(GOOD, "shared memory", "not needed: there are no loader workers")
    if not SHARED_MEMORY.is_dir():
        return Finding(DOUBTFUL, "shared memory", f"there is no {SHARED_MEMORY}, so it cannot be checked")
    return room(needed, SHARED_MEMORY, "shared memory", f"{processes} x {workers} workers hold")


def disk(output_dir: str, checkpoint_bytes: int, checkpoints: int) -> Finding:
    """Check that the run folder can be written, and has room for all checkpoints."""
    place = Path(output_dir).resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding(WRONG, "disk", f"{place} is not a writable folder; give another --output_dir")
    text = f"{checkpoints} checkpoints of {checkpoint_bytes / GB:.3f} GB take"
    return room(checkpoints * checkpoint_bytes, place, "disk", text)


def room(needed: int, place: Path, what: str, text: str) -> Finding:
    free = shutil.disk_usage(place).free
    verdict = GOOD if free > 2 * needed else DOUBTFUL if free > needed else WRONG
    return Finding(verdict, what, f"{text} {needed / GB:.3f} GB; {free / GB:.1f} GB are free in {place}")


def devices(device: torch.device, processes: int) -> Iterator[Finding]:
    """Report the devices, and check that the GPUs can communicate."""
    if device.type != "cuda":
        yield Finding(GOOD, "device", f"{device}, {torch.get_num_threads()} threads; no GPU is used")
        return
    count = torch.cuda.device_count()
    cards = [torch.cuda.get_device_properties(number) for number in range(count)]
    text = ", ".join(f"{card.name} with {card.total_memory / GB:.0f} GB" for card in cards)
    more = "" if processes <= count else f"; {processes} processes need {processes - count} more on other machines"
    yield Finding(GOOD if processes <= count else DOUBTFUL, "GPU", text + more)
    try:
        ones = [torch.ones(1 << 20, device=f"cuda:{number}") for number in range(count)]
        torch.cuda.nccl.all_reduce(ones)
        sums = {float(value.mean()) for value in ones}
        right = sums == {float(count)}
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding(GOOD if right else WRONG, "NCCL", f"{nccl}: a sum over {count} GPUs gave {sums}")
    except RuntimeError as error:
        yield Finding(WRONG, "NCCL", first_line(error))


@dataclass(frozen=True)
class Measured:
    """Seconds per micro-batch, the fraction of time spent waiting for images, and peak memory in bytes."""

    seconds: float
    waiting: float
    memory: int


def train_a_little(plan: Plan, optimizer: torch.optim.Optimizer, device: torch.device, count: int) -> Measured:
    """Train on `count` micro-batches after a warm-up, with an update after each."""
    options, batches = plan.options, plan.batches
    if options.compile and compiles(device):
        plan.model.compile()
    amp = precision.resolve_amp(options.amp, device)
    objective = plan.make_objective(plan.model).to(device)
    schedule = optim.warmup_cosine(optimizer, epochs=2, warmup_epochs=1, steps_per_epoch=count, min_lr=0)
    hooks: Any = plan.model if hasattr(plan.model, "before_step") else None
    stepper = Stepper(plan.model, optimizer, schedule, clip_grad=options.clip_grad, fp16=amp == "fp16", hooks=hooks)
    stream = itertools.chain.from_iterable(batches.epoch(epoch) for epoch in itertools.count())

    def train(number: int) -> float:
        began = time.monotonic()
        train_one_epoch(
            objective,
            itertools.islice(stream, number),
            stepper,
            Means(Processes(0, 1, 0, device)),
            device=device,
            autocast=precision.autocast(amp, device),
            note=lambda problems: None,
            after_step=lambda: None,
        )
        stepper.bad_steps()  # synchronises the device
        return time.monotonic() - began

    train(WARM_UP)
    batches.reset_wait()
    seconds = train(count)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured(seconds / count, min(1.0, batches.wait_seconds / seconds), memory)


def estimate(
    options: RunOptions, steps_per_epoch: int, measured: Measured, processes: int, price: float | None
) -> Iterator[str]:
    """Yield lines on time, memory and price of the run; `price` is per device and hour."""
    hours = steps_per_epoch * options.accum_iter * measured.seconds / 3600
    rate = processes * options.batch_size / measured.seconds
    yield (
        f"{rate:,.0f} images/s: {measured.seconds:.3f} s for {options.batch_size} images x {processes} processes, "
        f"{100 * measured.waiting:.0f}% of it waiting for images"
    )
    yield f"{measured.memory / GB:.2f} GB of memory at the peak, for each process"
    yield f"an epoch of {steps_per_epoch} updates: {duration(hours)}"
    yield f"the run of {options.epochs} epochs: {duration(options.epochs * hours)}"
    if price is not None:
        cost = processes * price * hours
        yield f"price, at {price:g} an hour and device: {cost:.2f} an epoch, {options.epochs * cost:.2f} the run"
    if processes > 1:
        yield "(measured with one process; exchanging gradients is assumed to take no time)"


def duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.1f} seconds"
    return f"{60 * hours:.1f} minutes" if hours < 2 else f"{hours:.1f} hours"


def examine(options: RunOptions, processes: int, batches: int, price: float | None) -> Iterator[Finding | str]:
    """Yield every finding, then the estimate. Raises ValueError for options with which a run would not start."""
    mean, std = pixel_statistics(options.in_chans, options.mean, options.std)
    options = replace(resolve_batch(options, processes), mean=mean, std=std)
    device = pick_device(options.device)
    yield from packages()
    try:
        require_extras(options)
    except ValueError as problem:
        yield Finding(WRONG, "packages", str(problem))
    yield from devices(device, processes)
    plan = make_first_plan(options, processes, device)
    options, optimizer = plan.options, plan.make_optimizer(device)
    yield images(plan.source, options.max_bad_fraction)
    yield from (Finding(DOUBTFUL if "left out" in note else GOOD, "data", note) for note in plan.source.notes)
    yield shared_memory(options, plan.image_bytes, processes)
    yield disk(options.output_dir, checkpoint_bytes(plan, optimizer), checkpoint_files(options))
    log.info("training on %d batches of %d images, to measure", WARM_UP + batches, options.batch_size)
    try:
        measured = train_a_little(plan, optimizer, device, batches)
    except torch.OutOfMemoryError:
        advice = f"--batch_size {options.batch_size // 2}" if options.batch_size > 1 else "a smaller model"
        yield Finding(WRONG, "memory", f"{options.batch_size} images at a time do not fit on {device}: try {advice}")
        return
    yield from estimate(options, plan.batches.steps_per_epoch, measured, processes, price)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="All other options are those of the program.",
        allow_abbrev=False,
    )
    parser.add_argument("--program", choices=COMMANDS, default="main_pretrain.py", help="program of the run")
    parser.add_argument("--price", type=float, help="price of a device per hour, in any currency")
    parser.add_argument("--processes", type=int, default=1, help="number of processes of the run, one per device")
    parser.add_argument("--batches", type=int, default=10, help="batches to train on for the estimate")
    given, words = parser.parse_known_args(argv)
    log_to_terminal(main=True)
    wrong = False
    require_at_least(given, processes=1, batches=1)
    if given.price is not None:
        require_number("--price", given.price, 0)
    try:
        options = parse_options(COMMANDS[given.program], words)
    except ValueError as error:
        raise ValueError(f"{error} (options of {given.program}; --program selects another program)") from None
    for found in examine(options, given.processes, given.batches, given.price):
        wrong |= isinstance(found, Finding) and found.verdict == WRONG
        sys.stdout.write(f"{found}\n")
    return EXIT_WRONG if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
