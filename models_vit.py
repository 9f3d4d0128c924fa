"""The encoder's parts: sizes, patch grids, fixed positions, MAE's initial weights, weights from other models.

Everything the models take from timm (pinned: 1.0.31) is named here: `VisionTransformer`, its `Block` and `Mlp`,
`build_sincos2d_pos_embed` for the position tables, `resample_abs_pos_embed` for other image sizes, `adapt_input_conv`
for other channels. An encoder is timm's own class, so its state has timm's names, which are MAE's.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

__all__ = [
    "SIZES",
    "Block",
    "LoadReport",
    "Mlp",
    "Size",
    "VisionTransformer",
    "adapt_input_conv",
    "for_channels",
    "initialize",
    "load_from_run",
    "load_matching",
    "parse_name",
    "patch_grid",
    "position_table",
    "resample_abs_pos_embed",
]

log = logging.getLogger(__name__)


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
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class LoadReport:
    """What `load_matching` did, by parameter name."""

    loaded: list[str]
    resampled: list[str]
    """Of the loaded, position tables of another grid."""
    missing: list[str]
    """The model's that the weights lack: left as they were."""
    unused: list[str]
    """The weights' that the model lacks."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resampled:
            parts.append(f"resampled to this model's grid: {', '.join(self.resampled)}")
        if self.missing:
            parts.append(f"not among the weights, left as they were: {_grouped(self.missing)}")
        if self.unused:
            parts.append(f"not in the model, ignored: {_grouped(self.unused)}")
        return "; ".join(parts)


def _grouped(names: list[str]) -> str:
    """`decoder_blocks.* (96), mask_token` instead of ninety-seven names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(f"{top}.* ({len(full)})" if len(full) > 1 else full[0] for top, full in groups.items())


def load_matching(
    model: VisionTransformer, weights: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copy into `model` the weights of the names it has: a whole MAE, an encoder, or a classifier of timm's.

    Position tables of another image size are resampled as MAE does. `grid` is the rows and columns of patches that the
    weights were trained with; by default the model's where the number of patches is the same, else a square. ValueError
    where a tensor has another shape or a part of the encoder is missing.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    gaps = [name for name in missing if name.startswith(("patch_embed.", "blocks."))]
    if gaps:
        raise ValueError(
            f"these weights hold no encoder of this model: without {_grouped(gaps)}; found {_grouped(list(weights))}"
        )
    fitting, resampled, wrong = {}, [], []
    for name in own.keys() - missing:
        tensor = weights[name]
        if name.endswith("pos_embed") and tensor.shape[::2] == own[name].shape[::2]:
            tensor = _resampled(name, tensor, grid, model.patch_embed.grid_size)
            if tensor is not weights[name]:
                resampled.append(name)
        if tensor.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} among the weights and {tuple(own[name].shape)} in the model")
        fitting[name] = tensor
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"these weights are of other sizes: {'; '.join(sorted(wrong)[:3])}{more}")
    model.load_state_dict(fitting, strict=False)
    unused = [name for name in weights if name not in own]
    return LoadReport([name for name in own if name in fitting], sorted(resampled), missing, unused)


def load_from_run(model: VisionTransformer, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> LoadReport:
    """`load_matching` for a checkpoint of which the run's options are known; `made_with` is empty where they are not.

    ValueError, too, for an encoder with another number of heads, which no weight's shape would tell.
    """
    if not made_with:
        return load_matching(model, weights)
    size, patch_size = parse_name(made_with["model"])
    heads, theirs = model.blocks[0].attn.num_heads, made_with["num_heads"] or SIZES[size].num_heads  # type: ignore[union-attr]
    if theirs != heads:
        raise ValueError(f"these weights are of an encoder with {theirs} attention heads, the model has {heads}")
    rows, columns = made_with["input_size"]
    return load_matching(model, weights, grid=patch_grid((rows, columns), patch_size))


def for_channels(weights: Mapping[str, Tensor], in_chans: int) -> Mapping[str, Tensor]:
    """The weights for images of so many channels, with a line in the log where they were for another number of them.

    As timm does it: for one channel the first layer's are summed, so that it answers a grey image as it did the same
    image in every channel; for other numbers they are taken in turn, and scaled to answers of the same size.
    """
    name = "patch_embed.proj.weight"
    if name not in weights or weights[name].ndim != 4 or (theirs := weights[name].shape[1]) == in_chans:
        return weights
    how = "summed over them" if in_chans == 1 else f"taken in turn, times {theirs}/{in_chans}"
    log.info("in_chans %d: the first layer's weights are for %d channels and are %s", in_chans, theirs, how)
    return {**weights, name: adapt_input_conv(in_chans, weights[name], base_chans=theirs)}


def _resampled(name: str, table: Tensor, old_grid: tuple[int, int] | None, new_grid: tuple[int, int]) -> Tensor:
    """The position table `[1, 1 + patches, dim]` at the new grid; the table itself where nothing changes."""
    patches = table.shape[1] - 1
    if old_grid is None:
        side = math.isqrt(patches)
        old_grid = new_grid if patches == math.prod(new_grid) else (side, side)
    if math.prod(old_grid) != patches:
        raise ValueError(f"{name} has {patches} positions, which are no grid of {old_grid[0]} x {old_grid[1]} patches")
    if old_grid == new_grid:
        return table
    return resample_abs_pos_embed(table.float(), list(new_grid), list(old_grid), antialias=False)
