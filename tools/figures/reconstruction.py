"""Reconstructions of masked patches."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

from models_mae import MaskedImageModel
from tools.figures.models import FigureModel
from tools.figures.style import note, picture, short_name
from tools.figures.subject import Subject

TITLES = {
    "original": "original",
    "masked": "what the encoder sees",
    "reconstruction": "reconstruction",
    "pasted": "reconstruction + visible",
}
OF_THE_IMAGE, OF_THE_MODEL = ("original", "masked"), ("reconstruction", "pasted")
UNDONE = (
    "predicts each patch standardised; this is undone with the patch's true mean and deviation, so the brightness and "
    "contrast of hidden patches are given, and only their pattern is predicted."
)


def autoencoder(shown: FigureModel) -> MaskedImageModel:
    """Return the model. Raises ValueError if it cannot reconstruct images."""
    if not isinstance(shown.model, MaskedImageModel):
        raise ValueError(f"{shown.label} is an encoder without a decoder, which cannot reconstruct")
    if not shown.decoder_trained:
        raise ValueError(
            f"{shown.label}: the file holds an encoder without its decoder, which cannot reconstruct. "
            "MAE publishes files with the decoder under names that have `visualize` in them"
        )
    return shown.model


def reconstruction(subject: Subject) -> Figure:
    """Plot original, visible patches, and predictions of each model: of all patches, and combined with the visible
    ones."""
    made, noise = [], subject.noise
    for shown in subject.models:
        model = autoencoder(shown)
        model.mask_ratio = subject.mask_ratio
        with torch.inference_mode():
            pictures = model.pictures(shown.normalized(subject.pixels), noise=noise.to(shown.device))
        if pictures is None:
            raise ValueError(f"{shown.label} ({shown.about}) predicts no pixels, so there is no reconstruction to show")
        made.append(pictures)
    panels = [(0, name, TITLES[name]) for name in OF_THE_IMAGE]
    for number, shown in enumerate(subject.models):
        whose = "" if len(subject.models) == 1 else f"{shown.label}\n"
        panels += [(number, name, f"{whose}{TITLES[name]}") for name in OF_THE_MODEL]
    rows, columns = len(subject.pixels), len(panels)
    height, width = subject.pixels.shape[-2:]
    inches = 1.75 * columns
    figure = Figure(figsize=(inches, 1.75 * rows * height / width + 0.7), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, (number, name, title) in enumerate(panels):
        for row, pixels in enumerate(subject.displayed(subject.models[number], made[number][name])):
            picture(axes[row, column], pixels)
        axes[0, column].set_title(title)
    for row, name in enumerate(subject.names):
        axes[row, 0].set_ylabel(short_name(name))
    sentences = [f"{shown.label}: {shown.about}." for shown in subject.models]
    same = ", the same for all" if len(subject.models) > 1 else ""
    sentences.append(f"{subject.mask_ratio:.0%} of the patches hidden{same}.")
    sentences += [
        f"{shown.label} {UNDONE}" for shown in subject.models if getattr(autoencoder(shown).target, "normalize", False)
    ]
    note(figure, [*sentences, *subject.channels_note], inches)
    return figure
