"""The description of an augmented crop: methods list the crops of a sample, `data/views.py` cuts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Crop:
    """Describe one kind of augmented crop of an image. `data/views.py` turns it into a transform.

    Probabilities are between 0 and 1; a probability of 0 leaves the operation out.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the share of the image's area."""
    count: int = 1
    """Crops of this kind per image."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue jitter, in random order."""
    jitter_prob: float = 0.0
    grayscale: float = 0.0
    """Probability of conversion to grey."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of its standard deviation in pixels."""
    solarize: float = 0.0
    """Probability of inverting every value above the middle."""
