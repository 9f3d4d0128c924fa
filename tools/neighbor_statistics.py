"""Measure how an autoencoder treats closest neighbours: does its encoder separate them, do its predictions agree?

    python -m tools.neighbor_statistics output/nor --data_path IMAGES --output_dir output/nor/neighbors

The images are encoded twice, from the visible patches and from their closest neighbours (CNPs, chosen by pixels so that
they do not depend on the model). `result.json` contains means over images:

    separation        share of the variance of the encoded tokens between groups of patches with the same CNP, corrected
                      for chance (tools/figures/separation.py)
    cosine_companion  cosine of a visible patch and its CNP, after the encoder
    cosine_other      cosine of a visible patch and the CNPs of others
    cosine_visible    cosine of two different visible patches
    agreement         correlation of the two predictions of a patch: from the visible patches, and from their CNPs as
                      `nor_mae` selects them; 1 if they are equal, 0 if they are unrelated
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import methods
from data.files import write_json
from data.folders import NoSplit
from tools import given
from tools.command import reports_errors, require_at_least
from tools.figures import models, separation
from tools.figures.collapse import token_similarity
from tools.figures.subject import Subject, chosen, read_images
from tools.given import Trained
from util.logging import log_to_terminal

log = logging.getLogger(__name__)


def measure_encoder(subject: Subject) -> dict[str, float]:
    """Return the statistics of the encoded tokens."""
    encoded = separation.encode(subject, subject.only)
    found: dict[str, list[float]] = {"separation": [], "cosine_companion": [], "cosine_other": [], "cosine_visible": []}
    for each in encoded:
        features, groups = separation.once(each)
        if 1 < len(groups.unique()) < len(groups):
            found["separation"].append(separation.separation(features, groups))
        cosines_VV = each.visible @ each.companions.T
        V = len(cosines_VV)
        other = each.ids[:, None] != each.ids[None]
        found["cosine_companion"].append(float(cosines_VV.diagonal().mean()))
        if other.any():
            found["cosine_other"].append(float(cosines_VV[other].mean()))
        if V > 1:
            found["cosine_visible"].append(float(token_similarity(each.visible[None])))
    return {name: statistics.mean(values) for name, values in found.items() if values}


def with_diagonal(trained: Trained) -> nn.Module:
    """Return the model with the neighbour term as a probe: the sum of products of two standardised predictions.

    Raises:
        ValueError: The method has another decoder than MAE.
    """
    options: Mapping[str, Any] = trained.options
    neighbor = (options.get("terms") or {}).get("neighbor") or {}
    probe = {"weight": 1.0, "relation": "diagonal", "normalize": "token", "space": "pixels", "tokens": "all"}
    kept = {name: neighbor[name] for name in ("similarity",) if name in neighbor and neighbor.get("cnp") != "released"}
    model: Any = methods.from_options({**options, "method": "nor_mae", "terms": {"neighbor": kept | probe}})
    weights = {name: value for name, value in trained.model.state_dict().items() if not name.startswith("terms.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(f"{trained.run}: the method {options['method']} has another decoder than MAE") from None
    return model.to(trained.device).eval()


@torch.inference_mode()
def agreement(trained: Trained, subject: Subject) -> float:
    """Return the mean correlation of the predictions from visible patches and from their companions."""
    model: Any = with_diagonal(trained)
    images = subject.only.normalized(subject.pixels)
    noise = subject.noise.to(images.device)
    return float(model(images, noise=noise)["neighbor"]) / (model.target.width - 1)


def measure(trained: Trained, subject: Subject) -> dict[str, float]:
    """Return all statistics."""
    return measure_encoder(subject) | {"agreement": agreement(trained, subject)}


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what a masked autoencoder makes of closest neighbours.")
    parser.add_argument("run", type=Path, help="run folder or checkpoint of a method that predicts pixels")
    parser.add_argument("--data_path", default="", help="images (validation split if there is one); default: the run's")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--images", type=int, default=500, help="number of images (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and the masks (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    args = parser.parse_args(argv)
    require_at_least(args, images=1)
    log_to_terminal(True)
    trained = given.load(args.run, args.device)
    if "mask_ratio" not in trained.options:
        raise ValueError(f"{trained.run}: the method {trained.options['method']} masks no patches")
    try:
        source = given.source(trained, "val", args.data_path)
    except NoSplit:
        source = given.source(trained, "train", args.data_path)
    shown = models.load(str(args.run), device=args.device)
    numbers = chosen(source, args.images, args.seed)
    pixels, names = read_images(source, shown.size, numbers)
    subject = Subject([shown], pixels, names, seed=args.seed, mask_ratio=trained.options["mask_ratio"])
    found = measure(trained, subject)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "result.json", {"images": len(numbers), "updates": trained.updates, **found})
    log.info("%d images: %s", len(numbers), ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
