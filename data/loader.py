"""Load batches of a source of images, in an order that does not depend on the machine.

The content of a batch is a function of (seed, epoch, position) only. The order of an epoch is one permutation; a global
batch is a range of it, for any number of processes, accumulation steps or workers. The augmentation and mask noise of a
sample are drawn from (seed, epoch, index). Therefore workers have no state, loading can start at any optimizer step,
and an interrupted run resumes with exactly the same images.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import multiprocessing
import random
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.decode import torchcodec_jpeg
from data.images import BadImage, Pair, PairTransform, Transform, eval_transform, pretrain_transform
from data.shared_buffers import Allocate, SharedBuffers, TensorHandle, empty
from data.sources import Source, open_source

__all__ = [
    "Batch", "Batches", "EvalSamples", "NothingReadable", "Samples", "Source", "TrainSamples", "allowed_bad",
    "eval_batches", "eval_transform", "mix", "open_source", "pixel_statistics", "pretrain_transform",
]  # fmt: skip

log = logging.getLogger(__name__)

TRIES = 100  # unreadable images in a row, after which reading a sample fails
AHEAD = 2**25  # bytes of images that are read before the first of them is augmented
PREFETCH = 2  # batches that each worker prepares ahead
WORKER_TIMEOUT = 300.0  # seconds without a batch, after which running workers are considered hung
IGNORED_BY_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the main process handles them
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green, blue
ORDER, AUGMENTATION, NOISE = range(3)  # independent streams of random numbers

Floats = tuple[float, ...]
AnyTransform = Transform | PairTransform | Callable[[Any], list[Tensor]]  # returns an image, a pair, or several views
DrawNoise = Callable[[torch.Generator], Tensor]  # draws a sample's noise [R, L] from a CPU generator; picklable


class _WorkersLost(Exception):
    """The workers return no more batches. Arguments: what happened, details, and the usual causes."""


class NothingReadable(ValueError):  # noqa: N818 - the name describes the error
    """No image can be read: none of `TRIES` in a row, or none at all."""


def mix(*words: int) -> int:
    """Hash integers to a 63-bit integer (SplitMix64, one round for each integer)."""
    mask, state = 0xFFFFFFFFFFFFFFFF, 0
    for word in words:
        state = ((state ^ (word & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*words))


def noise_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return the CPU generator of a sample's noise. It is independent of the random numbers of augmentation."""
    return _generator(seed, epoch, index, NOISE)


def uniform_noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw uniform noise in [0, 1) of `shape` (R, L)."""
    return torch.rand(shape, generator=generator)


def pixel_statistics(in_chans: int, mean: Sequence[float] = (), std: Sequence[float] = ()) -> tuple[Floats, Floats]:
    """Return mean and standard deviation per channel, on a scale of 0 to 1.

    If they are not given, they are ImageNet's for 3 channels and 0.5 for other numbers of channels.
    """
    usual = IMAGENET if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)
    return tuple(mean) or usual[0], tuple(std) or usual[1]


def require_same_statistics(own: tuple[Floats, Floats], path: str, made_with: Mapping[str, Any]) -> None:
    """Raise ValueError if a frozen network was trained with another normalisation of images.

    Args:
        own: Mean and standard deviation of the images.
        path: Of the network's checkpoint, for messages.
        made_with: The options of its run. Without options, ImageNet's normalisation is assumed for 3 channels, and a
            difference is logged.
    """
    if not {"in_chans", "mean", "std"} <= made_with.keys():
        usual = pixel_statistics(len(own[0]))
        if not made_with and len(own[0]) == 3 and own != usual:
            log.warning(
                "%s does not contain its normalisation of images; most such files need ImageNet's, mean %s and std %s. "
                "It gets images with mean %s and std %s",
                *(path, *usual, *own),
            )
        return
    theirs = pixel_statistics(made_with["in_chans"], made_with["mean"], made_with["std"])
    for name, mine, other in zip(("mean", "std"), own, theirs, strict=True):
        if tuple(mine) != tuple(other):
            needed = ",".join(f"{value:g}" for value in other)
            raise ValueError(f"{path} was made for images with another {name}: give --{name} {needed}")


@functools.lru_cache(maxsize=32)
def _per_channel(values: Floats, device: torch.device) -> Tensor:
    """Return the values as `[C, 1, 1]` on the device; cached, because a copy for every batch would synchronise."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(slots=True)
