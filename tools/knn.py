"""Evaluate features of an encoder: classify held-out images by their nearest neighbours.

    python -m tools.knn output/quickstart

There are three rows: raw pixels, the untrained encoder (same options, same seed), and the trained encoder. The effect
of training is the difference between the last two. Raw pixels are a strong baseline for small, centred images with the
same lighting, such as digits, and a weak one for photographs. Labels are needed. The results are written to knn.json in
the run folder, and tools/report.py shows them; with --data_path they are written to knn-NAME.json, which reports do not
show.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import methods
from data.files import write_json
from data.folders import NoSplit
from data.images import CROP_SHARE, EVAL_CROPS, describe_eval_crop
from data.sources import Source
from data.splits import align_classes, divide
from tools import classifiers, given
from tools.command import reports_errors, require_at_least
from tools.given import Trained
from util.features import encode_source, load_pixels
from util.knn import knn_accuracy
from util.logging import log_to_terminal

K, TEMPERATURE = 20, 0.07
SHARE = 0.1  # share of the training images that are queries if there are no validation images
POOLS = {"avg": "Average of the patch tokens", "token": "Class token"}

log = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor | None]


def untrained(options: Mapping[str, Any]) -> nn.Module:
    """Build the model with the initial weights of a run with these options."""
    torch.manual_seed(options["seed"])
    return methods.from_options(options)


def splits(trained: Trained, data_path: str, group_by: str = "") -> tuple[Source, Source, str]:
    """Open the bank (train) and the queries (val) with the same classes; also return a description of the queries.

    Without labelled validation images, 10% of the training images of each class are the queries; the encoder was
    trained on them without their labels.

    Raises:
        ValueError: The training images have no labels.
    """
    bank = given.source(trained, "train", data_path)
    if bank.labels is None:
        raise ValueError(f"nearest neighbours need labels, and the training images have none: {bank.problem}")
    try:
        queries = given.source(trained, "val", data_path, bank.classes)
    except NoSplit as error:
        log.warning("%s; a share of the training images are the queries instead", error)
        return *divide(bank, SHARE, 0, group_by, "queries"), "held-out training"
    if queries.labels is None:
        log.warning("the validation images have no labels (%s); training images are the queries", queries.problem)
        return *divide(bank, SHARE, 0, group_by, "queries"), "held-out training"
    return bank, align_classes(bank, queries), "validation"


def name_data(data_path: str) -> str:
    """Return the last part of the path of a data set."""
    return Path(data_path).resolve().name


def measure(
    trained: Trained,
    data_path: str = "",
    batch_size: int = 256,
    workers: int = 0,
    eval_crop: str = "",
    group_by: str = "",
) -> dict[str, Any]:
    """Return the accuracy in % of each kind of features, and a description of the protocol."""
    bank, queries, query_images = splits(trained, data_path, group_by)
    mean, std = trained.statistics
    reading: dict[str, Any] = dict(input_size=trained.options["input_size"], mean=mean, std=std)
    eval_crop = eval_crop or trained.options.get("eval_crop", "keep_size")
    reading |= dict(batch_size=batch_size, num_workers=workers, eval_crop=eval_crop)
    pool = trained.model.feature_pool

    def accuracy(bank_features: Features, query_features: Features) -> float:
        (bank_MD, bank_labels_M), (queries_ND, labels_N) = bank_features, query_features
        assert bank_labels_M is not None and labels_N is not None
        share = knn_accuracy(
            bank_MD, bank_labels_M, queries_ND, labels_N, K, TEMPERATURE, len(bank.classes or []) or None
        )
        return round(100 * share, 4)

    def evaluate_encoder(model: nn.Module) -> float:
        model = model.to(trained.device)
        parts = [encode_source(model, split, device=trained.device, pool=pool, **reading) for split in (bank, queries)]
        return accuracy(*parts)

    seen = trained.updates * trained.options["total_batch_size"]
    protocol = (
        f"Data: {name_data(data_path or trained.options['data_path'])}. "
        f"{POOLS[pool]} (or all pixels), k = {K}, temperature {TEMPERATURE}. "
        f"Bank: {len(bank):,} training images, queries: {len(queries):,} {query_images} images. "
        f"Images: {describe_eval_crop(tuple(trained.options['input_size']), CROP_SHARE, eval_crop)}. "
        f"{trained.checkpoint.name} after {trained.updates:,} updates, {seen:,} images seen."
    )
    return {
        "accuracy": {
            "raw pixels": accuracy(load_pixels(bank, **reading), load_pixels(queries, **reading)),
            "untrained encoder": evaluate_encoder(untrained(trained.options)),
            "pretrained encoder": evaluate_encoder(trained.model),
        },
        "protocol": protocol,
    }


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Evaluate features of an encoder by nearest neighbours.")
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--data_path", default="", help="labelled images, train and val (default: the run's own data)")
    parser.add_argument(
        "--eval_crop", default="", choices=EVAL_CROPS, help="for images of the input size (default: as the run)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument(
        "--group_by", default="", help="without val: keep groups of images together, `folder` or a regular expression"
    )
    words = parser.parse_args(argv)
    require_at_least(words, batch_size=1, num_workers=0)
    log_to_terminal(main=True)
    trained = given.load(words.model, words.device)
    found = measure(trained, words.data_path, words.batch_size, words.num_workers, words.eval_crop, words.group_by)
    name = f"knn-{name_data(words.data_path)}.json" if words.data_path else "knn.json"
    write_json(trained.run / name, found)
    sys.stdout.write(f"{classifiers.neighbors_table(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
