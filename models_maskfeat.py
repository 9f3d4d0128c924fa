"""MaskFeat: histograms of oriented gradients of hidden patches are predicted from the rest of the image.

Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022. Rectangles of patches are
replaced by a learned token; one linear layer on the encoder's last norm predicts the histograms, 108 values for a patch
of 16 x 16 pixels with 3 channels. The loss is the mean squared difference over hidden patches.

Differences from the release: positions are fixed sine-cosine instead of learned, as for all methods here, and so are
the encoder's initial weights (xavier instead of truncated normal); the last norm is the encoder's `norm`, where export
and fine-tuning read it, while the release keeps it in its head. The function computed is the same.
"""

from typing import ClassVar

import torch
from torch import nn

from models_simmim import BlockMaskedViT
from models_targets import HOG, Target
from options.maskfeat import MaskFeatOptions


class MaskFeat(BlockMaskedViT):
    """Replace blocks, predict HOG."""

    Options: ClassVar[type] = MaskFeatOptions
    options: MaskFeatOptions
    smallest_share: ClassVar[float] = 1 / 5  # 15 of 78 patches

    def make_target(self) -> Target:
        return HOG(self.patch_size, self.in_chans)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Set the usual initial weights, and those of the paper in the layer that predicts."""
        super().init_weights(mode, needs_reset)
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)
