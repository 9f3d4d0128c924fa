"""Linear probing: train a linear classifier on the features of a frozen encoder, and evaluate k nearest neighbours.

Every image is encoded once and the classifier is trained on the stored features. With `--augment` (MAE's protocol) each
epoch encodes new crops. The checkpoints contain only the linear classifier.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import methods
import models_classifier
from data import splits
from data.class_weights import image_weights
from data.images import CROP_SHARE, describe_eval_crop
from data.loader import Batch, Batches, Source, TrainSamples, pretrain_transform
from data.splits import Splits
from engine_finetune import Objective, make_evaluation
from models_classifier import Classifier, LinearProbe
from models_vit import compute_digest
from options import ProbeOptions
from programs.training import train_epochs
from programs.transfer import encoder_arguments, load_pretrained_weights
from util import checkpoint, distributed, optim
from util.checkpoint import CheckpointError
from util.distributed import Processes
from util.features import FeatureSamples, encode_source, interleaved, pooled, select_reading
from util.knn import knn_accuracy
from util.logging import log_to_terminal
from util.run import Run, resolve, share_batches
from util.threads import choose_threads

log = logging.getLogger("probe")

FEW_IMAGES, MAE_BLR = 100_000, 0.1


def load_encoder(options: ProbeOptions) -> tuple[Classifier, str]:
    """Load the frozen encoder with its last norm and without a head; return it and the pooling of its method."""
    model = models_classifier.build(num_classes=0, global_pool="token", **encoder_arguments(options))
    made_with = load_pretrained_weights(options, model, models_classifier.load_encoder)
    return model.requires_grad_(False).eval(), methods.feature_pool(made_with)


def record_encoder(options: ProbeOptions, encoder: Classifier) -> ProbeOptions:
    """Return the options with the digest of the encoder; without it to resume a run that has not recorded one."""
    # Positions are left out: resampled for another image size, they are rounded differently on other machines.
    found = compute_digest({name: value for name, value in encoder.state_dict().items() if name != "pos_embed"})
    if options.encoder_digest not in ("", found):
        raise ValueError(f"encoder_digest is {options.encoder_digest}, but {options.init_from} has {found}")
    earlier = None if options.overwrite else find_earlier_options(options)
    if earlier is None or earlier.get("encoder_digest"):
        return replace(options, encoder_digest=found)
    log.warning(
        "this run was started by a version that did not record the encoder: whether %s still contains the encoder that "
        "the linear classifier was trained on cannot be checked",
        options.init_from,
    )
    return replace(options, encoder_digest="")


def find_earlier_options(options: ProbeOptions) -> Mapping[str, Any] | None:
    """Return the options in the checkpoint from which the run resumes; None for a new run."""
    named = [] if options.resume == "auto" else [Path(options.resume)]
    for path in [*checkpoint.candidates(Path(options.output_dir) / "checkpoints"), *named]:
        with contextlib.suppress(CheckpointError):  # the run refuses it, or resumes from the next one
            return checkpoint.load(path)["options"]
    return None


class Features:
    """The features of every split, encoded once, in parallel by all processes.

    The linear layer uses the pooling of the options, nearest neighbours use `knn_pool`; if they differ, both are
    computed in the same pass.
    """

    def __init__(self, options: ProbeOptions, encoder: Classifier, run: Run, found: Splits, knn_pool: str):
        self.options, self.run = options, run
        self.encoder, self.knn_pool = encoder, knn_pool
        self.pool = options.global_pool if options.global_pool == knn_pool else "both"
        self.of = {name: self._encode(getattr(found, name)) for name in ("train", "choice", "test")}

    def _encode(self, source: Source) -> tuple[Tensor, Tensor]:
        options, processes = self.options, self.run.processes
        share = encode_source(
            self.encoder,
            source,
            device=processes.device,
            autocast=self.run.autocast,
            indices=range(processes.rank, len(source), processes.world_size),
            pool=self.pool,
            **select_reading(options),
        )
        return interleaved(processes.gather(share))

    def _pooled(self, name: str, pool: str) -> Tensor:
        features, _ = self.of[name]
        if self.pool != "both":
            return features
        averages, class_tokens = features.chunk(2, dim=1)
        return (averages if pool == "avg" else class_tokens).contiguous()

    def samples(self, name: str) -> FeatureSamples:
        return FeatureSamples(self._pooled(name, self.options.global_pool), self.of[name][1])

    def batches(self, name: str) -> Iterator[Batch]:
        """Yield this process's share of a split."""
        samples, processes = self.samples(name), self.run.processes
        share = range(processes.rank, len(samples), processes.world_size)
        for start in range(0, len(share), 1024):
            yield samples.__getitems__([(0, index) for index in share[start : start + 1024]])

    def knn(self) -> float:
        """Return the kNN accuracy in percent on the test images, with the pooling of the pretraining method."""
        (_, bank_labels), (_, labels) = self.of["train"], self.of["test"]
        bank, queries = (self._pooled(name, self.knn_pool) for name in ("train", "test"))
        return 100 * knn_accuracy(bank, bank_labels, queries, labels)


