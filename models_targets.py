"""What a method predicts for each hidden patch.

N images   L patches, row by row   P pixel values of a patch   D channels   K centres or tokens   C H W image
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_vit import FrozenNetwork, at_least_float32, without_autocast

HOG_BINS, HOG_CELL = 9, 8  # orientations over half a circle, and the side of a cell in pixels


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images `[N, C, H, W]` into patches `[N, L, P]`; within a patch the order is row, column, channel."""
    N, C, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    cut = images.reshape(N, C, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(N, rows * columns, patch_size * patch_size * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Join patches `[N, L, P]` on a grid of (rows, columns) to images `[N, C, H, W]`: the inverse of `patchify`."""
    N, (rows, columns) = patches.shape[0], grid
    cut = patches.reshape(N, rows, columns, patch_size, patch_size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(N, -1, rows * patch_size, columns * patch_size)


def standardize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Subtract the mean along the last axis and divide by the root of the unbiased variance plus `eps`.

    A layer norm uses the biased variance, which is the unbiased one times (P - 1) / P. With a smaller eps and a
    constant weight it computes the same in one kernel that keeps only its input.
    """
    width = x.shape[-1]
    ratio = (width - 1) / width
    return F.layer_norm(x, (width,), weight=x.new_full((width,), ratio**0.5), eps=eps * ratio)


class Target(nn.Module):
    """Base of the prediction targets: the target of each patch, and the error of a prediction."""

    name: ClassVar[str] = "reconstruction"
    """Name of the loss part."""

    width: int
    """Values, or classes, that are predicted per patch."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the target of normalised images `[N, C, H, W]`: `[N, L, width]`, or class numbers int64 `[N, L]`."""
        raise NotImplementedError

    def error(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the error `[N, L]` of each patch of the prediction `[N, L, width]`."""
        raise NotImplementedError

    def pixels(self, pred: Tensor, images: Tensor) -> Tensor | None:
        """Return the predicted patches `[N, L, P]` in the space of the images; None where the target is no picture."""
        return None

    def constant_loss(self, images: Tensor) -> float | None:
        """Return the error of the best prediction that is the same for every image; None where it is not known."""
        return None


class Pixels(Target):
    """The pixel values of each patch.

    Args:
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the images.
        normalize: Standardise each patch by its own mean and unbiased variance (MAE's norm_pix_loss).
        norm: "l2" for the mean squared difference, "l1" for the mean absolute difference.
    """

    def __init__(self, patch_size: int, in_chans: int, normalize: bool = False, norm: Literal["l1", "l2"] = "l2"):
        super().__init__()
        self.patch_size, self.normalize, self.norm = patch_size, normalize, norm
        self.width = patch_size * patch_size * in_chans
        if normalize and self.width == 1:
            raise ValueError("norm_pix_loss standardises each patch, and patches of a single value have no variance")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        patches = patchify(at_least_float32(images), self.patch_size)
        return standardize(patches) if self.normalize else patches

    def error(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.norm == "l1":
            return (pred - target).abs().mean(dim=-1)
        return F.mse_loss(pred, target, reduction="none").mean(dim=-1)

    def pixels(self, pred: Tensor, images: Tensor) -> Tensor:
        """Return `pred` in the images' space. Standardisation is undone with the true mean and variance of each patch,
        which the model does not know."""
        if not self.normalize:
            return pred
        variance, mean = torch.var_mean(patchify(at_least_float32(images), self.patch_size), dim=-1, keepdim=True)
        return pred * (variance + 1e-6).sqrt() + mean

    @torch.no_grad()
    def constant_loss(self, images: Tensor) -> float:
        """Return the error of the mean patch of `images`, for "l1" of their median patch; of zeros for standardised
        patches under "l2"."""
        target = self(images)
        if self.norm == "l1":
            return self.error(target.flatten(0, 1).median(dim=0).values, target).mean().item()
        return (target.square() if self.normalize else target.var(dim=(0, 1), correction=0)).mean().item()


class HOG(Target):
    """Histograms of oriented gradients; the error is the mean squared difference.

    Args:
        patch_size: Side of a patch in pixels, a multiple of 8.
        in_chans: Channels of the images.
    """

    def __init__(self, patch_size: int, in_chans: int) -> None:
        super().__init__()
        require_cells(patch_size)
        self.patch_size = patch_size
        self.width = in_chans * HOG_BINS * (patch_size // HOG_CELL) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return hog(images, self.patch_size)

    def error(self, pred: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(pred, target, reduction="none").mean(dim=-1)

    def constant_loss(self, images: Tensor) -> float:
        """Return the error of the mean histogram of `images`."""
        return self(images).var(dim=(0, 1), correction=0).mean().item()


class Tokens(Target):
    """The token that a tokenizer gives each patch; the error is the cross-entropy.

    Args:
        width: Number of different tokens.
        smoothing: Share of the target that is spread over all tokens.
    """

    name: ClassVar[str] = "tokens"

    def __init__(self, width: int, smoothing: float = 0.0) -> None:
        super().__init__()
        self.width, self.smoothing = width, smoothing
        self.tokenizer = FrozenNetwork()
        self._size = (0, 0)

    def hold(self, tokenizer: Any, grid: tuple[int, int]) -> None:
        """Set the tokenizer, for images of (rows, columns) patches.

        A tokenizer with patches of another size gets the images resized to as many patches of its own.
        """
        self._size = grid[0] * tokenizer.patch_size, grid[1] * tokenizer.patch_size
        tokenizer.set_input_size(self._size)
        self.tokenizer.hold(tokenizer)

    def _tokenizer(self) -> Any:
        if self.tokenizer.network is None:
            raise ValueError(
                "this model was loaded without its tokenizer, which only training needs: build it with methods.build"
            )
        return self.tokenizer.network

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        tokenizer = self._tokenizer()
        return tokenizer.tokenize(scaled_to(images, self._size))

    def error(self, pred: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(pred.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=self.smoothing)
        return loss.view_as(target)

    def pixels(self, pred: Tensor, images: Tensor) -> Tensor | None:
        """Return the patches that the tokenizer decodes from the most likely tokens.

        None if it does not decode to pixels, or has another patch size.
        """
        tokenizer = self.tokenizer.network
        if tokenizer is None or self._size != images.shape[-2:]:
            return None
        return tokenizer.show(pred.argmax(dim=-1))

    @torch.no_grad()
    def constant_loss(self, images: Tensor) -> float:
        """Return the entropy of the histogram of the tokens of `images`, in nats."""
        share = torch.bincount(self(images).flatten(), minlength=self.width).double()
        share /= share.sum()
        return -torch.xlogy(share, share).sum().item()


def scaled_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images to (height, width) pixels, where they have another size."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


@torch.no_grad()
def nearest_center(x: Tensor, centers: Tensor) -> Tensor:
    """Find for each vector of `x` `[..., D]` the nearest of `centers` `[K, D]` in squared distance: int64 `[...]`.

    That is the largest x c - |c|^2 / 2, one matrix product; products of more than 2^25 elements are taken in parts.
    """
    with without_autocast(x):
        x, centers = at_least_float32(x), at_least_float32(centers)
        rows = x.reshape(-1, x.shape[-1])
        half_square = centers.square().sum(dim=1) / 2
        parts = rows.split(max(1, 2**25 // len(centers)))
        found = [torch.addmm(-half_square, part, centers.T).argmax(dim=1) for part in parts]
    return torch.cat(found).reshape(x.shape[:-1])


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
    with without_autocast(images):
        histograms = F.normalize(_cell_histograms(*_gradients(at_least_float32(images))), dim=2)
    cut = histograms.reshape(N, C * HOG_BINS, rows, side, columns, side)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(N, rows * columns, C * HOG_BINS * side * side)


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return Sobel's gradients gx and gy, left minus right and upper minus lower, each `[N, C, H, W]`."""
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
