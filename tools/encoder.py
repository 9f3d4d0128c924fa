"""Load the vision transformer of any trained model, with the facts that are needed to use it.

The encoder of a run or a checkpoint of this project, pretrained or fine-tuned, or of a file of another MAE, is loaded
as a timm VisionTransformer. The weights determine all sizes except the number of attention heads, and the rows and
columns of patches, of which only the product is known. Both are read from the options of the run. Weights of other
programs have no options, and a wrong number of heads would not be detected, so it must be given unless the width
determines it.

N images   L patches   D channels   C H W image
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

import methods
import models_classifier
from data.folders import some
from data.images import (
    CROP_SHARE,
    array_pixels,
    classifier_crop_share,
    eval_transform,
    picture_pixels,
    read_image,
    to_uint8,
)
from data.loader import pixel_statistics
from data.splits import read_classes
from models_vit import (
    FIRST_LAYERS,
    PATCH_STEMS,
    SIZES,
    VisionTransformer,
    attention_heads,
    load_matching,
    patch_grid,
    read_patch_size,
    read_patch_stem,
    require_plain_encoder,
)
from util import checkpoint

TOLERANCE = 1e-5  # relative to the largest value if that exceeds 1
ARCHITECTURES = {size: f"vit_{size}_patch16_224" for size in SIZES} | {"huge": "vit_huge_patch14_224"}
DISTILLED = "deit_base_distilled_patch16_224"
DISTILLATION = ("dist_token", "head_dist.weight", "head_dist.bias")  # weights that only distilled models have
DECODER = ("decoder_", "mask_token")  # prefixes of the names of MAE's decoder


class Mismatch(ValueError):
    """Two models have different outputs."""


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, optionally with a classification head, and its origin."""

    model: Any
    """VisionTransformer in float32 and eval mode on the CPU; its head is the identity if there is no classifier."""
    architecture: str
    """timm's name of the model; with the arguments it creates this model."""
    arguments: dict[str, Any]
    statistics: tuple[tuple[float, ...], ...]
    """Mean and standard deviation of each channel for normalisation, on a scale of 0 to 1."""
    checkpoint: Path
    options: Mapping[str, Any]
    """Options of the run; empty for weights of another program."""
    updates: int | None = None
    program: str = ""
    """The program that trained it; empty for weights of another project."""

    @property
    def heads(self) -> int:
        return self.model.blocks[0].attn.num_heads

    @property
    def patch_stem(self) -> str:
        """`linear` or `conv`, see `models_vit.PATCH_STEMS`."""
        return read_patch_stem(self.model.state_dict())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return (self.arguments["in_chans"], *self.arguments["img_size"])

    @property
    def classes(self) -> int:
        """Number of classes; 0 without a classification head."""
        return self.arguments["num_classes"]

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the logits; empty if they are unknown."""
        names = read_classes(self.run) if self.options else []
        return names if len(names) == self.classes else []

    @property
    def pooling(self) -> str:
        """Description of `features`."""
        if self.model.num_prefix_tokens == 2:
            return "the mean of the class token and the distillation token after the last norm"
        if self.arguments["global_pool"] == "token":
            return "the class token after the last norm"
        if self.arguments["fc_norm"]:
            return "the average of the patch tokens, which is then normed (fc_norm)"
        return "the average of the patch tokens after the last norm"

    @property
    def method(self) -> str:
        """Short description of the training method."""
        names = {"pretrain": self.options.get("method", ""), "finetune": "fine-tuning"}
        return names.get(self.program, "unknown (weights of another program)")

    @property
    def run(self) -> Path:
        """The folder of the run, or the folder that contains the checkpoint."""
        return checkpoint.find_run(self.checkpoint)

    @property
    def crop_share(self) -> float:
        """Share of an image's short side that the centre crop of evaluation keeps."""
        return classifier_crop_share(self.image_shape[1:]) if self.classes else CROP_SHARE

    @property
    def eval_crop(self) -> str:
        """How the run evaluated images of the input size; see `data.images.eval_transform`."""
        return self.options.get("eval_crop", "keep_size")

    @property
    def value_range(self) -> tuple[float, ...]:
        """Lowest and highest value of images of more than 8 bits; () if the run had none."""
        return tuple(self.options.get("value_range", ()))

    @torch.inference_mode()
    def compute_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs for normalised images `[N, C, H, W]`.

        They are `tokens` `[N, 1 + L, D]`, after the last norm if it is before the pooling, `features` `[N, D]`, and
        `logits` if there is a classifier.
        """
        tokens = self.model.forward_features(images)
        features = self.model.forward_head(tokens, pre_logits=True)
        outputs = {"tokens": tokens, "features": features}
        return outputs | {"logits": self.model.forward_head(tokens)} if self.classes else outputs

    def probe(self, count: int = 2) -> Tensor:
        """Return fixed noise images on which outputs are compared."""
        return torch.randn(count, *self.image_shape, generator=torch.Generator().manual_seed(0))

    def at_size(self, input_size: tuple[int, int]) -> Encoder:
        """Return the encoder for images of another height and width; the position embedding is resampled as in MAE."""
        patch_grid(input_size, self.arguments["patch_size"])  # raises ValueError if the size is not divisible
        arguments = self.arguments | {"img_size": input_size}
        model = _create(self.architecture, arguments)
        load_matching(model, self.model.state_dict(), grid=self.model.patch_embed.grid_size)
        return replace(self, model=model, arguments=arguments)


def load(path: Path, *, input_size: tuple[int, int] | None = None, num_heads: int = 0) -> Encoder:
    """Load the encoder of a run folder or a checkpoint.

    Args:
        input_size: Image size; by default that of the training.
        num_heads: Number of attention heads, for weights of other programs, which do not contain it.

    Raises:
        ValueError: If there is no plain encoder.
    """
    file = checkpoint.find_file(path)
    weights, options = checkpoint.load_model(file, averaged=True)
    state = checkpoint.load(file) if options else {}
    program = checkpoint.find_program(state) if state else ""
    if program == "segment":
        raise ValueError(
            f"{file} is a segmenter, whose encoder has no last norm; `visualize.py figure9` shows what it predicts"
        )
    encoders = methods.encoder_weights(weights, options)
    arguments = _arguments(file, encoders, options, num_heads)
    size = next((size for size, known in SIZES.items() if known.embed_dim == arguments["embed_dim"]), "tiny")
    architecture = DISTILLED if "dist_token" in encoders else ARCHITECTURES[size]
    model = _create(architecture, arguments)
    _fill(model, encoders, file, ours=bool(options))
    mean, std = options.get("mean", ()), options.get("std", ())
    statistics = pixel_statistics(arguments["in_chans"], mean, std)
    encoder = Encoder(model, architecture, arguments, statistics, file, options)
    if options:
        encoder = replace(encoder, updates=state.get("step"), program=program)
        compare(encoder, _as_trained(options, weights, encoder), f"the model extracted from {file}")
    return encoder if input_size in (None, encoder.image_shape[1:]) else encoder.at_size(input_size)


def _as_trained(options: Mapping[str, Any], weights: Mapping[str, Tensor], encoder: Encoder) -> dict[str, Tensor]:
    """Return the outputs of the model as the run builds it, for `encoder.probe()`."""
    if encoder.program == "pretrain":
        pretrainer = methods.from_options(options)
        pretrainer.load_state_dict(weights)
        with torch.inference_mode():
            return {"tokens": pretrainer.eval().encode(encoder.probe())}
    names = ("model", "input_size", "in_chans", "embed_dim", "depth", "num_heads", "patch_stem", "global_pool")
    sizes = {name: options[name] for name in names if name in options}
    distill_token = options.get("distill_token", False)
    model = models_classifier.build(num_classes=encoder.classes, distill_token=distill_token, **sizes)
    model.load_state_dict(weights)
    model.eval()
    with torch.inference_mode():
        tokens = model.forward_features(encoder.probe())
        return {"tokens": tokens, "logits": model.forward_head(tokens)}


def compare(encoder: Encoder, found: Mapping[str, Tensor], what: str) -> dict[str, float]:
    """Return the largest difference of each output for `encoder.probe()`. Raises `Mismatch` if it exceeds rounding."""
    differences = {}
    for name, expected in encoder.compute_outputs(encoder.probe()).items():
        if name not in found:
            continue
        if found[name].shape != expected.shape:
            raise Mismatch(
                f"{what} returns {name} of shape {list(found[name].shape)} instead of {list(expected.shape)}"
            )
        difference = (found[name] - expected).abs().max().item()
        allowed = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= allowed:  # NaN counts as a difference
            raise Mismatch(
                f"{what} returns other {name}: the difference is {difference:.2g}, rounding explains {allowed:.2g}"
            )
        differences[name] = difference
    return differences


def _create(architecture: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> VisionTransformer:
    model = timm.create_model(architecture, pretrained=pretrained, **arguments)
    assert isinstance(model, VisionTransformer)
    return model.eval()


def _arguments(file: Path, weights: Mapping[str, Tensor], options: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    """Return the arguments of timm.create_model for these weights."""
    require_plain_encoder(weights, own=DISTILLATION, where=f"the weights in {file}")
    stem = read_patch_stem(weights)
    needed = ("cls_token", "pos_embed", FIRST_LAYERS[stem], "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in weights]:
        there = ", ".join(sorted({name.split(".")[0] for name in weights})[:8])
        raise ValueError(f"{file} holds no vision transformer: without {', '.join(missing)}; it holds {there}")
    _, in_chans, *patch = weights[FIRST_LAYERS[stem]].shape
    if len(patch) != 2 or patch[0] != patch[1]:
        raise ValueError(f"{file} embeds patches of {patch or 'unknown'} pixels; here they are squares")
    patch_size, width = read_patch_size(weights, options), weights["cls_token"].shape[-1]
    positions = weights["pos_embed"].shape[1] - (2 if "dist_token" in weights else 1)
    side = math.isqrt(positions)
    size = options.get("input_size") or (side * patch_size, side * patch_size)
    rows, columns = patch_grid(tuple(size), patch_size)
    if rows * columns != positions:
        trained_on = f"images of {size[0]} x {size[1]}" if options else "a square, as other programs' must"
        raise ValueError(
            f"{file} has positions for {positions} patches of {patch_size} pixels, which do not make {trained_on}"
        )
    has_head, has_fc_norm = "head.weight" in weights, "fc_norm.weight" in weights
    return {
        "img_size": tuple(size),
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": len(weights["head.weight"]) if has_head else 0,
        "global_pool": _pool(options, has_head, has_fc_norm),
        "fc_norm": has_fc_norm,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": attention_heads(options, width, num_heads, file=str(file)),
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.weight"]) / width,
        # An export for timm stores the arguments, which a class cannot be one of.
        **({"embed_layer": PATCH_STEMS[stem]} if stem != "linear" else {}),
    }


def _pool(options: Mapping[str, Any], has_head: bool, has_fc_norm: bool) -> str:
    if "global_pool" in options:
        return options["global_pool"]
    if has_head and not has_fc_norm:
        return "token"
    return methods.feature_pool(options)


def _fill(model: VisionTransformer, weights: Mapping[str, Tensor], file: Path, ours: bool) -> None:
    """Load the encoder's weights, all of them.

    Other tensors of a checkpoint of this project are ignored, because the outputs are compared with those of the
    complete model. Other tensors of another program's checkpoint must be known to belong to the decoder.
    """
    own = model.state_dict()
    if ours and "norm.weight" in own and "norm.weight" not in weights:  # CrossMAE's norm has none: the same as these
        weights = {**weights, "norm.weight": torch.ones(model.embed_dim), "norm.bias": torch.zeros(model.embed_dim)}
    parts = {name.split(".")[0] for name in own}
    others = [name for name in weights if name not in own]
    foreign = [name for name in others if (name.split(".")[0] in parts if ours else not name.startswith(DECODER))]
    missing = [name for name in own if name not in weights]
    shapes = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    problems = {"it has also": foreign, "it lacks": missing, "of another shape is": shapes}
    words = [f"{what} {some(names, 3)}" for what, names in problems.items() if names]
    if words:
        raise ValueError(
            f"{file} is not a plain vision transformer with absolute positions, which is what timm, Hugging Face and "
            f"this tool can hold: {'; '.join(words)}"
        )
    model.load_state_dict({name: weights[name].float() for name in own})


class Preprocess:
    """Turn an image into the input of an encoder, as all evaluations of this project do.

    Resize and crop the centre to the encoder's size, scale to 0..1, and normalise each channel. Images of more than
    8 bits are first scaled by the `value_range` of training; see `data.images.to_uint8`. The object can be pickled and
    given to a `torch.utils.data.Dataset` as its transform.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        crop_share: float,
        mean: Sequence[float],
        std: Sequence[float],
        eval_crop: str = "keep_size",
        value_range: Sequence[float] = (),
    ) -> None:
        self.channels, self.size, self.value_range = image_shape[0], image_shape[1:], tuple(value_range)
        self.crop = eval_transform(self.size, crop_share, eval_crop)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, image: Any) -> Tensor:
        """Return float32 `[C, H, W]`.

        Args:
            image: A PIL image, an array `[H, W, C]`, or the path of a file.

        Raises:
            ValueError: The image cannot be converted to the channels of the encoder.
        """
        if isinstance(image, str | os.PathLike):
            pixels = read_image(os.fspath(image), self.channels, self.value_range)
        else:
            stored = (
                picture_pixels(image, self.channels)
                if isinstance(image, Image.Image)
                else array_pixels(np.asarray(image), self.channels)
            )
            pixels = to_uint8(stored, self.channels, self.value_range)
        return (self.crop(pixels).float() / 255 - self.mean) / self.std


