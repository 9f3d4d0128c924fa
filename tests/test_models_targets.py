"""Histograms of oriented gradients against published values, a plain loop, and images whose gradients are known."""

import math

import pytest
import torch

import models_targets
from models_targets import HOG, hog
from tests import published

ramp = torch.arange(32.0).expand(32, 32)


def looped(images, patch_size):
    """The same by one pixel at a time."""
    N, C, H, W = images.shape
    side = patch_size // 8
    out = torch.zeros(N, H // patch_size * (W // patch_size), C * 9 * side * side, dtype=torch.float64)
    mirrored = [[abs(i) if i < size else 2 * size - 2 - i for i in range(-1, size + 1)] for size in (H, W)]
    for n in range(N):
        for c in range(C):
            x = images[n, c].double()[mirrored[0]][:, mirrored[1]].tolist()
            histograms = torch.zeros(H // 8, W // 8, 9, dtype=torch.float64)
            for i in range(H):
                for j in range(W):
                    gx = sum(w * (x[i + k][j] - x[i + k][j + 2]) for k, w in enumerate((1, 2, 1)))
                    gy = sum(w * (x[i][j + k] - x[i + 2][j + k]) for k, w in enumerate((1, 2, 1)))
                    orientation = math.floor(math.atan2(gx, gy) / math.pi * 9) % 9
                    histograms[i // 8, j // 8, orientation] += math.hypot(gx, gy)
            for i in range(H // 8):
                for j in range(W // 8):
                    cell = histograms[i, j]
                    patch = i // side * (W // patch_size) + j // side
                    for b in range(9):
                        place = (c * 9 + b) * side * side + i % side * side + j % side
                        out[n, patch, place] = cell[b] / max(cell.norm().item(), 1e-12)
    return out


def by_cell(image):
    """The histograms of an image `[32, 32]` as `[4, 4, 9]`."""
    return hog(image[None, None].float(), 8).reshape(4, 4, 9)


def raw(image, cell):
    """The sums of one cell that are not zero, by bin, before they are normalised."""
    sums = models_targets._cell_histograms(*models_targets._gradients(image[None, None].float()))[0, 0, :, *cell]
    return {b: pytest.approx(value, abs=1e-3) for b, value in enumerate(sums.tolist()) if value}


@published.needs_vectors
def test_it_equals_the_published_implementation():
    vectors = published.read("hog_a")
    torch.testing.assert_close(hog(vectors["images"], 16), vectors["hog"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("patch_size", "channels", "size"), [(8, 3, (16, 24)), (16, 3, (32, 16)), (24, 1, (24, 48))])
def test_it_equals_a_loop_for_any_multiple_of_8_and_any_channels(patch_size, channels, size):
    images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cells = (patch_size // 8) ** 2
    found = hog(images, patch_size)
    assert found.shape == (2, size[0] * size[1] // patch_size**2, channels * 9 * cells)
    torch.testing.assert_close(found, looped(images, patch_size), rtol=0, atol=1e-10)
    torch.testing.assert_close(hog(images.float(), patch_size), found.float(), rtol=0, atol=1e-4)


def test_a_patch_of_16_pixels_has_108_values():
    assert hog(torch.randn(1, 3, 48, 32), 16).shape == (1, 6, 108) and HOG(16, 3).width == 108


@pytest.mark.parametrize(
    ("image", "inside", "corner"),
    [
        (ramp, {4: 512}, {4: 448}),  # the border's column has no gradient, for it is reflected
        (-ramp, {4: 512}, {4: 448}),
        (ramp.T, {0: 512}, {0: 448}),
        (-ramp.T, {0: 512}, {0: 448}),
        (ramp + ramp.T, {2: 724.077}, {0: 56, 2: 554.372, 4: 56}),
        (ramp - ramp.T, {6: 724.077}, {0: 56, 4: 56, 6: 554.372}),
    ],
    ids=["columns", "minus columns", "rows", "minus rows", "diagonal", "other diagonal"],
)
def test_ramps_fill_the_bins_of_their_direction(image, inside, corner):
    assert raw(image, (1, 1)) == inside and raw(image, (0, 0)) == corner


def test_a_step_is_seen_by_the_cells_on_both_its_sides():
    step = (ramp >= 16).float()
    assert raw(step, (1, 1)) == {4: 32} and raw(step, (1, 2)) == {4: 32} and raw(step, (1, 0)) == {}


def test_a_constant_image_has_zeros_only():
    assert torch.equal(hog(torch.full((1, 3, 32, 32), 0.3), 16), torch.zeros(1, 4, 108))


def test_the_values_of_a_cell_and_channel_have_norm_1_or_0():
    images = torch.randn(2, 3, 32, 48)
    images[1, 1] = 0.7
    norms = hog(images, 16).reshape(2, 6, 3, 9, 4).norm(dim=3)
    expected = torch.ones_like(norms)
    expected[1, :, 1] = 0
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_flipping_the_image_flips_cells_and_bins(axis):
    """Bin b becomes 8 - b. In the border's columns gx is 0, which is the edge of bin 0 and stays in it."""
    image = torch.randn(32, 32, generator=torch.Generator().manual_seed(axis))
    flipped, expected = by_cell(image.flip(axis)), by_cell(image).flip(axis, 2)
    torch.testing.assert_close(flipped[:, 1:3], expected[:, 1:3], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("a", "b"), [(3.7, 0.4), (-0.2, 11.0)])
def test_scale_shift_and_sign_change_nothing(a, b):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(hog(a * images + b, 16), hog(images, 16), rtol=0, atol=1e-9)


def test_both_ways_to_sum_are_the_same(monkeypatch):
    """The one for devices on which additions have no fixed order."""
    gx, gy = torch.randn(2, 2, 3, 16, 24, dtype=torch.float64)
    on_cpu = models_targets._cell_histograms(gx, gy)

    class Elsewhere:
        type = "cuda"

    monkeypatch.setattr(torch.Tensor, "device", Elsewhere(), raising=False)
    torch.testing.assert_close(models_targets._cell_histograms(gx, gy), on_cpu)


def test_half_precision_is_computed_in_float32():
    images = torch.randn(1, 3, 32, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hog(images, 16)
    assert found.dtype == torch.float32 and torch.equal(found, hog(images.float(), 16))


@pytest.mark.parametrize(
    ("size", "patch_size", "message"),
    [((32, 32), 4, "do not fill patches of 4"), ((32, 32), 12, "multiple of 8"), ((24, 32), 16, "images of 24 x 32")],
)
def test_sizes_that_do_not_fit_are_refused(size, patch_size, message):
    with pytest.raises(ValueError, match=message):
        hog(torch.zeros(1, 3, *size), patch_size)
