"""UPerNet on a plain vision transformer, for semantic segmentation.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018: pyramid pooling on the deepest of four
maps, a feature pyramid from there to the finest, and one classifier on all four together. A plain ViT has one
resolution, so the outputs of four blocks are brought to four scales first, as BEiT and MAE do it; an auxiliary head
helps to train. The encoder is timm's with MAE's names, so that any checkpoint of the family fits; it gains no relative
positions and no layer scale, which BEiT's and MAE's segmenters have.

N images   D encoder channels   K classes   H W rows and columns of a map
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_classifier import Classifier, load_encoder, transformer_sizes
from models_vit import LoadReport

POOLS = (1, 2, 3, 6)  # rows and columns of the pooled maps
AUXILIARY = 256  # channels of the auxiliary head
AUXILIARY_LEVEL = 2  # it uses the map at the scale of the patches
DROPOUT = 0.1


class Segmenter(Classifier):
    """The encoder without its unused last norm; `neck`, `decode`, and the auxiliary head, used in training only."""

    def __init__(self, *, classes: int, **encoder: Any):
        super().__init__(num_classes=0, global_pool="token", final_norm=False, dynamic_img_size=True, **encoder)
        self.classes = classes
        self.taps = tapped_blocks(len(self.blocks))
        self.neck = Neck(self.embed_dim)
        self.decode = UPerHead(self.embed_dim, classes)
        self.auxiliary = FCNHead(self.embed_dim, classes)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the four tapped blocks at strides of 1/4, 1/2, 1 and 2 patches, `[N, D, H, W]` each."""
        blocks = sorted(set(self.taps))
        found = self.forward_intermediates(images, indices=blocks, intermediates_only=True)
        of_block = dict(zip(blocks, found, strict=True))
        return self.neck([of_block[block] for block in self.taps])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the logits `[N, K, H, W]` at a quarter of a patch, and those of the auxiliary head at a patch.

        Images may have any size that is a multiple of the patch size: positions are resampled.
        """
        maps = self.maps(images)
        return self.decode(maps), self.auxiliary(maps[AUXILIARY_LEVEL])


def tapped_blocks(depth: int) -> tuple[int, int, int, int]:
    """Return the indices of the tapped blocks: 3, 5, 7 and 11 of 12, or the same relative depths.

    With fewer than four blocks, some occur twice.
    """
    third, half, two_thirds = (max(1, round(depth * share / 12)) for share in (4, 6, 8))
    return third - 1, half - 1, two_thirds - 1, depth - 1


def build(
    model: str,
    *,
    num_classes: int,
    input_size: tuple[int, int],
    in_chans: int = 3,
    embed_dim: int = 0,
    depth: int = 0,
    num_heads: int = 0,
    patch_stem: str = "linear",
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
) -> Segmenter:
    """Build a segmenter; sizes of 0 are the model's own. Raises ValueError for an unknown or impossible model."""
    sizes = transformer_sizes(
        model,
        input_size=input_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_stem=patch_stem,
    )
    built = Segmenter(**sizes, classes=num_classes, drop_path_rate=drop_path)
    built.set_grad_checkpointing(grad_checkpointing)
    return built


def from_options(options: Mapping[str, Any], classes: int) -> Segmenter:
    """Build the model of a run with these options."""
    names = ("model", "input_size", "in_chans", "embed_dim", "depth", "num_heads", "patch_stem")
    return build(num_classes=classes, **{name: options[name] for name in names if name in options})


def load_pretrained(model: Segmenter, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> LoadReport:
    """Initialise from the weights of any checkpoint, except the last layers of a segmenter for other classes.

    `made_with` and errors as for `models_classifier.load_encoder`.
    """
    own = model.state_dict()
    last = ("decode.classify.", "auxiliary.classify.")
    foreign = {name for name in weights if name.startswith(last) and weights[name].shape != own[name].shape}
    return load_encoder(model, {name: value for name, value in weights.items() if name not in foreign}, made_with)


def load_segmenter(model: Segmenter, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> None:
    """Load all weights of a trained segmenter. Raises ValueError if one is missing or the classes differ."""
    if "decode.classify.weight" not in weights:
        raise ValueError("these weights are not of a segmenter: they have no layer decode.classify")
    if (theirs := len(weights["decode.classify.weight"])) != model.classes:
        raise ValueError(f"these weights are for {theirs} classes, the data has {model.classes}")
    missing = load_encoder(model, weights, made_with).missing
    if missing:
        raise ValueError(f"these weights are of another segmenter: missing {', '.join(missing[:5])}")


class Neck(nn.Module):
    """Bring four maps of one scale to four scales: 4 and 2 times as fine, unchanged, and half as fine.

    The last row or column of an odd map is dropped by the pooling, as in mmsegmentation.
    """

    def __init__(self, channels: int):
        super().__init__()

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(twice(), nn.BatchNorm2d(channels), nn.GELU(), twice()),
                twice(),
                nn.Identity(),
                HalfMaxPool(),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(each) for scale, each in zip(self.scales, maps, strict=True)]


class HalfMaxPool(nn.Module):
    """Max-pool 2 x 2 windows, rounding odd sides down; a side of one patch is unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = [min(2, side) for side in x.shape[-2:]]
        return F.max_pool2d(x, kernel_size=kernel, stride=kernel)


class UPerHead(nn.Module):
    """Maps from fine to coarse, `[N, D, H, W]` each, to logits `[N, K, H, W]` at the finest."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(side), *conv(channels, channels, 1))
                                    for side in POOLS])  # fmt: skip
        self.pooled = conv((1 + len(POOLS)) * channels, channels, 3)
        self.lateral = nn.ModuleList([conv(channels, channels, 1) for _ in range(3)])
        self.smooth = nn.ModuleList([conv(channels, channels, 3) for _ in range(3)])
        self.fuse = conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classify = classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, deepest = maps
        pools = [resize(pool(deepest), deepest) for pool in self.pools]
        top = self.pooled(torch.cat([deepest, *pools], dim=1))
        levels = [top]  # from coarse to fine
        for lateral, each in zip(reversed(self.lateral), reversed(finer), strict=True):
            levels.append(lateral(each) + resize(levels[-1], each))
        smoothed = [smooth(level) for smooth, level in zip(self.smooth, reversed(levels[1:]), strict=True)]
        finest = smoothed[0]
        together = torch.cat([finest, *(resize(each, finest) for each in [*smoothed[1:], top])], dim=1)
        return self.classify(self.dropout(self.fuse(together)))


class FCNHead(nn.Module):
    """One map `[N, D, H, W]` to logits `[N, K, H, W]`."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv = conv(channels, AUXILIARY, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classify = classifier(AUXILIARY, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.dropout(self.conv(features)))


def conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Create a convolution with batch norm and ReLU."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """Create the 1 x 1 convolution that returns the logits."""
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def resize(features: Tensor, like: Tensor) -> Tensor:
    """Resize features to the rows and columns of another map."""
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)
