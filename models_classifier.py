"""Classifiers on a pretrained encoder: fine-tuned end to end, or a linear layer on frozen features.

A classifier is timm's VisionTransformer with MAE's names, so that a checkpoint of MAE, NoR-MAE, timm or ours fits by
name, also at another image size, for which positions are resampled. Fine-tuning follows He et al., "Masked Autoencoders
Are Scalable Vision Learners", CVPR 2022.

N images   D encoder channels   C classes
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from models_vit import (
    FIRST_LAYERS,
    LoadReport,
    Normalization,
    VisionTransformer,
    attention_heads,
    averages_before_norm,
    encoder_sizes,
    load_from_run,
    patch_grid,
    prepare_images,
    read_depth,
    read_patch_size,
    read_patch_stem,
    renormalization,
)

HEAD_STD, PROBE_STD = 2e-5, 0.01  # standard deviation of the head's initial weights in MAE, for fine-tuning and probes
TOKEN_STD = 0.02  # standard deviation of the class token when trained from scratch


class Classifier(VisionTransformer):
    """timm's VisionTransformer with MAE's layers for the learning rates: parts other than stem and blocks form the top.

    `global_pool` "avg" normalises the average of the patch tokens and leaves out the encoder's own norm, as MAE does;
    "token" classifies the class token.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise as timm does, but the class token with std 0.02 as timm 0.3.2, on which MAE is built.

        Later versions of timm use 1e-6. Linear layers and positions are the same in both.
        """
        super().init_weights(mode, needs_reset)
        trunc_normal_(self.cls_token, std=TOKEN_STD)

    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens `[N, 1 + L, D]` after the last block; with "token", after the encoder's norm."""
        return self.forward_features(images)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by layer; timm would put the norm of "token" in the layer of the last block."""
        matcher = super().group_matcher(coarse)
        return {"stem": matcher["stem"], "blocks": [(r"^blocks\.(\d+)", None)]}


class DistilledClassifier(Classifier, VisionTransformerDistilled):
    """A classifier with DeiT's distillation token: a second class token, with a head of its own.

    In training it returns two sets of logits `[N, C]`, of the class token and of the distillation token, otherwise
    their mean. State names are those of timm's VisionTransformerDistilled: dist_token, head_dist, and a pos_embed with
    two places before the patches.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_distilled_training(True)