def load_encoder(
    path: str | os.PathLike[str], *, input_size: int | tuple[int, int] | None = None, num_heads: int = 0
) -> tuple[VisionTransformer, Preprocess]:
    """Load a trained encoder and the transform of its images.

    `model(images)` takes `[N, C, H, W]` and returns the pooled features `[N, D]`, the same as `python -m tools.embed`;
    `model.forward_features(images)` returns all tokens `[N, 1 + L, D]`. The head of a classifier is removed.

    Args:
        path: A run folder, a checkpoint (of this project, MAE, NoR-MAE or timm), or a folder that
            `python -m tools.export timm` wrote.
        input_size: Pixels of the images: one side, or height and width; by default those of training.
        num_heads: Number of attention heads, for checkpoints of other programs that do not determine it.

    Returns:
        The model, on the CPU in evaluation mode, and a callable that converts an image to a tensor `[C, H, W]`.

    Raises:
        ValueError: There is no plain vision transformer at `path`, or its number of heads is unknown.
    """
    path = Path(path)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    if (path / "export.json").is_file():
        return _load_export(path, size)
    found = load(path, input_size=size, num_heads=num_heads)
    found.model.reset_classifier(0)
    mean, std = found.statistics
    return found.model, Preprocess(found.image_shape, found.crop_share, mean, std, found.eval_crop, found.value_range)


def _load_export(folder: Path, size: tuple[int, int] | None) -> tuple[VisionTransformer, Preprocess]:
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    if facts["format"] != "timm":
        raise ValueError(f"{folder} is an export for {facts['format']}; load_encoder reads exports for timm only")
    expected = facts["input"]
    own = (expected["height"], expected["width"])
    model = _create(f"local-dir:{folder}", {}, pretrained=True)
    if size not in (None, own):
        other = _create(f"local-dir:{folder}", {"img_size": size})
        load_matching(other, model.state_dict(), grid=model.patch_embed.grid_size)
        model = other
    model.reset_classifier(0)
    shape = (expected["channels"], *(size or own))
    eval_crop, value_range = expected.get("eval_crop", "keep_size"), expected.get("value_range", ())
    return model, Preprocess(shape, expected["crop"], expected["mean"], expected["std"], eval_crop, value_range)
