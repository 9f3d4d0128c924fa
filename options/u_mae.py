"""Options of U-MAE's uniformity term."""

from dataclasses import dataclass
from typing import Literal

from options.schema import require_choice, require_number


@dataclass(frozen=True)
class UniformityOptions:
    """Features that are compared, and the weight of the term."""

    weight: float = 0.01
    """Weight of the mean squared cosine."""
    pool: Literal["patches", "class", "class_released"] = "patches"
    """Feature of an image: `patches`, the mean of its encoded visible patches; `class`, its class token;
    `class_released`, its class token after the encoder's norm a second time, as the released code computes it."""

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        require_choice("pool", self.pool, Literal["patches", "class", "class_released"])
