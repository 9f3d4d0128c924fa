"""Fine-tuning: train a classifier end to end, or evaluate a trained one."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import models_classifier
from data import splits
from data.augment import finetune_transform
from data.class_weights import image_weights
from data.images import classifier_crop_share, describe_eval_crop
from data.loader import Batch, EvalSamples, Source, TrainSamples, eval_transform
from data.splits import Splits
from engine_finetune import Distillation, Objective, describe, evaluate, make_evaluation
from models_classifier import Classifier
from models_vit import compute_digest, move_average
from options import FinetuneOptions
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
from util.distributed import Processes
from util.run import Run, eval_share, resolve, share_batches
from util.threads import choose_threads

log = logging.getLogger("finetune")


def require_pairs(options: FinetuneOptions) -> None:
    """Raise ValueError if mixup is used with an odd (resolved) batch size."""
    if options.mixes and options.batch_size % 2:
        raise ValueError(f"mixup and cutmix pair images: batch_size must be even, found {options.batch_size}")


def load_teacher(
    options: FinetuneOptions, classes: Sequence[str], device: torch.device
) -> tuple[FinetuneOptions, Distillation | None]:
    """Load the classifier `distill_from`; return the options with its digest, and the distillation (None without).

    Args:
        options: Of the run.
        classes: The class names of the data.
        device: Where the teacher runs.
    """
    if not options.distill_from:
        return options, None
    weights, made_with = checkpoint.load_model(options.distill_from, averaged=True)
    found = compute_digest(weights)
    if options.distill_digest not in ("", found):
        raise ValueError(f"distill_digest is {options.distill_digest}, but {options.distill_from} has {found}")
    try:
        teacher = models_classifier.load_teacher(
            weights,
            made_with,
            options.num_classes,
            (tuple(options.mean), tuple(options.std)),
            options.distill_heads,
        )
        if made_with:
            trained = splits.read_classes(checkpoint.find_run(Path(options.distill_from)))
            require_same_numbers(trained, classes, "the teacher")
    except ValueError as problem:
        raise ValueError(f"distill_from: {options.distill_from} cannot be the teacher: {problem}") from problem
    log.info("teacher: %s, weight %g, %s labels", options.distill_from, options.distill_weight, options.distill_labels)
    distillation = Distillation(
        teacher.to(device), options.distill_weight, options.distill_temperature, options.distill_labels
    )
    return replace(options, distill_digest=found), distillation


def create_objective(
    options: FinetuneOptions, model: nn.Module, train: Source, distillation: Distillation | None = None
) -> Objective:
    """Create the objective. The class weights may be computed from the labels of the training images `train`."""
    return Objective(
        model,
        classes=options.num_classes,
        mixup=options.mixup,
        cutmix=options.cutmix,
        smoothing=options.smoothing,
        class_weights=image_weights(options.class_weights, train),
        distillation=distillation,
    )


def build_model(options: FinetuneOptions, classes: int) -> Classifier:
    return models_classifier.build(
        num_classes=classes,
        global_pool=options.global_pool,
        drop_path=options.drop_path,
        distill_token=options.distill_token,
        **encoder_arguments(options),
    )


def training_images(options: FinetuneOptions, source: Source) -> TrainSamples:
    transform = finetune_transform(
        options.input_size,
        min_scale=options.min_scale,
        hflip=options.hflip,
        aa=options.aa,
        color_jitter=options.color_jitter,
        reprob=options.reprob,
        mean=options.mean,
        std=options.std,
    )
    return TrainSamples(source, transform, options.seed, None, mean=options.mean, std=options.std)


def make_optimizer(options: FinetuneOptions, model: Classifier, device: torch.device) -> torch.optim.Optimizer:
    """Create the optimizer, and log the learning rate of each layer."""
    lr, groups = layer_groups(options, model)
    if options.optimizer == "sgd":
        return optim.sgd(groups, lr, device=device)
    return optim.adamw(groups, lr, betas=(0.9, 0.999), device=device)


def prepared(options: FinetuneOptions) -> str:
    """Describe the preprocessing of `image_batches`."""
    return describe_eval_crop(options.input_size, classifier_crop_share(options.input_size), options.eval_crop)


def image_batches(options: FinetuneOptions, source: Source, processes: Processes) -> Iterator[Batch]:
    """Yield this process's share of a source, each image once, with a centre crop."""
    transform = eval_transform(options.input_size, classifier_crop_share(options.input_size), options.eval_crop)
    samples = EvalSamples(source, transform, mean=options.mean, std=options.std)
    return eval_share(options, samples, processes, options.batch_size)


