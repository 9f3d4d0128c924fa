"""Options of NoR-MAE's neighbor term."""

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, get_type_hints

from options.schema import require_choice, require_number

Border = Literal["natural", "wrap"]
Relation = Literal["off_diagonal", "off_diagonal_squared", "diagonal", "token_off_diagonal", "alignment"]
Normalize = Literal["token", "feature", "none"]


@dataclass(frozen=True)
class NeighborOptions:
    """Options of the neighbour term."""

    weight: float = 5e-5
    """The paper's lambda. With normalised tokens the correlation of the predictions has the factor weight x (P - 1)."""
    cnp: Literal["closest", "released"] = "closest"
    """Companion of a patch: `closest`, its most similar neighbour; `released`, the selection of the released code,
    which also sets `border`, `similarity` and `normalize` (on with norm_pix_loss, otherwise off)."""
    border: Literal["auto", "natural", "wrap"] = "auto"
    """Border of the grid: `natural`, 3 neighbours in a corner and 5 at an edge; `wrap`, 8 everywhere as on a torus;
    `auto`, natural unless cnp is released."""
    similarity: Literal["embed_pos", "embed", "pixels"] = "embed_pos"
    """What is compared to select companions: patch embeddings with positions, without positions, or pixels."""
    companion: Literal["closest", "random"] = "closest"
    """Input of the second pass: the companions, or the patches of an independent random mask."""
    relation: Relation = "off_diagonal"
    """Relation of the two predictions that is minimised; `alignment` is the supplement's NoA."""
    normalize: Normalize = "token"
    """Normalisation of both predictions: each token, each feature over images and patches, or none."""
    space: Literal["pixels", "embedding"] = "pixels"
    """What is related: predicted pixels, or the output of the decoder's norm."""
    tokens: Literal["all", "visible", "masked"] = "all"
    """Patches whose predictions are related."""
    fraction: float = 1.0
    """Share of the images for which the term is computed, to save time. With fraction = k/g, k of every g consecutive
    images of an update are drawn at random: 0.25 is 1 of 4, 0.3 is 3 of 10. The expected value and gradient of the term
    do not change; with B images in an update its variance increases by (g/k - 1)/B times the variance between images.
    If batch_size is not a multiple of g, round(fraction x batch_size) images of each batch are drawn, at least 1, and
    the result depends on batch_size."""

    def __post_init__(self) -> None:
        require_number("weight", self.weight)
        require_number("fraction", self.fraction)
        hints = get_type_hints(type(self))
        for option in fields(self):
            if option.name not in ("weight", "fraction"):
                require_choice(option.name, getattr(self, option.name), hints[option.name])
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction:g}; it must be more than 0 and at most 1")
        if self.fraction < 1 and self.together:
            raise ValueError(
                f"fraction is {self.fraction:g}; with {self.together} the term is no mean over images, so a share of "
                "them would have another expected value: use fraction 1"
            )
        if self.border == "auto":
            object.__setattr__(self, "border", "wrap" if self.cnp == "released" else "natural")
        if self.cnp == "released":
            fixed = {"border": "wrap", "similarity": "embed_pos", "companion": "closest", "normalize": "token"}
            for name, value in fixed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"{name} is {getattr(self, name)!r}; with cnp released it can only be {value!r}")

    @property
    def drawn(self) -> tuple[int, int]:
        """k and g: the term is computed for k of every g consecutive images."""
        share = Fraction(self.fraction).limit_denominator(max(100, math.ceil(1 / self.fraction)))
        return share.numerator, share.denominator

    @property
    def together(self) -> str:
        """The option for which the term is not a mean over images, or an empty string."""
        if self.normalize == "feature":
            return "normalize 'feature'"
        return "relation 'off_diagonal_squared'" if self.relation == "off_diagonal_squared" else ""
