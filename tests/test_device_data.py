"""Batches computed on the device: the distribution of crops, pixels equal to the loader's, samples by key."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from data import device_data
from data.device_data import DeviceSamples, random_boxes, resized_crops, uniforms
from data.images import BadImage, _resize, pretrain_transform
from data.loader import Batches, TrainSamples
from data.sources import Names, Source
from tests.runs import Training, assert_same_end, final, finish, start_ranks

CPU = torch.device("cpu")


def source_of(shapes, bad=(), labels=True):
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]

    def read(number):
        if number in bad:
            raise BadImage(f"image-{number}", "torn")
        return pictures[number]

    names = Names(f"image-{number}" for number in range(len(shapes)))
    return Source(names, read, np.arange(len(shapes)) if labels else None), pictures


def samples_of(source, **more):
    settings = dict(input_size=(8, 12), min_scale=0.2, hflip=0.5, seed=3, noise_shape=(2, 6), device=CPU)
    return DeviceSamples(source, **{**settings, "mean": (0.5,) * 3, "std": (0.5,) * 3, **more})


def test_crops_are_the_pixels_that_the_loader_would_cut_and_resize():
    shapes = [(20, 20), (31, 17), (9, 40), (64, 64)]
    source, pictures = source_of(shapes)
    samples = samples_of(source, noise_shape=None)
    generator = np.random.default_rng(1)
    for size in [(8, 8), (20, 20), (33, 15)]:
        boxes = np.array(
            [[*(generator.integers(0, side - 4, 1)[0] for side in shape), 1, 1] for shape in shapes], np.int64
        )
        boxes[:, 2:] = [generator.integers(2, np.array(shapes[n]) - boxes[n, :2] + 1) for n in range(4)]
        mirrored = np.array([False, True, False, True])
        made = resized_crops(samples.images, torch.arange(4), boxes, mirrored, size)
        for n, (top, left, rows, columns) in enumerate(boxes.tolist()):
            cut = torch.from_numpy(pictures[n][top : top + rows, left : left + columns].copy()).permute(2, 0, 1)
            expected = _resize(cut, size)
            expected = expected.flip(-1) if mirrored[n] else expected
            difference = (made[n].int() - expected.int()).abs()
            assert difference.max() <= 1 and difference.float().mean() < 0.1, (size, n)


def test_resizing_in_parts_changes_nothing(monkeypatch):
    source, _ = source_of([(16, 16)] * 5)
    samples = samples_of(source)
    keys = [(0, n) for n in range(5)]
    whole = samples.__getitems__(keys)
    monkeypatch.setattr(device_data, "RESIZE_BYTES", 1)
    assert torch.equal(samples.__getitems__(keys).images, whole.images)


@pytest.mark.parametrize("shape", [(32, 32), (300, 500), (40, 400), (500, 60)])
def test_the_law_of_crops_is_torchvisions(shape):
    """Two-sample Kolmogorov-Smirnov tests of each coordinate of the boxes and of their area."""
    n = 3000
    drawn = np.random.default_rng(2).random((n, 2 * device_data.ATTEMPTS + 2))
    ours = random_boxes(np.tile(shape, (n, 1)), 0.2, drawn)
    torch.manual_seed(0)
    image = torch.empty(1).expand(1, *shape)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for a, b in [*zip(ours.T, theirs.T, strict=True), (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])]:
        assert ks_2samp(a, b).pvalue > 1e-4
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all() and (ours[:, 1] + ours[:, 3] <= shape[1]).all()
    assert ours.min() >= 0 and ours[:, 2:].min() >= 1


def test_noise_is_uniform_and_without_pattern():
    states = torch.arange(400) * 1_000_003
    numbers = uniforms(states, 196)
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-4
    assert 0 <= numbers.min() and numbers.max() < 1
    neighbours = np.corrcoef(numbers[:-1].flatten(), numbers[1:].flatten())[0, 1]
    assert abs(neighbours) < 4 / numbers.numel() ** 0.5
    assert numbers.flatten().unique().numel() > 0.99 * numbers.numel()


def test_random_numbers_are_splitmix64s():
    """Compared with the published algorithm in Python's integers, which do not overflow."""
    mask = 2**64 - 1

    def splitmix(state, count):
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
            yield ((mixed ^ (mixed >> 31)) >> 40) / 2**24

    for state in (0, 1, 2**63 - 1, -1, -(2**63)):
        assert uniforms(torch.tensor([state]), 5)[0].tolist() == list(splitmix(state & mask, 5))


def test_a_sample_is_a_function_of_seed_epoch_and_index_alone():
    source, _ = source_of([(16, 16), (20, 14), (9, 30), (16, 16), (25, 25)])
    together = samples_of(source).__getitems__([(4, index) for index in range(5)])
    again = samples_of(source)
    again.__getitems__([(9, 1), (2, 0)])
    for index in (3, 0, 4):
        alone = again.__getitems__([(4, index)])
        assert torch.equal(alone.images[0], together.images[index])
        assert torch.equal(alone.noise[0], together.noise[index])
        assert alone.labels.tolist() == alone.index.tolist() == [index]
    for other in ([(5, 3)], [(4, 2)]):
        assert not torch.equal(again.__getitems__(other).noise[0], together.noise[3])
    assert not torch.equal(samples_of(source, seed=4).__getitems__([(4, 3)]).noise[0], together.noise[3])


