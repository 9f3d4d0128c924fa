"""The encoder: sizes, patch grids, fixed positions, MAE's initial weights, weights of other models.

All imports from timm (pinned: 1.0.31) are in this file: `VisionTransformer`, its `PatchEmbed`, `Block` and `Mlp`,
`build_sincos2d_pos_embed` for the position tables, `resample_abs_pos_embed` for other image sizes, `adapt_input_conv`
for other channels. An encoder is timm's own class, so its state has timm's names, which are MAE's.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp as Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import Block as Block
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from options.crop import Crop
from options.schema import Options

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
INPUT_SIZE = 224

Normalization = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel."""


def attention_heads(
    options: Mapping[str, Any],
    embed_dim: int,
    given: int = 0,
    *,
    option: str = "num_heads",
    file: str = "the checkpoint",
) -> int:
    """Return the attention heads of a checkpoint's encoder, which its weights do not determine.

    Args:
        options: of the run that wrote the checkpoint; {} for the weights of another project.
        embed_dim: channels of the encoder.
        given: the number in the user's options; 0: none.
        option: the option of `given`, for messages.
        file: the checkpoint, for messages.

    Returns:
        The heads of the run; else `given`; else those of all known encoders of that width, which is logged.

    Raises:
        ValueError: If the number is not known, is not the given one, or does not divide the channels.
    """
    if "model" in options:
        heads = options.get("num_heads") or SIZES[parse_name(options["model"])[0]].num_heads
        if given not in (0, heads):
            raise ValueError(f"{option}: {file} was trained with {heads} attention heads, not with {given}")
        return heads
    usual = {size.embed_dim: size.num_heads for size in SIZES.values() if size.embed_dim not in ONE_WIDTH_TWO_HEADS}
    heads = given or usual.get(embed_dim, 0)
    if not heads:
        known = f": {ONE_WIDTH_TWO_HEADS[embed_dim]}" if embed_dim in ONE_WIDTH_TWO_HEADS else ""
        raise ValueError(
            f"{option}: weights do not show the number of attention heads, and {file} does not contain it "
            f"for its width {embed_dim}{known}. Give --{option}; a wrong number gives wrong features without an error"
        )
    if heads < 1 or embed_dim % heads:
        raise ValueError(f"{option}: {heads} heads cannot share {embed_dim} channels")
    if not given:
        log.info("%s: %d attention heads, as every ViT of %d channels in the MAE family has", file, heads, embed_dim)
    return heads


def parse_name(model: str) -> tuple[str, int]:
    """Return the size and the patch size in pixels of `mae_vit_<size>_patch<pixels>`; raise ValueError otherwise."""
    match = re.fullmatch(r"mae_vit_([a-z]+)_patch([1-9][0-9]*)", model)
    if match is None or match[1] not in SIZES:
        raise ValueError(f"unknown model {model!r}: a model is mae_vit_<{'|'.join(SIZES)}>_patch<pixels>")
    return match[1], int(match[2])


