"""Models for figures: a run, a checkpoint, or a ViT by name, with random weights or those of a file.

    output/mine                                      a run folder: its latest checkpoint
    output/mine/checkpoints/best.pth                 one of its checkpoints
    mae_vit_tiny_patch16                           a model of this project with random weights
    untrained:output/mine                          the model of a pretraining run with its initial weights
    vit_base_patch16_224                           a ViT of timm with random weights
    mae_vit_base_patch16=mae_pretrain_vit_base.pth one of these with the weights of a file

Nothing is ever downloaded.

N images   L patches, row by row   V chosen patches   D channels
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import methods
from data.loader import pixel_statistics
from models_vit import SIZES, VisionTransformer, load_from_run, patch_grid
from options import nearest
from tools import encoder, given
from util import checkpoint
from util.distributed import pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The run of a model."""

    run: Path
    options: Mapping[str, Any]
    updates: int


@dataclass(frozen=True)
class FigureModel:
    """A ViT in eval mode on its device, with its name and a description."""

    label: str
    about: str
    model: VisionTransformer
    statistics: tuple[tuple[float, ...], ...]
    """Mean and standard deviation of each channel for normalisation."""
    device: torch.device
    origin: Origin | None = None
    """The run, if the model is from a run of this project."""
    decoder_trained: bool = True
    """Whether the decoder, if any, was trained with the encoder."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """Number of patches L."""
        return self.grid[0] * self.grid[1]

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.model.patch_embed.patch_size

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return (self.model.patch_embed.proj.in_channels, *self.model.patch_embed.img_size)

    def normalized(self, pixels: Tensor) -> Tensor:
        """Normalise uint8 pixels `[N, C, H, W]` for the model."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in self.statistics)
        return ((pixels / 255 - mean) / std).to(self.device)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the patch embeddings `[N, L, D]` without and with positions."""
        embedded = self.model.patch_embed(images)
        table = self.model.pos_embed
        return embedded, embedded if table is None else embedded + table[:, -self.num_patches :]

    def _with_prefix(self, tokens: Tensor) -> Tensor:
        """Concatenate class and register tokens, with positions, and the patch tokens."""
        model = self.model
        prefix: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
        if not prefix:
            return model.norm_pre(tokens)
        first = torch.cat(prefix, dim=1)
        if model.pos_embed is not None and not model.no_embed_class:
            first = first + model.pos_embed[:, : -self.num_patches]
        return model.norm_pre(torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1))

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode selected patches `[N, V, D]`, positions included; return `[N, V, D]` after the norm."""
        return self.model.norm(self.model.blocks(self._with_prefix(tokens)))[:, self.prefix :]

    def layers(self, images: Tensor) -> Iterator[tuple[nn.Module | None, Tensor]]:
        """Encode complete images; yield (None, input of the first block), then each block with its output."""
        x = self._with_prefix(self.embed(images)[1])
        yield None, x
        for block in self.model.blocks:
            x = block(x)
            yield block, x

    @property
    def prefix(self) -> int:
        """Number of tokens before those of the patches."""
        return self.model.num_prefix_tokens


def load(
    word: str,
    *,
    device: str = "auto",
    seed: int = 0,
    input_size: tuple[int, int] | None = None,
    norm_pix_loss: bool = False,
) -> FigureModel:
    """Load the model given by `word`, see above; `norm_pix_loss` applies to weights from a file."""
    name, equals, file = word.partition("=")
    if word.startswith("untrained:"):
        shown = _untrained(Path(word.partition(":")[2]), device)
    elif Path(word).exists():
        shown = _load_run(Path(word), device)
    elif equals or name.startswith("mae_vit_") or timm.is_model(name):
        shown = _by_name(name, file, device, seed, input_size, norm_pix_loss)
    elif "/" in word or word.endswith((".pth", ".pt", ".safetensors")):
        raise ValueError(f"{word} does not exist; give a run folder, a checkpoint or the name of a model")
    else:
        known = [
            *(f"mae_vit_{size}_patch16" for size in SIZES),
            *timm.list_models("vit_*"),
            *timm.list_models(),
        ]
        hint = nearest(name, known) or "mae_vit_tiny_patch16 or vit_tiny_patch16_224, say"
        raise ValueError(f"{word} is neither a run, nor a checkpoint, nor a model's name; {hint}")
    if input_size and shown.size[1:] != input_size:
        patch_grid(input_size, shown.patch[0])  # raises ValueError if the size is not divisible
        shown.model.set_input_size(input_size)
    return shown


