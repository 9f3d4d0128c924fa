"""DINO: train a student to match, from small and large crops, a teacher's output distribution for the large crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021. A head turns the class token into
scores of K outputs without a predefined meaning. The teacher is a moving average of the student; a centre subtracted
from its scores and a low temperature keep it from collapsing.

State: the student's encoder under MAE's names, its head as `head.*`, the teacher's encoder and head as `teacher.*`, and
`center` `[1, K]`. The last layer of a head is kept as `last_layer.weight_g` (norms) and `last_layer.weight_v`
(directions); torch's names for the same, `last_layer.parametrizations.weight.original0` and `original1`, can be loaded.
Features are the teacher's.

Differences from the release: the learning rate follows the schedule of all methods here, which reaches its highest
value one step later.

N images of this process   V views   K outputs   D encoder channels   L patches
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import BatchNormOverRanks, mean_over_ranks
from models_vit import (
    Crop,
    Pretrainer,
    Progress,
    VisionTransformer,
    at_least_float32,
    copy_into,
    cosine_between,
    move_average,
    patch_grid,
    plain_encoder,
    set_drop_path,
    without_autocast,
)
from options.dino import DINOOptions

GLOBAL_CROPS = 2
CLIP_EPS = 1e-6
JITTER: dict[str, Any] = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2}
LAST_LAYER = "head.last_layer."


def distillation_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float | Tensor
) -> Tensor:
    """Return the mean cross-entropy between the teacher's and the student's distributions over pairs of views.

    A pair is one of the teacher's two views and another view of the student. The teacher's scores are centred; no
    gradient flows into them.

    Args:
        student: Scores `[V * N, K]`, all images of a view together; the first two views are the teacher's.
        teacher: Scores `[2 * N, K]`.
        center: `[1, K]`.
        student_temp: Temperature of the student's softmax.
        teacher_temp: Temperature of the teacher's softmax.

    Returns:
        Scalar: the mean over images and over the 2 (V - 1) pairs.

    Raises:
        ValueError: If the shapes do not fit.
    """
    N, rest = divmod(len(teacher), GLOBAL_CROPS)
    if rest or not N or len(student) % N or len(student) < len(teacher) or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"scores of the student {list(student.shape)} and the teacher {list(teacher.shape)}: they must be "
            "[views x images, outputs] of the same images, and two views of the teacher"
        )
    with without_autocast(student):
        log_q = F.log_softmax(at_least_float32(student) / student_temp, dim=-1).unflatten(0, (-1, N))
        with torch.no_grad():
            p = F.softmax((at_least_float32(teacher) - center) / teacher_temp, dim=-1).unflatten(0, (-1, N))
        others = log_q.sum(dim=0) - log_q[:GLOBAL_CROPS]  # for each view of the teacher, all other views
        pairs = GLOBAL_CROPS * (len(log_q) - 1)
        return -(p * others).sum(dim=-1).mean(dim=1).sum() / pairs


def move_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """Return momentum x center + (1 - momentum) x batch_mean."""
    return center * momentum + batch_mean * (1 - momentum)


def teacher_temperature(epoch: int, warmup: float, final: float, warmup_epochs: int) -> float:
    """Return the temperature in an epoch: from `warmup` to `final` in `warmup_epochs` equal steps, ends included."""
    if epoch >= warmup_epochs:
        return final
    return warmup + (final - warmup) * epoch / max(1, warmup_epochs - 1)


def cosine_schedule(base: float, final: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Return DINO's schedule at a step: linear from 0 to `base`, both included, then half a cosine to `final`."""
    if step < warmup_steps:
        return base * step / max(1, warmup_steps - 1)
    return cosine_between(base, final, (step - warmup_steps) / max(1, total_steps - warmup_steps))


