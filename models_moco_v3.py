"""MoCo-v3: two augmented views of an image shall have similar features, unlike those of other images.

Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021. The class token passes a
projector and a predictor and gives the queries; a copy of encoder and projector whose weights follow as a moving
average gives the keys. Each query is classified among the keys of the other view of all images.

State: the encoder under MAE's names, `projector.*`, `predictor.*`, and the key encoder and its projector as
`teacher.*`. The indices within projector and predictor are those of the release (Linear, BatchNorm, ReLU, ...).

Differences from the release: the fixed positions have the column's channels first, as everywhere in this project
(there: the row's), which is the same up to a permutation of the channels. The key encoder is updated at the end of a
step with the next step's momentum, not at the start of the next step: the same weights, and a skipped update changes
nothing.

N images of this process   M images of all processes   C channels of the projection   D encoder channels
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import BatchNormOverRanks, all_ranks, world_size
from models_vit import (
    Crop,
    Pretrainer,
    Progress,
    VisionTransformer,
    at_least_float32,
    copy_into,
    cosine_between,
    initialize,
    move_average,
    plain_encoder,
    position_table,
    without_autocast,
)
from options.moco_v3 import MoCoV3Options

# Brightness, contrast, saturation and hue of the release's views, and the other probabilities.
VIEW: dict[str, Any] = {
    "interpolation": "bilinear",
    "jitter": (0.4, 0.4, 0.2, 0.1),
    "jitter_prob": 0.8,
    "grayscale": 0.2,
}


def contrastive_loss(q: Tensor, k: Tensor, temperature: float, offset: int = 0) -> Tensor:
    """Return 2 T times the cross-entropy of classifying each query among all keys, by cosine similarity over T.

    Args:
        q: Queries `[N, C]` of this process.
        k: Keys `[M, C]` of all processes; no gradient flows into them.
        temperature: T.
        offset: Row of `k` that belongs to the first query; the others follow in order.

    Returns:
        Scalar, the mean over queries. One of the two symmetric terms of the paper's loss.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if q.ndim != 2 or k.ndim != 2 or q.shape[1] != k.shape[1] or not 0 <= offset <= len(k) - len(q):
        raise ValueError(
            f"queries {list(q.shape)} and keys {list(k.shape)} with offset {offset}: both must be [images, channels], "
            "and every query needs its key"
        )
    with without_autocast(q):
        q = F.normalize(at_least_float32(q), dim=1)
        k = F.normalize(at_least_float32(k.detach()), dim=1)
        own = torch.arange(offset, offset + len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(q @ k.T / temperature, own)


def mlp(*widths: int) -> nn.Sequential:
    """Create linear layers without biases, each but the last followed by batch norm and ReLU.

    The last is followed by a batch norm without weights. Weights are initialised as torch does by default.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers.append(nn.Linear(inputs, outputs, bias=False))
        last = number == len(widths) - 2
        layers += [BatchNormOverRanks(outputs, affine=not last), *([] if last else [nn.ReLU()])]
    return nn.Sequential(*layers)


@torch.no_grad()
def initialize_encoder(encoder: VisionTransformer, grid: tuple[int, int]) -> None:
    """Set MoCo-v3's initial weights: xavier with query, key and value as separate matrices, positions sine-cosine."""
    encoder.apply(initialize)
    for block in encoder.blocks:
        weight = block.attn.qkv.weight  # type: ignore[union-attr]
        bound = math.sqrt(6 / (weight.shape[0] // 3 + weight.shape[1]))  # type: ignore[index]
        nn.init.uniform_(weight, -bound, bound)  # type: ignore[arg-type]
    patch = encoder.patch_embed.proj
    bound = math.sqrt(6 / (patch.weight[0].numel() + encoder.embed_dim))
    nn.init.uniform_(patch.weight, -bound, bound)
    nn.init.zeros_(patch.bias)
    nn.init.normal_(encoder.cls_token, std=1e-6)  # type: ignore[arg-type]
    encoder.pos_embed.copy_(position_table(grid, encoder.embed_dim))  # type: ignore[union-attr]


class MoCoV3(Pretrainer):
    """MoCo-v3: contrast the class tokens of two views, the keys from a moving average of the network.

    Batch norms and keys are those of the images of one forward pass on all processes, so accumulating gradients does
    not give the result of the larger batch.
    """

    Options: ClassVar[type] = MoCoV3Options
    options: MoCoV3Options
    takes_conv_stem: ClassVar[bool] = False  # its patch embedding is a fixed random projection
    feature_pool: ClassVar[Literal["avg", "token"]] = "token"
    images_together = "ranks"
    decays_vectors: ClassVar[bool] = True
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        options = self.options
        initialize_encoder(self, self.grid)
        self.projector = mlp(self.embed_dim, options.proj_hidden_dim, options.proj_hidden_dim, options.proj_dim)
        self.predictor = mlp(options.proj_dim, options.proj_hidden_dim, options.proj_dim)
        self.pos_embed.requires_grad_(False)
        if options.freeze_patch_embed:
            self.patch_embed.requires_grad_(False)
        self.teacher = plain_encoder(self)
        self.teacher.projector = mlp(self.embed_dim, options.proj_hidden_dim, options.proj_hidden_dim, options.proj_dim)
        self.teacher.requires_grad_(False)
        copy_into(self.teacher, self)
        self._next_momentum = options.momentum

    def views(self, min_scale: float, hflip: float) -> tuple[Crop, ...]:
        common = {"scale": (min_scale, 1.0), "hflip": hflip, "blur_sigma": self.options.blur_sigma, **VIEW}
        return (
            Crop(self.input_size, blur=1.0, **common),
            Crop(self.input_size, blur=0.1, solarize=0.2, **common),
        )

    def resized(self, before: tuple[int, int]) -> None:
        self.teacher.set_input_size(self.input_size)
        for encoder in (self, self.teacher):
            table = position_table(self.grid, self.embed_dim).to(encoder.pos_embed)
            encoder.pos_embed = nn.Parameter(table, requires_grad=False)

    # ---- schedules and the moving average

    def momentum(self, fraction: float) -> float:
        """Return the share of its weights that the key encoder keeps at `fraction` of the training."""
        return cosine_between(self.options.momentum, 1.0, min(1.0, fraction))

    def before_step(self, progress: Progress) -> None:
        if progress.step == 0:  # weights may have been loaded since the model was built
            copy_into(self.teacher, self)
        self._next_momentum = self.momentum((progress.step + 1) / max(1, progress.total_steps))

    def after_update(self, taken: Tensor) -> None:
        move_average(self.teacher, self, self._next_momentum, taken)

    # ---- the objective

    def queries(self, images: Tensor) -> Tensor:
        """Return the predictions `[N, C]` from one view."""
        return self.predictor(self.projector(self.encode(images)[:, 0]))

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Return the projections `[N, C]` of the key encoder from one view."""
        return self.teacher.projector(self.teacher.forward_features(images)[:, 0])  # type: ignore[operator]

    def forward(  # type: ignore[override]
        self, images: list[Tensor], labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and `contrastive`, which are the same, of two views `[N, C, H, W]` each."""
        if isinstance(images, Tensor) or len(images) != 2:
            found = list(images.shape) if isinstance(images, Tensor) else f"{len(images)} views"
            raise ValueError(f"MoCo-v3 takes a list of two views of the same images, found {found}")
        temperature = self.options.temperature
        q1, q2 = (self.queries(view) for view in images)
        k1, k2 = (all_ranks(self.keys(view)) for view in images)
        offset = dist.get_rank() * len(images[0]) if world_size() > 1 else 0
        loss = contrastive_loss(q1, k2, temperature, offset) + contrastive_loss(q2, k1, temperature, offset)
        return {"loss": loss, "contrastive": loss}
