"""Options of MoCo-v3."""

from __future__ import annotations

from dataclasses import dataclass

from options.schema import Options, require, result, shape


@dataclass(frozen=True, kw_only=True)
class MoCoV3Options(Options):
    """Options of MoCo-v3."""

    temperature: float = result(0.2, section="Method")
    """Temperature of the contrastive loss."""
    momentum: float = result(0.99)
    """Share of its weights that the key encoder keeps at the first update; it rises to 1 along half a cosine."""
    freeze_patch_embed: bool = result(True)
    """Leave the patch embedding at its random initial weights, which the paper found to train more stably."""
    proj_hidden_dim: int = shape(4096)
    """Width of the hidden layers of projector and predictor."""
    proj_dim: int = shape(256)
    """Channels of the vectors that the loss compares."""
    blur_sigma: tuple[float, float] = result((0.1, 2.0))
    """Range in pixels of the Gaussian blur's standard deviation; scale it with the image size."""

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "momentum")
        self._at_least(1, "proj_hidden_dim", "proj_dim")
        require(self.temperature > 0, "must be more than 0", "temperature")
        low, high = self.blur_sigma
        require(0 < low <= high, "must be two positive numbers, the smaller first", "blur_sigma")
