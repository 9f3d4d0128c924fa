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
from collections.abc import Callable, Iterator, Sequence
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
from data.shelf import Allocate, Parcel, Shelf, empty
from data.sources import Source, open_source

__all__ = [
    "Batch", "Batches", "EvalSamples", "NothingReadable", "Samples", "Source", "TrainSamples", "allowed_bad",
    "eval_batches", "eval_transform", "mix", "open_source", "pixel_statistics", "pretrain_transform",
]  # fmt: skip

log = logging.getLogger(__name__)

TRIES = 100  # unreadable images in a row before a sample gives up
AHEAD = 2**25  # bytes of images that are read before the first of them is augmented
PREFETCH = 2  # batches that each worker is ahead
WORKER_TIMEOUT = 300.0  # seconds without a batch, after which living workers count as hung
IGNORED_BY_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the main process handles them
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of red, green, blue
ORDER, AUGMENTATION, NOISE = range(3)  # independent streams of random numbers

Floats = tuple[float, ...]
AnyTransform = Transform | PairTransform | Callable[[Any], list[Tensor]]  # to one image, a pair, or several views
DrawNoise = Callable[[torch.Generator], Tensor]  # from a CPU generator to a sample's noise [R, L]; picklable


class _WorkersLost(Exception):
    """The workers give no more batches: what happened to them, the details, and what mostly causes it."""


class NothingReadable(ValueError):  # noqa: N818 - it says what happened
    """No image can be read: not one in a row of `TRIES`, or not one of all."""


def mix(*words: int) -> int:
    """Hash integers to a 63-bit integer (SplitMix64, one round for each), fast enough for every sample."""
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
    """Return the CPU generator of a sample's noise. Its stream is its own: augmentation may draw as it likes."""
    return _generator(seed, epoch, index, NOISE)


def uniform_noise(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw uniform noise in [0, 1) of `shape` (R, L)."""
    return torch.rand(shape, generator=generator)


def pixel_statistics(in_chans: int, mean: Sequence[float] = (), std: Sequence[float] = ()) -> tuple[Floats, Floats]:
    """Return mean and standard deviation per channel, on a scale of 0 to 1.

    These are the given ones; if empty, ImageNet's for 3 channels and 0.5 for other numbers.
    """
    usual = IMAGENET if in_chans == 3 else ((0.5,) * in_chans, (0.5,) * in_chans)
    return tuple(mean) or usual[0], tuple(std) or usual[1]


@functools.lru_cache(maxsize=32)
def _per_channel(values: Floats, device: torch.device) -> Tensor:
    """Return the values as `[C, 1, 1]` on the device; cached, because a copy for every batch would synchronise."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(slots=True)
class Sample:
    """One row of a batch, as its fields say there."""

    image: Tensor | list[Tensor]
    label: int | Tensor | None
    noise: Tensor | None
    index: int
    problems: list[tuple[str, str]]


@dataclass
class Batch:
    """Samples side by side.

    images    uint8 `[n, C, H, W]` from the loader; float32, normalised, after `to`. A list of such tensors, one for
              each view, where the method has several views of an image
    labels    int64 `[n]`, or None where the source has none; masks `[n, H, W]` of a source of pairs
    noise     `[n, R, L]`, float32 in 0..1 where the method draws no other noise, or None
    index     int64 `[n]`: which image was asked for (one that was unreadable is replaced, label and all)
    problems  (path, reason) of the images that were unreadable
    mean, std of each channel
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
        """Move the batch to the device and normalise its images there, so that bytes are copied instead of floats."""
        device = torch.device(device)
        without_waiting = device.type == "cuda"  # Metal would read the memory when it may hold something else
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

    def posted(self, shelf: Shelf, number: int) -> Batch:
        """Write batch `number` for another process; its tensors are in shared memory, the images first."""
        tensors: list[Tensor] = []
        self._each(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        parcels: Iterator[Any] = iter(shelf.put(number, tensors))
        return self._each(lambda _: next(parcels))

    def opened(self) -> Batch:
        """Read a batch that another process has written, with tensors of this process."""
        return self._each(lambda tensor: tensor.open() if isinstance(tensor, Parcel) else tensor)

    def _each(self, change: Callable[[Any], Tensor]) -> Batch:
        """Return the batch with every tensor changed, in a fixed order: images, labels, noise, index."""
        images = _each_view(self.images, change)
        labels = None if self.labels is None else change(self.labels)
        noise = None if self.noise is None else change(self.noise)
        return replace(self, images=images, labels=labels, noise=noise, index=change(self.index))


def _each_view(images: Any, change: Callable[[Any], Tensor]) -> Any:
    """Change a tensor of images, or every tensor of a list."""
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

    Images leave the resize with channels last and stay so: stacking is then a plain copy.
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
    """Transform an image that was read; return it with its label: the source's, or the mask that came with it."""
    if isinstance(image, Pair):
        return transform(image)  # type: ignore[arg-type, return-value]
    label = None if source.labels is None else int(source.labels[index])
    return transform(image), label


class Samples(Protocol):
    """Make batches by the keys of their samples.

    An exception that the user should read is returned as a value, because one raised in a worker arrives wrapped in a
    traceback. `allocate` returns uninitialised memory for the images.
    """

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Any], allocate: Allocate = ...) -> Batch | NothingReadable: ...


