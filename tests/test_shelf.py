"""Tensors on a shelf are equal to those that were stored, and batches through it equal those of one process."""

import gc
import os
import pickle

import pytest
import torch

from data import shelf as shelves
from data.shelf import Shelf, empty

TENSORS = [
    torch.arange(60, dtype=torch.uint8).view(1, 3, 4, 5),
    torch.arange(60, dtype=torch.uint8).view(1, 4, 5, 3).permute(0, 3, 1, 2),  # channels last
    torch.tensor([2, 1]),
    torch.rand(2, 1, 7),
    torch.empty(0, 3),
    torch.tensor(1.5).expand(4, 2),
]


def opened(parcels):
    return [parcel.open() for parcel in parcels]


def test_tensors_come_back_with_their_types_and_the_order_of_their_axes():
    shelf = Shelf(2)
    parcels = shelf.put(1, TENSORS)
    for found, tensor in zip(opened(pickle.loads(pickle.dumps(parcels))), TENSORS, strict=True):
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype
    assert parcels[1].open().stride() == TENSORS[1].stride()


def test_a_place_is_used_again_and_grows():
    shelf = Shelf(2)
    first, other = shelf.put(0, TENSORS)[0], shelf.put(1, [torch.ones(3)])[0]
    kept = first.open()
    large = torch.rand(2**20)
    for number, tensor in enumerate((torch.zeros(60, dtype=torch.uint8), large, TENSORS[2])):
        assert torch.equal(shelf.put(2 * number, [tensor])[0].open(), tensor)
    assert torch.equal(kept, TENSORS[0])  # an opened tensor is a copy
    assert torch.equal(other.open(), torch.ones(3))


def test_what_is_made_in_its_place_is_not_copied():
    shelf = Shelf(2)
    allocate = shelf.allocator(3)
    made, second = allocate((2, 5, 3), torch.uint8), allocate((4,), torch.int64)
    made.copy_(torch.arange(30).view(2, 5, 3))
    second.copy_(torch.arange(4))
    parcels = shelf.put(3, [made.permute(0, 2, 1), second, TENSORS[3]])
    assert shelf.look(parcels[0]).data_ptr() == made.data_ptr()
    assert shelf.look(parcels[1]).data_ptr() == second.data_ptr()
    assert torch.equal(opened(parcels)[0], torch.arange(30).view(2, 5, 3).permute(0, 2, 1))
    assert torch.equal(opened(parcels)[1], torch.arange(4)) and torch.equal(opened(parcels)[2], TENSORS[3])


def test_what_is_made_in_its_place_survives_the_growth_of_the_place(monkeypatch):
    monkeypatch.setattr(shelves, "SPARE", 0)
    shelf, large = Shelf(1), torch.rand(2**18)
    made = shelf.allocator(0)((1000,), torch.float32).copy_(torch.arange(1000))
    found = opened(shelf.put(0, [made, large]))
    assert torch.equal(found[0], torch.arange(1000.0)) and torch.equal(found[1], large)


def test_without_memory_files_tensors_are_allocated_in_own_memory():
    assert pickle.loads(pickle.dumps(Shelf(1))).allocator(0) is empty


def test_another_process_fills_it():
    shelf, tensor = Shelf(1), torch.rand(1000)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, pickle.dumps(shelf.put(0, [tensor])))
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(opened(pickle.loads(os.read(reading, 65536)))[0], tensor)


def test_a_shelf_that_travelled_or_has_no_memory_files_passes_on_the_tensors(monkeypatch):
    assert pickle.loads(pickle.dumps(Shelf(3))).put(2, TENSORS) == TENSORS
    monkeypatch.delattr(os, "memfd_create")
    assert Shelf(3).put(0, TENSORS) == TENSORS


def test_files_are_closed_with_the_shelf():
    shelf = Shelf(1)
    (file,) = shelf.files
    os.fstat(file)
    del shelf
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
