"""Figure 9: predictions of segmenters for the same images, beside the true masks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from data import masks
from data.sources import Source
from engine_segment import evaluation_samples, make_windows, predicted_masks
from tools import segmenter
from tools.figures.style import note, picture, short_name
from tools.figures.subject import chosen
from util.distributed import Processes, pick_device
from util.overlay import colours, overlay

MOST_NAMES = 24  # maximum number of classes in the legend: those with the most pixels


def figure9(
    runs: Sequence[Path], *, count: int = 4, seed: int = 0, device: str = "auto", data_path: str = ""
) -> Figure:
    """Plot image, true mask and the prediction of the latest checkpoint of each run, for random test images."""
    processes = Processes(0, 1, 0, pick_device(device))
    shown: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    sentences, labels = [], []
    source: Source | None = None
    for path in runs:
        trained = segmenter.load(path)
        options = replace(trained.options, check_masks=False, data_path=data_path or trained.options.data_path)
        if source is None:
            source = masks.open_test(options, processes)
            numbers = chosen(source, count, seed)
        elif options.num_classes != len(source.classes or []):
            classes = len(source.classes or [])
            raise ValueError(f"{trained.checkpoint} has {options.num_classes} classes, the first run {classes}")
        model = trained.model.to(processes.device)
        windows = make_windows(options, model.patch)
        shown.append(
            predicted_masks(
                model,
                evaluation_samples(options, source),
                numbers,
                windows=windows,
                device=processes.device,
                autocast=contextlib.nullcontext,
            )
        )
        labels.append(trained.run.resolve().name)
        sentences.append(f"{labels[-1]}: {options.model}, {trained.updates:,} updates.")
    assert source is not None, "give at least one run"
    return _drawn(shown, labels, [source.names[number] for number in numbers], source.classes or [], sentences)


def _drawn(
    shown: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]],
    labels: Sequence[str],
    names: Sequence[str],
    classes: Sequence[str],
    sentences: Sequence[str],
) -> Figure:
    rows, columns = len(names), 2 + len(shown)
    inches = 1.9 * columns
    heights = [image.shape[1] / image.shape[2] for image, _, _ in shown[0]]
    figure = Figure(figsize=(inches, 1.9 * sum(heights) + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    pixels = torch.zeros(len(classes), dtype=torch.int64)
    for row, (image, true, _) in enumerate(shown[0]):
        predicted = [each[row][2] for each in shown]
        pictures = [image, *(overlay(image, mask, len(classes)) for mask in (true, *predicted))]
        for column, each in enumerate(pictures):
            picture(axes[row, column], each.permute(1, 2, 0).numpy())
        axes[row, 0].set_ylabel(short_name(names[row]))
        for mask in (true, *predicted):
            pixels += torch.bincount(mask[mask != masks.IGNORE].long(), minlength=len(classes))
    for column, title in enumerate(("image", "true classes", *labels)):
        axes[0, column].set_title(title)
    most = [number for number in pixels.argsort(descending=True).tolist() if pixels[number]][:MOST_NAMES]
    palette = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours(len(classes)).tolist()]
    patches = [Patch(color=palette[number], label=classes[number]) for number in most]
    figure.legend(handles=patches, loc="outside lower center", ncols=max(1, int(inches / 1.3)))
    note(figure, [*sentences, "Black: ignored."], inches)
    return figure