def test_the_mask_does_not_depend_on_crops_nor_on_further_rows_of_noise():
    source, _ = source_of([(16, 16)] * 3)
    keys = [(0, 0), (0, 2)]
    noise = samples_of(source).__getitems__(keys).noise
    assert torch.equal(samples_of(source, min_scale=0.9, hflip=0.0).__getitems__(keys).noise, noise)
    assert torch.equal(samples_of(source, noise_shape=(1, 6)).__getitems__(keys).noise[:, 0], noise[:, 0])


def block(generator):
    """Draw a mask with one hidden column."""
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, int(torch.randint(6, (), generator=generator))] = True
    return mask


def test_noise_that_a_method_draws_is_that_of_the_loader():
    source, keys = source_of([(20, 20), (31, 17), (9, 40)])[0], [(4, 2), (0, 1), (4, 0)]
    on_device = samples_of(source, draw_noise=block).__getitems__(keys).noise
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    loaded = TrainSamples(source, pretrain_transform(8), 3, None, draw_noise=block, **settings)
    assert on_device.dtype == torch.bool and torch.equal(on_device, loaded.__getitems__(keys).noise)


def test_any_number_of_ranks_and_any_start_see_the_same_samples():
    source, _ = source_of([(16, 16)] * 20)

    def images(rank, world_size, batch_size, start=0):
        batches = Batches(
            samples_of(source), batch_size=batch_size, rank=rank, world_size=world_size, seed=1, num_workers=0
        )
        return [batch.to(CPU) for batch in batches.epoch(2, start)]

    whole = images(0, 1, 4)
    halves = list(zip(images(0, 2, 2), images(1, 2, 2), strict=True))
    for batch, (first, second) in zip(whole, halves, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.noise, torch.cat([first.noise, second.noise]))
    assert torch.equal(images(0, 1, 4, start=3)[0].images, whole[3].images)
    assert whole[0].images.dtype == torch.float32 and whole[0].images.abs().max() <= 1.0001


def test_mirroring_happens_as_often_as_asked():
    source, _ = source_of([(16, 16)])
    for hflip in (0.0, 0.3, 1.0):
        _, mirrored = samples_of(source, hflip=hflip).boxes(np.arange(2000), np.zeros(2000, np.int64))
        assert abs(mirrored.mean() - hflip) <= 4 * (hflip * (1 - hflip) / 2000) ** 0.5


def test_unreadable_images_are_replaced_by_the_next_and_reported_once():
    source, pictures = source_of([(16, 16)] * 4, bad=(1, 2))
    samples = samples_of(source)
    batch = samples.__getitems__([(0, 1), (0, 3)])
    assert batch.labels.tolist() == [3, 3]
    assert batch.index.tolist() == [1, 3]
    assert batch.problems == [("image-1", "torn"), ("image-2", "torn")]
    assert samples.__getitems__([(0, 0)]).problems == []
    assert torch.equal(samples.images[1].permute(1, 2, 0), torch.from_numpy(pictures[3]))
    with pytest.raises(ValueError, match="4 images in a row cannot be read, such as image-0: torn"):
        samples_of(source_of([(16, 16)] * 4, bad=range(4))[0])


def test_images_without_room_are_refused_before_they_are_read(monkeypatch):
    source, _ = source_of([(16, 16)] * 200)
    read = []
    counted = Source(source.names, lambda number: read.append(number) or source.read(number), source.labels)
    monkeypatch.setattr(device_data, "free_bytes", lambda device: 200_000)
    with pytest.raises(ValueError, match=r"200 images, all padded to 16 x 16, take 0.0 GB.*tools.pack"):
        samples_of(counted)
    assert len(read) <= device_data.LOOKED_AT


def test_memory_that_holds_copies_of_files_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(device_data, "MEMORY", tmp_path / "meminfo")
    whole = device_data.free_bytes(CPU)  # the system reports nothing, as on a Mac
    assert whole >= 2**30
    (tmp_path / "meminfo").write_text("MemTotal:  8000000 kB\nMemFree:  1000 kB\nMemAvailable:  5000000 kB\n")
    assert device_data.free_bytes(CPU) == 5_120_000_000


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_with_its_data_on_the_device_resumes_exactly(tmp_path):
    words = ["--data_on_device", "--epochs", 2]
    finish(tmp_path / "whole", *words)
    parted = Training(tmp_path / "parted", *words, "--save_steps", 1)
    parted.kill_at(7)
    finish(tmp_path / "parted", *words)
    assert_same_end(tmp_path / "whole", tmp_path / "parted")
    assert final(tmp_path / "whole")["step"] > 7


def test_two_processes_end_where_one_ends(tmp_path):
    words = ["--data_on_device", "--epochs", 1, "--warmup_epochs", 0]
    finish(tmp_path / "one", *words)
    ranks = start_ranks(2, tmp_path / "two", *words)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stderr
    one, two = final(tmp_path / "one")["model"], final(tmp_path / "two")["model"]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)
