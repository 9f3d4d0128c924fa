"""Options of SupMAE's label term."""

from dataclasses import dataclass

from options.schema import require_number


@dataclass(frozen=True)
class LabelOptions:
    """Options of the classification head and its loss."""

    weight: float = 0.01
    """Weight of the cross-entropy."""
    temperature: float = 10.0
    """Divisor of the logits before the cross-entropy."""
    hidden: int = 3072
    """Width of the head's hidden layer."""
    classes: int = 0
    """Number of classes; 0: as many as the training images have."""

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        require_number("classes", self.classes, 0)
        require_number("hidden", self.hidden, 1)
        require_number("temperature", self.temperature)
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be more than 0")
