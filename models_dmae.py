"""DMAE: what the encoder makes of the visible patches should be what a larger, trained encoder makes of them.

Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", CVPR 2023. A frozen teacher gets the same
visible patches. At three quarters of both encoders the student's tokens, through one linear layer, are compared with
the teacher's: the mean absolute difference of unit vectors.

The teacher is of no use after training: it is in no checkpoint, and a trained model is loaded without it.

N images   V visible patches   D the student's channels   T the teacher's channels
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import (
    MaskedImageModel,
    Term,
    View,
    at_least_float32,
    take,
    without_autocast,
)
from models_vit import (
    SIZES,
    FrozenNetwork,
    Reader,
    VisionTransformer,
    digest_of,
    load_matching,
    patch_grid,
    require_plain_encoder,
)
from options.dmae import TeacherOptions


def tapped(block: int, depth: int) -> int:
    """The block counted from 1, at three quarters of the depth where it is 0: 9 of 12, 18 of 24."""
    return block or max(1, depth * 3 // 4)


def encoder_weights(weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Of a checkpoint's weights those that lead to the blocks' outputs; ValueError where they are no such encoder."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(f"checkpoint {path} holds no encoder that can teach: without {', '.join(missing)}")
    require_plain_encoder(weights, where=f"the weights in checkpoint {path}")
    return {name: weights[name] for name in weights if name.startswith(("blocks.", "patch_embed.", *needed[:2]))}


def settled(options: TeacherOptions, weights: Mapping[str, Tensor], trained_with: Mapping[str, Any]) -> TeacherOptions:
    """The options with what the teacher's weights, and its run's options if they are known, decide.

    ValueError where an option says otherwise.
    """
    path = options.checkpoint
    embed_dim = weights["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    heads = {size.embed_dim: size.num_heads for size in SIZES.values()}.get(embed_dim, 0)
    if "model" in trained_with:
        named = [size.num_heads for name, size in SIZES.items() if f"_{name}_" in trained_with["model"]]
        heads = trained_with.get("num_heads") or named[0]
    elif options.num_heads:
        heads = options.num_heads
    if not heads:
        raise ValueError(
            f"checkpoint {path} does not tell the teacher's attention heads: give --terms.teacher.num_heads"
        )
    found: dict[str, Any] = {"embed_dim": embed_dim, "depth": depth, "num_heads": heads, "digest": digest_of(weights)}
    for name, value in found.items():
        asked = getattr(options, name)
        if asked and asked != value:
            raise ValueError(f"{name} is {asked}, and the teacher in checkpoint {path} has {value}")
    return replace(options, **found)


class Teacher(VisionTransformer):
    """A frozen encoder, up to the block that is looked at, without a norm after it."""

    def __init__(self, options: TeacherOptions, img_size: tuple[int, int], patch_size: int, in_chans: int) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="token",
            embed_dim=options.embed_dim,
            depth=tapped(options.teacher_block, options.depth),
            num_heads=options.num_heads,
            final_norm=False,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )

    @torch.no_grad()
    def forward(self, images: Tensor, ids_keep: Tensor) -> Tensor:  # type: ignore[override]
        """Of images `[N, C, H, W]` the visible patches `[N, V]`: `[N, 1 + V, T]`, class token first."""
        tokens = take(self.patch_embed(images) + self.pos_embed[:, 1:], ids_keep)  # type: ignore[index]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)  # type: ignore[index, operator]
        return self.blocks(torch.cat([cls_token, tokens], dim=1))


class TeacherTerm(Term):
    """The mean absolute difference between unit tokens of the student, through a linear layer, and of the teacher."""

    name: ClassVar[str] = "teacher"
    Options: ClassVar[type] = TeacherOptions
    options: TeacherOptions

    def __init__(self, options: TeacherOptions) -> None:
        super().__init__(options)
        self._weights: dict[str, Tensor] = {}
        self._grid: tuple[int, int] | None = None
        self.teacher = FrozenNetwork()

    def settle(self, read: Reader) -> None:
        if not self.options.checkpoint:
            raise ValueError("no teacher is given: --terms.teacher.checkpoint FILE")
        weights, trained_with = read(self.options.checkpoint)
        self._weights = encoder_weights(weights, self.options.checkpoint)
        self.options = settled(self.options, self._weights, trained_with)
        if "input_size" in trained_with:
            patch_size = self._weights["patch_embed.proj.weight"].shape[-1]
            self._grid = patch_grid(tuple(trained_with["input_size"]), patch_size)

    def attach(self, model: MaskedImageModel) -> None:
        options = self.options
        if not options.embed_dim:
            raise ValueError("the teacher's channels are not known: --terms.teacher.checkpoint FILE tells them")
        for whose, block, depth in (
            ("student", options.student_block, len(model.blocks)),
            ("teacher", options.teacher_block, options.depth),
        ):
            if block > depth:
                raise ValueError(f"{whose}_block is {block}; the {whose} has {depth} blocks")
        self.taps = (tapped(options.student_block, len(model.blocks)) - 1,)
        self.head = nn.Linear(model.embed_dim, options.embed_dim)
        if self._weights:
            teacher = Teacher(options, model.input_size, model.patch_size, model.in_chans)
            try:
                load_matching(teacher, self._weights, grid=self._grid)
            except ValueError as problem:
                raise ValueError(f"checkpoint {options.checkpoint} cannot teach this model: {problem}") from problem
            self.teacher.hold(teacher)
            self._weights = {}

    def check(self, model: MaskedImageModel) -> None:
        if not model.drops_hidden:
            raise ValueError("the teacher sees what the student sees, so it needs an encoder of visible patches alone")
        teacher = self.teacher.network
        if teacher is not None and teacher.patch_embed.grid_size != model.grid:
            teacher.set_input_size(model.input_size)
            self.teacher.hold(teacher)  # the resampled positions have no gradient either

    def teacher_tokens(self, view: View) -> Tensor:
        """`[N, 1 + V, T]` of the patches that the student sees."""
        if self.teacher.network is None:
            raise ValueError(
                "this model was loaded to be looked at, without its teacher: to train it, build it with methods.build"
            )
        return self.teacher.network(view.images, view.ids_keep)

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        teacher, student = self.teacher_tokens(view), self.head(view.taps[self.taps[0]])
        with without_autocast(student):
            teacher, student = (F.normalize(at_least_float32(x), dim=-1) for x in (teacher, student))
            return F.l1_loss(student, teacher)
