"""Batches: their content depends only on (seed, epoch, position)."""

import collections
import logging
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchvision import transforms

from data import loader as data
from data.images import BadImage, Pair, Undecoded
from data.loader import (
    IMAGENET,
    TRIES,
    Batch,
    Batches,
    EvalSamples,
    NothingReadable,
    Source,
    TrainSamples,
    allowed_bad,
    eval_batches,
    eval_transform,
    mix,
    pixel_statistics,
    pretrain_transform,
    require_same_statistics,
)

PROJECT = Path(__file__).resolve().parent.parent


class Pictures:
    """A source's `read`: image i is 12 x 12 random pixels with seed i; some images are unreadable."""

    def __init__(self, bad=(), log=None):
        self.bad, self.log = set(bad), log

    def __call__(self, index):
        if self.log is not None:
            self.log.append(index)
        if index in self.bad:
            raise BadImage(f"{index}.jpg", "broken on purpose")
        return np.random.RandomState(index).randint(0, 256, (12, 12, 3), np.uint8)


def make_source(images=48, bad=(), log=None):
    labels = np.arange(images, dtype=np.int64) % 5
    return Source([f"{i}.jpg" for i in range(images)], Pictures(bad, log), labels, list("abcde"))


def train_samples(source, transform, seed, noise_shape):
    return TrainSamples(source, transform, seed, noise_shape, mean=IMAGENET[0], std=IMAGENET[1])


def make_samples(images=48, bad=(), seed=7, noise_shape=(2, 4), log=None, transform=None):
    return train_samples(make_source(images, bad, log), transform or pretrain_transform(8), seed, noise_shape)


def make_batches(samples=None, **options):
    return Batches(samples or make_samples(), **{"batch_size": 4, "seed": 7, **options})


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.noise, b.noise)
        and torch.equal(a.index, b.index)
        and a.problems == b.problems
    )


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


# --- one sample -------------------------------------------------------------------------------------------------------


def test_mix_is_splitmix64_and_spreads():
    assert mix(0) == 0xE220A8397B1DCDAF >> 1  # the generator's first number from seed 0
    assert len({mix(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(100)}) == 10_000
    assert mix(1, 2) != mix(2, 1) and mix(-1) != mix(1) and 0 <= mix(-1) < 2**63
    ones = np.mean([mix(3, 4, index).bit_count() for index in range(1000)])
    assert 31 < ones < 32


def test_the_same_key_is_the_same_sample_and_every_part_of_it_counts():
    samples = make_samples()
    one, again = samples[(3, 5)], samples[(3, 5)]
    assert torch.equal(one.image, again.image) and torch.equal(one.noise, again.noise)
    assert one.label == 0 and one.index == 5 and one.problems == []
    for other in (samples[(4, 5)], samples[(3, 6)], make_samples(seed=8)[(3, 5)]):
        assert not torch.equal(one.image, other.image) and not torch.equal(one.noise, other.noise)


def test_noise_is_uniform_and_of_the_shape_asked_for():
    noise = make_samples(noise_shape=(3, 1000))[(0, 0)].noise
    assert noise.shape == (3, 1000) and noise.dtype == torch.float32
    assert 0 <= noise.min() < 0.01 and 0.99 < noise.max() < 1 and abs(noise.mean() - 0.5) < 0.02
    assert make_samples(noise_shape=None)[(0, 0)].noise is None


def test_noise_is_drawn_from_a_generator_of_the_samples_own():
    drawn = torch.Generator().manual_seed(mix(7, 3, 5, 2))
    assert torch.equal(make_samples()[(3, 5)].noise, torch.rand(2, 4, generator=drawn))
    samples = TrainSamples(
        make_source(), pretrain_transform(8), 7, (2, 4), mean=IMAGENET[0], std=IMAGENET[1], draw_noise=_digits
    )
    drawn.manual_seed(mix(7, 3, 5, 2))
    assert torch.equal(samples[(3, 5)].noise, _digits(drawn))
    batches = list(make_batches(samples, num_workers=1).epoch(0))
    assert_same(batches, make_batches(samples).epoch(0))
    assert batches[0].noise.dtype == torch.int64 and batches[0].noise.shape == (4, 1, 4)


def _digits(generator):
    return torch.randint(9, (1, 4), generator=generator)


def greedy(image):
    """Transform that draws more random numbers than the usual one."""
    torch.rand(100)
    return pretrain_transform(8)(image)


def test_noise_does_not_depend_on_what_the_augmentation_draws():
    assert torch.equal(make_samples()[(1, 2)].noise, make_samples(transform=greedy)[(1, 2)].noise)
    assert not torch.equal(make_samples()[(1, 2)].image, make_samples(transform=greedy)[(1, 2)].image)


def all_three(image):
    return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]).view(3, 1, 1)


