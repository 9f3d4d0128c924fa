"""Apply a trained segmenter or classifier to images: masks with overlays, or a table of classes.

    python -m tools.predict output/segment PHOTOS                    # a segmenter: masks/ and overlays/ in a new folder
    python -m tools.predict output/finetune a.jpg b.jpg              # a classifier: predictions.csv
    python -m tools.predict output/finetune/checkpoints/best.pth PHOTOS MORE/c.png --output DIR

IMAGES are files and folders, which are searched recursively. A segmenter writes for each image a mask of the same size
(a PNG file of class indices from 0, with a palette) and the image overlaid with the colours of the classes;
classes.csv lists indices, names and colours. A classifier writes a row for each image: its file, the class with the
highest probability, and the probabilities of all classes. Images are preprocessed as in the evaluation of the run, with
its `value_range`. EXIF orientation is applied, so that masks match the images as viewers show them. Files that cannot
be read are listed in bad_images.txt and reported at the end.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.depth import with_range
from data.files import require_free, write_text
from data.folders import walk
from data.images import HEIF, HEIF_EXTRA, BadImage, is_image_name, read_stored
from data.loader import EvalSamples, eval_batches, eval_transform
from data.sources import Names, Source
from tools import encoder as encoders
from tools import segmenter as segmenters
from tools.command import reports_errors, require_at_least
from tools.encoder import Encoder
from util import checkpoint
from util.distributed import pick_device
from util.logging import log_to_terminal
from util.overlay import colours, overlay, to_rgb

log = logging.getLogger(__name__)

MASKS, OVERLAYS, CLASSES, TABLE, BAD = "masks", "overlays", "classes.csv", "predictions.csv", "bad_images.txt"


def find_images(paths: Sequence[str], *, by_stem: bool) -> dict[str, str]:
    """Find the image files in `paths`; files in folders that are left out are logged.

    Args:
        paths: Image files, and folders that are searched recursively.
        by_stem: Whether the results are named without the suffix of the image.

    Returns:
        The file of each image by its name: the path relative to the folder, or the file name.

    Raises:
        ValueError: For a path that does not exist, a folder without images, or two images with the same result name.
    """
    found: dict[str, str] = {}
    results: dict[str, str] = {}
    for path in paths:
        for name, file in _images_in(path):
            result = os.path.splitext(name)[0] if by_stem else name
            if result not in results:
                results[result] = found[name] = file
            elif os.path.realpath(results[result]) != os.path.realpath(file):
                raise ValueError(
                    f"{results[result]} and {file} would both be written as {result}: give them in two commands, each "
                    "with an --output of its own"
                )
    return found


def _images_in(path: str) -> list[tuple[str, str]]:
    """Return the name and the file of each image in a folder, or those of an image file."""
    if os.path.isdir(path):
        found = walk(path)
        for line in found.left_out():
            log.warning("%s: left out: %s", path, line)
        if heif := sum(found.other[suffix] for suffix in HEIF):
            log.warning("%s: %d %s", path, heif, HEIF_EXTRA)
        if not found.names:
            raise ValueError(f"no images in {path}")
        return [(name, os.path.join(path, name)) for name in found.names]
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist")
    if not is_image_name(os.path.basename(path)):
        heif_hint = f". {HEIF_EXTRA}" if path.lower().endswith(HEIF) else ""
        raise ValueError(f"{path} is not named like an image (.jpg .png .tif .npy ...){heif_hint}")
    return [(os.path.basename(path), path)]


def open_images(files: dict[str, str], channels: int, value_range: Sequence[float]) -> Source:
    """Open image files as a source of uint8 images, scaled as the model's training images were."""
    paths = Names(files.values())
    source = Source(Names(files), functools.partial(_read, paths, channels), path=functools.partial(_path, paths))
    return with_range(source, channels, value_range)


def _path(paths: Sequence[str], number: int) -> str:
    return paths[number]


def _read(paths: Sequence[str], channels: int, number: int) -> np.ndarray:
    return read_stored(paths[number], channels)


# ---- segmenters -----------------------------------------------------------------------------------------------------