def run(options: FinetuneOptions) -> None:
    train_or_evaluate(resolve(options), train, evaluate_checkpoint)


def evaluate_checkpoint(options: FinetuneOptions, processes: Processes) -> None:
    """Log the accuracy of a checkpoint on the test images, and print it as JSON; no files are written."""
    path = checkpoint.evaluated_checkpoint(vars(options))
    run_folder = checkpoint.find_run(Path(path))
    test = splits.open_test(options, splits.read_classes(run_folder), run_folder)
    classes = max(len(test.classes or []), options.num_classes)
    weights, made_with = checkpoint.load_model(path, averaged=True)
    model = build_model(options, classes)
    models_classifier.load_classifier(model, weights, made_with)
    model.to(processes.device)
    choose_threads(model, processes.device)
    batches = image_batches(options, test, processes)
    metrics = evaluate(model, batches, classes=classes, processes=processes, autocast=autocast(options, processes))
    log.info("%s on %d test images: %s", path, metrics["images"], describe(metrics))
    log.info("evaluation: %s", prepared(options))
    if processes.main:
        sys.stdout.write(json.dumps({"checkpoint": path, "eval_crop": options.eval_crop, **metrics}) + "\n")


def make_plan(options: FinetuneOptions, processes: Processes, *, reading: Processes | None = None) -> Plan:
    require_pairs(options)
    found = splits.open_splits(options)
    options = replace(options, num_classes=found.classes, value_range=found.train.value_range)
    model = build_model(options, found.classes)
    options, distillation = load_teacher(options, found.train.classes or [], processes.device)
    batches_of = partial(share_batches, options, training_images(options, found.train))
    if options.steps:
        options = replace(options, epochs=math.ceil(options.steps / batches_of(processes).steps_per_epoch))
    floats = bool(options.aa or options.color_jitter or options.reprob)
    return Plan(
        options,
        processes,
        found.train,
        model,
        make_batches=batches_of,
        make_objective=lambda trained: create_objective(options, trained, found.train, distillation),
        make_optimizer=partial(make_optimizer, options, model),
        image_bytes=options.in_chans * math.prod(options.input_size) * (4 if floats else 1) + 8,
        splits=found,
    )


def train(options: FinetuneOptions, processes: Processes) -> None:
    plan = make_plan(options, processes)
    options, model, batches, found = plan.options, plan.model, plan.batches, plan.splits
    load_initial_weights(options, model, models_classifier.load_encoder)
    run = Run(options, processes, found.train)
    model.to(processes.device)
    choose_threads(model, processes.device)
    optimizer = plan.make_optimizer(processes.device)
    average = copy.deepcopy(model).requires_grad_(False).eval() if options.ema else None
    run.prepare(model, batches, optimizer, total_steps=options.steps, **({"ema": average} if average else {}))
    objective = plan.make_objective(run.trained).to(processes.device)
    sources = {"choice": found.choice, "test": found.test}
    evaluated = average or model
    tasks = [
        make_evaluation(options, run, evaluated, found, lambda name: image_batches(options, sources[name], processes))
    ]

    def update_average() -> None:
        if average:
            move_average(average, model, options.ema, run.stepper.taken)

    with run:
        if processes.main:
            announce(options, model, found, run)
        result = train_epochs(run, objective, batches, tasks, after_update=update_average)
        run.finish(**result, eval_crop=options.eval_crop)
        name_next_steps(run.folder)


def announce(options: FinetuneOptions, model: Classifier, found: Splits, run: Run) -> None:
    log_model(options, model)
    log.info("evaluation: %s", prepared(options))
    splits.write_lists(found, run.folder)