def add_distillation_token(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain encoder with a distillation token: a copy of the class token and its position."""
    tokens = {name: weights[name] for name in ("cls_token", "pos_embed") if name in weights}
    if len(tokens) < 2:
        return dict(weights)  # refused when they are loaded
    table = tokens["pos_embed"]
    return {
        **weights,
        "dist_token": tokens["cls_token"],
        "pos_embed": torch.cat([table[:, :1], table[:, :1], table[:, 1:]], dim=1),
    }


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
    global_pool: Literal["avg", "token"] = "avg",
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    distill_token: bool = False,
) -> Classifier:
    """Build a classifier with timm's initial weights.

    Args:
        model: Name as for pretraining, such as `mae_vit_tiny_patch16`.
        num_classes: 0 for no head.
        embed_dim, depth, num_heads: 0 for the sizes of the model.
        patch_stem: `linear` or `conv`, see `models_vit.PATCH_STEMS`.
        distill_token: Build a `DistilledClassifier`, which needs `global_pool` "token".

    Raises:
        ValueError: The name is unknown, or the sizes do not fit together.
    """
    sizes = transformer_sizes(
        model,
        input_size=input_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        patch_stem=patch_stem,
    )
    built = (DistilledClassifier if distill_token else Classifier)(
        **sizes, num_classes=num_classes, global_pool=global_pool, drop_path_rate=drop_path
    )
    built.set_grad_checkpointing(grad_checkpointing)
    return built


def transformer_sizes(model: str, **sizes: Any) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer; sizes of 0 are those of the model's name. Raises as `build`."""
    found = encoder_sizes(model, sizes)
    del found["size"]
    patch_grid(found["img_size"], found["patch_size"])
    if found["embed_dim"] % found["num_heads"]:
        raise ValueError(f"{found['num_heads']} heads do not divide {found['embed_dim']} channels")
    return found


def load_encoder(model: Classifier, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> LoadReport:
    """Initialise from the weights of a checkpoint; re-initialise missing or mismatched heads near zero.

    The distillation token of a `DistilledClassifier` starts as a copy of the class token where the weights have none.

    Args:
        model: The classifier.
        weights: The weights by name.
        made_with: The options of the run that wrote them; empty where they are not known.

    Raises:
        ValueError: If they contain no encoder of this model, or one with another number of attention heads, which the
            shapes of weights do not show.
    """
    other_head = "head.weight" in weights and weights["head.weight"].shape[0] != model.num_classes
    heads = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    fitting = {name: value for name, value in weights.items() if not (other_head and name in heads)}
    if isinstance(model, DistilledClassifier) and "dist_token" not in weights:
        fitting = add_distillation_token(fitting)
    elif "dist_token" in weights and not isinstance(model, DistilledClassifier):
        raise ValueError(
            "these weights have a distillation token, without which the encoder computes something else: fine-tune "
            "with --distill_token, or use the pretrained encoder"
        )
    report = load_from_run(model, fitting, made_with)
    if not model.num_classes and averages_before_norm(weights):
        raise ValueError(
            "these weights are of a classifier that averages the patch tokens: its last norm, fc_norm, comes after "
            "the average, and frozen tokens need one before. Use the pretrained encoder, or features of tools.embed"
        )
    for name in ("head", "head_dist"):
        if model.num_classes and f"{name}.weight" in report.missing:
            head = model.get_submodule(name)
            trunc_normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
    return report


def load_classifier(model: Classifier, weights: Mapping[str, Tensor], made_with: Mapping[str, Any]) -> None:
    """Load all weights of a trained classifier. Raises ValueError if one is missing or the classes differ."""
    if "head.weight" not in weights:
        raise ValueError("these weights have no classification head")
    if (theirs := len(weights["head.weight"])) != model.num_classes:
        raise ValueError(f"these weights are of a head for {theirs} classes, the data have {model.num_classes}")
    if isinstance(model, DistilledClassifier) and "dist_token" not in weights:
        raise ValueError("these weights are of a classifier without a distillation token")
    report = load_encoder(model, weights, made_with)
    if report.missing:
        pool = " (another global_pool?)" if any("norm" in name for name in report.missing) else ""
        raise ValueError(f"these weights are of another classifier{pool}: missing {', '.join(report.missing[:5])}")


class TeacherClassifier(nn.Module):
    """A frozen classifier that gets images as they are prepared for another one.

    Args:
        classifier: The trained classifier.
        own: Mean and standard deviation with which its images are normalised.
        images: Those of the images that it gets.
    """

    def __init__(self, classifier: Classifier, own: Normalization, images: Normalization) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale, shift = (None, None) if own == images else renormalization(images, own)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def train(self, mode: bool = True) -> Self:
        """Keep the model in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[N, C]`."""
        network = self.classifier
        size = network.patch_embed.img_size
        return network(prepare_images(images, network.in_chans, self.scale, self.shift, size))


def load_teacher(
    weights: Mapping[str, Tensor],
    made_with: Mapping[str, Any],
    classes: int,
    images: Normalization,
    num_heads: int = 0,
) -> TeacherClassifier:
    """Build a trained classifier as a teacher.

    Args:
        weights: Its weights.
        made_with: The options of the run that trained it; empty for a file of MAE's or timm's, whose sizes are read
            from the weights and whose images are taken to be normalised as ImageNet's.
        classes: Number of classes of the data.
        images: Mean and standard deviation of the images that it will get.
        num_heads: Attention heads, if `made_with` is empty; 0: the only usual number for the channels.

    Raises:
        ValueError: The weights are not those of a plain ViT with a head for this number of classes, or its attention
            heads are not known.
    """
    first = FIRST_LAYERS[read_patch_stem(weights)]
    if first not in weights or "head.weight" not in weights:
        raise ValueError(f"the weights are not those of a classifier: {first} or head.weight is missing")
    in_chans, channels = weights[first].shape[1], weights["pos_embed"].shape[-1]
    patch_size = read_patch_size(weights, made_with)
    heads = attention_heads(made_with, channels, num_heads, option="distill_heads", file="the teacher")
    distill_token = "dist_token" in weights
    side = patch_size * math.isqrt(weights["pos_embed"].shape[1] - 1 - distill_token)
    model = f"mae_vit_tiny_patch{patch_size}"
    made_with = {"model": model, "input_size": (side, side), "num_heads": heads, **made_with}
    rows, columns = made_with["input_size"]
    classifier = build(
        made_with["model"],
        num_classes=classes,
        input_size=(rows, columns),
        in_chans=in_chans,
        embed_dim=channels,
        depth=read_depth(weights),
        num_heads=heads,
        patch_stem=read_patch_stem(weights),
        global_pool="avg" if "fc_norm.weight" in weights else "token",
        distill_token=distill_token,
    )
    load_classifier(classifier, weights, made_with)
    own: Normalization = (tuple(made_with.get("mean") or ()), tuple(made_with.get("std") or ()))
    if not all(own):
        own = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if in_chans == 3 else images
    if len(images[0]) not in (1, len(own[0])):
        raise ValueError(f"its images have {len(own[0])} channels, the data {len(images[0])}")
    return TeacherClassifier(classifier, own, images)


class LinearProbe(nn.Module):
    """MAE's linear classifier: batch normalisation without weights, then one linear layer."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        self.head = nn.Linear(channels, num_classes)
        trunc_normal_(self.head.weight, std=PROBE_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Logits `[N, C]`."""
        return self.head(self.norm(features_ND.float()))


def list_layers(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[str]]]:
    """Return (factor of the learning rate, parts of the model) for each layer, from the stem to the head."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts: dict[float, dict[str, None]] = {}
    for group in groups:
        for parameter in group["params"]:
            parts.setdefault(group["lr_scale"], {})[_part(names[id(parameter)])] = None
    return [(scale, list(parts[scale])) for scale in sorted(parts)]


def _part(name: str) -> str:
    """Return the part of the model that a parameter belongs to: `blocks.3` for `blocks.3.attn.qkv.weight`."""
    words: Iterable[str] = name.split(".")[: 2 if name.startswith("blocks.") else 1]
    return ".".join(words)