def test_torch_numpy_and_random_are_all_seeded():
    samples = make_samples(transform=all_three)
    first = samples[(0, 1)].image
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(999)
    assert torch.equal(first, samples[(0, 1)].image)
    assert ((first != samples[(0, 2)].image) & (first != samples[(1, 1)].image)).all()


def test_an_unreadable_image_is_replaced_by_the_next_ones_in_turn():
    whole, broken = make_samples(), make_samples(bad=[46, 47, 0])
    found = broken[(2, 46)]
    assert found.problems == [(f"{i}.jpg", "broken on purpose") for i in (46, 47, 0)]
    assert found.index == 46 and found.label == 1
    assert torch.equal(found.noise, whole[(2, 46)].noise)
    assert torch.equal(found.image, broken[(2, 46)].image)
    plain = make_samples(bad=[46, 47, 0], transform=eval_transform(12))[(2, 46)].image
    np.testing.assert_array_equal(plain.permute(1, 2, 0), Pictures()(1))


def test_giving_up_says_so():
    with pytest.raises(NothingReadable, match="3 images in a row cannot be read: 1.jpg: broken on purpose, and 2 more"):
        make_samples(images=3, bad=range(3))[(0, 1)]
    log = []
    with pytest.raises(NothingReadable):
        make_samples(images=1000, bad=range(1000), log=log)[(0, 1)]
    assert len(log) == TRIES


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_error_for_no_readable_image_reaches_the_user_unchanged(num_workers):
    batches = make_batches(make_samples(images=8, bad=range(8)), num_workers=num_workers)
    with pytest.raises(NothingReadable) as error:
        next(batches.epoch(0))
    assert "Traceback" not in str(error.value)


# --- one batch --------------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_it_says():
    batch = next(make_batches().epoch(0))
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [index % 5 for index in batch.index.tolist()] and batch.labels.dtype == torch.int64
    assert batch.noise.shape == (4, 2, 4) and batch.noise.dtype == torch.float32
    assert len(batch) == 4 and batch.problems == []
    samples = make_samples()
    for row, index in enumerate(batch.index.tolist()):
        assert torch.equal(batch.images[row], samples[(0, index)].image)
        assert torch.equal(batch.noise[row], samples[(0, index)].noise)


def late_damage(image):
    """Transform that fails for some images, as for files that are decoded only when they are cropped."""
    if image[0, 0, 0] % 4 == 0:
        raise BadImage("late.jpg", "broken further down")
    return pretrain_transform(8)(image)


@pytest.mark.parametrize("ahead", [0, 1000, 2**25])
def test_a_batch_is_its_samples_however_many_are_read_ahead(ahead, monkeypatch):
    monkeypatch.setattr(data, "AHEAD", ahead)
    samples = make_samples(bad=[2, 5, 6], transform=late_damage)
    keys = [(3, index) for index in (0, 2, 47, 5, 31, 9, 9)]
    batch, alone = samples.__getitems__(keys), [samples[key] for key in keys]
    assert torch.equal(batch.images, torch.stack([sample.image for sample in alone]))
    assert torch.equal(batch.noise, torch.stack([sample.noise for sample in alone]))
    assert batch.labels.tolist() == [sample.label for sample in alone]
    assert batch.problems == [problem for sample in alone for problem in sample.problems]
    assert {reason for _, reason in batch.problems} == {"broken on purpose", "broken further down"}


