"""The training step of the released NoR-MAE, restated in the simplest way: the baseline for our own NoR-MAE step.

Meng et al., "Closest Neighbors are Harmful for Lightweight Masked Auto-encoders", CVPR 2025. It has the
behaviour of the released program, deviations from the paper included: eight neighbours that wrap around the border,
stored as `[N, L, 8, D]`; a selection that gathers along the patches instead of the neighbours; a second pass without
gradient; one P x P matrix per image, from which the off-diagonal sum is computed; an autocast in the model inside that
of the engine; query, key and value indexed from one tensor.

As in the released program, there are only square grids and one relation.

N images   L patches, row-major   V visible patches   D encoder channels   P pixel values of a patch
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from benchmarks.restated_mae import RestatedMAE


class NumberedAttention(Attention):
    """timm's attention, with query, key and value picked out by number: three slices, three padded gradients."""

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        n, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, channels // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(attended.transpose(1, 2).reshape(n, tokens, channels))


class NumberedBlock(Block):
    """timm's block around that attention."""

    def __init__(self, channels: int, heads: int, *rest: Any, **options: Any):
        super().__init__(channels, heads, *rest, **options)
        self.attn = NumberedAttention(channels, num_heads=heads, qkv_bias=True)


def wrapped_neighbors(side: int) -> Tensor:
    """Return the eight neighbours of each patch of a `side` x `side` torus, `[L, 8]`, in ascending order."""
    place = torch.arange(side * side)
    row, column = place // side, place % side
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
    around = [((row + down) % side) * side + (column + right) % side for down, right in steps]
    return torch.stack(around, dim=1).sort(dim=1).values


class RestatedNoRMAE(RestatedMAE):
    """`forward(images, noise)` gives reconstruction + weight x off-diagonal relation, a scalar."""

    block = NumberedBlock

    def __init__(self, *, weight: float = 5e-5, amp: torch.dtype | None = None, **sizes):
        super().__init__(**sizes)
        self.weight, self.amp = weight, amp
        grid = self.patch_embed.grid_size
        if grid[0] != grid[1] or grid[0] < 3:
            raise ValueError(
                f"the restated step needs a square grid of 3 x 3 patches or more, not {grid[0]} x {grid[1]}"
            )
        self.neighbors_L8 = wrapped_neighbors(grid[0])  # on the CPU, as released

    def companions(self, tokens_NLD: Tensor) -> Tensor:
        """Return the released "closest neighbour" tokens `[N, L, D]`."""
        around_NL8D = tokens_NLD[:, self.neighbors_L8]
        own_NL1D = F.normalize(tokens_NLD, dim=-1).unsqueeze(2)
        similarity_NL1K = own_NL1D @ F.normalize(around_NL8D, dim=-1).transpose(2, 3)
        slot_NL1 = similarity_NL1K.squeeze(2).argmax(dim=-1, keepdim=True)
        index = slot_NL1.unsqueeze(-1).expand(-1, -1, -1, tokens_NLD.shape[2])
        return torch.gather(around_NL8D, 1, index).squeeze(2)  # dimension 1: patch number `slot`, not neighbour `slot`

    def standardise(self, pred_NLP: Tensor) -> Tensor:
        if not self.norm_pix_loss:
            return pred_NLP
        variance = pred_NLP.var(dim=-1, keepdim=True)
        return (pred_NLP - pred_NLP.mean(dim=-1, keepdim=True)) / torch.sqrt(variance + 1e-6)

    def relation(self, pred_NLP: Tensor, companion_NLP: Tensor) -> Tensor:
        """Return the off-diagonal sum of the mean P x P matrix, by way of one such matrix per image."""
        product_NPP = torch.einsum("nlp,nlq->npq", self.standardise(pred_NLP), self.standardise(companion_NLP))
        matrix_PP = (product_NPP / pred_NLP.shape[1]).mean(dim=0)
        return matrix_PP.sum() - matrix_PP.diagonal().sum()

    def forward(self, images: Tensor, noise_NL: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            keep_NV, restore_NL, mask_NL = self.choose(noise_NL)
            tokens_NLD = self.tokens(images)
            pred_NLP = self.decode(self.encode(tokens_NLD, keep_NV), restore_NL)
            with torch.no_grad():
                latent = self.encode(self.companions(tokens_NLD), keep_NV)
                companion_NLP = self.decode(latent, restore_NL)
            loss = self.reconstruction(images, pred_NLP, mask_NL)
            return loss + self.weight * self.relation(pred_NLP, companion_NLP)
