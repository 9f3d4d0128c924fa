"""Segmentation: train UPerNet on a vision transformer, or evaluate a trained segmenter."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_upernet
from data import masks, splits
from data.class_weights import pixel_weights
from data.loader import Batch, Batches, Source, TrainSamples
from data.mask_files import ignored_value
from data.segment_augment import train_transform
from data.splits import Splits
from engine_segment import (
    PICTURES,
    Objective,
    evaluate,
    evaluation_samples,
    make_windows,
    predicted_masks,
    short_side,
)
from models_upernet import Segmenter
from options import SegmentOptions
from programs.plan import Plan
from programs.training import train_epochs
from programs.transfer import (
    autocast,
    encoder_arguments,
    layer_groups,
    load_initial_weights,
    log_model,
    name_next_steps,
    require_same_numbers,
    train_or_evaluate,
)
from util import checkpoint, optim
from util.confusion import METRIC, describe, table
from util.distributed import Processes
from util.evaluation import Evaluation
from util.overlay import mask_sheet
from util.run import Run, eval_share, resolve, share_batches
from util.tasks import Pictures
from util.threads import choose_threads

log = logging.getLogger("segment")


def build_model(options: SegmentOptions, classes: int, processes: Processes) -> Segmenter:
    """Create the segmenter; on CUDA with several processes, batch norm is synchronised."""
    sizes = encoder_arguments(options)
    model = models_upernet.build(num_classes=classes, drop_path=options.drop_path, **sizes)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if norms_together(processes) else model


def norms_together(processes: Processes) -> bool:
    return processes.world_size > 1 and processes.device.type == "cuda"


def require_several(options: SegmentOptions, processes: Processes) -> None:
    """Raise ValueError if a (resolved) batch for batch norm would be a single image."""
    if options.batch_size == 1 and not norms_together(processes):
        raise ValueError("batch_size 1: batch norm compares the images of a batch; it needs at least 2 on a device")


def training_images(options: SegmentOptions, source: Source) -> TrainSamples:
    transform = train_transform(
        options.input_size,
        short_side=short_side(options),
        min_resize=options.min_resize,
        max_resize=options.max_resize,
        max_class_share=options.max_class_share,
        hflip=options.hflip,
        photometric=options.photometric,
        mean=options.mean,
    )
    return TrainSamples(source, transform, options.seed, None, mean=options.mean, std=options.std)


def image_batches(options: SegmentOptions, source: Source, processes: Processes) -> Iterator[Batch]:
    """Yield this process's share of a source, one image at a time, because their sizes differ."""
    return eval_share(options, evaluation_samples(options, source), processes, batch_size=1)


def make_optimizer(options: SegmentOptions, model: Segmenter, device: torch.device) -> torch.optim.Optimizer:
    """Create the optimizer, and log the learning rate of each layer."""
    lr, groups = layer_groups(options, model)
    return optim.adamw(groups, lr, betas=(0.9, 0.999), device=device)


def create_objective(options: SegmentOptions, model: nn.Module, train: Source) -> Objective:
    """Create the objective. The class weights may be computed from the masks of the training images `train`."""
    weights = pixel_weights(options.class_weights, train, options.num_workers)
    return Objective(model, auxiliary=options.auxiliary, class_weights=weights)


def complete_options(options: SegmentOptions, found: Splits, batches: Batches) -> SegmentOptions:
    """Return the options, completed with the number of classes, and the epochs for the given steps."""
    per_epoch = batches.steps_per_epoch
    epochs = math.ceil(options.steps / per_epoch) if options.steps else options.epochs
    warmup = options.warmup_steps / per_epoch if options.warmup_steps else options.warmup_epochs
    options = replace(options, num_classes=found.classes, value_range=found.train.value_range)
    options = replace(options, ignore_label=ignored_value(options))
    return replace(options, epochs=epochs, warmup_epochs=warmup)


def run(options: SegmentOptions) -> None:
    train_or_evaluate(resolve(options), train, evaluate_checkpoint)


