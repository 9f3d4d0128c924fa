"""U-MAE: keep the images' features from collapsing onto each other.

Zhang et al., "How Mask Matters: Towards Theoretical Understandings of Masked Autoencoders", NeurIPS 2022. The term is
the mean squared cosine of the features of any two images of a step, on all ranks, each with itself included: between
1 / M for M orthogonal features and 1 for equal ones.

N images of this rank   M images of all ranks   D encoder channels
"""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from models_mae import (
    MaskedImageModel,
    Term,
    View,
    at_least_float32,
    mean_over_ranks,
    without_autocast,
)
from options.u_mae import UniformityOptions


def uniformity(features: Tensor) -> Tensor:
    """The mean of cos(f_i, f_j)^2 over all pairs i, j of the features `[N, D]` of all ranks; float32 at least.

    With F the unit features as rows, the squares of F F^T, M x M, have the sum of those of F^T F, D x D. The latter is
    a sum over images, so ranks need only add theirs up; gradients reach the features of all of them.
    """
    with without_autocast(features):
        unit_ND = F.normalize(at_least_float32(features), dim=-1)
        second_moment_DD = mean_over_ranks(unit_ND.T @ unit_ND / len(unit_ND))
        return second_moment_DD.square().sum()


class UniformityTerm(Term):
    """The mean squared cosine between the features of the step's images."""

    name: ClassVar[str] = "uniformity"
    Options: ClassVar[type] = UniformityOptions
    options: UniformityOptions
    images_together = "ranks"

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        if self.options.pool == "patches":
            return uniformity(view.latent[:, 1:].mean(dim=1))
        class_ND = view.latent[:, 0]
        return uniformity(model.norm(class_ND) if self.options.pool == "class_released" else class_ND)