def write_mask(mask_HW: Tensor, classes: int, path: Path) -> None:
    """Write class indices `[H, W]` as a PNG file with a palette, or as 16-bit grey for more than 256 classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if classes > 256:
        Image.fromarray(mask_HW.numpy().astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(mask_HW.numpy().astype(np.uint8), "P")
    picture.putpalette(colours(classes)[:-1].flatten().tolist())
    picture.save(path)


def segment(trained: segmenters.Trained, source: Source, output: Path) -> list[BadImage]:
    """Write the masks and overlays of all images; return those that could not be read."""
    classes = len(trained.class_names)
    bad = []
    for number, name in enumerate(source.names):
        try:
            image_HWC = source.read(number)
        except BadImage as error:
            bad.append(error)
            continue
        mask_HW = trained.predict(image_HWC)
        stem = os.path.splitext(name)[0]
        write_mask(mask_HW, classes, output / MASKS / f"{stem}.png")
        image_CHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1) / 255
        none, one = (0.0,) * len(image_CHW), (1.0,) * len(image_CHW)
        drawn = overlay(to_rgb(image_CHW, none, one), mask_HW, classes)
        (output / OVERLAYS / stem).parent.mkdir(parents=True, exist_ok=True)
        pixels = (drawn * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(output / OVERLAYS / f"{stem}.png")
    palette = colours(classes).tolist()
    rows = [(number, name, "#{:02x}{:02x}{:02x}".format(*palette[number]))
            for number, name in enumerate(trained.class_names)]  # fmt: skip
    write_table(output / CLASSES, ("number", "class", "colour"), rows)
    return bad


# ---- classifiers ----------------------------------------------------------------------------------------------------


def classify(
    encoder: Encoder, source: Source, device: torch.device, batch_size: int, num_workers: int
) -> tuple[list[int], np.ndarray]:
    """Compute class probabilities.

    Returns:
        The indices of the readable images, and the probabilities float32 `[n, K]`.
    """
    encoder.model.to(device)
    mean, std = encoder.statistics
    transform = eval_transform(encoder.image_shape[1:], encoder.crop_share, encoder.eval_crop)
    samples = EvalSamples(source, transform, mean=mean, std=std)
    numbers: list[int] = []
    parts = []
    for batch in eval_batches(samples, batch_size=batch_size, num_workers=num_workers):
        logits = encoder.compute_outputs(batch.to(device).images)["logits"]
        parts.append(logits.float().softmax(dim=1).cpu().numpy())
        numbers += batch.index.tolist()
    return numbers, np.concatenate(parts)


def find_reasons(source: Source, numbers: Sequence[int]) -> list[BadImage]:
    """Read all images except `numbers` again, and return why they cannot be read."""
    bad = []
    for number in sorted({*range(len(source))} - {*numbers}):
        try:
            source.read(number)
        except BadImage as error:
            bad.append(error)
        else:
            bad.append(BadImage(source.names[number], "could be read only at the second attempt: run the tool again"))
    return bad


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_classes(encoder: Encoder, source: Source, numbers: list[int], shares_NK: np.ndarray, path: Path) -> None:
    """Write the file, the most probable class with its probability, and all probabilities of each image."""
    names = encoder.class_names or [str(number) for number in range(encoder.classes)]
    rows = [
        (source.names[number], names[shares.argmax()], f"{shares.max():.6f}", *(f"{share:.6f}" for share in shares))
        for number, shares in zip(numbers, shares_NK, strict=True)
    ]
    write_table(path, ("file", "predicted", "probability", *names), rows)


# ---- the program ----------------------------------------------------------------------------------------------------


def predict(
    model: Path,
    images: Sequence[str],
    output: Path | None,
    device: torch.device,
    *,
    batch_size: int,
    num_workers: int,
    num_heads: int = 0,
) -> str:
    """Write the predictions of a run's model for images, and return a summary.

    `num_heads` is the number of attention heads of a classifier of another program; 0: not given.

    Raises:
        ValueError: If the model does not predict classes, or the images or the output folder cannot be used.
    """
    file = checkpoint.find_file(model)
    weights = checkpoint.load_weights(file)
    program = checkpoint.program_at(file)
    if program == "pretrain" or (program in ("", "finetune") and "head.weight" not in weights):
        raise ValueError(
            f"{file} is an encoder without a classification head: fine-tune it first (main_finetune.py, "
            "main_segment.py), or compute its features with tools.embed"
        )
    if program == "probe":
        raise ValueError(
            f"{file} is a linear probe, which holds no encoder: fine-tune the encoder with main_finetune.py to predict"
        )
    if program == "segment" and num_heads:
        raise ValueError("num_heads does not apply to a segmenter, whose run states it: omit --num_heads")
    output = output or checkpoint.find_run(file) / "predictions"
    require_free(output)
    files = find_images(images, by_stem=program == "segment")
    if program == "segment":
        trained = segmenters.load(file)
        source = open_images(files, trained.options.in_chans, trained.options.value_range)
        trained.model.to(device)
        output.mkdir(parents=True, exist_ok=True)
        errors = segment(trained, source, output)
        what = f"{MASKS}/ and {OVERLAYS}/ of {len(trained.class_names)} classes, which {CLASSES} lists"
    else:
        encoder = encoders.load(file, num_heads=num_heads)
        source = open_images(files, encoder.image_shape[0], encoder.value_range)
        numbers, shares_NK = classify(encoder, source, device, batch_size, num_workers)
        output.mkdir(parents=True, exist_ok=True)
        write_classes(encoder, source, numbers, shares_NK, output / TABLE)
        errors = find_reasons(source, numbers)
        what = f"{TABLE}, {encoder.classes} classes"
    bad = [(files.get(error.path, error.path), error.reason) for error in errors]  # the scaling states only the name
    if bad:
        write_text(output / BAD, "".join(f"{path}\t{reason}\n" for path, reason in bad))
    if len(bad) == len(source):
        raise ValueError(f"not one of {len(bad)} images can be read: {': '.join(bad[0])}")
    left_out = f"; {len(bad)} could not be read and are listed in {BAD}, such as {bad[0][0]}" if bad else ""
    return f"Written: {output}\n  {len(source) - len(bad)} images: {what}{left_out}\n"


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT", help="of main_segment.py or main_finetune.py")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, and folders of any depth")
    parser.add_argument("--output", type=Path, help="a new folder (default: predictions in the run's folder)")
    parser.add_argument("--num_heads", type=int, default=0, help="attention heads, for weights of other programs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time, of a classifier")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that load images, of a classifier")
    words = parser.parse_args(argv)
    log_to_terminal(True)
    require_at_least(words, batch_size=1, num_workers=0)
    device = pick_device(words.device)
    how = {"batch_size": words.batch_size, "num_workers": words.num_workers, "num_heads": words.num_heads}
    sys.stdout.write(predict(words.model, words.images, words.output, device, **how))
    return 0


if __name__ == "__main__":
    sys.exit(main())
