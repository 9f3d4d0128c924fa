"""Tensors on a buffer are equal to those that were stored, and batches through it equal those of one process."""

import gc
import os
import pickle

import pytest
import torch

from data import shared_buffers
from data.shared_buffers import SharedBuffers, empty

TENSORS = [
    torch.arange(60, dtype=torch.uint8).view(1, 3, 4, 5),
    torch.arange(60, dtype=torch.uint8).view(1, 4, 5, 3).permute(0, 3, 1, 2),  # channels last
    torch.tensor([2, 1]),
    torch.rand(2, 1, 7),
    torch.empty(0, 3),
    torch.tensor(1.5).expand(4, 2),
]


def opened(handles):
    return [handle.open() for handle in handles]


def test_tensors_come_back_with_their_types_and_the_order_of_their_axes():
    buffers = SharedBuffers(2)
    handles = buffers.put(1, TENSORS)
    for found, tensor in zip(opened(pickle.loads(pickle.dumps(handles))), TENSORS, strict=True):
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert handles[1].open().stride() == TENSORS[1].stride()


def test_a_place_is_used_again_and_grows():
    buffers = SharedBuffers(2)
    first, other = buffers.put(0, TENSORS)[0], buffers.put(1, [torch.ones(3)])[0]
    kept = first.open()
    large = torch.rand(2**20)
    for number, tensor in enumerate((torch.zeros(60, dtype=torch.uint8), large, TENSORS[2])):
        assert torch.equal(buffers.put(2 * number, [tensor])[0].open(), tensor)
    assert torch.equal(kept, TENSORS[0])  # an opened tensor is a copy
    assert torch.equal(other.open(), torch.ones(3))


def test_what_is_made_in_its_place_is_not_copied():
    buffers = SharedBuffers(2)
    allocate = buffers.allocator(3)
    made, second = allocate((2, 5, 3), torch.uint8), allocate((4,), torch.int64)
    made.copy_(torch.arange(30).view(2, 5, 3))
    second.copy_(torch.arange(4))
    handles = buffers.put(3, [made.permute(0, 2, 1), second, TENSORS[3]])
    assert buffers.view(handles[0]).data_ptr() == made.data_ptr()
    assert buffers.view(handles[1]).data_ptr() == second.data_ptr()
    assert torch.equal(opened(handles)[0], torch.arange(30).view(2, 5, 3).permute(0, 2, 1))
    assert torch.equal(opened(handles)[1], torch.arange(4)) and torch.equal(opened(handles)[2], TENSORS[3])


def test_what_is_made_in_its_place_survives_the_growth_of_the_place(monkeypatch):
    monkeypatch.setattr(shared_buffers, "SPARE", 0)
    buffers, large = SharedBuffers(1), torch.rand(2**18)
    made = buffers.allocator(0)((1000,), torch.float32).copy_(torch.arange(1000))
    found = opened(buffers.put(0, [made, large]))
    assert torch.equal(found[0], torch.arange(1000.0)) and torch.equal(found[1], large)


def test_without_memory_files_tensors_are_allocated_in_own_memory():
    assert pickle.loads(pickle.dumps(SharedBuffers(1))).allocator(0) is empty


def test_another_process_fills_it():
    buffers, tensor = SharedBuffers(1), torch.rand(1000)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, pickle.dumps(buffers.put(0, [tensor])))
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(opened(pickle.loads(os.read(reading, 65536)))[0], tensor)


def test_a_shelf_that_travelled_or_has_no_memory_files_passes_on_the_tensors(monkeypatch):
    assert pickle.loads(pickle.dumps(SharedBuffers(3))).put(2, TENSORS) == TENSORS
    monkeypatch.delattr(os, "memfd_create")
    assert SharedBuffers(3).put(0, TENSORS) == TENSORS


def test_files_are_closed_with_the_shelf():
    buffers = SharedBuffers(1)
    (file,) = buffers.files
    os.fstat(file)
    del buffers
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