def _load_run(path: Path, device: str) -> FigureModel:
    """Load a pretrained autoencoder, or the encoder of a classifier."""
    file = checkpoint.find_file(path)
    try:
        state = checkpoint.load(file)
    except checkpoint.CheckpointError as error:
        advice = f"the weights of another program need the model's name beside them: mae_vit_base_patch16={path}"
        raise ValueError(f"{error}. For a picture, {advice}") from error
    model: Any
    options = state["options"]
    if checkpoint.find_program(state) == "pretrain":
        trained = given.load(path, device)
        model, about, updates = trained.model, options["method"], trained.updates
        if trained.model.encoder_prefix:  # features are computed by another encoder than the trained one
            model = encoder.load(file).model
    else:
        found = encoder.load(file)
        model, about, updates = found.model, "classifier", found.updates or 0
    statistics = pixel_statistics(options["in_chans"], options["mean"], options["std"])
    origin = Origin(checkpoint.find_run(file), options, updates)
    name = origin.run.resolve().name
    if file.name != checkpoint.LAST:
        name += f" ({file.name})"
    about = f"{about}, {options['model']}, {updates:,} updates"
    where = pick_device(device)
    return FigureModel(name, about, model.to(where).eval(), statistics, where, origin)


def _untrained(path: Path, device: str) -> FigureModel:
    """Return the model of a pretraining run with its initial weights."""
    trained = _load_run(path, device)
    if trained.origin is None or "method" not in trained.origin.options:
        raise ValueError(f"{path} is not a pretraining run, so it has no untrained model")
    options = trained.origin.options
    torch.manual_seed(options["seed"])
    model = methods.from_options(options).to(trained.device).eval()
    about = f"{options['method']}, {options['model']}, initial weights"
    return replace(trained, label=f"{trained.label}, untrained", about=about, model=model, origin=None)


def _by_name(
    name: str, file: str, device: str, seed: int, input_size: tuple[int, int] | None, norm_pix_loss: bool
) -> FigureModel:
    weights = checkpoint.load_weights(file) if file else {}
    torch.manual_seed(seed)
    model: VisionTransformer
    if name.startswith("mae_vit_"):
        sizes: dict[str, Any] = {"input_size": input_size, "norm_pix_loss": norm_pix_loss}
        model = methods.build("mae", name, decoder_depth=_depth(weights, "decoder_blocks"), **sizes)
        statistics = pixel_statistics(3)
    else:
        if not timm.is_model(name):
            raise ValueError(f"unknown model {name!r}; {nearest(name, timm.list_models()) or 'see timm.list_models()'}")
        built: Any = timm.create_model(name, pretrained=False, num_classes=0)
        statistics = pixel_statistics(3, built.pretrained_cfg["mean"], built.pretrained_cfg["std"])
        if type(built) is not VisionTransformer:
            raise ValueError(f"{name} is a {type(built).__name__}; these pictures are of plain vision transformers")
        model = built
    about, decoder_trained = f"random weights, seed {seed}", True
    if file:
        report = load_from_run(model, weights, {})
        log.info("%s: %s", file, report)
        about = f"weights of {Path(file).name}, {_heads(model)} heads"  # the file does not contain it
        decoder_trained = not any(missing.startswith("decoder_") for missing in report.missing)
    else:
        log.info("%s: %s; nothing is downloaded, trained weights are given as %s=FILE", name, about, name)
    where = pick_device(device)
    return FigureModel(name, about, model.to(where).eval(), statistics, where, None, decoder_trained)


def _heads(model: Any) -> int:
    return model.blocks[0].attn.num_heads


def _depth(weights: Mapping[str, Tensor], blocks: str) -> int:
    """Return the number of blocks with this name in the weights."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{blocks}.")})
