"""Pretraining: create model, data, optimizer and run, and train all epochs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import methods
from data import views
from data.decode import lacks_parts
from data.device_data import DeviceSamples
from data.loader import (
    AnyTransform,
    Batches,
    EvalSamples,
    Samples,
    Source,
    TrainSamples,
    eval_batches,
    eval_transform,
    pixel_statistics,
    pretrain_transform,
    require_same_statistics,
)
from data.sources import open_split
from models_vit import Pretrainer, load_from_run
from options import PretrainOptions, changed, describe_model, show
from programs.plan import Plan
from programs.training import train_epochs
from util import distributed, optim
from util.distributed import Processes
from util.logging import RunLog, log_to_terminal
from util.run import Run, resolve, share_batches
from util.tasks import EpochTask, Pictures
from util.threads import choose_threads
from util.watch import OnlineKNN, draw_reconstructions, open_validation

log = logging.getLogger("pretrain")

FEW_UPDATES = 500  # a run with fewer optimizer steps logs a warning at its start


def build_model(options: PretrainOptions) -> Pretrainer:
    names = (*methods.ENCODER_OVERRIDES, *methods.own_options(options.method), "terms")
    return methods.build(
        options.method, options.model, **{name: getattr(options, name) for name in names if hasattr(options, name)}
    )


def open_images(options: PretrainOptions, model: Pretrainer, split: str = "train") -> Source:
    source = open_split(options, split)
    needy = [name for name, term in model.loss_terms.items() if term.needs_labels]
    if needy and source.labels is None:
        what, why = options.data_path or options.dataset, source.problem or "the data set has none"
        raise ValueError(f"the term {needy[0]} learns from labels, and {what} has none: {why}")
    return source


def complete_options(options: PretrainOptions, model: Pretrainer, source: Source) -> PretrainOptions:
    """Return the options, completed with values from the data and from checkpoints that were read."""
    if source.classes is not None:
        model.prepare(methods.load_pretrained, len(source.classes))
    own = pixel_statistics(options.in_chans, options.mean, options.std)
    for path, made_with in model.helpers.items():
        require_same_statistics(own, path, made_with)
    for name, term in model.loss_terms.items():
        if term.needs_two_images and options.batch_size == 1:
            raise ValueError(f"batch_size 1: the batch norm of the term {name} needs at least 2 images on a device")
    return replace(options, value_range=source.value_range, **methods.resolved_options(options, model))


def make_batches(options: PretrainOptions, model: Pretrainer, source: Source, processes: Processes) -> Batches:
    shared: dict[str, Any] = {
        "seed": options.seed,
        "noise_shape": (model.noise_rows, model.num_patches) if model.noise_rows else None,
        "draw_noise": model.draw_noise,
        "mean": options.mean,
        "std": options.std,
    }
    crops: dict[str, Any] = {"input_size": options.input_size, "min_scale": options.min_scale, "hflip": options.hflip}
    described = model.views(options.min_scale, options.hflip)
    single = described[0] if len(described) == 1 and described[0].count == 1 else None
    plain = single is not None and views.is_plain(single)
    samples: Samples
    if options.data_on_device:
        if not plain:
            count = sum(crop.count for crop in described)
            raise ValueError(
                f"data_on_device: the method {options.method} trains on "
                f"{'an augmented view' if count == 1 else f'{count} augmented views'} of each image, and on the device "
                "there are only plain crops; leave the option out"
            )
        samples = DeviceSamples(source, **crops, **shared, device=processes.device, num_workers=options.num_workers)
        options = replace(options, num_workers=0, pin_mem=False)  # nothing is left to load
    else:
        if options.region_decode and not (lack := lacks_parts()):
            source = replace(source, read=source.read_lazily or source.read)
        elif options.region_decode:
            log.warning("data: JPEG files are decoded whole, which takes longer: %s", lack)
        transform: AnyTransform
        if plain:
            transform = pretrain_transform(**crops)
        elif single is not None:
            transform = views.make_view(single, options.in_chans)
        else:
            transform = views.make_views(described, options.in_chans)
        samples = TrainSamples(source, transform, **shared)
    return share_batches(options, samples, processes)


def make_optimizer(options: PretrainOptions, model: Pretrainer, device: torch.device) -> torch.optim.AdamW:
    """Create AdamW with the betas and the parameter groups of the model."""
    lr = optim.absolute_lr(options.lr, options.blr, options.total_batch_size)
    return optim.adamw(optim.pretrain_groups(model, options.weight_decay), lr, betas=model.betas, device=device)


def announce(
    options: PretrainOptions,
    model: Pretrainer,
    source: Source,
    records: RunLog,
    step: int,
    device: torch.device,
) -> dict[str, Any]:
    """Log a summary of the training and the loss of a constant prediction; return both for result.json."""
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "%s, %s: %.2f M trainable parameters, %d x %d patches",
        *(options.method, describe_model(vars(options)), weights / 1e6, *model.grid),
    )
    facts: dict[str, Any] = {"images": len(source), "parameters": weights}
    if records.total_steps < FEW_UPDATES:
        log.warning(
            "%d updates are few: usually about 20,000 are needed. Raise --epochs, or use smaller batches with a higher "
            "--blr, as configs/pretrain/few_images.yaml does",
            records.total_steps,
        )
    for name, term in model.loss_terms.items():
        records.scalars(f"strength_{name}", term.scale(model), step)
        settings = changed(methods.TERMS[name].Options, options.terms[name] or {})
        log.info(
            "term %s: %s%s",
            name,
            ", ".join(f"{option} {show(value)}" for option, value in settings.items()) or "default options",
            "".join(f"; {what} = {value:.4g}" for what, value in term.scale(model).items()),
        )
        combined = term.combines(options.batch_size)
        ranks = distributed.world_size() if combined == "ranks" else 1
        if combined and (together := options.batch_size * ranks) < options.total_batch_size:
            log.warning(
                "term %s compares %d images (batch_size%s), not the %d of an update: "
                "with another batch_size or number of processes the result is another",
                name,
                together,
                " x processes" if ranks > 1 else "",
                options.total_batch_size,
            )
    together = options.batch_size * distributed.world_size()
    if model.images_together and together < options.total_batch_size:
        log.warning(
            "the loss of %s, or its batch norm, uses %d images (batch_size x processes), not the %d of "
            "an update: accumulated gradients are not those of the larger batch",
            *(options.method, together, options.total_batch_size),
        )
    few = EvalSamples(source, eval_transform(options.input_size), mean=options.mean, std=options.std)
    first = next(eval_batches(few, batch_size=32)).to(device)
    if (constant := model.constant_loss(first.images)) is not None:
        log.info("the best constant prediction has a %s loss of about %.3f", model.main_part, constant)
        facts |= {"constant_loss": constant, "constant_loss_of": model.main_part}
    return facts


def conclude(options: PretrainOptions, facts: Mapping[str, Any], last: Mapping[str, Any], folder: Path) -> None:
    """Log a warning if the run learned nothing, and the commands that usually follow."""
    constant, loss = facts.get("constant_loss"), last.get(f"train_{facts.get('constant_loss_of')}")
    if constant is not None and loss is not None and loss >= constant:
        log.warning(
            "the loss of the last epoch, %.3f, is not below that of the best constant prediction, %.3f: nothing was "
            "learned. Train for more updates (--epochs) or at a higher rate (--blr; now %g for batches of 256)",
            loss,
            constant,
            options.blr,
        )
    weights = folder / "checkpoints" / "last.pth"
    log.info("next: python -m tools.report %s", folder)
    log.info("next: python -m tools.export %s %s", "onnx" if options.patch_stem == "conv" else "timm", folder)
    log.info("next: python main_finetune.py --init_from %s --data_path LABELLED_IMAGES", weights)


def make_plan(options: PretrainOptions, processes: Processes, *, reading: Processes | None = None) -> Plan:
    model = build_model(options)
    source = open_images(options, model)
    options = complete_options(options, model, source)
    pixels = sum(crop.count * math.prod(crop.size) for crop in model.views(options.min_scale, options.hflip))
    return Plan(
        options,
        processes,
        source,
        model,
        make_batches=partial(make_batches, options, model, source),
        make_objective=lambda trained: trained,
        make_optimizer=partial(make_optimizer, options, model),
        image_bytes=options.in_chans * pixels + 4 * model.noise_rows * model.num_patches,
    )


def run(options: PretrainOptions) -> None:
    options = resolve(options)
    torch.manual_seed(options.seed)
    with distributed.start(options.device) as processes:
        log_to_terminal(processes.main)
        plan = make_plan(options, processes)
        options, model, source, batches = plan.options, plan.model, plan.source, plan.batches
        if options.init_from:
            report = load_from_run(model, *methods.load_pretrained(options.init_from))
            log.info("weights from %s: %s", options.init_from, report)
        run = Run(options, processes, source)
        model.to(processes.device)
        choose_threads(model, processes.device)
        run.prepare(model, batches, plan.make_optimizer(processes.device))
        tasks = make_tasks(options, model, source, run)
        with run:
            facts: dict[str, Any] = {}
            if run.log:
                facts = announce(options, model, source, run.log, run.stepper.step, processes.device)
            run.finish(**facts, **train_epochs(run, run.trained, batches, tasks))
            if run.log:
                conclude(options, facts, run.state.last or {}, run.folder)


def make_tasks(options: PretrainOptions, model: Pretrainer, source: Source, run: Run) -> list[EpochTask]:
    """Create the tasks that run between epochs."""
    tasks: list[EpochTask] = []
    if options.picture_every:
        shown = open_validation(options, source) or source
        draw = partial(draw_reconstructions, run, model, options, shown)
        tasks.append(Pictures(run, options.picture_every, name="reconstruction", prefix="recon_e", draw=draw))
    if options.knn_every:
        tasks.append(OnlineKNN(run, model, options, source))
    return tasks