def test_no_more_images_wait_than_they_may_take_of_the_memory(monkeypatch):
    monkeypatch.setattr(data, "AHEAD", 2 * 12 * 12 * 3)
    log = []

    def noted(image):
        log.append("augmented")
        return pretrain_transform(8)(image)

    make_samples(log=log, transform=noted).__getitems__([(0, index) for index in range(5)])
    assert log == [0, 1, 2, *["augmented"] * 3, 3, 4, *["augmented"] * 2]


def test_what_waiting_images_take():
    image, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.int16)
    assert data._bytes(image) == 60 and data._bytes(Pair(image, mask)) == 100
    assert data._bytes(Undecoded(b"1234567", "a.jpg", 4, 5)) == 7 and data._bytes("of no known size") == 0


def test_images_are_normalised_on_the_device_as_mae_does_beforehand():
    batch = next(make_batches().epoch(0))
    moved = batch.to("cpu")
    normalize = transforms.Normalize(*IMAGENET)
    pictures = [transforms.ToTensor()(image.permute(1, 2, 0).numpy()) for image in batch.images]
    assert torch.equal(moved.images, torch.stack([normalize(picture) for picture in pictures]))
    assert moved.images.is_contiguous()
    assert batch.images.dtype == torch.uint8  # the batch itself is unchanged
    assert torch.equal(moved.to("cpu").images, moved.images)  # not normalised twice
    assert same(batch, Batch(batch.images, moved.labels, moved.noise, moved.index))


@pytest.mark.parametrize(("device", "without_waiting"), [("cuda", True), ("mps", False)])
def test_only_copies_to_cuda_are_not_waited_for(monkeypatch, device, without_waiting):
    batch, asked = next(make_batches().epoch(0)), []

    def to(tensor, where, non_blocking=False):
        asked.append((where.type, non_blocking))
        return tensor

    monkeypatch.setattr(Batch, "_each", lambda batch, change: change(torch.ones(1)) and batch)
    monkeypatch.setattr(torch.Tensor, "to", to)
    replace(batch, images=batch.images.float()).to(device)
    assert asked == [(device, without_waiting)]


def test_statistics_of_another_number_of_channels_are_a_mistake():
    batch = next(make_batches().epoch(0))
    batch.images = batch.images[:, :1]
    with pytest.raises(AssertionError):
        batch.to("cpu")


def test_labels_and_noise_may_be_missing():
    source = Source(["0.jpg"], Pictures())
    batch = next(Batches(train_samples(source, pretrain_transform(8), 0, None), batch_size=1).epoch(0)).to("cpu")
    assert batch.labels is None and batch.noise is None and batch.images.shape == (1, 3, 8, 8)