def evaluate_checkpoint(options: SegmentOptions, processes: Processes) -> None:
    """Log the metrics of a checkpoint on the test images, and print them as JSON; no files are written."""
    path = checkpoint.evaluated_checkpoint(vars(options))
    run_folder = checkpoint.find_run(Path(path))
    test = masks.open_test(options, processes, run_folder)
    names = test.classes or []
    weights, made_with = checkpoint.load_model(path)
    require_same_numbers(splits.read_classes(run_folder), names, "the segmenter")
    model = build_model(options, len(names), processes)
    models_upernet.load_segmenter(model, weights, made_with)
    model.to(processes.device)
    choose_threads(model, processes.device)
    metrics = evaluate(
        model,
        image_batches(options, test, processes),
        names=names,
        windows=make_windows(options, model.patch),
        processes=processes,
        autocast=autocast(options, processes),
    )
    log.info("%s on %d test images: %s\n%s", path, metrics["images"], describe(metrics), table(metrics))
    if processes.main:
        sys.stdout.write(json.dumps({"checkpoint": path, **metrics}) + "\n")


def make_plan(options: SegmentOptions, processes: Processes, *, reading: Processes | None = None) -> Plan:
    require_several(options, processes)
    found = masks.open_splits(options, reading or processes)
    model = build_model(options, found.classes, processes)
    batches_of = partial(share_batches, options, training_images(options, found.train))
    options = complete_options(options, found, batches_of(processes))
    return Plan(
        options,
        processes,
        found.train,
        model,
        make_batches=batches_of,
        make_objective=lambda trained: create_objective(options, trained, found.train),
        make_optimizer=partial(make_optimizer, options, model),
        image_bytes=(options.in_chans + 2) * math.prod(options.input_size),  # the mask has 16 bits
        splits=found,
    )


def train(options: SegmentOptions, processes: Processes) -> None:
    plan = make_plan(options, processes)
    options, model, batches, found = plan.options, plan.model, plan.batches, plan.splits
    names = found.train.classes or []
    load_initial_weights(options, model, models_upernet.load_pretrained)
    run = Run(options, processes, found.train)
    model.to(processes.device)
    choose_threads(model, processes.device)
    optimizer = plan.make_optimizer(processes.device)
    total_steps = options.steps or batches.steps_per_epoch * options.epochs
    schedule = optim.warmup_poly(
        optimizer,
        steps=total_steps,
        warmup_steps=options.warmup_epochs * batches.steps_per_epoch,
        power=options.power,
        min_lr=options.min_lr,
    )
    run.prepare(model, batches, optimizer, schedule, total_steps=total_steps)
    objective = plan.make_objective(run.trained).to(processes.device)
    windows = make_windows(options, model.patch)
    sources = {"choice": found.choice, "test": found.test}

    def measure(images: str) -> dict[str, Any]:
        shown = image_batches(options, sources[images], processes)
        shown = run.until_stopped(shown)
        return evaluate(model, shown, names=names, windows=windows, processes=processes, autocast=run.autocast)

    tasks = [
        Pictures(
            run, options.picture_every, name="masks", prefix="masks_e", draw=partial(draw, options, model, found, run)
        ),
        Evaluation(
            run,
            model,
            measure,
            metric=METRIC,
            chosen_on=found.chosen_on,
            every=options.eval_every,
            describe=describe,
        ),
    ]
    with run:
        if processes.main:
            announce(options, model, found, run)
        result = train_epochs(run, objective, batches, tasks)
        log.info("classes, last epoch:\n%s", table(result["accuracy"]["last"]))
        run.finish(**result)
        name_next_steps(run.folder)


def draw(options: SegmentOptions, model: Segmenter, found: Splits, run: Run, path: Path) -> Tensor:
    """Draw the predicted and true masks of a few fixed test images."""
    count = min(PICTURES, len(found.test))
    index = [number * len(found.test) // count for number in range(count)]
    made = predicted_masks(
        model,
        evaluation_samples(options, found.test),
        index,
        windows=make_windows(options, model.patch),
        device=run.processes.device,
        autocast=run.autocast,
    )
    return mask_sheet(made, found.classes, path)


def announce(options: SegmentOptions, model: Segmenter, found: Splits, run: Run) -> None:
    log_model(options, model)
    log.info("UPerNet on the outputs of blocks %s (from 0), %d classes", model.taps, found.classes)
    splits.write_lists(found, run.folder)