class Sample:
    """One sample of a batch; see `Batch` for the fields."""

    image: Tensor | list[Tensor]
    label: int | Tensor | None
    noise: Tensor | None
    index: int
    problems: list[tuple[str, str]]


@dataclass
class Batch:
    """A batch of n samples.

    images     uint8 `[n, C, H, W]` from the loader; float32, normalised, after `to`. A list of such tensors, one for
               each view, if the method uses several views of an image
    labels     int64 `[n]`, or None if the source has no labels; masks `[n, H, W]` for a source of pairs
    noise      `[n, R, L]`, float32 uniform in 0..1 unless the method draws other noise; or None
    index      int64 `[n]`, the requested images (an unreadable image is replaced together with its label)
    problems   (path, reason) of the unreadable images
    mean, std  for each channel
    """

    images: Any
    labels: Tensor | None
    noise: Tensor | None
    index: Tensor
    problems: list[tuple[str, str]] = field(default_factory=list)
    mean: Floats = ()
    std: Floats = ()

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        """Move the batch to the device and normalise its images there, so that uint8 is copied instead of floats."""
        device = torch.device(device)
        without_waiting = device.type == "cuda"  # MPS might read the memory after it was reused
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=without_waiting))
        moved.images = _each_view(moved.images, self._normalized)
        return moved

    def _normalized(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        assert len(self.mean) == len(self.std) == images.shape[1], "they would be broadcast to other channels"
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = _per_channel(self.mean, images.device), _per_channel(self.std, images.device)
        return images.sub_(mean).div_(std)

    def pin_memory(self) -> Batch:
        return self._each(lambda tensor: tensor.pin_memory())

    def to_shared(self, buffers: SharedBuffers, number: int) -> Batch:
        """Put the tensors of batch `number` into shared memory for another process, the images first."""
        tensors: list[Tensor] = []
        self._each(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        handles: Iterator[Any] = iter(buffers.put(number, tensors))
        return self._each(lambda _: next(handles))

    def from_shared(self) -> Batch:
        """Copy the tensors that another process has put into shared memory to this process."""
        return self._each(lambda tensor: tensor.open() if isinstance(tensor, TensorHandle) else tensor)

    def _each(self, change: Callable[[Any], Tensor]) -> Batch:
        """Apply `change` to every tensor, in a fixed order: images, labels, noise, index."""
        images = _each_view(self.images, change)
        labels = None if self.labels is None else change(self.labels)
        noise = None if self.noise is None else change(self.noise)
        return replace(self, images=images, labels=labels, noise=noise, index=change(self.index))


def _each_view(images: Any, change: Callable[[Any], Tensor]) -> Any:
    """Apply `change` to a tensor of images, or to every tensor of a list."""
    return [change(view) for view in images] if isinstance(images, list) else change(images)


def collate(samples: list[Sample], mean: Floats, std: Floats, allocate: Allocate = empty) -> Batch:
    """Stack samples into one batch, the images in memory from `allocate`."""
    first = samples[0].image
    images: Any
    if isinstance(first, list):
        views = zip(*(sample.image for sample in samples), strict=True)
        images = [_stack_images(view, allocate) for view in views]
    else:
        images = _stack_images([sample.image for sample in samples], allocate)  # type: ignore[misc]
    labels = [sample.label for sample in samples if sample.label is not None]
    noise = [sample.noise for sample in samples if sample.noise is not None]
    return Batch(
        images=images,
        labels=_together(labels),
        noise=torch.stack(noise) if noise else None,
        index=torch.tensor([sample.index for sample in samples]),
        problems=[problem for sample in samples for problem in sample.problems],
        mean=mean,
        std=std,
    )


def _stack_images(images_CHW: Sequence[Tensor], allocate: Allocate) -> Tensor:
    """Return `[n, C, H, W]` in memory from `allocate`.

    Resized images are channels last and keep this memory format, so that stacking is a plain copy.
    """
    rows_HWC = [image.permute(1, 2, 0) for image in images_CHW]
    images_NHWC = torch.stack(rows_HWC, out=allocate((len(rows_HWC), *rows_HWC[0].shape), rows_HWC[0].dtype))
    return images_NHWC.permute(0, 3, 1, 2)


def _together(labels: list[Any]) -> Tensor | None:
    """Stack numbers or masks of a batch into one tensor."""
    if not labels:
        return None
    return torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)


def _transformed(source: Source, transform: AnyTransform, image: Any, index: int) -> tuple[Any, Any]:
    """Transform an image; return it with its label: the source's label, or the mask of a pair."""
    if isinstance(image, Pair):
        return transform(image)  # type: ignore[arg-type, return-value]
    label = None if source.labels is None else int(source.labels[index])
    return transform(image), label


class Samples(Protocol):
    """Make batches from the keys of their samples.

    An error for the user is returned as a value, because an exception raised in a worker would be reported with a
    traceback. `allocate` returns uninitialised memory for the images.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Any], allocate: Allocate = ...) -> Batch | NothingReadable: ...


class TrainSamples(Dataset):
    """Augmented images with mask noise, by (epoch, index): the same key always gives the same sample.

    Args:
        noise_shape: (R, L) of uniform noise: rows per image and number of patches; None for no noise.
        draw_noise: Draws a sample's noise from a CPU generator, instead of uniform noise.
    """

    def __init__(
        self,
        source: Source,
        transform: AnyTransform,
        seed: int,
        noise_shape: tuple[int, int] | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        draw_noise: DrawNoise | None = None,
    ):
        self.source, self.transform, self.seed = source, transform, seed
        uniform = None if noise_shape is None else functools.partial(uniform_noise, noise_shape)
        self.draw_noise = draw_noise or uniform
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of (epoch, index).

        An unreadable image is reported and replaced, with its label, by the next readable one of the source; the random
        numbers are still those of the key.
        """
        return _last(self._steps(key))

    def __getitems__(self, keys: Sequence[tuple[int, int]], allocate: Allocate = empty) -> Batch | NothingReadable:
        """Read many images and then augment them.

        Alternating between reading and augmenting takes nearly 10% longer, because of CPU cache misses.
        """
        samples: list[Sample] = []
        started, waiting = [], 0
        try:
            for key in keys:
                started.append(steps := self._steps(key))
                waiting += _bytes(next(steps))
                if waiting > AHEAD:
                    samples += map(_last, started)
                    started, waiting = [], 0
            samples += map(_last, started)
        except NothingReadable as error:
            return error
        return collate(samples, self.mean, self.std, allocate)

    def _steps(self, key: tuple[int, int]) -> Iterator[Any]:
        """Yield the image that was read (and its replacement if it cannot be decoded), then the sample."""
        epoch, index = key
        seed = mix(self.seed, epoch, index, AUGMENTATION)
        problems: list[tuple[str, str]] = []
        for shown in (number % len(self.source) for number in range(index, index + min(TRIES, len(self.source)))):
            try:
                image = self.source.read(shown)
                yield image
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed all accelerators
                np.random.seed(seed & 0xFFFFFFFF)
                random.seed(seed)
                pixels, label = _transformed(self.source, self.transform, image, shown)
                break
            except BadImage as error:
                problems.append((error.path, error.reason))
        else:
            raise NothingReadable(f"{len(problems)} images in a row cannot be read: {_first(problems)}")
        noise = None if self.draw_noise is None else self.draw_noise(noise_generator(self.seed, epoch, index))
        yield Sample(pixels, label, noise, index, problems)


def _last(steps: Iterator[Any]) -> Any:
    return collections.deque(steps, maxlen=1).pop()


def _bytes(image: Any) -> int:
    """Return the size in bytes of an image, or of an image and its mask."""
    return sum(part.nbytes for part in image) if isinstance(image, Pair) else getattr(image, "nbytes", 0)


class EvalSamples(Dataset):
    """Images without randomness, by index. Unreadable ones are left out of the batch and reported, never replaced."""

    def __init__(self, source: Source, transform: AnyTransform, *, mean: Sequence[float], std: Sequence[float]):
        self.source, self.transform = source, transform
        self.mean, self.std = tuple(mean), tuple(std)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        pixels, label = _transformed(self.source, self.transform, self.source.read(index), index)
        return Sample(pixels, label, None, index, [])

    def __getitems__(self, keys: Sequence[int], allocate: Allocate = empty) -> Batch:
        samples, problems = [], []
        for key in keys:
            try:
                samples.append(self[key])
            except BadImage as error:
                problems.append((error.path, error.reason))
        if not samples:
            nothing = torch.empty(0, len(self.mean), 1, 1, dtype=torch.uint8)
            return Batch(nothing, None, None, torch.empty(0, dtype=torch.int64), problems, self.mean, self.std)
        return replace(collate(samples, self.mean, self.std, allocate), problems=problems)


def _may_decode_jpeg(samples: Samples) -> bool:
    """Return whether images of 3 channels are read from files or archives, which may be JPEG whatever their names."""
    source, channels = getattr(samples, "source", None), len(getattr(samples, "mean", ()))
    return source is not None and channels == 3 and bool(source.read_lazily or source.path)


class Loader:
    """Load batches by their keys, in order, in worker processes or (num_workers 0) in this process.

    Workers run until `stop`, ignore the signals that the main process handles, and have no state: if one exits, or no
    batch arrives for `timeout` seconds (0: no limit), all are restarted and loading continues at the same position.
    """

    def __init__(self, samples: Samples, num_workers: int, pin_memory: bool, timeout: float = WORKER_TIMEOUT):
        self.samples, self.num_workers, self.timeout = samples, num_workers, timeout
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._waits_since = 0.0  # on the monotonic clock; 0: not waiting for a batch
        self._hung = False
        self._processes: list[Any] = []
        self._loader: DataLoader | None = None
        self._feed = _Feed()
        if num_workers and _may_decode_jpeg(samples):
            torchcodec_jpeg()  # decided before the fork, so that the workers do not each log it
        # At exit, multiprocessing sends the remaining children a signal that the workers ignore, and waits for them.
        # The finalizer stops the workers before that, or when the loader is deleted.
        Finalize(self, _kill, args=[self._processes], exitpriority=1)

    def batches(self, count: int, keys: Callable[[int], list]) -> Iterator[Batch]:
        """Yield batches 0 to `count`; `keys(n)` returns the samples of batch n."""
        if self.num_workers == 0:
            for n in range(count):
                with _own_randomness():
                    batch = _unless_error(self.samples.__getitems__(keys(n)))
                yield batch.pin_memory() if self.pin_memory else batch
            return
        done, retried = 0, False
        stream = self._from_workers(keys, 0, count)
        while done < count:
            try:
                batch = self._next(stream)
            except _WorkersLost as lost:
                what, details, advice = lost.args
                self.stop()
                if retried:
                    raise RuntimeError(
                        f"data loading workers {what} twice in one epoch ({details}). {advice}; "
                        "--num_workers 0 loads the images in this process, which shows the original error"
                    ) from lost
                retried = True
                log.warning("a data loading worker %s (%s); restarting all workers at the same batch", what, details)
                stream = self._from_workers(keys, done, count)
                continue
            done += 1
            yield _unless_error(batch)

    def _next(self, stream: Iterator[Any]) -> Any:
        """Return the next batch. Raises _WorkersLost if a worker has exited, or no batch arrives in time."""
        self._waits_since = time.monotonic()
        try:
            batch = next(stream)
            return batch if isinstance(batch, NothingReadable) else batch.from_shared()
        except Exception as error:  # the type of the error depends on when the worker exited
            exited = self._dead_workers()
            if not exited:
                raise
            if self._hung:
                advice = "The usual cause is a file system that does not respond; worker_timeout sets the time limit"
                raise _WorkersLost("hung", f"no batch for {self.timeout:g} s", advice) from error
            advice = f"try fewer than num_workers {self.num_workers} or a larger /dev/shm"
            raise _WorkersLost("died", exited, f"The usual cause is insufficient memory: {advice}") from error
        finally:
            self._waits_since = 0.0

    def stop(self) -> None:
        """Stop the workers. They have no state, so nothing is lost."""
        self._loader, self._hung = None, False
        _kill(self._processes)

    def _dead_workers(self) -> str:
        """Describe exited workers, waiting up to a second for one that is exiting."""
        closed = wait([process.sentinel for process in self._processes], timeout=1)
        exited = [process for process in self._processes if process.sentinel in closed]
        for process in exited:
            process.join()  # its pipes close shortly before it has an exit code
        return ", ".join(f"process {process.pid}, exit code {process.exitcode}" for process in exited)

    def _from_workers(self, keys: Callable[[int], list], start: int, count: int) -> Iterator[Any]:
        if self._loader is None:
            # torch warns about more workers than cores. If decoded JPEG files are waiting, more workers do no harm.
            warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
            self._loader = DataLoader(
                _SharedBatches(
                    self.samples, SharedBuffers(PREFETCH * self.num_workers + 1)
                ),  # batches in flight, and the newest
                batch_sampler=self._feed,
                num_workers=self.num_workers,
                prefetch_factor=PREFETCH,
                collate_fn=_identity,
                pin_memory=self.pin_memory,
                worker_init_fn=_ignore_signals,
                persistent_workers=True,
                generator=torch.Generator(),  # else every epoch would advance the main process's random generator
            )
            if self.timeout:
                references = weakref.ref(self), weakref.ref(self._loader)
                threading.Thread(target=_watch, args=references, name="data loading", daemon=True).start()
        self._feed.keys = ((n, keys(n)) for n in range(start, count))
        with _safe_to_start_workers():
            before = set(multiprocessing.active_children())
            iterator = iter(self._loader)
            self._processes += set(multiprocessing.active_children()) - before
        yield from iterator


def _watch(loader: Callable[[], Loader | None], torchs: Callable[[], DataLoader | None]) -> None:
    """Kill workers that do not return a batch in time.

    The main process may be blocked while it reads from such a worker; killing the worker ends the wait.
    """
    while (watched := loader()) is not None and watched._loader is torchs() is not None:
        if 0 < watched._waits_since < time.monotonic() - watched.timeout:
            watched._hung = True
            for process in list(watched._processes):
                process.kill()
            return
        pause = min(5.0, watched.timeout / 4)
        del watched
        time.sleep(pause)


class _Feed:
    """Batch sampler of a loader that is used for several epochs: iterate over the keys that were set last."""

    keys: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.keys


class _SharedBatches(Dataset):
    """The data set of a loader's workers: return the batch of (number, keys) through shared memory."""

    def __init__(self, samples: Samples, buffers: SharedBuffers):
        self.samples, self.buffers = samples, buffers

    def __getitems__(self, numbered: tuple[int, list]) -> Batch | NothingReadable:
        number, keys = numbered
        batch = self.samples.__getitems__(keys, self.buffers.allocator(number))
        return batch if isinstance(batch, NothingReadable) else batch.to_shared(self.buffers, number)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(10)  # a process blocked in file system access may not end even when killed
    processes.clear()


def _identity(batch: Any) -> Any:
    return batch


def _unless_error(batch: Batch | NothingReadable) -> Batch:
    if isinstance(batch, NothingReadable):
        raise batch
    return batch


def _ignore_signals(worker: int) -> None:
    for number in IGNORED_BY_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED_BY_WORKERS)


