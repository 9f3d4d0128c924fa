"""The encoder's parts: sizes, patch grids, fixed sine-cosine positions and MAE's initial weights for timm's ViT.

Everything the models take from timm (pinned: 1.0.31) is named here: `VisionTransformer` and its `Block`,
`build_sincos2d_pos_embed` for the position tables and `resample_abs_pos_embed` for other image sizes. An encoder is
timm's own class, so its state has timm's names, which are MAE's.
"""

import re
from dataclasses import dataclass

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

__all__ = [
    "SIZES",
    "Block",
    "Size",
    "VisionTransformer",
    "initialize",
    "parse_name",
    "patch_grid",
    "position_table",
    "resample_abs_pos_embed",
]


@dataclass(frozen=True)
class Size:
    """An encoder's channels, blocks and heads."""

    embed_dim: int
    depth: int
    num_heads: int


SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 12),  # 12 heads as in NoR-MAE and MAE-Lite; DeiT's tiny has 3
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}


def parse_name(model: str) -> tuple[str, int]:
    """The size and the patch's side in pixels of `mae_vit_<size>_patch<pixels>`; ValueError for any other name."""
    match = re.fullmatch(r"mae_vit_([a-z]+)_patch([1-9][0-9]*)", model)
    if match is None or match[1] not in SIZES:
        raise ValueError(f"unknown model {model!r}: a model is mae_vit_<{'|'.join(SIZES)}>_patch<pixels>")
    return match[1], int(match[2])


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in images of `img_size` pixels, one side or (height, width).

    ValueError where the patches do not fill the image.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width, patch_size) < 1:
        raise ValueError(f"images of {height} x {width} pixels in patches of {patch_size}: sizes must be positive")
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} x {patch_size} pixels do not fill images of {height} x {width}")
    return height // patch_size, width // patch_size


def position_table(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed positions `[1, 1 + patches, dim]`: zeros for the class token, then each patch, row by row.

    A patch has sin and cos of its column, then sin and cos of its row, at frequencies 10000^(-i / (dim / 4)). timm
    stacks the row first, hence the exchange of halves. ValueError unless 4 divides `dim`.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need channels that 4 divides, not {dim}")
    of_row, of_column = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True).chunk(2, dim=1)
    return torch.cat([torch.zeros(1, dim), torch.cat([of_column, of_row], dim=1)])[None]


def initialize(module: nn.Module) -> None:
    """MAE's initial weights for one module: the patch convolution counts as the linear layer that it is."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