class TrainSamples(Dataset):
    """Augmented images with mask noise, by (epoch, index): the same key is always the same sample.

    Args:
        noise_shape: (R, L) of uniform noise, rows for each image and its number of patches; None for no noise.
        draw_noise: Draws other noise than that, from the CPU generator of one sample.
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

        An unreadable image is replaced, with its label, by the next readable one of the source and reported; the random
        numbers stay those of the key.
        """
        return _last(self._steps(key))

    def __getitems__(self, keys: Sequence[tuple[int, int]], allocate: Allocate = empty) -> Batch | NothingReadable:
        """Read many images in a row and then augment them in a row.

        One by one takes nearly a tenth longer: reading and augmenting push each other's code and tables out of the
        processor's caches.
        """
        samples: list[Sample] = []
        begun, waiting = [], 0
        try:
            for key in keys:
                begun.append(steps := self._steps(key))
                waiting += _bytes(next(steps))
                if waiting > AHEAD:
                    samples += map(_last, begun)
                    begun, waiting = [], 0
            samples += map(_last, begun)
        except NothingReadable as error:
            return error
        return collate(samples, self.mean, self.std, allocate)

    def _steps(self, key: tuple[int, int]) -> Iterator[Any]:
        """Yield the image that was read (and a replacement if it turns out to be damaged), then the sample."""
        epoch, index = key
        seed = mix(self.seed, epoch, index, AUGMENTATION)
        problems: list[tuple[str, str]] = []
        for shown in (number % len(self.source) for number in range(index, index + min(TRIES, len(self.source)))):
            try:
                image = self.source.read(shown)
                yield image
                torch.default_generator.manual_seed(seed)  # torch.manual_seed also visits every accelerator each time
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
    """Return the memory in bytes of an image, alone or with its mask."""
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


def _has_jpeg_files(samples: Samples) -> bool:
    """Return whether some of the first images are JPEG files."""
    source = getattr(samples, "source", None)
    names = [] if source is None else source.names[:100]
    return any(str(name).lower().endswith((".jpg", ".jpeg")) for name in names)