@contextlib.contextmanager
def _safe_to_start_workers() -> Iterator[None]:
    """Return a context for starting worker processes that is safe with respect to signals.

    Signals are blocked until the new workers ignore them. torch's SIGCHLD handler is removed after the start, because
    it would raise an exception at any point of the main process, even within an update. The loader itself detects an
    exited worker within seconds, when it waits for the next batch.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    on_child = signal.getsignal(signal.SIGCHLD)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_BY_WORKERS)
    try:
        yield
    finally:
        if main_thread:
            signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Return a context that preserves the random state of the main process, because samples seed the generator."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def suggested_batch(images: int, processes: int) -> int:
    """Return the largest batch size with at least four batches per epoch that is a power of two times `processes`.

    It is at least `processes`.
    """
    size = processes
    while size * 8 <= images:
        size *= 2
    return size


class Batches:
    """A rank's batches of every epoch.

    Global batch b of T = batch_size x accum x world_size images consists of positions b T to (b + 1) T of the epoch's
    permutation. Its micro step a on rank r uses `batch_size` positions, starting at b T + (a world_size + r)
    batch_size. The last images, which do not fill a global batch, are left out of the epoch; they differ from epoch to
    epoch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        accum: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        worker_timeout: float = WORKER_TIMEOUT,
    ):
        self.total = batch_size * accum * world_size
        self.steps_per_epoch = len(samples) // self.total
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(samples)} images are too few for one optimizer step of {self.total} "
                f"(batch_size {batch_size} x accum_iter {accum} x {world_size} processes): use a smaller "
                f"--total_batch_size, e.g. {suggested_batch(len(samples), world_size)}"
            )
        self.images, self.batch_size, self.accum = len(samples), batch_size, accum
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.wait_seconds = 0.0  # spent waiting for data
        self._loader = Loader(samples, num_workers, pin_memory, worker_timeout)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of an epoch, `accum` per optimizer step, beginning with step `start_step`."""
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"step {start_step} of an epoch of {self.steps_per_epoch} steps")
        rows = self._rows(epoch)[start_step * self.accum :]
        stream = self._loader.batches(len(rows), lambda n: [(epoch, index) for index in rows[n].tolist()])
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def reset_wait(self) -> None:
        self.wait_seconds = 0.0

    def close(self) -> None:
        """Stop the workers; they are started again for the next epoch."""
        self._loader.stop()

    def _rows(self, epoch: int) -> Tensor:
        """Return the indices of the images of each of this rank's micro-batches, `[micro steps, batch_size]`."""
        order = torch.randperm(self.images, generator=_generator(self.seed, epoch, ORDER))
        used = order[: self.steps_per_epoch * self.total]
        return used.view(-1, self.world_size, self.batch_size)[:, self.rank]


