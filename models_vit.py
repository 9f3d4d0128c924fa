"""The encoder's parts: sizes, patch grids, fixed positions, MAE's initial weights, weights from other models.

Everything the models take from timm (pinned: 1.0.31) is named here: `VisionTransformer`, its `Block` and `Mlp`,
`build_sincos2d_pos_embed` for the position tables, `resample_abs_pos_embed` for other image sizes, `adapt_input_conv`
for other channels. An encoder is timm's own class, so its state has timm's names, which are MAE's.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
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
    "ONE_WIDTH_TWO_HEADS",
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
    "require_plain_encoder",
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


ONE_WIDTH_TWO_HEADS = {192: "12 in NoR-MAE and MAE-Lite, 3 in DeiT and timm"}


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


PLAIN_TENSORS = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm)\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
)
"""Names of the tensors that an encoder of this project can have."""

OTHER_ARCHITECTURES = {
    r"\.ls[12]\.gamma|\.gamma_?[12]$|lambda1|layer_?scale": "layer scale (init_values in timm; DINOv2, DINOv3, BEiT)",
    r"^(reg_token|register_tokens?|storage_tokens|registers)$": "register tokens (DINOv2 with registers, DINOv3)",
    r"^(dist_token|head_dist)": "a distillation token (DeiT)",
    r"\.(q_norm|k_norm)\.": "normalised queries and keys (qk_norm)",
    r"rope|rotary|freqs|periods": "rotary positions (DINOv3, EVA-02)",
    r"\.mlp\.(w12|w[123]|fc1_[gx]|gate\w*|up_proj|norm)\b": "a gated MLP (SwiGLU; DINOv2 giant, DINOv3, EVA-02)",
    r"relative_position|rel_pos": "relative positions (BEiT, data2vec, SimMIM)",
    r"\.attn\.([qv]_bias|[qkv]_proj|norm)\b": "another attention (BEiT, EVA-02)",
    r"^(norm_pre|ln_pre|pre_layrnorm)|^patch_embed\.norm|\.norm[34]\.": "further norms (CLIP, Swin v2)",
    r"^attn_pool|^latent": "attention pooling (SigLIP)",
    r"^(cls_pos|patch_embed\.(?!proj)|blocks\.\d+\.(?!\d+\.))": "other layers than a plain ViT's",
    r"^blocks\.\d+\.\d+\.": "blocks in chunks (DINOv2's training files) or in stages",
}
"""Patterns of tensor names that no encoder of this project has, and the architecture that they belong to."""


def require_plain_encoder(weights: Iterable[str], own: Container[str] = (), where: str = "these weights") -> None:
    """Refuse the weights of an encoder with parts that a plain vision transformer lacks.

    Loading the rest would give a network that computes something else, without a word. Every program and tool that
    reads an encoder calls this function.

    Args:
        weights: Names of the tensors.
        own: Names that the model has and that are therefore no problem.
        where: How the error message names the weights, for example by their file.

    Raises:
        ValueError: Naming the tensors and the architecture that they look like.
    """
    found: dict[str, list[str]] = {}
    for name in weights:
        if name in own or PLAIN_TENSORS.fullmatch(name) or name.startswith(("decoder", "terms.", "teacher.")):
            continue
        looks_like = next((what for pattern, what in OTHER_ARCHITECTURES.items() if re.search(pattern, name)), None)
        if looks_like:
            found.setdefault(looks_like, []).append(name)
    if found:
        parts = [f"{what}: {_across_blocks(names)}" for what, names in found.items()]
        raise ValueError(
            f"{where} are not those of a plain vision transformer with absolute positions, the only encoder that this "
            f"project trains and reads. They also hold {'; '.join(parts)}. Without these tensors the encoder would "
            "compute something else: use a checkpoint without them"
        )


def _other_names(weights: Iterable[str]) -> str:
    """Return what to do with weights whose names are another program's; "" where that is not the problem."""
    for name in weights:
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return ". These are names of Hugging Face transformers: convert the weights to timm's names first"
        if name.endswith(".patch_embed.proj.weight"):
            prefix = name.removesuffix("patch_embed.proj.weight")
            return f". The encoder's names start with {prefix!r}: save its tensors without this prefix"
    return ""


def _across_blocks(names: list[str]) -> str:
    """Return `blocks.*.ls1.gamma (12), reg_token` for the names of a few or many tensors."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    listed = [f"{name} ({count})" if name.startswith("blocks.*") else name for name, count in counts.items()]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def load_matching(
    model: VisionTransformer, weights: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copy into `model` the weights of the names it has: a whole MAE, an encoder, or a classifier of timm's.

    Position tables of another image size are resampled as MAE does. `grid` is the rows and columns of patches that the
    weights were trained with; by default the model's where the number of patches is the same, else a square. ValueError
    where a tensor has another shape or a part of the encoder is missing.
    """
    own = model.state_dict()
    require_plain_encoder(weights, own)
    missing = [name for name in own if name not in weights]
    gaps = [name for name in missing if name.startswith(("patch_embed.", "blocks.", "cls_token", "pos_embed"))]
    if gaps:
        raise ValueError(
            f"these weights hold no encoder of this model: without {_across_blocks(gaps)}; "
            f"found {_grouped(list(weights))}{_other_names(weights)}"
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

    ValueError, too, for an encoder with more blocks, or with another number of heads, which no weight's shape would
    tell. Where nothing is known of the heads of weights whose width does not settle it, a warning says so.
    """
    blocks = {int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)}
    depth = len(model.blocks)
    if blocks and max(blocks) >= depth:
        raise ValueError(f"these weights are of an encoder with {max(blocks) + 1} blocks, the model has {depth}")
    if not made_with:
        if model.embed_dim in ONE_WIDTH_TWO_HEADS:
            log.warning(
                "the number of attention heads cannot be read from weights: the model has %d, and encoders of %d "
                "channels have %s. A wrong number gives wrong features; --num_heads sets it",
                *(model.blocks[0].attn.num_heads, model.embed_dim, ONE_WIDTH_TWO_HEADS[model.embed_dim]),  # type: ignore[union-attr]
            )
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