def test_pixel_statistics():
    assert pixel_statistics(3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert pixel_statistics(5) == ((0.5,) * 5, (0.5,) * 5)
    assert pixel_statistics(1, [0.1], [0.2]) == ((0.1,), (0.2,))


def test_a_frozen_network_needs_the_normalisation_that_it_was_trained_with(caplog):
    ours, usual = ((0.1, 0.2, 0.3), (0.5,) * 3), pixel_statistics(3)
    run = {"in_chans": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    require_same_statistics(ours, "a.pth", run)
    with pytest.raises(ValueError, match="a.pth was made for images with another mean: give --mean 0.1,0.2,0.3"):
        require_same_statistics(usual, "a.pth", run)
    require_same_statistics(usual, "timm.pth", {})
    require_same_statistics(((0.5,), (0.5,)), "grey.pth", {})
    assert not caplog.records
    require_same_statistics(ours, "timm.pth", {})
    assert "timm.pth does not contain its normalisation of images; most such files need ImageNet's" in caplog.text


# --- epochs -----------------------------------------------------------------------------------------------------------


def indices(batches, epoch=0, start_step=0):
    return [batch.index.tolist() for batch in batches.epoch(epoch, start_step)]


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    batches = make_batches()
    assert batches.steps_per_epoch == 12
    first, second = (sum(indices(batches, epoch), []) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(48)) and first != second and first != sorted(first)
    assert first == sum(indices(make_batches()), []) != sum(indices(make_batches(seed=8)), [])


def test_images_that_fill_no_batch_are_left_out_of_this_epoch_only():
    batches = make_batches(make_samples(images=50))
    shown = [set(sum(indices(batches, epoch), [])) for epoch in range(5)]
    assert all(len(images) == 48 for images in shown) and len(set.union(*shown)) == 50


def test_too_few_images_for_a_step_are_refused_with_the_numbers():
    with pytest.raises(
        ValueError, match=r"48 images are too few .* of 64 \(batch_size 4 x accum_iter 8 x 2 processes\)"
    ):
        make_batches(accum=8, world_size=2)


@pytest.mark.parametrize(
    "world_size, accum, batch_size", [(1, 1, 16), (2, 1, 8), (1, 2, 8), (2, 2, 4), (4, 1, 4), (1, 4, 4)]
)
def test_world_size_and_accumulation_share_the_same_global_batches(world_size, accum, batch_size):
    whole = indices(make_batches(batch_size=16))
    ranks = [
        indices(make_batches(batch_size=batch_size, accum=accum, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        micro = [ranks[rank][step * accum + a] for a in range(accum) for rank in range(world_size)]
        assert sum(micro, []) == expected
    assert all(len(rank) == len(whole) * accum for rank in ranks)


@pytest.mark.parametrize("accum", [1, 3])
def test_an_epoch_from_the_middle_is_the_tail_of_the_whole_and_reads_nothing_else(accum):
    log = []
    batches = make_batches(make_samples(log=log), accum=accum)
    whole = list(batches.epoch(2))
    for step in (0, 1, 3):
        log.clear()
        tail = list(batches.epoch(2, start_step=step))
        assert_same(tail, whole[step * accum :])
        assert log == [index for batch in tail for index in batch.index.tolist()]
    assert list(batches.epoch(2, start_step=batches.steps_per_epoch)) == []
    with pytest.raises(ValueError, match="step 99 of an epoch of"):
        next(batches.epoch(2, start_step=99))


def test_loading_here_leaves_the_random_numbers_of_this_process_alone():
    def draw():
        return torch.rand(()).item(), np.random.rand(), random.random()

    def seed():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    seed()
    expected = draw()
    for num_workers in (0, 1):
        batches = make_batches(num_workers=num_workers)
        seed()
        list(batches.epoch(0))
        assert draw() == expected
        batches.close()


def test_waiting_for_data_is_measured_and_nothing_else(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Slow(Pictures):
        def __call__(self, index):
            clock[0] += 0.002
            return super().__call__(index)

    source = make_source()
    source.read = Slow()
    batches = Batches(train_samples(source, pretrain_transform(8), 0, None), batch_size=4)
    for _ in batches.epoch(0):
        clock[0] += 0.003
    assert batches.wait_seconds == pytest.approx(48 * 0.002)
    batches.reset_wait()
    assert batches.wait_seconds == 0


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_workers():
    batches = make_batches(make_samples(bad=[3, 4]), num_workers=2)
    yield batches
    batches.close()


def workers_of(batches):
    return list(batches._loader._processes)


def test_workers_change_nothing(two_workers):
    alone = make_batches(make_samples(bad=[3, 4]))
    for epoch, start in ((0, 0), (1, 5), (0, 0)):
        assert_same(two_workers.epoch(epoch, start), alone.epoch(epoch, start))
    assert collections.Counter(problem for batch in alone.epoch(0) for problem in batch.problems)[
        "3.jpg", "broken on purpose"
    ]


def test_workers_stay_from_epoch_to_epoch_and_after_an_abandoned_one(two_workers):
    next(two_workers.epoch(0))
    first = [process.pid for process in workers_of(two_workers)]
    assert len(first) == 2
    whole = list(two_workers.epoch(1))
    assert [process.pid for process in workers_of(two_workers)] == first
    unfinished = two_workers.epoch(0)
    next(unfinished), next(unfinished)
    assert_same(two_workers.epoch(1), whole)
    two_workers.close()
    assert all(not os.path.exists(f"/proc/{pid}") for pid in first)
    assert_same(two_workers.epoch(1), whole)  # workers are started again when they are needed


def test_workers_ignore_the_signals_that_the_main_process_handles(two_workers):
    stream = two_workers.epoch(0)
    found = [next(stream)]
    before = workers_of(two_workers)
    for process in before:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(process.pid, number)
    found += stream
    assert_same(found, make_batches(make_samples(bad=[3, 4])).epoch(0))
    assert workers_of(two_workers) == before and all(process.is_alive() for process in before)


@pytest.fixture
def impatient(monkeypatch):
    """Check for exited workers every 0.2 seconds instead of every 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def test_an_exited_worker_is_replaced_at_its_position(two_workers, caplog, impatient):
    stream = two_workers.epoch(0)
    found = [next(stream)]
    before = [process.pid for process in workers_of(two_workers)]
    os.kill(before[0], signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        found += stream
    assert_same(found, make_batches(make_samples(bad=[3, 4])).epoch(0))
    assert f"worker died (process {before[0]}, exit code -9); restarting all" in caplog.text
    assert not set(before) & {process.pid for process in workers_of(two_workers)}


def die_slowly():
    os.closerange(3, 256)  # as in the kernel: pipes are closed before there is an exit code
    time.sleep(0.3)


def test_a_worker_whose_pipes_are_closed_is_dead_before_it_has_an_exit_code(two_workers):
    dying = multiprocessing.get_context("fork").Process(target=die_slowly)
    dying.start()
    two_workers._loader._processes.append(dying)
    assert two_workers._loader._dead_workers() == f"process {dying.pid}, exit code 0"


def die(image):
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_are_an_error_with_advice(impatient):
    batches = make_batches(make_samples(transform=die), num_workers=1)
    with pytest.raises(RuntimeError, match="workers died twice .* fewer than num_workers 1"):
        next(batches.epoch(0))


def test_a_death_does_not_strike_the_main_process_elsewhere(two_workers):
    stream = two_workers.epoch(0)
    next(stream)
    os.kill(workers_of(two_workers)[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # torch's handler would raise here
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def stumble(image):
    raise RuntimeError("a mistake in the code")


def test_a_bug_in_the_code_is_not_mistaken_for_an_exited_worker():
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        next(make_batches(make_samples(transform=stumble), num_workers=1).epoch(0))


PROGRAM = """
    import os, signal, tempfile
    early = tempfile.TemporaryDirectory()  # fixes the order of the things that happen at exit
    import numpy as np
    import torch
    from data.loader import Batches, Source, TrainSamples, pretrain_transform

    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2  # a worker looks this often whether it is alone

    def read(index):
        return np.zeros((8, 8, 3), np.uint8)

    for ending in ("end", "exit", "kill"):
        main = os.fork()
        if main == 0:
            break
        _, status = os.waitpid(main, 0)
        print(ending, os.waitstatus_to_exitcode(status), flush=True)
    else:
        raise SystemExit

    source = Source([str(i) for i in range(8)], read)
    samples = TrainSamples(source, pretrain_transform(8), 0, None, mean=[0] * 3, std=[1] * 3)
    batches = Batches(samples, batch_size=1, num_workers=2)
    stream = batches.epoch(0)
    next(stream)
    print("workers", *[process.pid for process in batches._loader._processes], flush=True)
    if ending == "exit":
        raise SystemExit(3)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_however_it_ends():
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line for line in lines if line[0] != "workers"] == [["end", "0"], ["exit", "3"], ["kill", "-9"]], (
        done.stderr
    )
    pids = [pid for line in lines if line[0] == "workers" for pid in line[1:]]
    assert len(pids) == 6
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its main process"
        time.sleep(0.1)


def test_samples_can_be_sent_to_workers_that_are_not_forked():
    samples = pickle.loads(pickle.dumps(make_samples()))
    assert torch.equal(samples[(1, 2)].image, make_samples()[(1, 2)].image)


# --- evaluation -------------------------------------------------------------------------------------------------------


def make_eval(images=10, bad=()):
    mean, std = pixel_statistics(3)
    return EvalSamples(make_source(images, bad), eval_transform(12), mean=mean, std=std)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_shows_every_image_once_in_order(num_workers):
    found = list(eval_batches(make_eval(), batch_size=4, num_workers=num_workers))
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert sum((batch.index.tolist() for batch in found), []) == list(range(10))
    np.testing.assert_array_equal(found[1].images[2].permute(1, 2, 0), Pictures()(6))
    assert found[1].labels.tolist() == [4, 0, 1, 2] and found[0].noise is None


def test_evaluation_of_a_share():
    shares = [list(eval_batches(make_eval(), batch_size=4, indices=range(rank, 10, 3))) for rank in range(3)]
    assert sorted(index for share in shares for batch in share for index in batch.index.tolist()) == list(range(10))
    assert [batch.index.tolist() for batch in shares[1]] == [[1, 4, 7]]
    assert list(eval_batches(make_eval(), batch_size=4, indices=[])) == []


def test_evaluation_leaves_unreadable_images_out_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        found = list(eval_batches(make_eval(bad=[1, 4, 5, 6, 7]), batch_size=4))
    assert [batch.index.tolist() for batch in found] == [[0, 2, 3], [8, 9]]
    assert found[0].problems == [("1.jpg", "broken on purpose")]
    assert "5 of 10 images cannot be read and are left out: 1.jpg: broken on purpose, and 4 more" in caplog.text
    with pytest.raises(NothingReadable, match="not one of 10 images can be read"):
        list(eval_batches(make_eval(bad=range(10)), batch_size=4))


@pytest.mark.parametrize(
    "fraction, images, allowed", [(0.01, 1000, 10), (0.01, 50, 1), (0.0, 50, 0), (0.07, 100, 7), (1, 3, 3)]
)
def test_how_many_images_may_be_bad(fraction, images, allowed):
    assert allowed_bad(fraction, images) == allowed
    assert math.ceil(0.07 * 100) == 8  # the rounding error that must not occur


def test_too_few_images_for_a_step_name_a_batch_that_fits():
    with pytest.raises(
        ValueError, match="64 images are too few for one optimizer step of 256 .*--total_batch_size, e.g. 16"
    ):
        Batches(make_samples(images=64), batch_size=256)
    assert [data.suggested_batch(images, 1) for images in (1, 7, 8, 100, 1000)] == [1, 1, 2, 16, 128]
    assert data.suggested_batch(100, 3) == 24


def test_the_main_process_chooses_the_decoder_for_its_workers(monkeypatch):
    chosen = []
    monkeypatch.setattr(data, "torchcodec_jpeg", lambda: chosen.append(1))
    samples = make_samples(images=16)
    data.Loader(samples, 2, False)
    assert not chosen, "the images are not read from files"
    for number, files in enumerate(({"path": str}, {"read_lazily": Pictures()}), start=1):  # of packs: not their names
        samples.source = replace(samples.source, names=["a.png"] * 16, **{"path": None, "read_lazily": None} | files)
        data.Loader(samples, 0, False)
        data.Loader(samples, 2, False)
        assert len(chosen) == number
    samples.mean = samples.std = (0.5,)
    data.Loader(samples, 2, False)
    assert len(chosen) == 2, "torchcodec decodes three channels only"
