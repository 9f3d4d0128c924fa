"""Block-wise masks compared with the counts of the released generators, and the patches that they hide."""

import pickle

import numpy as np
import pytest
import torch

from models_simmim import BlockMask
from tests.small import batch, small


def draws(mask, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([mask(generator)[0] for _ in range(count)])


@pytest.mark.parametrize(
    ("grid", "hidden", "smallest", "mean", "least", "exact"),
    [
        ((14, 14), 78, 15, 77.55, 67, 0.701),  # MaskFeat
        ((14, 14), 75, 16, 74.46, 64, 0.664),  # BEiT
        ((8, 8), 26, 5, 25.94, 24, 0.939),
    ],
)
def test_counts_vary_as_in_the_releases(grid, hidden, smallest, mean, least, exact):
    counts = draws(BlockMask(grid, hidden, smallest), 3000).sum(dim=1)
    assert counts.mean().item() == pytest.approx(mean, abs=0.08)
    assert counts.min() >= least - 3 and counts.max() == hidden
    assert (counts == hidden).float().mean().item() == pytest.approx(exact, abs=0.04)


def test_methods_take_the_papers_numbers():
    with torch.device("meta"):
        from methods import build

        maskfeat = build("maskfeat", "mae_vit_tiny_patch16").draw_noise
    assert maskfeat == BlockMask((14, 14), 78, 15)
    beit = small("beit", input_size=(56, 56)).draw_noise
    assert beit == BlockMask((14, 14), 75, 16)
    assert small("beit", min_block=3).draw_noise.smallest == 3


@pytest.mark.parametrize("grid", [(1, 7), (7, 1), (2, 2), (1, 2), (3, 40), (5, 4)])
def test_any_grid_gets_a_mask_that_hides_something_and_not_all(grid):
    L = grid[0] * grid[1]
    hidden = max(1, round(0.4 * L))
    masks = draws(BlockMask(grid, hidden, max(1, hidden // 5)), 200)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.sum(dim=1).min() >= 1 and masks.sum(dim=1).max() <= hidden < L


def test_a_first_block_is_a_rectangle_within_the_aspects():
    mask = BlockMask((14, 14), 16, 16)  # one block of that area fills the grid
    for drawn in draws(mask, 100):
        rows, columns = drawn.reshape(14, 14).nonzero(as_tuple=True)
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        if height * width == drawn.sum():
            assert 0.2 < height / width < 5


def test_blocks_are_between_three_tenths_and_ten_thirds_as_high_as_wide():
    """Of 100 patches: sqrt(100 x 0.3) = 5.5 to sqrt(100 / 0.3) = 18.3 rows or columns."""
    blocks, generator = BlockMask((40, 40), 400, 100), torch.Generator().manual_seed(0)
    heights, widths = [], []
    for _ in range(300):
        mask = np.zeros((40, 40), dtype=np.float32)
        area = blocks._add_block(mask, 100, generator)
        sides = [int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())]
        assert area == mask.sum() == sides[0] * sides[1]
        heights.append(sides[0])
        widths.append(sides[1])
    for sides in (heights, widths):
        assert min(sides) in (5, 6) and max(sides) in (17, 18) and 9 <= np.median(sides) <= 11


def test_a_mask_depends_on_the_generator_alone_and_rows_of_terms_follow_it():
    mask = pickle.loads(pickle.dumps(BlockMask((6, 5), 12, 2, rows=3)))
    one, other = (mask(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, other) and one.shape == (3, 30)
    assert not torch.equal(one[0], mask(torch.Generator().manual_seed(8))[0])
    assert set(one[0].tolist()) == {0.0, 1.0} and 0 < one[1:].min() and one[1:].unique().numel() == 60


@pytest.fixture(params=["maskfeat", "beit", "peco"])
def method(request):
    return request.param


def drawn_batch(model):
    images, _, _ = batch(model)
    draw, generator = model.draw_noise, torch.Generator().manual_seed(3)
    return images, torch.stack([draw(generator) for _ in images])


def test_the_mask_is_what_was_drawn(method):
    model = small(method)
    images, noise = drawn_batch(model)
    _, mask = model.predict(images, noise=noise)
    assert torch.equal(mask, noise[:, 0])
    with_another_row = torch.cat([noise, 1 - noise[:, :1]], dim=1)
    assert torch.equal(model.predict(images, noise=with_another_row)[1], mask)
    counts = torch.cat([model.predict(images)[1].sum(dim=1) for _ in range(20)])  # drawn inside
    assert counts.min() >= 1 and counts.max() <= model.num_hidden


def test_uniform_noise_hides_single_patches(method):
    model = small(method)
    images, _, noise = batch(model, 100)
    _, mask = model.predict(images, noise=noise)
    assert mask.sum(dim=1).max() <= model.num_hidden
    assert (noise[:, 0] * mask).sum() / mask.sum() > 1 - model.mask_ratio / 2 - 0.05


def test_the_encoder_sees_nothing_of_what_is_hidden(method):
    model = small(method).eval()
    images, noise = drawn_batch(model)
    pred, mask = model.predict(images, noise=noise)
    pixels = mask.unflatten(1, model.grid)[:, None]
    for axis in (2, 3):
        pixels = pixels.repeat_interleave(model.patch_size, axis)
    changed = torch.where(pixels > 0, torch.randn_like(images), images)
    assert torch.equal(pred, model.predict(changed, noise=noise)[0])
    assert not torch.equal(pred, model.predict(images + 1, noise=noise)[0])


def test_the_loss_is_the_mean_over_all_hidden_patches_together(method):
    model = small(method).eval()
    images, noise = drawn_batch(model)
    pred, mask = model.predict(images, noise=noise)
    target, errors = model.target(images), []
    for n, l in mask.nonzero().tolist():  # noqa: E741
        errors.append(model.target.error(pred[n : n + 1, l : l + 1], target[n : n + 1, l : l + 1]))
    losses = model(images, noise=noise)
    torch.testing.assert_close(losses[model.target.name], torch.stack(errors).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.01}, "hides 0 of 20"),
        ({"mask_ratio": 0.999}, "hides 20 of 20"),
        ({"min_block": 9}, "min_block is 9 patches, and 8 of 20"),
        ({"terms": {"neighbor": {}}}, "needs an encoder that gets visible patches only"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small("maskfeat", **changes)