def eval_batches(
    samples: EvalSamples,
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    worker_timeout: float = WORKER_TIMEOUT,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield all samples once, or only those of `indices` (for example a rank's share), in order.

    Unreadable images are left out and logged; a batch without any readable image is not yielded.
    """
    chosen = np.arange(len(samples)) if indices is None else np.asarray(indices)
    loader = Loader(samples, num_workers, pin_memory, worker_timeout)
    problems: list[tuple[str, str]] = []
    try:
        count = math.ceil(len(chosen) / batch_size)
        for batch in loader.batches(count, lambda n: chosen[n * batch_size : (n + 1) * batch_size].tolist()):
            problems += batch.problems
            if len(batch):
                yield batch
    finally:
        loader.stop()
    if problems and len(problems) == len(chosen):
        raise NothingReadable(f"not one of {len(chosen)} images can be read: {_first(problems)}")
    if problems:
        log.warning("%d of %d images cannot be read and are left out: %s", len(problems), len(chosen), _first(problems))


def _first(problems: Sequence[tuple[str, str]]) -> str:
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return ": ".join(problems[0]) + more


def allowed_bad(max_bad_fraction: float, n: int) -> int:
    """Return how many of n images may be unreadable: the fraction of n, rounded up."""
    return math.ceil(max_bad_fraction * n - 1e-9)  # 0.07 x 100 is 7.000000000000001