def encoder_sizes(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Pretrainer` for a model's name; sizes in `overrides` that are not 0 replace its own."""
    size, patch_size = parse_name(model)
    encoder = SIZES[size]
    stem = overrides.get("patch_stem") or "linear"
    if stem not in PATCH_STEMS:
        raise ValueError(f"unknown patch_stem {stem!r}: it is {' or '.join(PATCH_STEMS)}")
    return {
        "img_size": _height_and_width(overrides.get("input_size") or INPUT_SIZE),
        "patch_size": patch_size,
        "in_chans": overrides.get("in_chans") or 3,
        "embed_dim": overrides.get("embed_dim") or encoder.embed_dim,
        "depth": overrides.get("depth") or encoder.depth,
        "num_heads": overrides.get("num_heads") or encoder.num_heads,
        "mlp_ratio": overrides.get("mlp_ratio") or 4.0,
        "embed_layer": PATCH_STEMS[stem],
        "size": size,
    }


def _height_and_width(input_size: int | Iterable[int]) -> tuple[int, int]:
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sides) != 2:
        raise ValueError(f"input_size is {list(sides)}; it is one side in pixels, or height and width")
    return sides


def patch_grid(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image.

    Args:
        img_size: Pixels of one side, or (height, width).
        patch_size: Side of a square patch in pixels.

    Raises:
        ValueError: The image size is not a multiple of the patch size.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width, patch_size) < 1:
        raise ValueError(f"images of {height} x {width} pixels in patches of {patch_size}: sizes must be positive")
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} x {patch_size} pixels do not fill images of {height} x {width}")
    return height // patch_size, width // patch_size


def position_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Return MAE's fixed sine-cosine position embeddings.

    A patch has sin and cos of its column, then sin and cos of its row, at frequencies 10000^(-i / (dim / 4)). timm
    has the row first, so the halves are exchanged.

    Returns:
        `[1, 1 + L, dim]`: zeros for the class token, then the patches row by row.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a multiple of 4 channels, not {dim}")
    of_row, of_column = build_sincos2d_pos_embed(list(grid), dim, interleave_sin_cos=True).chunk(2, dim=1)
    return torch.cat([torch.zeros(1, dim), torch.cat([of_column, of_row], dim=1)])[None]


class ConvStem(nn.Sequential):
    """Embed each patch by convolutions that read no other patch, so that hidden patches do not leak into visible ones.

    Two 3 x 3 convolutions of D / 4 channels, each followed by a group norm of one group and GELU, then a convolution
    over all that is left. Patches are padded with zeros, and the norm is over a single patch. The stride is 2 while the
    side is more than 4 pixels, so that up to 16 x 16 pixels a patch costs about as much as in one block of the encoder.

    Source: convolutions with norms in place of one linear layer as in Xiao et al., "Early Convolutions Help
    Transformers See Better", NeurIPS 2021, whose convolutions overlap.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        layers: list[nn.Module] = []
        width, channels, side = embed_dim // 4, in_chans, patch_size
        for _ in range(2):
            stride = 2 if side > 4 else 1
            layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.GroupNorm(1, width), nn.GELU()]
            channels, side = width, math.ceil(side / stride)
        super().__init__(*layers, nn.Conv2d(width, embed_dim, side))
        self.patch_size, self.in_channels = patch_size, in_chans

    def forward(self, images: Tensor) -> Tensor:
        """Embed `[N, C, H, W]`; return `[N, D, rows, columns]` of patches."""
        (N, C, H, W), side = images.shape, self.patch_size
        cut = images.reshape(N, C, H // side, side, W // side, side)
        tokens = super().forward(cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, C, side, side))
        return tokens.reshape(N, H // side, W // side, -1).permute(0, 3, 1, 2)


class ConvPatchEmbed(PatchEmbed):
    """timm's patch embedding with a `ConvStem` in place of the linear layer."""

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int, **more: Any) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **more)
        self.proj = ConvStem(patch_size, in_chans, embed_dim)  # type: ignore[assignment]


PATCH_STEMS: dict[str, type[PatchEmbed]] = {"linear": PatchEmbed, "conv": ConvPatchEmbed}
FIRST_LAYERS = {"linear": "patch_embed.proj.weight", "conv": "patch_embed.proj.0.weight"}  # `[channels, C, ., .]`


def read_patch_stem(weights: Container[str]) -> str:
    """Return the patch stem of weights, a key of `PATCH_STEMS`."""
    return "conv" if FIRST_LAYERS["conv"] in weights else "linear"


def read_depth(names: Iterable[str], prefix: str = "blocks.") -> int:
    """Return the number of blocks of an encoder, from the names of its weights; 0 without any."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith(prefix)), default=-1)


def averages_before_norm(weights: Container[str]) -> bool:
    """Return whether the last norm of a classifier comes after the average of its tokens, which have none then."""
    return "fc_norm.weight" in weights and "norm.weight" not in weights


def read_patch_size(weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> int:
    """Return the side of a patch in pixels.

    Args:
        weights: Those of an encoder.
        made_with: Options of the run that wrote them, which the patch size of a convolutional stem is read from.

    Raises:
        ValueError: The options do not contain the model.
    """
    if read_patch_stem(weights) == "linear":
        return weights[FIRST_LAYERS["linear"]].shape[-1]
    if "model" not in made_with:
        raise ValueError(
            "weights with a convolutional patch stem do not contain the patch size, which is read from the options "
            "beside them: use the checkpoint that the run wrote"
        )
    return parse_name(made_with["model"])[1]


def set_drop_path(blocks: nn.Sequential, rate: float, *, uniform: bool = False) -> None:
    """Set stochastic depth: `rate` in all blocks if `uniform`, else from 0 in the first to `rate` in the last."""
    for number, block in enumerate(blocks):
        own = rate if uniform else rate * number / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = (DropPath(own) if own else nn.Identity() for _ in range(2))


def initialize(module: nn.Module) -> None:
    """Set MAE's initial weights of one module; the patch convolution is initialised as a linear layer."""
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
    """Report of `load_matching`, by parameter name."""

    loaded: list[str]
    resampled: list[str]
    """Loaded position tables of another grid."""
    missing: list[str]
    """Parameters of the model that are not in the weights."""
    unused: list[str]
    """Weights that are not in the model."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resampled:
            parts.append(f"resampled to this model's grid: {', '.join(self.resampled)}")
        if self.missing:
            parts.append(f"not in the weights, unchanged: {_grouped(self.missing)}")
        if self.unused:
            parts.append(f"not in the model, ignored: {_grouped(self.unused)}")
        return "; ".join(parts)


def _grouped(names: list[str]) -> str:
    """Abbreviate parameter names: `decoder_blocks.* (96), mask_token`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return ", ".join(f"{top}.* ({len(full)})" if len(full) > 1 else full[0] for top, full in groups.items())


PLAIN_TENSORS = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(\d\.)?(weight|bias)|(norm|fc_norm)\.(weight|bias)"
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
    """Raise ValueError if weights are those of an encoder with parts that a plain vision transformer lacks.

    Loading only the known tensors would silently give a network that computes something else. Every program and tool
    that reads an encoder calls this function.

    Args:
        weights: Names of the tensors.
        own: Names that the model has, which are accepted.
        where: Description of the weights in the error message, for example their file.

    Raises:
        ValueError: names the tensors and the architecture that probably has them.
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
            f"project trains and reads. They also contain {'; '.join(parts)}. Without these tensors the encoder would "
            "compute something else: use a checkpoint without them"
        )


def _other_names(weights: Iterable[str]) -> str:
    """Return advice for weights with the names of another program, or "" if the names are not the problem."""
    for name in weights:
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return ". These are names of Hugging Face transformers: convert the weights to timm's names first"
        if name.endswith(".patch_embed.proj.weight"):
            prefix = name.removesuffix("patch_embed.proj.weight")
            return f". The encoder's names start with {prefix!r}: save its tensors without this prefix"
    return ""


def _across_blocks(names: list[str]) -> str:
    """Abbreviate the names of tensors of all blocks: `blocks.*.ls1.gamma (12), reg_token`."""
    counts = Counter(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names)
    listed = [f"{name} ({count})" if name.startswith("blocks.*") else name for name, count in counts.items()]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def load_matching(
    model: VisionTransformer, weights: Mapping[str, Tensor], *, grid: tuple[int, int] | None = None
) -> LoadReport:
    """Copy into `model` the weights whose names it has: those of an MAE, of an encoder, or of a timm classifier.

    Position tables of another image size are resampled as in MAE.

    Args:
        model: The model, which is changed.
        weights: Tensors by name.
        grid: Rows and columns of patches that the weights were trained with. None: the model's grid if the number of
            patches is the same, otherwise a square.

    Returns:
        What was loaded, resampled, missing and ignored.

    Raises:
        ValueError: A tensor has another shape, a part of the encoder is missing, or the patch stem is another one.
    """
    own = model.state_dict()
    require_plain_encoder(weights, own)
    if FIRST_LAYERS[theirs := read_patch_stem(weights)] in weights and theirs != read_patch_stem(own):
        raise ValueError(
            f"these weights are of an encoder with patch_stem {theirs}, the model has {read_patch_stem(own)}: give "
            f"--patch_stem {theirs}"
        )
    missing = [name for name in own if name not in weights]
    gaps = [name for name in missing if name.startswith(("patch_embed.", "blocks.", "cls_token", "pos_embed"))]
    if gaps:
        raise ValueError(
            f"these weights contain no encoder for this model: {_across_blocks(gaps)} missing; "
            f"found {_grouped(list(weights))}{_other_names(weights)}"
        )
    fitting, resampled, wrong = {}, [], []
    for name in own.keys() - missing:
        tensor = weights[name]
        if name.endswith("pos_embed") and tensor.shape[::2] == own[name].shape[::2]:
            prefix = model.num_prefix_tokens if name == "pos_embed" else 1
            tensor = _resampled(name, tensor, grid, model.patch_embed.grid_size, prefix)
            if tensor is not weights[name]:
                resampled.append(name)
        if tensor.shape != own[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)} in the weights and {tuple(own[name].shape)} in the model")
        fitting[name] = tensor
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"these weights have other sizes: {'; '.join(sorted(wrong)[:3])}{more}")
    model.load_state_dict(fitting, strict=False)
    unused = [name for name in weights if name not in own]
    return LoadReport([name for name in own if name in fitting], sorted(resampled), missing, unused)


def load_from_run(model: VisionTransformer, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> LoadReport:
    """Load weights with `load_matching`, after checking them against the options of the run that wrote them.

    Args:
        model: The model, which is changed.
        weights: Tensors by name.
        made_with: Options of that run; {} for the weights of another project, for which a warning is logged if the
            number of attention heads is unknown.

    Raises:
        ValueError: as `load_matching`, and if the encoder of the weights has more blocks or another number of heads,
            which the shapes of the weights do not show.
    """
    theirs, depth = read_depth(weights), len(model.blocks)
    if theirs > depth:
        raise ValueError(f"these weights are of an encoder with {theirs} blocks, the model has {depth}")
    if not made_with:
        if model.embed_dim in ONE_WIDTH_TWO_HEADS:
            log.warning(
                "the number of attention heads cannot be read from weights: the model has %d, and encoders of %d "
                "channels have %s. A wrong number gives wrong features; --num_heads sets it",
                *(model.blocks[0].attn.num_heads, model.embed_dim, ONE_WIDTH_TWO_HEADS[model.embed_dim]),  # type: ignore[union-attr]
            )
        return load_matching(model, weights)
    _, patch_size = parse_name(made_with["model"])
    heads, theirs = model.blocks[0].attn.num_heads, attention_heads(made_with, model.embed_dim)  # type: ignore[union-attr]
    if theirs != heads:
        raise ValueError(f"these weights are of an encoder with {theirs} attention heads, the model has {heads}")
    rows, columns = made_with["input_size"]
    return load_matching(model, weights, grid=patch_grid((rows, columns), patch_size))


def for_channels(weights: Mapping[str, Tensor], in_chans: int) -> Mapping[str, Tensor]:
    """Convert weights to another number of input channels, and log it.

    As in timm: for one channel the weights of the first layer are summed, so that its output for a grey image is that
    for three equal channels; for other numbers they are repeated in turn, and scaled to outputs of the same size.
    """
    name = FIRST_LAYERS[read_patch_stem(weights)]
    if name not in weights or weights[name].ndim != 4 or (theirs := weights[name].shape[1]) == in_chans:
        return weights
    how = "summed over them" if in_chans == 1 else f"repeated in turn and multiplied by {theirs}/{in_chans}"
    log.info("in_chans %d: the first layer's weights are for %d channels and are %s", in_chans, theirs, how)
    return {**weights, name: adapt_input_conv(in_chans, weights[name], base_chans=theirs)}


def _resampled(
    name: str, table: Tensor, old_grid: tuple[int, int] | None, new_grid: tuple[int, int], prefix: int
) -> Tensor:
    """Resample a position table `[1, prefix + patches, dim]` to a new grid; return it unchanged for the same grid."""
    patches = table.shape[1] - prefix
    if old_grid is None:
        side = math.isqrt(patches)
        old_grid = new_grid if patches == math.prod(new_grid) else (side, side)
    if math.prod(old_grid) != patches:
        raise ValueError(
            f"{name} has {patches} positions, which do not form a grid of {old_grid[0]} x {old_grid[1]} patches"
        )
    if old_grid == new_grid:
        return table
    return resample_abs_pos_embed(
        table.float(), list(new_grid), list(old_grid), num_prefix_tokens=prefix, antialias=False
    )


# ---- helpers of every method ----------------------------------------------------------------------------------------

ENCODER_INPUT = -1  # in `taps`: the input of the first block

Reader = Callable[[str], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""Function from the path of a checkpoint to its weights by name and the options of its run (empty for checkpoints of
other projects)."""


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Gather the rows `ids` `[N, V]` of `x` `[N, L, D]`; return `[N, V, D]`."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def renormalization(own: Normalization, other: Normalization) -> tuple[Tensor, Tensor]:
    """Return `scale` and `shift`, `[channels, 1, 1]`, that change the normalisation of images: x * scale + shift.

    Args:
        own: Mean and standard deviation per channel with which the images are normalised.
        other: Mean and standard deviation to change to. Either may have a single value for all channels.
    """
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pair] for pair in (own, other)
    )
    return (std / other_std).float(), ((mean - other_mean) / other_std).float()


def prepare_images(
    images: Tensor, channels: int, scale: Tensor | None, shift: Tensor | None, size: Sequence[int]
) -> Tensor:
    """Convert images `[N, C, H, W]` to the channels (grey ones only), normalisation and size of another network.

    `scale` and `shift` are those of `renormalization`; None: the images have its normalisation.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, channels, -1, -1)
    if scale is not None and shift is not None:
        images = images * scale.to(images.dtype) + shift.to(images.dtype)
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(at_least_float32(images), tuple(size), mode="bicubic", antialias=True)
    return images


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave float32 and float64 unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context without automatic mixed precision on the device of `x`."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def compute_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, shapes and float32 values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().to("cpu", torch.float32).contiguous()
        found.update(f"{name} {list(values.shape)}\n".encode())
        found.update(values.numpy().tobytes())
    return found.hexdigest()


def cosine_between(start: float, end: float, fraction: float) -> float:
    """Return the value at `fraction` (0 to 1) of half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def plain_encoder(model: "Pretrainer") -> VisionTransformer:
    """Create an encoder of the same sizes without a method, for example for an EMA teacher. Weights are not copied."""
    return VisionTransformer(
        img_size=model.input_size,
        patch_size=model.patch_size,
        in_chans=model.in_chans,
        num_classes=0,
        global_pool="token",
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,  # type: ignore[arg-type, union-attr]
        mlp_ratio=model.mlp_ratio,
        embed_layer=type(model.patch_embed),
        weight_init="skip",
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


@torch.no_grad()
def copy_into(average: nn.Module, model: nn.Module) -> None:
    """Copy into `average` the parameters and buffers that `model` has under the same names."""
    own = model.state_dict()
    for name, value in average.state_dict().items():
        value.copy_(own[name])


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, keep: float, taken: Tensor) -> None:
    """Update an exponential moving average of parameters: average = keep x average + (1 - keep) x model.

    Args:
        average: Its parameters have the names of those of `model`; its buffers are not changed.
        model: The current model.
        keep: Decay, between 0 and 1.
        taken: 0-d bool on the device; if it is False, the average is not changed.
    """
    own = dict(model.named_parameters())
    averages, current = zip(*((p.data, own[name].data) for name, p in average.named_parameters()), strict=True)
    step = torch._foreach_sub(current, averages)
    torch._foreach_mul_(step, torch.where(taken, 1 - keep, 0.0).to(averages[0]))
    torch._foreach_add_(averages, step)


class FrozenNetwork(nn.Module):
    """Container of a network that is used in training but not trained, such as a teacher or a tokenizer.

    The network moves with `.to()`, is in evaluation mode, has no gradients and is not part of the state_dict, so
    checkpoints do not contain it. Store the digest of its weights (`compute_digest`) in the options, so that a run is
    not resumed with another network.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self._held: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not a submodule
        if network is not None:
            self.hold(network)

    def hold(self, network: nn.Module) -> None:
        """Freeze `network` and keep it in place of any earlier one."""
        self._held = (network.requires_grad_(False).eval(),)

    @property
    def network(self) -> Any:
        """The network; None where there is none, as in a model that is loaded without what only training needs."""
        return self._held[0] if self._held else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for network in self._held:
            network._apply(fn)
        return super()._apply(fn, recurse)


# ---- the base of every method ---------------------------------------------------------------------------------------


class Progress(Protocol):
    """Progress of the training, the argument of `before_step` and `adjust_gradients`."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def total_steps(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""

    @property
    def fraction(self) -> float:
        """Share of the training that is done, from 0 to 1."""

    @property
    def epoch(self) -> float:
        """Epochs done, fractional."""


class Pretrainer(VisionTransformer):
    """A ViT encoder that computes its own pretraining loss from a batch: the base of every method.

    A method overrides `forward` and, as needed, the hooks below. The engine only uses `loss`. Everything that a method
    changes outside the optimizer (an EMA teacher, a centre) is a parameter or a buffer, so that a run resumes exactly.

    Args:
        img_size: Pixels of one side, or (height, width).
        patch_size: Side of a square patch in pixels.
        in_chans: Channels of the images.
        embed_dim: Channels of the encoder (D).
        depth: Blocks of the encoder.
        num_heads: Attention heads of the encoder.
        mlp_ratio: Width of a block's MLP over `embed_dim`.
        embed_layer: Class of the patch embedding, a value of `PATCH_STEMS`.
        options: An instance of the class's `Options`; None for the defaults.
        size: The model's size, a key of `SIZES`, which decides further default sizes.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    Options: ClassVar[type] = Options
    """Frozen dataclass of the method's options, declared in options/."""

    helpers: Mapping[str, Mapping[str, Any]] = {}
    """Frozen networks that were read from runs: options of the run by path. A network that was trained with another
    normalisation of the images is refused."""

    takes_terms: ClassVar[bool] = False
    """Whether loss terms can be added."""
    takes_conv_stem: ClassVar[bool] = True
    """Whether patches can be embedded by a `ConvStem`."""
    feature_pool: ClassVar[Literal["avg", "token"]] = "avg"
    """Features of an image: `avg`, the average of the patch tokens after the last norm; `token`, the class token."""
    encoder_prefix: ClassVar[str] = ""
    """Prefix in the state_dict of the encoder that is evaluated and exported: `teacher.` if it is a moving average."""
    images_together: Literal["", "ranks"] = ""
    """Which images the loss compares with each other: none, or those of a forward pass on all processes."""
    decays_vectors: ClassVar[bool] = False
    """Whether weight decay applies to every parameter, biases and norms included."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    """Coefficients of AdamW's moving averages."""

    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    noise_rows: int = 0
    """R: rows of random numbers that each sample needs, one number per patch."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        *,
        embed_layer: type[PatchEmbed] = PatchEmbed,
        options: Any = None,
        size: str = "tiny",
    ) -> None:
        patch_grid(img_size, patch_size)
        require_sizes("encoder", embed_dim, depth, num_heads)
        if in_chans < 1:
            raise ValueError(f"images have at least one channel, not {in_chans}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="token",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            embed_layer=embed_layer,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.options = self.Options() if options is None else options
        self.patch_size, self.mlp_ratio, self.size = patch_size, mlp_ratio, size

    # ---- sizes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.patch_embed.img_size

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size: positions are resampled as timm resamples them, unless a method computes its own.

        Raises:
            ValueError: If the patch size changes, or the patches do not fill the images.
        """
        if patch_size not in (None, self.patch_size, (self.patch_size, self.patch_size)):
            raise ValueError(
                f"this model is for patches of {self.patch_size} pixels: build a model for patches of {patch_size}"
            )
        if img_size is None:
            return
        before = self.grid
        self.check_grid(patch_grid(img_size, self.patch_size))
        super().set_input_size((img_size, img_size) if isinstance(img_size, int) else img_size)
        self.resized(before)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError where the method does not work with these rows and columns of patches."""

    def resized(self, before: tuple[int, int]) -> None:
        """Adapt what the method adds to the encoder to another image size; `before` is the previous grid."""

    def no_weight_decay(self) -> set[str]:
        """Return the names of matrices that are not decayed: none, as in MAE. Vectors and biases never are."""
        return set()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Raise: a pretraining model has no classifier."""
        raise ValueError(
            "a pretraining model returns losses and has no classifier: create a timm VisionTransformer of the same "
            "sizes with num_classes, and load the encoder's part of this model's state_dict into it"
        )

    # ---- hooks

    def views(self, min_scale: float, hflip: float) -> tuple[Crop, ...]:
        """Return the crops that a sample consists of; `min_scale` and `hflip` are options of the run."""
        return (Crop(self.input_size, (min_scale, 1.0), hflip=hflip),)

    @property
    def draw_noise(self) -> Callable[[torch.Generator], Tensor] | None:
        """Return a picklable function from a CPU generator to a sample's noise `[R, L]`; None: uniform numbers."""
        return None

    def prepare(self, read: Reader, classes: int | None) -> None:
        """Read the checkpoints that training needs, and adapt to the number of classes.

        Called by `methods.build` with `classes` None, and again when the data set is known; the second call must not
        read again. It may replace `self.options` by a completed copy, which the run then stores.
        """

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Store the mean and standard deviation per channel with which the images are normalised."""

    def before_step(self, progress: Progress) -> None:
        """Set values that follow a schedule of the method: momentum, temperature, weight decay."""

    def adjust_gradients(self, progress: Progress) -> None:
        """Change gradients after the backward pass and before their norm is taken."""

    def after_update(self, taken: Tensor) -> None:
        """Update state that follows the weights, such as an EMA teacher, unless the update was refused.

        Args:
            taken: 0-d bool on the model's device, False if the update was refused. Use `torch.where`: reading the
                value would synchronise the device.
        """

    @property
    def main_part(self) -> str:
        """Name of the loss part that `constant_loss` compares with."""
        return "loss"

    @property
    def loss_terms(self) -> dict[str, Any]:
        """The loss terms that were added to the method, by name."""
        return {}

    def pictures(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor] | None:
        """Return pictures `[N, C, H, W]` for `samples/`, by name, or None if the method has none."""
        return None

    def constant_loss(self, images: Tensor) -> float | None:
        """Return the loss of the best prediction that does not depend on the image, or None if it is not defined."""
        return None

    # ---- the encoder

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set MAE's initial weights and fixed positions. Call it after all layers are created.

        The arguments are those of timm and are not used.
        """
        for name in ("pos_embed", "decoder_pos_embed"):
            if hasattr(self, name):
                table = getattr(self, name)
                table.copy_(position_table(self.grid, table.shape[-1]))
                table.requires_grad_(False)
        for name in ("cls_token", "mask_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=0.02)
        self.apply(initialize)

    def _check_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(
                f"images are {str(images.dtype).removeprefix('torch.')}; this model takes normalised floats: "
                "(images / 255 - mean) / std, with the run's mean and std per channel"
            )
        expected = (self.in_chans, *self.input_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {list(images.shape)}; this model takes [images, {', '.join(map(str, expected))}]"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Embed every patch, with its position: `[N, L, D]`."""
        self._check_images(images)
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, images: Tensor) -> Tensor:
        """Return the features of unmasked images: `[N, 1 + L, D]` after the last norm, class token first."""
        self._check_images(images)
        return self.forward_features(images)

    def run_blocks(
        self, blocks: Iterable[nn.Module], x: Tensor, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Apply the blocks to `x`; return the result and the outputs of the blocks in `taps`."""
        seen = {ENCODER_INPUT: x} if ENCODER_INPUT in taps else {}
        for index, block in enumerate(blocks):
            x = self.run_block(block, x)
            if index in taps:
                seen[index] = x
        return x, seen

    def run_block(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """Apply one block, with gradient checkpointing if it is enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def require_sizes(part: str, channels: int, blocks: int, heads: int) -> None:
    """Raise ValueError if a transformer cannot have these sizes."""
    if min(channels, blocks, heads) < 1 or channels % heads or channels % 4:
        raise ValueError(
            f"{part}: {blocks} blocks of {channels} channels in {heads} heads: "
            "each must be positive, and the channels a multiple of the heads and of 4"
        )
