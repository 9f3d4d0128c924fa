"""Options of DINO."""

from __future__ import annotations

from dataclasses import dataclass

from options.schema import Options, require, result, shape


@dataclass(frozen=True, kw_only=True)
class DINOOptions(Options):
    """Options of DINO."""

    student_temp: float = result(0.1, section="Method")
    """Temperature of the student's softmax."""
    teacher_temp: float = result(0.04)
    """Temperature of the teacher's softmax, after the warm-up."""
    warmup_teacher_temp: float = result(0.04)
    """Temperature of the teacher's softmax in the first epoch; it rises linearly."""
    warmup_teacher_temp_epochs: int = result(0)
    """Epochs over which the teacher's temperature rises to teacher_temp."""
    momentum: float = result(0.996)
    """Share of its weights that the teacher keeps at the first update; it rises to 1 along half a cosine."""
    center_momentum: float = result(0.9)
    """Share of its value that the centre of the teacher's outputs keeps at an update."""
    weight_decay_end: float = result(0.4)
    """Weight decay at the end of training; it moves from weight_decay to it along half a cosine."""
    clip_param: float = result(3.0)
    """Largest norm of the gradient of each parameter tensor, scaled down beyond it; 0: no limit."""
    freeze_last_layer: float = result(1.0)
    """Epochs in which the last layer of the student's head is not trained."""
    drop_path: float = result(0.1)
    """Stochastic depth in the student: share of the images that skip the last block; earlier blocks have less."""

    out_dim: int = shape(65536)
    """Outputs of the head (K)."""
    head_hidden_dim: int = shape(2048)
    """Width of the head's hidden layers."""
    head_bottleneck_dim: int = shape(256)
    """Width of the head's layer before the last."""
    head_batch_norm: bool = shape(False)
    """Batch norm after the head's hidden layers, over the images of all processes, as the release's use_bn_in_head.
    Small models and short runs need it."""
    norm_last_layer: bool = shape(True)
    """Fix the norm of the last layer's rows at 1; the authors train it only for small models."""

    local_crops: int = result(8)
    """Small crops per image beside the two large ones; with 0, the authors advise min_scale 0.14."""
    local_size: int = result(96)
    """Pixels of a side of the small crops."""
    local_scale: tuple[float, float] = result((0.05, 0.4))
    """Range of the share of the image's area that a small crop takes. Large crops take from min_scale to 1."""
    blur_sigma: tuple[float, float] = result((0.1, 2.0))
    """Range in pixels of the Gaussian blur's standard deviation; scale it with the image size."""

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "momentum", "center_momentum")
        self._below_one("drop_path")
        self._at_least(0, "weight_decay_end", "clip_param", "freeze_last_layer", "local_crops")
        self._at_least(0, "warmup_teacher_temp_epochs")
        self._at_least(1, "out_dim", "head_hidden_dim", "head_bottleneck_dim", "local_size")
        for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
            require(getattr(self, name) > 0, "must be more than 0", name)
        low, high = self.local_scale
        require(0 < low <= high <= 1, "must be two shares in (0, 1], the smaller first", "local_scale")
        low, high = self.blur_sigma
        require(0 < low <= high, "must be two positive numbers, the smaller first", "blur_sigma")