@torch.no_grad()
def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scale down every gradient whose own norm exceeds `limit`, in place. Does not wait for the device."""
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (limit / (norms + CLIP_EPS)).clamp(max=1.0).unbind())


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g v / |v|: `weight_g` `[K, 1]` and `weight_v` `[K, inputs]`.

    Directions have torch's default initial weights of a linear layer, norms are 1.
    """

    OTHER_NAMES: ClassVar[dict[str, str]] = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1))
        self.weight_v = nn.Parameter(nn.Linear(inputs, outputs, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for other, name in self.OTHER_NAMES.items():
            if prefix + other in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + other)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DINOHead(nn.Module):
    """Three linear layers with GELU, l2 normalisation, and a linear layer with weight norm: `[N, D]` to `[N, K]`.

    With `batch_norm`, each hidden layer is followed by batch norm before the GELU. The indices within `mlp` are those
    of the release.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, hidden):
            layers += [nn.Linear(width, hidden), *([BatchNormOverRanks(hidden)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.mlp.apply(initialize)
        self.last_layer = WeightNormLinear(bottleneck, outputs)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        with without_autocast(x):
            x = F.normalize(at_least_float32(x), dim=-1)
        return self.last_layer(x)


def initialize(module: nn.Module) -> None:
    """Set DINO's initial weights of a linear layer: a truncated normal of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def initialize_encoder(encoder: VisionTransformer) -> None:
    """Set DINO's initial weights. The patch embedding and the norms keep torch's."""
    encoder.apply(initialize)
    for table in (encoder.pos_embed, encoder.cls_token):
        nn.init.trunc_normal_(table, std=0.02)  # type: ignore[arg-type]


def resampling_matrix(grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Return `[new L, L]`: how positions of `new_grid` mix those of `grid`, as DINO resamples them for small crops.

    Bicubic without antialiasing, with the scale (new + 0.1) / old of the release instead of new / old. As a matrix, its
    gradient is a product too, which is deterministic on GPUs.
    """
    scale = tuple((new + 0.1) / old for new, old in zip(new_grid, grid, strict=True))
    L = grid[0] * grid[1]
    places = torch.eye(L).view(1, L, *grid)  # a channel for each old position
    resampled = F.interpolate(places, scale_factor=scale, mode="bicubic")
    return resampled.view(L, -1).T.contiguous()


class DINO(Pretrainer):
    """DINO: the student predicts from all crops the teacher's output for the two large ones.

    Accumulating gradients gives the result of the larger batch, unless the head has batch norm: the centre moves once
    per update, by all its images.
    """

    Options: ClassVar[type] = DINOOptions
    options: DINOOptions
    feature_pool: ClassVar[Literal["avg", "token"]] = "token"
    encoder_prefix: ClassVar[str] = "teacher."
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    center: Tensor
    teacher_temp: Tensor
    _teacher_sum: Tensor
    _teacher_count: Tensor
    _to_local: Tensor

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        options = self.options
        self.images_together = "ranks" if options.head_batch_norm else ""
        initialize_encoder(self)
        self.head = self._make_head()  # type: ignore[assignment]
        self.teacher = plain_encoder(self)
        self.teacher.head = self._make_head()  # type: ignore[assignment]
        self.teacher.requires_grad_(False)
        copy_into(self.teacher, self)
        set_drop_path(self.blocks, options.drop_path)
        self.register_buffer("center", torch.zeros(1, options.out_dim))
        # Not part of the state: functions of the step, and what has been collected since the last update.
        self.register_buffer("teacher_temp", torch.tensor(options.teacher_temp), persistent=False)
        self.register_buffer("_teacher_sum", torch.zeros(1, options.out_dim), persistent=False)
        self.register_buffer("_teacher_count", torch.zeros(()), persistent=False)
        self._prepare_local_crops()
        self._momentum = options.momentum
        self._first_weight_decay: float | None = None

    def _make_head(self) -> DINOHead:
        options = self.options
        return DINOHead(
            self.embed_dim,
            options.out_dim,
            options.head_hidden_dim,
            options.head_bottleneck_dim,
            options.norm_last_layer,
            options.head_batch_norm,
        )

    def _prepare_local_crops(self) -> None:
        if not self.options.local_crops:
            return
        try:
            grid = patch_grid(self.options.local_size, self.patch_size)
        except ValueError as problem:
            raise ValueError(f"local_size: {problem}") from problem
        matrix = torch.empty(0) if grid == self.grid else resampling_matrix(self.grid, grid)
        self.register_buffer("_to_local", matrix.to(self.pos_embed.device), persistent=False)

    def views(self, min_scale: float, hflip: float) -> tuple[Crop, ...]:
        options = self.options
        common = {"hflip": hflip, "blur_sigma": options.blur_sigma, **JITTER}
        side = (options.local_size, options.local_size)
        crops = (
            Crop(self.input_size, (min_scale, 1.0), blur=1.0, **common),
            Crop(self.input_size, (min_scale, 1.0), blur=0.1, solarize=0.2, **common),
        )
        return (
            (*crops, Crop(side, options.local_scale, options.local_crops, blur=0.5, **common))
            if options.local_crops
            else crops
        )

    def resized(self, before: tuple[int, int]) -> None:
        self.teacher.set_input_size(self.input_size)
        self.teacher.requires_grad_(False)
        self._prepare_local_crops()

    # ---- schedules, gradients, teacher and centre

    def before_step(self, progress: Progress) -> None:
        options = self.options
        if progress.step == 0:  # weights may have been loaded since the model was built
            copy_into(self.teacher, self)
        self._momentum = cosine_between(options.momentum, 1.0, progress.fraction)
        temperature = teacher_temperature(
            int(progress.epoch), options.warmup_teacher_temp, options.teacher_temp, options.warmup_teacher_temp_epochs
        )
        self.teacher_temp.fill_(temperature)
        self._teacher_sum.zero_()
        self._teacher_count.zero_()
        for group in progress.param_groups:
            if any(parameter.ndim > 1 for parameter in group["params"]):  # biases and norms are not decayed
                if self._first_weight_decay is None:
                    self._first_weight_decay = group["weight_decay"]
                group["weight_decay"] = cosine_between(
                    self._first_weight_decay, options.weight_decay_end, progress.fraction
                )

    def adjust_gradients(self, progress: Progress) -> None:
        trained = {name: p for name, p in self.named_parameters() if p.grad is not None}
        if self.options.clip_param:
            clip_each([p.grad for p in trained.values()], self.options.clip_param)  # type: ignore[misc]
        if progress.epoch < self.options.freeze_last_layer:
            for name, parameter in trained.items():
                if name.startswith(LAST_LAYER):
                    parameter.grad = None

    @torch.no_grad()
    def after_update(self, taken: Tensor) -> None:
        move_average(self.teacher, self, self._momentum, taken)
        moved = move_center(self.center, self._teacher_sum / self._teacher_count, self.options.center_momentum)
        self.center.copy_(torch.where(taken & (self._teacher_count > 0), moved, self.center))

    # ---- the objective

    def class_tokens(self, encoder: VisionTransformer, images: Tensor) -> Tensor:
        """Return the class tokens `[N, D]` after the last norm, from large or small crops."""
        patches = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
        table: Tensor = encoder.pos_embed  # type: ignore[assignment]
        start, positions = encoder.cls_token + table[:, :1], table[:, 1:]  # type: ignore[operator]
        if (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size) != self.grid:
            with without_autocast(positions):
                positions = self._to_local @ positions
        x = torch.cat([start.expand(len(images), -1, -1), patches + positions], dim=1)
        x, _ = self.run_blocks(encoder.blocks, x)
        return encoder.norm(x)[:, 0]

    def student_scores(self, views: Sequence[Tensor]) -> Tensor:
        """Return `[V * N, K]`; the views of one size pass the encoder together."""
        kinds = [views[:GLOBAL_CROPS], views[GLOBAL_CROPS:]]
        return self.head(torch.cat([self.class_tokens(self, torch.cat(list(same))) for same in kinds if same]))

    @torch.no_grad()
    def teacher_scores(self, views: Sequence[Tensor]) -> Tensor:
        """Return `[2 * N, K]` from the large views."""
        return self.teacher.head(self.class_tokens(self.teacher, torch.cat(list(views[:GLOBAL_CROPS]))))

    def _check_views(self, images: Any) -> None:
        options = self.options
        expected = [self.input_size] * GLOBAL_CROPS + [(options.local_size, options.local_size)] * options.local_crops
        found = [tuple(view.shape[-2:]) for view in images] if isinstance(images, list | tuple) else None
        if found != expected:
            raise ValueError(
                f"DINO takes a list of {GLOBAL_CROPS} views of {self.input_size[0]} x {self.input_size[1]} pixels and "
                f"{options.local_crops} of {options.local_size}, found {found or f'a tensor {list(images.shape)}'}"
            )

    def forward(  # type: ignore[override]
        self, images: list[Tensor], labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and `distillation`, which are the same, of V views `[N, C, H, W]` each, the large first."""
        self._check_views(images)
        teacher = at_least_float32(self.teacher_scores(images))
        loss = distillation_loss(
            self.student_scores(images), teacher, self.center, self.options.student_temp, self.teacher_temp
        )
        if self.training:
            self._teacher_sum += mean_over_ranks(teacher.mean(dim=0, keepdim=True))
            self._teacher_count += 1
        return {"loss": loss, "distillation": loss}

    def encode(self, images: Tensor) -> Tensor:
        """Return the teacher's features: `[N, 1 + L, D]` after the last norm, class token first."""
        self._check_images(images)
        return self.teacher.forward_features(images)
