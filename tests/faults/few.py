"""A few small images, for runs that are over in a second."""

import numpy as np
from PIL import Image

EPOCHS = 3
STEPS_PER_EPOCH = {"main_pretrain": 7, "main_finetune": 6, "main_linprobe": 6}
LAST_STEP = {door: EPOCHS * steps for door, steps in STEPS_PER_EPOCH.items()}
CLASSES = "abc"


def few(folder):
    """Write 60 images of three classes to train on and 12 to judge by; answers the words that make a run of them.

    A classifier's run has four of each class less to train on, which choose its best epoch.
    """
    pixels = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        for split, count in (("train", 20), ("val", 4)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for image in range(count):
                shade = (pixels.integers(0, 128, (8, 8)) + 60 * number).astype(np.uint8)
                Image.fromarray(shade).save(folder / split / name / f"{image:02}.png")
    return ["--dataset", "folder", "--data_path", folder, "--total_batch_size", 8, "--epochs", EPOCHS]


CLASSIFIER = ["--holdout", 0.2]