class Loader:
    """Batches by their keys, from worker processes or (num_workers 0) in this one, in the order of the keys.

    Workers run until `stop`, ignore the signals that the main process handles, and have no state: if one exits, or no
    batch arrives for `timeout` seconds (0: no limit), all are restarted and loading continues at the same position.
    """

    def __init__(self, samples: Samples, num_workers: int, pin_memory: bool, timeout: float = WORKER_TIMEOUT):
        self.samples, self.num_workers, self.timeout = samples, num_workers, timeout
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._waits_since = 0.0  # on the monotonic clock; 0: nobody waits for a batch
        self._hung = False
        self._processes: list[Any] = []
        self._loader: DataLoader | None = None
        self._feed = _Feed()
        if num_workers and _has_jpeg_files(samples):
            torchcodec_jpeg()  # here, so that the workers inherit the choice and do not each log it
        # At exit multiprocessing ends forgotten children by a signal that these ignore, and then waits for them. This
        # comes before that, or when the loader is no longer used.
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
                        "with num_workers 0 this process loads, and shows the error itself"
                    ) from lost
                retried = True
                log.warning("a data loading worker %s (%s); starting all of them again where they were", what, details)
                stream = self._from_workers(keys, done, count)
                continue
            done += 1
            yield _unless_error(batch)

    def _next(self, stream: Iterator[Any]) -> Any:
        """Return the next batch. Raises _WorkersLost if a worker has exited, or no batch arrives in time."""
        self._waits_since = time.monotonic()
        try:
            batch = next(stream)
            return batch if isinstance(batch, NothingReadable) else batch.opened()
        except Exception as error:  # the error depends on the moment at which a worker exited
            dead = self._dead_workers()
            if not dead:
                raise
            if self._hung:
                advice = "The usual cause is a file system that does not respond; worker_timeout sets the time limit"
                raise _WorkersLost("hung", f"no batch for {self.timeout:g} s", advice) from error
            advice = f"try fewer than num_workers {self.num_workers} or a larger /dev/shm"
            raise _WorkersLost("died", dead, f"The usual cause is insufficient memory: {advice}") from error
        finally:
            self._waits_since = 0.0

    def stop(self) -> None:
        """Stop the workers, which have no state to lose."""
        self._loader, self._hung = None, False
        _kill(self._processes)

    def _dead_workers(self) -> str:
        """Describe exited workers, waiting up to a second for one that is exiting."""
        closed = wait([process.sentinel for process in self._processes], timeout=1)
        dead = [process for process in self._processes if process.sentinel in closed]
        for process in dead:
            process.join()  # its pipes close a moment before it is a dead process with an exit code
        return ", ".join(f"process {process.pid}, exit code {process.exitcode}" for process in dead)

    def _from_workers(self, keys: Callable[[int], list], start: int, count: int) -> Iterator[Any]:
        if self._loader is None:
            # torch advises against more workers than cores; with decoded JPEG files waiting, they do no harm.
            warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
            self._loader = DataLoader(
                _Posting(self.samples, Shelf(PREFETCH * self.num_workers + 1)),  # those on their way, and the newest
                batch_sampler=self._feed,
                num_workers=self.num_workers,
                prefetch_factor=PREFETCH,
                collate_fn=_as_it_is,
                pin_memory=self.pin_memory,
                worker_init_fn=_ignore_signals,
                persistent_workers=True,
                generator=torch.Generator(),  # or each epoch's start would draw from the main process's random numbers
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
    """Kill workers that do not deliver a batch in time.

    The main process may be blocked in reading from such a worker; killing it ends the wait.
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
    """Batch sampler of a loader that is used for several epochs: the keys that were set last."""

    keys: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.keys


class _Posting(Dataset):
    """What the workers of a loader hold: samples by the number of a batch and its keys, sent off by a shelf."""

    def __init__(self, samples: Samples, shelf: Shelf):
        self.samples, self.shelf = samples, shelf

    def __getitems__(self, numbered: tuple[int, list]) -> Batch | NothingReadable:
        number, keys = numbered
        batch = self.samples.__getitems__(keys, self.shelf.allocator(number))
        return batch if isinstance(batch, NothingReadable) else batch.posted(self.shelf, number)


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(10)  # one that waits for a dead file system does not even end when it is killed
    processes.clear()


def _as_it_is(batch: Any) -> Any:
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
    """Start worker processes without a moment in which a signal could end one, or a death could strike this process.

    Signals stay blocked until the newborn ignores them. And torch's handler for the death of a child is taken out
    again: it raises wherever the main process happens to be, in the middle of an update too. The loader itself notices
    a death within seconds, when it waits for the next batch.
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
    """Return a context that keeps the random state of the main process: samples have their own seeds."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def suggested_batch(images: int, processes: int) -> int:
    """Return the largest power of two times `processes` of which an epoch has at least four; at least `processes`."""
    size = processes
    while size * 8 <= images:
        size *= 2
    return size


class Batches:
    """A rank's share of every epoch.

    Global batch b of T = batch_size x accum x world_size images is positions b T to (b + 1) T of the epoch's
    permutation. Its micro step a on rank r takes `batch_size` positions from b T + (a world_size + r) batch_size on.
    The images that fill no global batch are left out of the epoch (another permutation leaves out others).
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
        """Yield the micro-batches of an epoch, `accum` per optimizer step.

        Those before `start_step` are not read.
        """
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
    """Yield all samples once, or those of `indices` (for example the share of a rank), in order.

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
