"""A dataset of a few small images, for runs of about one second."""

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

EPOCHS = 3
STEPS_PER_EPOCH = {"main_pretrain": 7, "main_finetune": 7, "main_linprobe": 7}
LAST_STEP = {script: EPOCHS * steps for script, steps in STEPS_PER_EPOCH.items()}
CLASSIFIER = ["--holdout", 0.2]  # too few images to hold out: the best epoch is chosen on the 12 test images


def few(*more):
    """Return the arguments of a run on 60 images of three classes, with 12 test images, followed by `more`."""
    words = f"--dataset folder --total_batch_size 8 --epochs {EPOCHS} --data_path".split()
    return [*words, Path(_images().name), *more]


@functools.cache
def _images():
    folder, pixels = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    for number, name in enumerate("abc"):
        for split, count in (("train", 20), ("val", 4)):
            place = Path(folder.name) / split / name
            place.mkdir(parents=True)
            for image in range(count):
                shade = (pixels.integers(0, 128, (8, 8)) + 60 * number).astype(np.uint8)
                Image.fromarray(shade).save(place / f"{image:02}.png")
    return folder
