"""Compute the features of all images of a folder with a trained encoder.

    python -m tools.embed output/mine PHOTOS                               # features.npz in the run's folder
    python -m tools.embed output/mine PHOTOS --split val --output val.npz
    python -m tools.embed output/finetune/checkpoints/best.pth PHOTOS      # a classifier's features and logits

The file contains, in the order of the images:

    features  float32 [n, D]   for a pretrained encoder, the average of the patch tokens after the last norm (the class
                               token for MoCo-v3 and DINO), as in all evaluations of this project; for a classifier,
                               the input of its head
    names     [n]              path of each image, relative to the folder
    labels    int64 [n]        and `classes`, their names, if there is a folder for each class
    logits    float32 [n, C]   for a classifier; `logit_classes`: class names, if the run folder has them

If the classifier has classes of these names, `classes` are `logit_classes`; otherwise those of `--split val` are the
classes of the training images, so that labels of both splits can be compared. Other names are logged.

Images that cannot be read are left out and logged.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.files import atomic_write
from data.folders import match_classes, some
from data.images import EVAL_CROPS, describe_eval_crop
from data.loader import EvalSamples, eval_batches, eval_transform
from data.sources import Source, open_source
from options.schema import read
from tools import encoder as encoders
from tools.command import reports_errors, require_at_least
from tools.encoder import Encoder
from util.distributed import pick_device
from util.logging import log_to_terminal

log = logging.getLogger(__name__)


def embed(
    encoder: Encoder,
    source: Source,
    *,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 0,
    eval_crop: str = "",
) -> dict[str, np.ndarray]:
    """Compute the arrays of the file, by name. `eval_crop` "": the value of the encoder's run."""
    encoder.model.to(device)
    mean, std = encoder.statistics
    transform = eval_transform(encoder.image_shape[1:], encoder.crop_share, eval_crop or encoder.eval_crop)
    samples = EvalSamples(source, transform, mean=mean, std=std)
    found: dict[str, list[np.ndarray]] = {}
    indices: list[int] = []
    for batch in eval_batches(samples, batch_size=batch_size, num_workers=num_workers):
        outputs = encoder.compute_outputs(batch.to(device).images)
        del outputs["tokens"]
        for name, values in outputs.items():
            found.setdefault(name, []).append(values.cpu().numpy())
        indices += batch.index.tolist()
    arrays = {name: np.concatenate(parts) for name, parts in found.items()}
    arrays["names"] = np.array([source.names[index] for index in indices])
    if source.labels is not None:
        arrays["labels"] = np.asarray(source.labels)[indices]
        arrays["classes"] = np.array(source.classes)
    if encoder.class_names:
        arrays["logit_classes"] = np.array(encoder.class_names)
    return arrays


def number_labels(source: Source, encoder: Encoder, images: str, split: str) -> Source:
    """Return the source with labels that are numbered as the classes of the model, or of the training images.

    Args:
        source: The images of `split`.
        encoder: A classifier, whose classes are used if those of the source are among them.
        images: The data that contain the split; for `val`, the classes of its training images are used otherwise.
        split: `train` or `val`.
    """
    if source.labels is None:
        return source
    if encoder.class_names:
        numbered, foreign = _numbered_by(source, encoder.class_names)
        if not foreign:
            return numbered
        log.warning(
            "labels: not the indices of the logits, do not compare them: the model has no class %s (it has %s)",
            *(some(foreign), some(encoder.class_names)),
        )
    if split == "val":
        shape, value_range = encoder.image_shape, source.value_range
        try:
            train = open_source("auto", images, "train", in_chans=shape[0], value_range=value_range)
        except ValueError as error:
            problem = str(error)
        else:
            numbered, foreign = _numbered_by(source, train.classes or [])
            if not foreign:
                return numbered
            problem = f"the training images have no {f'class {some(foreign)}' if train.classes else 'labels'}"
        log.warning("labels: not numbered as those of the training images, do not compare them: %s", problem)
    return source


def _numbered_by(source: Source, classes: Sequence[str]) -> tuple[Source, list[str]]:
    """Return the source with indices of `classes` as labels, and the names of its labels that are not among them."""
    own, labels = source.classes or [], np.asarray(source.labels)
    numbers, foreign = match_classes([own[label] for label in np.unique(labels)], classes)
    labels = np.array([numbers.get(name, -1) for name in own], np.int64)[labels]
    return replace(source, labels=labels, classes=list(classes)), foreign


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays atomically."""
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Features of images, with their names, as a NumPy file.")
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("images", help="a folder, flat or nested, or anything that --data_path of a run accepts")
    parser.add_argument("--split", default="train", choices=["train", "val"], help="of a folder that holds both")
    parser.add_argument("--output", type=Path, help="an .npz file (default: features.npz in the run's folder)")
    parser.add_argument("--input_size", help="pixels, 224 or 160x96 (default: those it was trained on)")
    parser.add_argument("--num_heads", type=int, default=0, help="attention heads, for weights of other programs")
    parser.add_argument("--eval_crop", choices=EVAL_CROPS, help="for images of the input size (default: as its run)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0)
    words = parser.parse_args(argv)
    log_to_terminal(True)
    require_at_least(words, batch_size=1, num_workers=0)
    size = read(words.input_size, tuple[int, int], "input_size") if words.input_size else None
    device = pick_device(words.device)
    encoder = encoders.load(words.model, input_size=size, num_heads=words.num_heads)
    output = words.output or encoder.run / "features.npz"
    if output.suffix != ".npz":
        raise ValueError(f"output: {output} must end in .npz, which is what is written")
    output.parent.mkdir(parents=True, exist_ok=True)
    channels, value_range = encoder.image_shape[0], encoder.value_range
    source = open_source("auto", words.images, words.split, in_chans=channels, value_range=value_range)
    source = number_labels(source, encoder, words.images, words.split)
    how = {"batch_size": words.batch_size, "num_workers": words.num_workers}
    eval_crop = words.eval_crop or encoder.eval_crop
    arrays = embed(encoder, source, device=device, eval_crop=eval_crop, **how)
    write(output, arrays)
    count, width = arrays["features"].shape
    left_out = f", {len(source) - count} could not be read" if count < len(source) else ""
    prepared = describe_eval_crop(encoder.image_shape[1:], encoder.crop_share, eval_crop)
    sys.stdout.write(
        f"Written: {output}\n  {count} images{left_out}; {width} values each: {encoder.pooling}\n  {prepared}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
