"""Functions of fine-tuning, probes and segmentation: pretrained encoders, layer-wise learning rates, evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import methods
import models_classifier
from data.folders import some
from models_classifier import Classifier
from models_vit import LoadReport, for_channels
from options import EncoderOptions, TransferOptions, describe_model
from util import distributed, optim, precision
from util.distributed import Processes
from util.logging import log_to_terminal

log = logging.getLogger("transfer")

Options = TypeVar("Options", bound=TransferOptions)
Work = Callable[[Options, Processes], None]


def name_next_steps(folder: Path) -> None:
    """Log the commands that usually follow a finished run."""
    log.info("next: python -m tools.predict %s IMAGES", folder)
    log.info("next: python -m tools.report %s", folder)


def train_or_evaluate(options: Options, train: Work[Options], evaluate: Work[Options]) -> None:
    """Train or evaluate, according to the (resolved) options, together with the other processes."""
    torch.manual_seed(options.seed)
    with distributed.start(options.device) as processes:
        log_to_terminal(processes.main)
        (evaluate if options.eval else train)(options, processes)


def encoder_arguments(options: EncoderOptions) -> dict[str, Any]:
    """Return the options that decide the encoder, as arguments of `build` of a classifier or a segmenter."""
    names = ("model", "input_size", "in_chans", "embed_dim", "depth", "num_heads", "patch_stem", "grad_checkpointing")
    return {name: getattr(options, name) for name in names}


def load_initial_weights(
    options: TransferOptions,
    model: Classifier,
    load: Callable[[Any, Mapping[str, Tensor], Mapping[str, Any]], LoadReport],
) -> None:
    """Initialise `model` from the checkpoint in `init_from`, if there is one, with `load(model, weights, options)`."""
    if not options.init_from:
        log.warning("no --init_from: the encoder starts from random weights, not from a pretrained one")
    if options.init_from and not options.from_scratch:
        load_pretrained_weights(options, model, load)


def load_pretrained_weights(
    options: EncoderOptions,
    model: Classifier,
    load: Callable[[Any, Mapping[str, Tensor], Mapping[str, Any]], LoadReport],
) -> Mapping[str, Any]:
    """Load the weights of `init_from` with `load(model, weights, options)`; return the options of their run.

    Raises:
        ValueError: The weights are not those of this model.
    """
    weights, made_with = methods.load_pretrained(options.init_from)
    try:
        report = load(model, for_channels(weights, options.in_chans), made_with)
    except ValueError as error:
        ours, theirs = describe_model(vars(options)), describe_model(made_with) if made_with else ""
        if theirs in ("", ours):
            raise
        raise ValueError(
            f"{error}. The checkpoint is of {theirs}, the options ask for {ours}: without model, embed_dim, depth and "
            "num_heads in the command and the recipe, those of the checkpoint are used"
        ) from error
    log.info("weights from %s: %s", options.init_from, report)
    warn_of_pooling(getattr(options, "global_pool", ""), made_with)
    return made_with


def warn_of_pooling(global_pool: str, made_with: Mapping[str, Any]) -> None:
    """Log a warning if patch tokens are averaged, but the pretraining method trained the class token."""
    if global_pool == "avg" and methods.feature_pool(made_with) == "token":
        log.warning(
            "%s trains the class token, and global_pool avg uses the average of the patch tokens: --global_pool token "
            "is usually better",
            made_with["method"],
        )


def layer_groups(options: TransferOptions, model: Classifier) -> tuple[float, list[dict[str, Any]]]:
    """Return the learning rate and the parameter groups, and log the learning rate of each layer."""
    lr = optim.absolute_lr(options.lr, options.blr, options.total_batch_size)
    groups = optim.finetune_groups(model, options.weight_decay, options.layer_decay)
    for scale, parts in models_classifier.list_layers(model, groups):
        log.info("learning rate %.3e (x %.6f): %s", lr * scale, scale, ", ".join(parts))
    return lr, groups


def autocast(options: TransferOptions, processes: Processes) -> Callable[[], AbstractContextManager]:
    """Return the autocast context for an evaluation without a run."""
    return precision.autocast(precision.resolve_amp(options.amp, processes.device), processes.device)


def log_model(options: TransferOptions, model: Classifier) -> None:
    """Log the size of the model and where its weights come from."""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows, columns = model.patch_embed.grid_size
    start = f"from {options.init_from}" if options.init_from and not options.from_scratch else "from scratch"
    described = describe_model(vars(options))
    log.info("%s, %s: %.2f M weights, %d x %d patches", described, start, weights / 1e6, rows, columns)


def require_same_numbers(trained: Sequence[str], names: Sequence[str], what: str) -> None:
    """Check the classes of a trained model that is used without matching classes by name.

    Args:
        trained: Its class names; empty if they are not known.
        names: The class names of the data.
        what: Description of the model, for messages.

    Raises:
        ValueError: A class has another number in the data than in the model.
    """
    numbers = {name: number for number, name in enumerate(trained)}
    for number, name in enumerate(names):
        if numbers.get(name, number) != number:
            raise ValueError(
                f"{name} is class {numbers[name]} of {what}, and class {number} of the data: classes are compared by "
                "number, so the data must list them in the same order"
            )
    pairs = [f"{name} = {theirs}" for name, theirs in zip(names, trained, strict=False) if name != theirs]
    if pairs:
        log.warning(
            "%d classes have other names in %s, and classes are compared by number: %s. If they are not the same "
            "classes, the result is meaningless",
            *(len(pairs), what, some(pairs)),
        )
