"""Pretrain a masked autoencoder on a folder of images.

    python main_pretrain.py -c configs/pretrain/quickstart.yaml --output_dir output/digits
    torchrun --nproc_per_node 8 main_pretrain.py -c configs/pretrain/nor_mae_vit_tiny_in1k.yaml --data_path IMAGENET

Composition only: a recipe and flags become a model, batches, a stepper and a run; then epochs follow each other.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import methods
from engine_pretrain import train_one_epoch
from util import checkpoint, distributed, optim, precision
from util.data import Batches, Source, TrainSamples, open_source, pretrain_transform
from util.distributed import Processes
from util.logging import talk
from util.meters import Means
from util.options import PretrainOptions, parse, resolve_batch
from util.run import Run, run_front_door
from util.stepper import Stepper

log = logging.getLogger("pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, and answer the exit code."""
    return run_front_door(pretrain, sys.argv[1:] if argv is None else argv)


def parse_options(argv: Sequence[str]) -> PretrainOptions:
    term_options = {name: term.Options for name, term in methods.TERMS.items()}
    return parse(PretrainOptions, argv, preset=methods.preset, term_options=term_options)


def build_model(options: PretrainOptions) -> nn.Module:
    return methods.build(
        options.method,
        options.model,
        input_size=options.input_size,
        in_chans=options.in_chans,
        embed_dim=options.embed_dim,
        depth=options.depth,
        num_heads=options.num_heads,
        decoder_embed_dim=options.decoder_embed_dim,
        decoder_depth=options.decoder_depth,
        decoder_num_heads=options.decoder_num_heads,
        mask_ratio=options.mask_ratio,
        norm_pix_loss=options.norm_pix_loss,
        grad_checkpointing=options.grad_checkpointing,
        terms=options.terms,
    )


def open_batches(options: PretrainOptions, model: nn.Module, processes: Processes) -> Batches:
    source = open_source(
        options.dataset, options.data_path, "train", in_chans=options.in_chans, class_list=options.class_list
    )
    needy = [name for name, term in model.terms.items() if term.needs_labels]
    if needy and source.labels is None:
        raise ValueError(f"the term {needy[0]} learns from labels, and {options.data_path or options.dataset} has none")
    samples = TrainSamples(
        source,
        pretrain_transform(options.input_size, min_scale=options.min_scale, hflip=options.hflip),
        seed=options.seed,
        noise_shape=(model.noise_rows, model.num_patches),
        mean=options.mean,
        std=options.std,
    )
    return Batches(
        samples,
        batch_size=options.batch_size,
        accum=options.accum_iter,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=options.seed,
        num_workers=options.num_workers,
        pin_memory=options.pin_mem and processes.device.type == "cuda",
    )


def announce(options: PretrainOptions, model: nn.Module, batches: Batches, amp: str, lr: float) -> None:
    """What will be run, before it is."""
    source: Source = batches.samples.source
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s, %s: %.2f M weights, %d x %d patches", options.method, options.model, weights / 1e6, *model.grid)
    for name, term in model.terms.items():
        scale = ", ".join(f"{what} {value:.4g}" for what, value in term.scale(model).items())
        log.info("term %s: %s (%s)", name, options.terms[name], scale)
    log.info("data: %d images (%s)", len(source), options.data_path or options.dataset)
    log.info(
        "%d epochs x %d steps = %d updates of %d images (%d at a time, x %d), learning rate %.3e, %s precision",
        options.epochs,
        batches.steps_per_epoch,
        options.epochs * batches.steps_per_epoch,
        options.total_batch_size,
        options.batch_size,
        options.accum_iter,
        lr,
        {"none": "full"}.get(amp, amp),
    )
    first = batches.samples.collate([batches.samples[(0, i)] for i in range(min(32, len(source)))])
    constant = float(model.baseline(first.to(torch.device("cpu")).images))
    log.info("the best constant prediction has a reconstruction loss of about %.3f", constant)


def pretrain(argv: Sequence[str]) -> None:
    options = resolve_batch(parse_options(argv), distributed.world_size())
    torch.manual_seed(options.seed)
    model = build_model(options)
    with distributed.start(options.device) as processes:
        talk(processes.main)
        amp = precision.resolve_amp(options.amp, processes.device)
        batches = open_batches(options, model, processes)
        run = Run(options, processes, data=batches.samples.source.fingerprint())
        if options.init_from:
            report = checkpoint.load_into(model, checkpoint.load_weights(options.init_from))
            log.info("weights from %s: %s", options.init_from, report)
        model.to(processes.device)
        lr = optim.absolute_lr(options.lr, options.blr, options.total_batch_size)
        optimizer = optim.adamw(optim.pretrain_groups(model, options.weight_decay), lr, device=processes.device)
        schedule = optim.warmup_cosine(
            optimizer,
            epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            steps_per_epoch=batches.steps_per_epoch,
            min_lr=options.min_lr,
        )
        if options.compile:
            model.compile()
        trained: nn.Module = model
        if processes.world_size > 1:
            ids = [processes.local_rank] if processes.device.type == "cuda" else None
            trained = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
        stepper = Stepper(
            trained,
            optimizer,
            schedule,
            accum=options.accum_iter,
            clip_grad=options.clip_grad,
            fp16=amp == "fp16",
            seed=options.seed,
            rank=processes.rank,
        )
        means = Means(processes)
        run.attach(model, stepper, means, batches)
        with run:
            if processes.main:
                announce(options, model, batches, amp, lr)
            for epoch, done in run.epochs():
                train_one_epoch(
                    trained,
                    batches.epoch(epoch, done),
                    stepper,
                    means,
                    device=processes.device,
                    autocast=precision.autocast(amp, processes.device),
                    note=run.note,
                    after_step=run.after_step,
                )
                run.end_epoch()
            run.finish()


if __name__ == "__main__":
    sys.exit(main())
