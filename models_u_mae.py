"""U-MAE: a uniformity term that prevents the collapse of the images' features.

Zhang et al., "How Mask Matters: Towards Theoretical Understandings of Masked Autoencoders", NeurIPS 2022. The term is
the mean squared cosine similarity over all pairs of images of a step, on all ranks, pairs of an image with itself
included: 1 / M for M orthogonal features, 1 for equal ones.

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
    """Return the mean of cos(f_i, f_j)^2 over all pairs i, j of the features of all ranks.

    With F the normalised features as rows, F F^T (M x M) and F^T F (D x D) have the same sum of squares. The latter is
    a sum over images, which the ranks add up; gradients reach the features of all ranks.

    Args:
        features: `[N, D]`, those of this rank.

    Returns:
        A scalar, in float32 or a wider type.
    """
    with without_autocast(features):
        unit_ND = F.normalize(at_least_float32(features), dim=-1)
        second_moment_DD = mean_over_ranks(unit_ND.T @ unit_ND / len(unit_ND))
        return second_moment_DD.square().sum()


class UniformityTerm(Term):
    """Mean squared cosine similarity between the features of the images of a step."""

    name: ClassVar[str] = "uniformity"
    Options: ClassVar[type] = UniformityOptions
    options: UniformityOptions
    images_together = "ranks"

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        if self.options.pool == "patches":
            return uniformity(view.latent[:, 1:].mean(dim=1))
        class_ND = view.latent[:, 0]
        return uniformity(model.norm(class_ND) if self.options.pool == "class_released" else class_ND)
