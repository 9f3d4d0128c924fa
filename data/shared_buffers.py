"""Reused shared memory for batches from worker processes to the training process.

New shared memory is zeroed and mapped page by page in both processes, which takes longer than filling it with a batch
of images. Instead there are a few buffers, each an in-memory file that both processes keep mapped. A worker stacks the
images of a batch in the buffer assigned to it, and the training process copies them before the buffer is assigned to
another batch. Buffers grow to the size of the largest batch. They are not limited by a small /dev/shm.
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

SPARE = 2**20  # bytes that a growing buffer reserves in addition
ALIGNED = 64  # bytes

_instances: weakref.WeakValueDictionary[int, SharedBuffers] = weakref.WeakValueDictionary()
_numbers = itertools.count()

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # returns an uninitialised tensor of a shape and dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialised tensor in this process's own memory."""
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class TensorHandle:
    """A tensor in shared memory, to be copied by the process that created the buffers before its buffer is reused."""

    owner: int
    buffer: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def open(self) -> Tensor:
        """Return a copy."""
        return _instances[self.owner].view(self).clone()

    def pin_memory(self) -> Tensor:
        """Return a copy in page-locked memory."""
        return _instances[self.owner].view(self).pin_memory()


class SharedBuffers:
    """A number of `buffers` for batches; 0 if the system has no in-memory files.

    It must be created before the workers are forked. In workers that are not forked it has no buffers.
    """

    def __init__(self, buffers: int):
        self.number = next(_numbers)
        self.files = [os.memfd_create(f"batch-{n}") for n in range(buffers)] if hasattr(os, "memfd_create") else []
        self.mapped = [torch.empty(0, dtype=torch.uint8) for _ in self.files]
        _instances[self.number] = self
        weakref.finalize(self, _close, self.files)

    def __getstate__(self) -> dict[str, list]:
        return {"files": [], "mapped": []}

    def allocator(self, number: int) -> Allocate:
        """Return a function that allocates the first tensors of batch `number` in its buffer, in the order of `put`."""
        if not self.files:
            return empty
        tensors: list[Tensor] = []

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            tensors.append(torch.empty(shape, dtype=dtype, device="meta"))
            return self.view(self.handles(number, tensors)[-1])

        return allocate

    def put(self, number: int, tensors: Sequence[Tensor]) -> list[TensorHandle] | list[Tensor]:
        """Store batch `number` in its buffer; without buffers, return the tensors themselves."""
        if not self.files:
            return list(tensors)
        handles = self.handles(number, tensors)
        for handle, tensor in zip(handles, tensors, strict=True):
            stored = self.view(handle)
            if stored.data_ptr() != tensor.data_ptr():  # else it was created in its buffer
                stored.copy_(tensor)
        return handles

    def handles(self, number: int, tensors: Sequence[Tensor]) -> list[TensorHandle]:
        """Reserve memory for tensors of these shapes for batch `number`."""
        buffer, handles, end = number % len(self.files), [], 0
        for tensor in tensors:
            dense = torch.empty_like(tensor, device="meta")
            handles.append(TensorHandle(self.number, buffer, end, tensor.dtype, tuple(tensor.shape), dense.stride()))
            end += -(-dense.nbytes // ALIGNED) * ALIGNED
        if os.fstat(self.files[buffer]).st_size < end:
            os.ftruncate(self.files[buffer], end + SPARE)
        return handles

    def view(self, handle: TensorHandle) -> Tensor:
        """Return the tensor in shared memory, without a copy."""
        if len(self.mapped[handle.buffer]) < handle.offset + handle.bytes:
            self.mapped[handle.buffer] = torch.frombuffer(mmap.mmap(self.files[handle.buffer], 0), dtype=torch.uint8)
        stored = self.mapped[handle.buffer][handle.offset : handle.offset + handle.bytes]
        return stored.view(handle.dtype).as_strided(handle.shape, handle.stride)


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)
