"""Weights of the classes in the loss of a classifier or a segmenter: given, or inverse to the class frequencies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data.folders import some
from data.images import BadImage
from data.sources import Source

log = logging.getLogger(__name__)

BALANCED = "balanced"
MOST_LISTED = 20  # classes in the log


def balanced_weights(counts_K: np.ndarray) -> np.ndarray:
    """Compute the weight n / (K' n_k) of each class, for n_k samples of class k, n in total, and K' present classes.

    This is scikit-learn's `compute_class_weight("balanced", ...)`; a class without samples has weight 1.

    Args:
        counts_K: Images or pixels of each class.
    """
    present = counts_K > 0
    weights = np.ones(len(counts_K))
    weights[present] = counts_K.sum() / (present.sum() * counts_K[present])
    return weights


def resolve_class_weights(
    words: Sequence[str], names: Sequence[str], count: Callable[[], np.ndarray], unit: str
) -> list[float] | None:
    """Convert the option `class_weights` to a weight for each class, and log the weights.

    Args:
        words: Values of the option: one number for each class, `balanced`, or nothing.
        names: Class names.
        count: Function that returns the frequency of each class in the training data; called for `balanced` only.
        unit: What is counted, `images` or `pixels`.

    Returns:
        The weights; None if the option is empty.

    Raises:
        ValueError: If the number of weights differs from the number of classes.
    """
    if not words:
        return None
    if list(words) == [BALANCED]:
        counts_K = count()
        weights = balanced_weights(counts_K)
        how = f"balanced, {unit} of all classes / (classes that occur x {unit} of the class)"
        listed = [
            f"{name} {weight:.4g} ({n:,} {unit})" for name, weight, n in zip(names, weights, counts_K, strict=True)
        ]
    else:
        weights, how = np.array([float(word) for word in words]), "as given"
        if len(weights) != len(names):
            raise ValueError(
                f"class_weights: {len(weights)} weights for {len(names)} classes ({', '.join(names[:10])}"
                f"{' ...' * (len(names) > 10)}): give one for each, in this order, or `{BALANCED}`"
            )
        listed = [f"{name} {weight:.4g}" for name, weight in zip(names, weights, strict=True)]
    log.info("class weights (%s): %s", how, some(listed, MOST_LISTED))
    return weights.tolist()


def image_weights(words: Sequence[str], source: Source) -> list[float] | None:
    """Return the class weights for labelled training images; see `resolve_class_weights`."""
    names, labels = source.classes or [], source.labels
    assert labels is not None
    return resolve_class_weights(words, names, lambda: np.bincount(labels, minlength=len(names)), "images")


def pixel_weights(words: Sequence[str], source: Source, threads: int = 1) -> list[float] | None:
    """Return the class weights for training images with masks; see `resolve_class_weights`."""
    return resolve_class_weights(words, source.classes or [], lambda: count_pixels(source, threads), "pixels")


def count_pixels(source: Source, threads: int) -> np.ndarray:
    """Count the pixels of each class in all masks of a source, int64 `[K]`."""
    if source.class_pixels is not None:
        return source.class_pixels.sum(axis=0)
    classes = len(source.classes or [])

    def count(number: int) -> np.ndarray:
        try:
            mask_HW = source.read(number).mask_HW
        except BadImage:  # reported when training reads it
            return np.zeros(classes, np.int64)
        return np.bincount(mask_HW[mask_HW >= 0], minlength=classes)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return sum(pool.map(count, range(len(source))), np.zeros(classes, np.int64))
