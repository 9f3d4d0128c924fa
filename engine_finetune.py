"""The objective of a classifier, for `engine_pretrain.train_one_epoch`, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from data.loader import Batch
from data.splits import Splits, metric
from options import ClassifierOptions
from util.confusion import confusion
from util.distributed import Processes
from util.evaluation import Evaluation
from util.run import Run

MOST_CONFUSED = 100  # maximum number of classes for which a confusion matrix is returned


@dataclass(frozen=True)
class Distillation:
    """Distillation from a trained classifier, in addition to the labels.

    The total loss is (1 - weight) x label loss + weight x distillation loss. The latter is
    T^2 KL(softmax(teacher / T) || softmax(student / T)) for `soft` labels, and the cross-entropy with the class that
    the teacher predicts for `hard` labels.
    """

    teacher: Callable[[Tensor], Tensor]
    """Function from images to logits `[N, C]`, without gradient."""
    weight: float = 0.5
    temperature: float = 1.0
    labels: Literal["soft", "hard"] = "soft"

    def loss(self, logits_NC: Tensor, images: Tensor) -> Tensor:
        """Compute the loss in float32 for the student's logits (of its distillation token if it has one)."""
        teacher_NC = self.teacher(images).float()
        if self.labels == "hard":
            return F.cross_entropy(logits_NC.float(), teacher_NC.argmax(dim=1))
        T = self.temperature
        student, teacher = (F.log_softmax(x.float() / T, dim=1) for x in (logits_NC, teacher_NC))
        return T**2 * (teacher.exp() * (teacher - student)).sum(dim=1).mean()


class Objective(nn.Module):
    """`(images, labels) -> {"loss"}`: cross-entropy with label smoothing, for batches mixed by mixup or cutmix.

    With `class_weights` w the loss is sum(w_k p_k (-log q_k)) / sum(w_k p_k) over images and classes, for targets p and
    predictions q; smoothing as in `torch.nn.CrossEntropyLoss`.
    A model with a distillation token returns two sets of logits: the labels are used for the first, the distillation
    for the second. `prepare` is applied to the images before the model, for features of a frozen encoder. Mixing uses
    NumPy's global generator, which the stepper seeds at every step; it needs batches of an even number of images.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        smoothing: float = 0.0,
        prepare: Callable[[Tensor], Tensor] | None = None,
        class_weights: Sequence[float] | None = None,
        distillation: Distillation | None = None,
    ):
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        self.model, self.smoothing, self.prepare = model, smoothing, prepare
        self.distillation = distillation
        self.mix: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            logits, distilled = self._logits(images)
            loss = self._mixed_loss(logits, targets)
        else:
            logits, distilled = self._logits(images)
            loss = F.cross_entropy(logits, labels, weight=self.class_weights, label_smoothing=self.smoothing)
        if self.distillation is None:
            return {"loss": loss}
        part, share = self.distillation.loss(distilled, images), self.distillation.weight
        return {"loss": (1 - share) * loss + share * part, "label": loss, "distillation": part}

    def _mixed_loss(self, logits_NC: Tensor, targets_NC: Tensor) -> Tensor:
        """Compute the loss for target distributions over the classes; torch divides by N even with class weights."""
        weights = self.class_weights
        loss = F.cross_entropy(logits_NC, targets_NC, weight=weights)
        return loss if weights is None else loss * len(targets_NC) / (targets_NC * weights).sum()

    def _logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits for the label loss and those for the distillation loss, which may be the same."""
        logits = self.model(images if self.prepare is None else self.prepare(images))
        return logits if isinstance(logits, tuple) else (logits, logits)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, Any]:
    """Evaluate a classifier on the images of all processes, each image once.

    Args:
        model: Function from images to logits.
        batches: This process's share of the images, in batches of any size.
        classes: Number of classes.
        processes: The processes that evaluate together.
        autocast: Context of the forward pass.

    Returns:
        `acc1` and, for more than five classes, `acc5` in percent; `mean_class_acc`, the mean accuracy of the classes
        that have images; `loss`; the number of `images`; for at most 100 classes `confusion`, the number of images by
        true class (row) and predicted class (column).
    """
    was_training = model.training
    model.eval()
    device = processes.device
    table_3C = torch.zeros(3, classes, dtype=torch.int64, device=device)  # per class: images, top-1 and top-5 hits
    listed = classes if classes <= MOST_CONFUSED else 0
    confusion_CC = torch.zeros(listed, listed, dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        assert batch.labels is not None
        with autocast():
            logits_NC = model(batch.images).float()
        loss += F.cross_entropy(logits_NC, batch.labels, reduction="sum")
        predicted_N = logits_NC.argmax(dim=1)  # topk chooses another class among equal logits
        right_N = predicted_N == batch.labels
        in_five_N = right_N | (logits_NC.topk(min(5, classes), dim=1).indices == batch.labels[:, None]).any(dim=1)
        table_3C.index_add_(1, batch.labels, torch.stack([torch.ones_like(right_N), right_N, in_five_N]).long())
        if listed:
            confusion_CC += confusion(batch.labels, predicted_N, classes)
    model.train(was_training)
    shares = processes.gather((table_3C.cpu(), float(loss), confusion_CC.cpu()))
    table_3C = torch.stack([share[0] for share in shares]).sum(dim=0).double()
    images, right, in_five = table_3C
    present = images > 0
    top5 = {"acc5": 100 * float(in_five.sum() / images.sum())} if classes > 5 else {}
    matrix = {"confusion": torch.stack([share[2] for share in shares]).sum(dim=0).tolist()} if listed else {}
    return {
        "acc1": 100 * float(right.sum() / images.sum()),
        **top5,
        "mean_class_acc": 100 * float((right[present] / images[present]).mean()),
        "loss": sum(share[1] for share in shares) / float(images.sum()),
        "images": int(images.sum()),
        **matrix,
    }


def describe(metrics: Mapping[str, float]) -> str:
    """Return the metrics of `evaluate` as text: `top-1 71.23%, top-5 ...`."""
    names = {"acc1": "top-1", "acc5": "top-5", "mean_class_acc": "mean per class"}
    return ", ".join(f"{word} {metrics[name]:.2f}%" for name, word in names.items() if name in metrics)


def make_evaluation(
    options: ClassifierOptions, run: Run, model: nn.Module, found: Splits, batches: Callable[[str], Iterable[Batch]]
) -> Evaluation:
    """Create the evaluation of a classifier.

    `batches` returns this process's share of the validation images ("choice") or the test images ("test").
    """

    def measure(images: str) -> dict[str, float]:
        shown = run.until_stopped(batches(images))
        return evaluate(model, shown, classes=found.classes, processes=run.processes, autocast=run.autocast)

    every = options.eval_every
    return Evaluation(
        run, model, measure, metric=metric(options), chosen_on=found.chosen_on, every=every, describe=describe
    )
