"""SimMIM: the encoder gets the whole image with blanks in it, and one linear layer says what they hide.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022. Cells of several patches are replaced by
a learned token before positions are added; the encoder sees all places. There is no decoder: a linear layer predicts
each patch's raw pixels, and the mean absolute difference over hidden ones is the loss.

The encoder is that of the other methods, fixed positions and all, so that their features compare and one program
fine-tunes them. The release has another: no absolute positions, a relative position bias that its blocks share, layer
scale, drop path.

Methods of this kind differ in what they hide and what they predict: a subclass overrides `hide`, and `target_values`,
`target` and `patch_error`.

N images   L patches, row by row   D encoder channels   P values predicted of a patch
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT, View, at_least_float32, without_autocast


class SimMIM(MaskedAutoencoderViT):
    """Replace, encode everything, predict with one layer. `mask_cell` is the side of a hidden cell in pixels; 0: two
    patches, which is the paper's 32 with patches of 16.

    Of all cells, the share `mask_ratio` is hidden, rounded up. Those at the lower and right edge may be cut off.
    """

    choices: ClassVar[tuple[str, ...]] = ("mask_cell",)
    drops_hidden: ClassVar[bool] = False

    def __init__(self, *sizes: Any, mask_cell: int = 0, **more: Any) -> None:
        self.mask_cell = mask_cell
        super().__init__(*sizes, **more)

    @property
    def cell(self) -> int:
        """Side of a cell in patches."""
        return self.mask_cell // self.patch_size or 2

    @property
    def target_values(self) -> int:
        """P."""
        return self.patch_pixels

    def _cells(self, grid: tuple[int, int]) -> tuple[int, int]:
        """How many cells there are, and how many of them are hidden."""
        cells = math.ceil(grid[0] / self.cell) * math.ceil(grid[1] / self.cell)
        return cells, math.ceil(cells * self.mask_ratio)

    def _check_mask(self, grid: tuple[int, int]) -> None:
        if self.mask_cell < 0 or self.mask_cell % self.patch_size:
            raise ValueError(f"mask_cell is {self.mask_cell} pixels, which patches of {self.patch_size} do not fill")
        cells, hidden = self._cells(grid)
        if not 0 < hidden < cells:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} hides {hidden} of the {cells} cells of {self.cell} x {self.cell} "
                f"patches: some must be hidden and some not; a smaller mask_cell makes more of them"
            )

    def build_decoder(self, decoder_embed_dim: int, decoder_depth: int, decoder_num_heads: int) -> None:
        """Create the blank and the layer that predicts; the decoder's sizes mean nothing here."""
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.decoder_pred = nn.Linear(self.embed_dim, self.target_values)

    def hide(self, noise: Tensor) -> Tensor:
        """The mask `[N, L]`, 1 = hidden, from noise `[N, L]`: cells rank by the noise of their first patch."""
        cells, hidden = self._cells(self.grid)
        rows, columns = self.grid
        noise_of_cells = noise.unflatten(1, self.grid)[:, :: self.cell, :: self.cell]
        rank = noise_of_cells.flatten(1).argsort(dim=1, stable=True).argsort(dim=1)
        mask = (rank >= cells - hidden).float().unflatten(1, noise_of_cells.shape[1:])
        mask = mask.repeat_interleave(self.cell, dim=1).repeat_interleave(self.cell, dim=2)
        return mask[:, :rows, :columns].flatten(1)

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Blank, encode and predict. The encoder gets every place, so all ids are kept, in order."""
        tokens = self.embed(images)
        noise = self._complete(noise, images)
        mask = self.hide(noise[:, 0])
        blank = self.mask_token + self.pos_embed[:, 1:]
        latent, taps = self.encode_tokens(torch.where(mask[:, :, None] > 0, blank.to(tokens.dtype), tokens))
        decoded = latent[:, 1:]
        pred = at_least_float32(self.decoder_pred(decoded))
        noise = noise if self.noise_rows > 1 else noise[:, 0]
        ids = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        return View(images, labels, noise, tokens, ids, ids, mask, latent, taps, decoded, pred)

    def patch_error(self, pred: Tensor, target: Tensor) -> Tensor:
        """How far each patch is off, `[N, L]`: its mean absolute difference."""
        return (pred - target).abs().mean(dim=-1)

    def reconstruction_loss(self, view: View) -> Tensor:
        """The mean over images of the mean error over their hidden patches, of which cut-off cells have fewer."""
        with without_autocast(view.pred):
            error_NL = self.patch_error(view.pred, self.target(view.images)) * view.mask
            return (error_NL.sum(dim=1) / view.mask.sum(dim=1)).mean()

    @torch.no_grad()
    def baseline(self, images: Tensor) -> Tensor:
        """The reconstruction loss of the best prediction that does not look at the image: each value's median."""
        target = self.target(images)
        return self.patch_error(target.flatten(0, 1).median(dim=0).values, target).mean()
