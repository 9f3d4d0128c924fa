"""SupMAE: also classify the image from its visible patches.

Liang et al., "SupMAE: Supervised Masked Autoencoders Are Efficient Vision Learners", 2022. A small head predicts the
class from the mean of the encoded visible patches; its cross-entropy, at a high temperature, is added to the loss.

N images   D encoder channels
"""

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import MaskedImageModel, Term, View, at_least_float32
from models_vit import initialize
from options.sup_mae import LabelOptions

IMAGENET_CLASSES = 1000


class LabelTerm(Term):
    """Cross-entropy of a head on the mean visible patch: linear, batch norm, ReLU, linear.

    The batch norm uses the statistics of the images of one forward pass on one device, as in the release. It has no
    running statistics: the head is used for this loss only, and a refused update would change them.
    """

    name: ClassVar[str] = "label"
    Options: ClassVar[type] = LabelOptions
    options: LabelOptions
    needs_labels = True
    needs_two_images = True
    images_together = "device"

    def attach(self, model: MaskedImageModel) -> None:
        """Create the head, with ImageNet's number of classes until that of the data is known."""
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
                f"--terms.label.classes {classes}, or 0 for the number in the data"
            )

    def logits(self, view: View) -> Tensor:
        """Return the logits `[N, classes]` for the mean of the encoded patches, without the class token."""
        return self.head(view.latent[:, 1:].mean(dim=1))

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        assert view.labels is not None  # checked by the model
        return F.cross_entropy(at_least_float32(self.logits(view)) / self.options.temperature, view.labels)
