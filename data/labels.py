"""Labels given as text, in lists and in archives: class indices or class names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.folders import normal, some

LARGEST_LABEL = 1_000_000  # larger numbers are ids, not class indices
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
SEVERAL = re.compile(r".*[|;].*|\d+([\s,]+\d+)+", re.DOTALL)  # labels of one image


@dataclass
class Labels:
    """The label of each image.

    numbers  int64 `[n]`, or None if images have several labels
    classes  class names
    problem  reason why no classifier can be trained on them, with the option that resolves it, or ""
    notes    messages for the user
    """

    numbers: np.ndarray | None
    classes: list[str] | None
    problem: str = ""
    notes: list[str] = field(default_factory=list)


def several(label: str) -> str:
    """Return the message for an image with several labels."""
    return f"several labels of one image ({label}): classifiers here are trained on one class for each image"


def read_labels(words: Sequence[str], where: str, label_offset: int | None = None) -> Labels:
    """Convert labels given as text to class indices.

    Integers are class indices after `label_offset` is subtracted; names are numbered in alphabetical order.

    Args:
        where: The source of the labels, for messages.
        label_offset: Number of the first class. None is 0, but then no classifier can be trained if no label is 0.

    Raises:
        ValueError: If labels are not class indices: negative numbers, fractions or ids.
    """
    given = [normal(word) for word in words]
    distinct = sorted(set(given))
    if joined := next((word for word in distinct if SEVERAL.fullmatch(word)), ""):
        problem = f"{where}: {several(joined)}"
        return Labels(None, None, f"{problem}. Use one class each, or join names by another character")
    if all(word.isdecimal() for word in distinct):
        return _numbers(given, where, label_offset)
    wrong = [word for word in distinct if not word or (NUMBER.fullmatch(word) and not word.isdecimal())]
    if wrong:
        raise ValueError(f"{where}: the label {wrong[0]!r} is neither the number of a class (0, 1, ...) nor a word")
    if label_offset:
        raise ValueError(f"label_offset {label_offset}: the labels in {where} are words, such as {distinct[0]!r}")
    number = {name: label for label, name in enumerate(distinct)}
    notes = [f"labels are words, numbered in alphabetical order: {some(distinct)}"]
    if digits := [word for word in distinct if word.isdecimal()]:
        notes.append(f"{len(digits)} of {len(distinct)} labels are numbers beside words and are used as words")
    folded = Counter(word.casefold() for word in distinct)
    if capitals := [word for word in distinct if folded[word.casefold()] > 1]:
        notes.append(f"classes whose names differ in capitals alone: {some(capitals)}")
    return Labels(np.array([number[word] for word in given], np.int64), distinct, notes=notes)


def _numbers(words: Sequence[str], where: str, label_offset: int | None) -> Labels:
    labels = np.array([int(word) for word in words], np.int64)
    low, high = int(labels.min()), int(labels.max())
    if high > LARGEST_LABEL:
        raise ValueError(f"{where}: label {high} is too large for the number of a class")
    if label_offset is not None and low < label_offset:
        raise ValueError(f"label_offset {label_offset}: {where} hold the label {low}")
    labels -= label_offset or 0
    classes = [str(label + (label_offset or 0)) for label in range(labels.max() + 1)]
    missing = [name for name, count in zip(classes, np.bincount(labels), strict=True) if not count]
    problem, notes = "", []
    if label_offset is None and low > 0:
        problem = (
            f"{where}: labels are {low} to {high} and none is 0. --label_offset {low} makes {low} the first class; "
            "--label_offset 0 keeps classes without images"
        )
    if missing:
        notes.append(f"{len(missing)} of {len(classes)} class numbers have no image: {some(missing)}")
    return Labels(labels, classes, problem, notes)
