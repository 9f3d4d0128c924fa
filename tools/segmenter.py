"""Load a trained segmenter for tools: the model, the options of its run, and predictions for single images.

N images   C channels   K classes   H W rows and columns of an image
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models_upernet
from data.loader import pixel_statistics
from data.segment_augment import fitted, resize_image
from data.splits import read_classes
from engine_segment import make_windows, short_side
from options import SegmentOptions, from_dict
from util import checkpoint
from util.windows import predict


@dataclass(frozen=True)
class Trained:
    """A segmenter in eval mode, the resolved options of its run, and its origin."""

    model: models_upernet.Segmenter
    options: SegmentOptions
    checkpoint: Path
    class_names: list[str]
    updates: int

    @property
    def statistics(self) -> tuple[tuple[float, ...], ...]:
        """Mean and standard deviation of each channel for normalisation, on a scale of 0 to 1."""
        return pixel_statistics(self.options.in_chans, self.options.mean, self.options.std)

    @property
    def run(self) -> Path:
        """The folder of the run, or the folder that contains the checkpoint."""
        return checkpoint.find_run(self.checkpoint)

    def normalised(self, image_HWC: np.ndarray) -> Tensor:
        """Resize an image as evaluation does and normalise it: float32 `[1, C, h, w]` on the model's device."""
        image_CHW = torch.from_numpy(np.require(image_HWC, requirements=["C", "W"])).permute(2, 0, 1)
        resized = resize_image(image_CHW, fitted(image_CHW.shape[1:], short_side(self.options)))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.statistics)
        device = self.model.decode.classify.weight.device
        return ((resized.float() / 255 - mean) / std)[None].to(device)

    @torch.inference_mode()
    def predict(self, image_HWC: np.ndarray) -> Tensor:
        """Predict the class of each pixel of an uint8 image `[H, W, C]`: int64 `[H, W]` on the CPU."""
        windows = make_windows(self.options, self.model.patch)
        scores = predict(self.model, self.normalised(image_HWC), windows, image_HWC.shape[:2])
        return scores.argmax(dim=1)[0].cpu()


def load(path: Path) -> Trained:
    """Load the segmenter of a run folder or a checkpoint, on the CPU.

    Raises:
        ValueError: If it is not a segmenter of this project.
    """
    file = checkpoint.find_file(path)
    weights, made_with = checkpoint.load_model(file, averaged=True)
    state = checkpoint.load(file) if made_with else {}
    if not made_with or checkpoint.find_program(state) != "segment":
        raise ValueError(f"{file} is not a segmenter of main_segment.py")
    options = from_dict(SegmentOptions, made_with)
    classes = len(weights["decode.classify.weight"])
    model = models_upernet.from_options(made_with, classes)
    models_upernet.load_segmenter(model, weights, made_with)
    names = read_classes(checkpoint.find_run(file))
    if len(names) != classes:
        names = [str(number) for number in range(classes)]
    return Trained(model.eval(), options, file, names, state.get("step", 0))
