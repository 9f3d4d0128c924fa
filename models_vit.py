"""The encoder's parts: a timm VisionTransformer's sizes, fixed sine-cosine positions, MAE's initialisation, and loading at another size.

Everything the models take from timm (pinned: 1.0.31) is named here: `VisionTransformer` and its `Block`, `build_sincos2d_pos_embed` for the
position tables and `resample_abs_pos_embed` for other image sizes. Being timm's own class, an encoder carries timm's parameter names.

L patches, row-major   D channels
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

__all__ = [
    "SIZES",
    "Block",
    "LoadReport",
    "Size",
    "VisionTransformer",
    "initialize",
    "load_matching",
    "parse_name",
    "patch_grid",
    "position_table",
    "resample_abs_pos_embed",
]


@dataclass(frozen=True)
class Size:
    """An encoder's width, depth and heads."""

    embed_dim: int
    depth: int
    num_heads: int


SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 12),  # 12 heads of 16 channels as NoR-MAE and MAE-Lite; DeiT's tiny has 3
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
}

POSITION_TABLES = ("pos_embed", "decoder_pos_embed")


def parse_name(model: str) -> tuple[str, int]:
    """The size's name and the patch size in pixels that `mae_vit_<size>_patch<pixels>` asks for; ValueError for anything else."""
    match = re.fullmatch(r"mae_vit_([a-z]+)_patch([1-9][0-9]*)", model)
    if match is None or match[1] not in SIZES:
        raise ValueError(f"unknown model {model!r}: expected mae_vit_<{'|'.join(SIZES)}>_patch<pixels>, as in mae_vit_tiny_patch16")
    return match[1], int(match[2])


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of `img_size` pixels (one side, or height and width); ValueError where they do not fit."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width, patch_size) < 1:
        raise ValueError(f"an image of {height} x {width} pixels in patches of {patch_size}: sizes must be positive")
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} pixels cannot be cut into patches of {patch_size}: {patch_size} must divide both sides")
    return height // patch_size, width // patch_size


def position_table(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed positions `[1, 1 + L, dim]`: a row of zeros for the class token, then sin and cos of the column, sin and cos of the row.

    The frequencies are 10000^(-i / (dim / 4)). timm stacks the row first, hence the exchange of halves. ValueError unless 4 divides `dim`.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, not {dim}")
    by_row, by_column = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True).chunk(2, dim=1)
    return torch.cat([torch.zeros(1, dim), torch.cat([by_column, by_row], dim=1)])[None]


def initialize(module: nn.Module) -> None:
    """MAE's initial weights for one module: Xavier for linear layers, the patch convolution as the linear layer that it is, norms at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class LoadReport:
    """What `load_matching` did, by parameter name."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    """Those of the loaded that are position tables of another grid, interpolated to the model's."""
    missing: list[str] = field(default_factory=list)
    """The model's, absent from the weights: they keep their initial values."""
    unused: list[str] = field(default_factory=list)
    """The weights', unknown to the model."""

    def __str__(self) -> str:
        def some(names: list[str]) -> str:
            return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

        parts = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("resized", self.resized), ("not in the file", self.missing), ("not in the model", self.unused)):
            if names:
                parts.append(f"{len(names)} {what} ({some(names)})")
        return "; ".join(parts)


def load_matching(model: VisionTransformer, weights: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None) -> LoadReport:
    """Copy into `model` the weights whose names it has; position tables of another image size are interpolated as MAE does.

    `grid` is the rows and columns of patches the weights were trained with (default: the model's where the number of patches is equal, else a
    square). ValueError where a shape does not fit or not one name is known: such a file belongs to another model.
    """
    own = model.state_dict()
    ready, resized = {}, []
    for name in own.keys() & weights.keys():
        tensor = weights[name]
        if name in POSITION_TABLES and tensor.shape[-1:] == own[name].shape[-1:]:
            fitted = _fit_positions(name, tensor, grid, model.patch_embed.grid_size)
            if fitted is not tensor:
                resized.append(name)
            tensor = fitted
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} in the model: "
                "size, patch size, channels and decoder must be the same"
            )
        ready[name] = tensor
    if not ready:
        raise ValueError(f"none of the {len(weights)} names is this model's; the first are {', '.join(list(weights)[:4])}")
    model.load_state_dict(ready, strict=False)
    return LoadReport(
        loaded=[name for name in own if name in ready],
        resized=sorted(resized),
        missing=[name for name in own if name not in weights],
        unused=[name for name in weights if name not in own],
    )


def _fit_positions(name: str, table: Tensor, old_grid: tuple[int, int] | None, new_grid: tuple[int, int]) -> Tensor:
    """The table itself, or its bicubic interpolation without antialiasing to `new_grid`, the class token's row apart."""
    patches = table.shape[1] - 1
    if old_grid is None:
        side = math.isqrt(patches)
        old_grid = new_grid if patches == new_grid[0] * new_grid[1] else (side, side)
    if old_grid[0] * old_grid[1] != patches:
        raise ValueError(f"{name} holds {patches} positions, which is no grid of {old_grid[0]} x {old_grid[1]}: say which grid it was trained with")
    if old_grid == new_grid:
        return table
    return resample_abs_pos_embed(table, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=1, antialias=False)
