"""SupMAE: the visible patches must also tell the image's class.

Liang et al., "SupMAE: Supervised Masked Autoencoders Are Efficient Vision Learners", 2022. A small head reads the class
off the mean of the encoded visible patches; its cross-entropy, at a high temperature, is added to the reconstruction.

N images   D encoder channels
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import MaskedAutoencoderViT, Term, View, at_least_float32, require_number
from models_vit import initialize

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class LabelOptions:
    """How the class is learned."""

    weight: float = 0.01
    """Weight of the cross-entropy."""
    temperature: float = 10.0
    """What the logits are divided by before the cross-entropy."""
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


class LabelTerm(Term):
    """Cross-entropy of a head on the mean visible patch: linear, batch norm, ReLU, linear.

    The batch norm has the statistics of the images that one device gets at once, as in the release. It keeps no running
    ones: the head serves this loss alone, and they would be the one part of a run's state that a refused update moves.
    """

    name: ClassVar[str] = "label"
    Options: ClassVar[type] = LabelOptions
    options: LabelOptions
    needs_labels = True
    images_together = "device"

    def attach(self, model: MaskedAutoencoderViT) -> None:
        """The head; for ImageNet's number of classes until the data's is known."""
        hidden = self.options.hidden
        self.head = nn.Sequential(
            nn.Linear(model.embed_dim, hidden),
            nn.BatchNorm1d(hidden, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(hidden, self.options.classes or IMAGENET_CLASSES),
        )
        self.head.apply(initialize)

    def learn_classes(self, classes: int) -> None:
        if self.options.classes == 0:
            self.options = replace(self.options, classes=classes)
            self.head[-1] = nn.Linear(self.options.hidden, classes)
            initialize(self.head[-1])
        elif self.options.classes != classes:
            raise ValueError(
                f"the term 'label' is for {self.options.classes} classes and the training images have {classes}: "
                f"--terms.label.classes {classes}, or 0 for whatever they have"
            )

    def logits(self, view: View) -> Tensor:
        """`[N, classes]` from the mean of the encoded patches, without the class token."""
        return self.head(view.latent[:, 1:].mean(dim=1))

    def forward(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        assert view.labels is not None  # the model has seen to it
        return F.cross_entropy(at_least_float32(self.logits(view)) / self.options.temperature, view.labels)
