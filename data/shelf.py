"""Reused shared memory for batches from worker processes to the training process.

New shared memory is zeroed and mapped page by page in both processes, which takes longer than filling it with a batch
of images. Instead there are a few places, each an in-memory file that both processes keep mapped. A worker stacks the
images of a batch in the place assigned to it, and the training process copies them before the place is assigned to
another batch. Places grow to the size of the largest batch. They are not limited by a small /dev/shm.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPARE = 2**20  # bytes that a growing place reserves in addition
ALIGNED = 64  # bytes

_shelves: weakref.WeakValueDictionary[int, Shelf] = weakref.WeakValueDictionary()
_numbers = itertools.count()

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # returns an uninitialised tensor of a shape and dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor in this process's own memory."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Parcel:
    """A tensor on a shelf, to be opened by the process that created the shelf before its place is reused."""

    shelf: int
    place: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def open(self) -> Tensor:
        """Return a copy."""
        return _shelves[self.shelf].look(self).clone()

    def pin_memory(self) -> Tensor:
        """Return a copy in page-locked memory."""
        return _shelves[self.shelf].look(self).pin_memory()


class Shelf:
    """A number of `places` for batches; 0 if the system has no in-memory files.

    It must be created before the workers are forked. In workers that are not forked it has no places.
    """

    def __init__(self, places: int):
        self.number = next(_numbers)
        self.files = [os.memfd_create(f"batch-{n}") for n in range(places)] if hasattr(os, "memfd_create") else []
        self.mapped = [torch.empty(0, dtype=torch.uint8) for _ in self.files]
        _shelves[self.number] = self
        weakref.finalize(self, _close, self.files)

    def __getstate__(self) -> dict[str, list]:
        return {"files": [], "mapped": []}

    def allocator(self, number: int) -> Allocate:
        """Return a function that allocates the first tensors of batch `number` in its place, in the order of `put`."""
        if not self.files:
            return empty
        tensors: list[Tensor] = []

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            tensors.append(torch.empty(shape, dtype=dtype, device="meta"))
            return self.look(self.parcels(number, tensors)[-1])

        return allocate

    def put(self, number: int, tensors: Sequence[Tensor]) -> list[Parcel] | list[Tensor]:
        """Store batch `number` in its place; without places, return the tensors themselves."""
        if not self.files:
            return list(tensors)
        parcels = self.parcels(number, tensors)
        for parcel, tensor in zip(parcels, tensors, strict=True):
            stored = self.look(parcel)
            if stored.data_ptr() != tensor.data_ptr():  # else it was created in its place
                stored.copy_(tensor)
        return parcels

    def parcels(self, number: int, tensors: Sequence[Tensor]) -> list[Parcel]:
        """Reserve memory for tensors of these shapes for batch `number`."""
        place, parcels, end = number % len(self.files), [], 0
        for tensor in tensors:
            dense = torch.empty_like(tensor, device="meta")
            parcels.append(Parcel(self.number, place, end, tensor.dtype, tuple(tensor.shape), dense.stride()))
            end += -(-dense.nbytes // ALIGNED) * ALIGNED
        if os.fstat(self.files[place]).st_size < end:
            os.ftruncate(self.files[place], end + SPARE)
        return parcels

    def look(self, parcel: Parcel) -> Tensor:
        """Return the tensor in shared memory, without a copy."""
        if len(self.mapped[parcel.place]) < parcel.offset + parcel.bytes:
            self.mapped[parcel.place] = torch.frombuffer(mmap.mmap(self.files[parcel.place], 0), dtype=torch.uint8)
        stored = self.mapped[parcel.place][parcel.offset : parcel.offset + parcel.bytes]
        return stored.view(parcel.dtype).as_strided(parcel.shape, parcel.stride)


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
