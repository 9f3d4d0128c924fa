"""CrossMAE: decode a part of the hidden patches, each independently, by cross-attention to the visible patches.

Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", 2024. A query is the mask token with the position of a
hidden patch. In each decoder block it attends to the visible patches, not to other queries. Each decoder block has its
own learned weighted sum of the encoder's feature maps: its input and the output of every encoder block.

N images   V visible patches   Q queries   D encoder channels   E decoder channels   B decoder blocks   M feature maps
"""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import (
    ENCODER_INPUT,
    MaskedAutoencoderViT,
    Masking,
    View,
    at_least_float32,
    by_rank,
    take,
    without_autocast,
)
from models_vit import Mlp
from options.mae import CrossMAEOptions

PREDICT_RATIO = 0.25


class CrossAttention(nn.Module):
    """Cross-attention from queries `[N, Q, E]` to a memory `[N, 1 + V, D]`."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q(x), *self.kv(memory).chunk(2, dim=-1))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Cross-attention and MLP, each with pre-norm and a residual connection."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class CrossMAE(MaskedAutoencoderViT):
    """MAE with a cross-attention decoder. `predict_ratio` is the share of all patches that training predicts.

    The encoder's last norm has no weights, because the decoder does not use its output, so they would not be trained.
    `predict` decodes every patch, which is possible because the result of a query does not depend on other queries.
    """

    Options: ClassVar[type] = CrossMAEOptions
    options: CrossMAEOptions

    @property
    def predict_ratio(self) -> float:
        """Share of all patches that training predicts."""
        return self.options.predict_ratio or PREDICT_RATIO

    @property
    def num_predicted(self) -> int:
        """Q in training, rounded as in the release: of 196 patches, 49 at 0.25 and all 147 hidden ones at 0.75."""
        L = self.num_patches
        return L - self.num_visible - int(L * (self.mask_ratio - self.predict_ratio))

    def check_grid(self, grid: tuple[int, int]) -> None:
        super().check_grid(grid)
        L = grid[0] * grid[1]
        hidden = L - int(L * (1 - self.mask_ratio))
        if not 0 < self.predict_ratio <= self.mask_ratio or hidden <= int(L * (self.mask_ratio - self.predict_ratio)):
            raise ValueError(
                f"predict_ratio is the share of the patches that is predicted, at most mask_ratio {self.mask_ratio} "
                f"and at least one of {L} patches, not {self.predict_ratio}"
            )

    def build_decoder(self) -> None:
        """Create the decoder: weighted sums of the encoder's feature maps, and blocks of cross-attention to them."""
        decoder_embed_dim, decoder_depth, decoder_num_heads = self.decoder_sizes()
        D, norm_layer = self.embed_dim, partial(nn.LayerNorm, eps=1e-6)
        self.norm = norm_layer(D, elementwise_affine=False)
        self.decoder_taps = (ENCODER_INPUT, *range(len(self.blocks)))
        self.feature_mix = nn.Linear(len(self.decoder_taps), decoder_depth, bias=False)
        self.feature_norms = nn.ModuleList(norm_layer(D) for _ in range(decoder_depth))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(decoder_embed_dim, D, decoder_num_heads, self.mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.target.width)

    def decode_at(self, ids: Tensor, taps: dict[int, Tensor]) -> Tensor:
        """Decode the patches `ids` `[N, Q]`; return `[N, Q, E]` after the decoder's norm."""
        maps_MNVD = torch.stack([taps[tap] for tap in self.decoder_taps])
        memories = torch.einsum("bm,mnvd->bnvd", self.feature_mix.weight, maps_MNVD)
        x = take((self.mask_token + self.decoder_pos_embed[:, 1:]).expand(len(ids), -1, -1), ids)
        for block, norm, memory in zip(self.decoder_blocks, self.feature_norms, memories.unbind(), strict=True):
            x = self.run_block(block, x, norm(memory))
        return self.decoder_norm(x)

    def predicted(self, ids_restore: Tensor) -> Tensor:
        """Return the hidden patches `[N, Q]` that training predicts: those with the least noise after the visible."""
        return by_rank(ids_restore)[:, self.num_visible :][:, : self.num_predicted]

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """Decode the patches that training predicts; return `[N, Q, E]` after the decoder's norm."""
        return self.decode_at(self.predicted(masking.ids_restore), taps)

    def target_loss(self, view: View) -> Tensor:
        """Return the mean error over the predicted patches of all images."""
        with without_autocast(view.pred):
            target = take(self.target(view.images), self.predicted(view.ids_restore))
            return self.target.error(view.pred, target).mean()

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction `[N, L, P]` of every patch and the mask `[N, L]`; see `MaskedImageModel.predict`."""
        view = self.observe(images, noise=noise)
        everywhere = torch.arange(self.num_patches, device=images.device).expand(len(images), -1)
        return at_least_float32(self.decoder_pred(self.decode_at(everywhere, view.taps))), view.mask
