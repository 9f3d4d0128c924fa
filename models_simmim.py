"""SimMIM: the encoder gets the image with some patches replaced, and one linear layer predicts the hidden ones.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022. Cells of several patches are replaced by
a learned token before positions are added; the encoder sees all patches. A linear layer predicts the raw pixels of each
patch; the loss is the mean absolute difference over hidden patches.

The encoder is that of the other methods, with fixed positions, so that their features compare and one program
fine-tunes them. The release differs: no absolute positions, a relative position bias shared by its blocks, layer scale,
drop path, no bias of keys, crops resized bilinearly, coefficients of AdamW (0.9, 0.999), not MAE's (0.9, 0.95). Its
initial weights and weight decay are used here.

`ReplacedViT` is the base of this kind of method. They differ in what they hide (`draw_mask`) and what they predict
(`make_target`). `BlockMaskedViT` is the base of those that hide rectangles, as BEiT does: Bao et al., "BEiT: BERT
Pre-Training of Image Transformers", ICLR 2022.

N images   L patches, row by row   D encoder channels   P values predicted of a patch
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from models_mae import MaskedImageModel, View, mean_over_ranks
from models_targets import Pixels, Target
from models_vit import at_least_float32, without_autocast
from options.mae import SimMIMOptions
from options.maskfeat import BlockMaskOptions

INIT_STD = 0.02


class ReplacedViT(MaskedImageModel):
    """Replace hidden patches by a learned token, encode all patches, predict with one linear layer."""

    drops_hidden: ClassVar[bool] = False

    def build_decoder(self) -> None:
        """Create the token and the layer that predicts."""
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.decoder_pred = nn.Linear(self.embed_dim, self.target.width)

    def draw_mask(self, noise: Tensor) -> Tensor:
        """Return the mask `[N, L]`, float, 1 = hidden, from the mask's row of noise `[N, L]`."""
        raise NotImplementedError

    def select(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return those of the encoded patches `[N, L, D]` that training predicts: all of them."""
        return tokens

    def encode_replaced(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode tokens `[N, L, D]`, hidden ones replaced: `[N, 1 + L, D]` after the norm, and the taps."""
        blank = self.mask_token + self.pos_embed[:, 1:]
        return self.encode_tokens(torch.where(mask[:, :, None] > 0, blank.to(tokens.dtype), tokens))

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Replace, encode and predict. All ids are kept, in order, because the encoder gets every patch."""
        tokens = self.embed(images)
        noise = self._complete(noise, images)
        mask = self.draw_mask(noise[:, 0])
        latent, taps = self.encode_replaced(tokens, mask)
        decoded = self.select(latent[:, 1:], mask)
        pred = at_least_float32(self.decoder_pred(decoded))
        ids = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        return View(images, labels, noise, tokens, ids, ids, mask, latent, taps, decoded, pred)


class SimMIM(ReplacedViT):
    """SimMIM with square cells of `mask_cell` pixels; 0: two patches, which are the paper's 32 pixels at patch 16.

    Of all cells, the share `mask_ratio` is hidden, rounded up. Cells at the lower and right edge may be cut off.
    """

    Options: ClassVar[type] = SimMIMOptions
    options: SimMIMOptions

    @property
    def cell(self) -> int:
        """Side of a cell in patches."""
        return self.options.mask_cell // self.patch_size or 2

    def make_target(self) -> Target:
        return Pixels(self.patch_size, self.in_chans, self.options.norm_pix_loss, norm="l1")

    def no_weight_decay(self) -> set[str]:
        """Return the class token, which the release does not decay; it decays the mask token."""
        return {"cls_token"}

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set the initial weights of the release.

        Matrices and tokens of the encoder are normal with standard deviation 0.02 before truncation at +-0.02, biases
        0. Both matrices that end a residual branch of block n (from 1) are divided by sqrt(2 n). The layer that
        predicts has PyTorch's defaults: weights and biases uniform within +-1 / sqrt(D).
        """
        super().init_weights(mode, needs_reset)
        matrices = [module.weight for module in self.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for drawn in (self.cls_token, self.mask_token, *matrices):
            nn.init.trunc_normal_(drawn, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for number in range(len(self.blocks)):
            for last in ("attn.proj", "mlp.fc2"):
                self.get_parameter(f"blocks.{number}.{last}.weight").div_(math.sqrt(2 * (number + 1)))
        self.decoder_pred.reset_parameters()

    def _cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the number of cells and how many of them are hidden."""
        cells = math.ceil(grid[0] / self.cell) * math.ceil(grid[1] / self.cell)
        return cells, math.ceil(cells * self.mask_ratio)

    def check_grid(self, grid: tuple[int, int]) -> None:
        mask_cell = self.options.mask_cell
        if mask_cell < 0 or mask_cell % self.patch_size:
            raise ValueError(f"mask_cell is {mask_cell} pixels, which patches of {self.patch_size} do not fill")
        cells, hidden = self._cells(grid)
        if hidden == cells:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides {hidden} of the {cells} cells of {self.cell} x {self.cell} "
                f"patches: some must stay visible; a smaller mask_cell makes more cells"
            )

    def draw_mask(self, noise: Tensor) -> Tensor:
        """Hide the cells whose first patches have the largest noise."""
        cells, hidden = self._cells(self.grid)
        rows, columns = self.grid
        noise_of_cells = noise.unflatten(1, self.grid)[:, :: self.cell, :: self.cell]
        rank = noise_of_cells.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        mask = (rank >= cells - hidden).float().unflatten(1, noise_of_cells.shape[1:])
        mask = mask.repeat_interleave(self.cell, dim=1).repeat_interleave(self.cell, dim=2)
        return mask[:, :rows, :columns].flatten(1)

    def target_loss(self, view: View) -> Tensor:
        """Return the mean over images of the mean error over hidden patches, of which cut-off cells have fewer."""
        with without_autocast(view.pred):
            error_NL = self.target.error(view.pred, self.target(view.images)) * view.mask
            return (error_NL.sum(dim=1) / view.mask.sum(dim=1)).mean()


# ---- block-wise masks ------------------------------------------------------------------------------------------------

TRIES = 10  # draws of a block that does not fit
ASPECTS = 0.3, 1 / 0.3  # least and largest height of a block over its width


@dataclass(frozen=True)
class BlockMask:
    """Draw a mask of rectangles of patches, which may overlap.

    Blocks are added until `hidden` patches are hidden. A block's area is uniform from `smallest` to the number of
    patches that are still to be hidden, the logarithm of its aspect ratio is uniform, and so is its place. It counts
    when it hides at least one patch more and not too many. After 10 draws without such a block the mask is left as it
    is, so the number of hidden patches varies. Where no block has fitted (a grid of one row), patches are hidden one by
    one.

    Calling it with a CPU generator returns `[rows, L]`, float: the mask, 1 = hidden, then rows of uniform numbers.
    """

    grid: tuple[int, int]
    hidden: int
    """Largest number of hidden patches."""
    smallest: int
    """Smallest drawn area of a block, in patches."""
    rows: int = 1
    """Rows of the result."""

    def __call__(self, generator: torch.Generator) -> Tensor:
        mask = np.zeros(self.grid, dtype=np.float32)
        done = 0
        while done < self.hidden and (added := self._add_block(mask, self.hidden - done, generator)):
            done += added
        if not done:
            mask.flat[torch.randperm(mask.size, generator=generator)[: self.hidden].numpy()] = 1
        first = torch.from_numpy(mask).reshape(1, -1)
        return (
            first if self.rows == 1 else torch.cat([first, torch.rand(self.rows - 1, mask.size, generator=generator)])
        )

    def _add_block(self, mask: np.ndarray, most: int, generator: torch.Generator) -> int:
        """Hide one more block of at most `most` new patches; return their number, 0 where none was found."""
        rows, columns = self.grid
        low, high = (math.log(aspect) for aspect in ASPECTS)
        for area, aspect, down, right in torch.rand(TRIES, 4, generator=generator).tolist():
            area = self.smallest + (most - self.smallest) * area
            aspect = math.exp(low + (high - low) * aspect)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < rows and 0 < width < columns):
                continue
            top, left = int(down * (rows - height + 1)), int(right * (columns - width + 1))
            block = mask[top : top + height, left : left + width]
            new = height * width - int(block.sum())
            if 0 < new <= most:
                block[:] = 1
                return new
        return 0


class BlockMaskedViT(ReplacedViT):
    """Hide rectangles of patches.

    Masks are drawn by `BlockMask` and given as noise of 0 and 1. Uniform noise is accepted too, where a caller has no
    mask: it hides patches with noise above 1 - mask_ratio, one by one.

    The number of hidden patches varies between images. The loss is the mean over all hidden patches of a batch on all
    ranks, not the mean over images. With gradient accumulation it is the mean of the means of the micro-batches.
    """

    options: BlockMaskOptions
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    smallest_share: ClassVar[float]
    """Smallest drawn area of a block, as a share of the patches to hide."""

    @property
    def num_hidden(self) -> int:
        """Largest number of hidden patches."""
        return self._num_hidden(self.grid)

    def _num_hidden(self, grid: tuple[int, int]) -> int:
        return round(self.mask_ratio * grid[0] * grid[1])

    def check_grid(self, grid: tuple[int, int]) -> None:
        L, hidden = grid[0] * grid[1], self._num_hidden(grid)
        if not 0 < hidden < L:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides {hidden} of {L} patches: some must be hidden and some not"
            )
        if self.options.min_block > hidden:
            raise ValueError(f"min_block is {self.options.min_block} patches, and {hidden} of {L} are hidden in all")

    @property
    def draw_noise(self) -> Callable[[torch.Generator], Tensor]:
        smallest = self.options.min_block or max(1, int(self.num_hidden * self.smallest_share + 1e-9))
        return BlockMask(self.grid, self.num_hidden, smallest, self.noise_rows)

    def _complete(self, noise: Tensor | None, images: Tensor) -> Tensor:
        if noise is None:
            draw = self.draw_noise
            noise = torch.stack([draw(torch.default_generator) for _ in images])
        return super()._complete(noise, images)

    def draw_mask(self, noise: Tensor) -> Tensor:
        ids = self.predicted(noise)
        return torch.zeros_like(noise).scatter(1, ids, (noise.gather(1, ids) > 1 - self.mask_ratio).to(noise.dtype))

    def predicted(self, mask: Tensor) -> Tensor:
        """Return the patches `[N, Q]` of the largest values, hidden ones first; Q is the largest number of them."""
        return mask.argsort(dim=1, descending=True, stable=True)[:, : self.num_hidden]

    def mean_over_hidden(self, error: Tensor, mask: Tensor) -> Tensor:
        """Average an error over the hidden patches of all images of all ranks; both are `[N, L]`."""
        hidden = mean_over_ranks(mask.sum()).clamp(min=1)
        return (error * mask).sum() / hidden

    def target_loss(self, view: View) -> Tensor:
        """Return the mean error over the hidden patches of all images of all ranks."""
        with without_autocast(view.pred):
            return self.mean_over_hidden(self.target.error(view.pred, self.target(view.images)), view.mask)