def training_batches(options: ProbeOptions, source: Source, features: Features, processes: Processes) -> Batches:
    """Create batches of new crops of the images, or of stored features, which need no loader processes."""
    if not options.augment:
        return share_batches(replace(options, num_workers=0), features.samples("train"), processes)
    transform = pretrain_transform(options.input_size, options.min_scale, options.hflip)
    samples = TrainSamples(source, transform, options.seed, None, mean=options.mean, std=options.std)
    return share_batches(options, samples, processes)


def run(options: ProbeOptions) -> None:
    options = resolve(options)
    torch.manual_seed(options.seed)
    encoder, knn_pool = load_encoder(options)
    with distributed.start(options.device) as processes:
        log_to_terminal(processes.main)
        found = splits.open_splits(options)
        options = replace(options, num_classes=found.classes, value_range=found.train.value_range)
        options = record_encoder(options, encoder)
        model = LinearProbe(encoder.embed_dim, found.classes).to(processes.device)
        encoder.to(processes.device)
        choose_threads(encoder, processes.device)
        run = Run(options, processes, found.train)
        features = Features(options, encoder, run, found, knn_pool)
        batches = training_batches(options, found.train, features, processes)
        lr = optim.absolute_lr(options.lr, options.blr, options.total_batch_size)
        if len(found.train) < FEW_IMAGES and not options.lr and options.blr <= MAE_BLR:
            log.warning(
                "%d training images: blr %g is MAE's rate for ImageNet in batches of 16,384 and may be far too low "
                "here; compare with a higher one, e.g. --blr 1, on the validation images",
                len(found.train),
                options.blr,
            )
        run.prepare(model, batches, optim.lars(model, lr, options.weight_decay))

        def encode(images: Tensor) -> Tensor:
            with torch.no_grad():
                return pooled(encoder.encode(images).float(), options.global_pool)

        objective = Objective(
            run.trained,
            classes=found.classes,
            prepare=encode if options.augment else None,
            class_weights=image_weights(options.class_weights, found.train),
        ).to(processes.device)
        tasks = [make_evaluation(options, run, model, found, features.batches)]
        with run:
            if processes.main:
                splits.write_lists(found, run.folder)
            log.info("features: %s", describe_eval_crop(options.input_size, CROP_SHARE, options.eval_crop))
            knn_acc1 = features.knn()
            of = "class token" if knn_pool == "token" else "average of patch tokens"
            log.info(
                "k nearest neighbours (%s, k = 20, T = 0.07), %d test images: %.2f%%", of, len(found.test), knn_acc1
            )
            result = train_epochs(run, objective, batches, tasks)
            run.finish(**result, knn_acc1=knn_acc1, eval_crop=options.eval_crop)
