"""What a method predicts for each hidden patch.

N images   L patches, row by row   P pixel values of a patch   C H W image
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

HOG_BINS, HOG_CELL = 9, 8  # orientations over half a circle, and the side of a cell in pixels


def require_cells(patch_size: int) -> None:
    """Raise ValueError unless cells of 8 x 8 pixels fill a patch."""
    if patch_size < 1 or patch_size % HOG_CELL:
        raise ValueError(
            f"HOG has cells of {HOG_CELL} x {HOG_CELL} pixels, which do not fill patches of {patch_size} x "
            f"{patch_size}: use a patch size that is a multiple of {HOG_CELL}"
        )


@torch.no_grad()
def hog(images: Tensor, patch_size: int) -> Tensor:
    """Compute histograms of oriented gradients, the target of MaskFeat (Wei et al., CVPR 2022).

    Each channel has its own gradients: Sobel's, with the border reflected. The gradient's length is added to one of 9
    bins of its unsigned direction, atan2(gx, gy), over each cell of 8 x 8 pixels. The 9 values of a cell are divided by
    their L2 norm; they are zeros where nothing varies. A histogram is the same for images and a * images + b (a != 0),
    so normalised images and raw ones have the same target.

    Args:
        images: `[N, C, H, W]`; half precision is computed in float32.
        patch_size: Side of a patch in pixels, a multiple of 8 that divides H and W.

    Returns:
        `[N, L, C * 9 * cells]` with cells = (patch_size / 8)^2. Of a patch, value `(c * 9 + bin) * cells + cell` is
        channel c; cells count row by row.

    Raises:
        ValueError: If cells do not fill the patches, or patches the images.
    """
    require_cells(patch_size)
    N, C, H, W = images.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"patches of {patch_size} x {patch_size} pixels do not fill images of {H} x {W}")
    rows, columns, side = H // patch_size, W // patch_size, patch_size // HOG_CELL
    with torch.autocast(images.device.type, enabled=False):
        images = images if images.dtype == torch.float64 else images.float()
        histograms = F.normalize(_cell_histograms(*_gradients(images)), dim=2)
    cut = histograms.reshape(N, C * HOG_BINS, rows, side, columns, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(N, rows * columns, C * HOG_BINS * side * side)


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's gradients gx and gy, left minus right and upper minus lower: each `[N, C, H, W]`."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    down = padded[..., :-2, :] + padded[..., 2:, :] + 2 * padded[..., 1:-1, :]
    across = padded[..., :-2] + padded[..., 2:] + 2 * padded[..., 1:-1]
    return down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]


def _cell_histograms(gx: Tensor, gy: Tensor) -> Tensor:
    """Sum gradient lengths by direction over cells: `[N, C, 9, H / 8, W / 8]`."""
    N, C, H, W = gx.shape
    rows, columns = H // HOG_CELL, W // HOG_CELL
    length = torch.hypot(gx, gy)
    bins = torch.atan2(gx, gy).mul_(HOG_BINS / math.pi).floor_()  # from -9 to 9
    bins = torch.where(bins < 0, bins + HOG_BINS, bins)
    bins = torch.where(bins == HOG_BINS, 0, bins).long()
    if gx.device.type == "cpu":
        cell = torch.arange(rows)[:, None, None, None] * columns + torch.arange(columns)[:, None]
        where = bins.reshape(N * C, rows, HOG_CELL, columns, HOG_CELL) + HOG_BINS * cell
        sums = gx.new_zeros(N * C, rows * columns * HOG_BINS)
        sums.scatter_add_(1, where.reshape(N * C, -1), length.reshape(N * C, -1))
        return sums.reshape(N, C, rows, columns, HOG_BINS).permute(0, 1, 4, 2, 3)
    # Elsewhere scatter_add_ adds in any order and rounds differently each time; here every place is written once.
    by_bin = gx.new_zeros(N, C, HOG_BINS, H, W).scatter_(2, bins[:, :, None], length[:, :, None])
    return by_bin.reshape(N, C, HOG_BINS, rows, HOG_CELL, columns, HOG_CELL).sum(dim=(4, 6))
