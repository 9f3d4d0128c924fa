"""A classifier's objective, for the epochs of `engine_pretrain`, and its evaluation: after epochs, and at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from util import checkpoint
from util.data import Batch
from util.distributed import Processes
from util.options import ClassifierOptions
from util.run import Run
from util.splits import TEST, Splits, metric

log = logging.getLogger(__name__)


class Objective(nn.Module):
    """`(images, labels) -> {"loss"}`: cross-entropy with smoothed labels, over batches mixed by mixup or cutmix.

    `prepare` comes before the model, for features of a frozen encoder. Mixing draws from NumPy's global generator,
    which the stepper seeds at every step; it needs batches of an even number of images.
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
    ):
        super().__init__()
        self.model, self.smoothing, self.prepare = model, smoothing, prepare
        self.mix: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            self.mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=smoothing, num_classes=classes)

    def forward(self, images: Tensor, labels: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            return {"loss": F.cross_entropy(self._logits(images), targets)}
        return {"loss": F.cross_entropy(self._logits(images), labels, label_smoothing=self.smoothing)}

    def _logits(self, images: Tensor) -> Tensor:
        return self.model(images if self.prepare is None else self.prepare(images))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    classes: int,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """`acc1`, `acc5` and `mean_class_acc` in percent, `loss`, and the number of `images`, over all processes.

    Each process brings batches of its own share, of any size, so that every image counts once. `mean_class_acc`
    averages the accuracies of the classes that have images.
    """
    was_training = model.training
    model.eval()
    device = processes.device
    table_3C = torch.zeros(3, classes, dtype=torch.int64, device=device)  # of each class: images, right, right in five
    loss = torch.zeros((), device=device)
    for batch in batches:
        batch = batch.to(device)
        assert batch.labels is not None
        with autocast():
            logits_NC = model(batch.images).float()
        loss += F.cross_entropy(logits_NC, batch.labels, reduction="sum")
        hit_Nk = logits_NC.topk(min(5, classes), dim=1).indices == batch.labels[:, None]
        counted_3N = torch.stack([torch.ones_like(batch.labels), hit_Nk[:, 0].long(), hit_Nk.any(dim=1).long()])
        table_3C.index_add_(1, batch.labels, counted_3N)
    model.train(was_training)
    shares = processes.gather((table_3C.cpu(), float(loss)))
    table_3C = torch.stack([share[0] for share in shares]).sum(dim=0).double()
    images, right, in_five = table_3C
    there = images > 0
    return {
        "acc1": 100 * float(right.sum() / images.sum()),
        "acc5": 100 * float(in_five.sum() / images.sum()),
        "mean_class_acc": 100 * float((right[there] / images[there]).mean()),
        "loss": sum(share[1] for share in shares) / float(images.sum()),
        "images": int(images.sum()),
    }


def in_words(figures: Mapping[str, float]) -> str:
    """`top-1 71.23%, top-5 ...` of what `evaluate` answers."""
    names = {"acc1": "top-1", "acc5": "top-5", "mean_class_acc": "mean per class"}
    return ", ".join(f"{word} {figures[name]:.2f}%" for name, word in names.items())


class Judge:
    """Looks at a run's classifier after its epochs, keeps the best, and reckons both at the end.

    `model` is what is judged: the classifier that is trained, or a moving average of it. `batches` gives this process's
    share of the images that choose ("choice") or of those that judge ("test").
    """

    def __init__(
        self,
        options: ClassifierOptions,
        run: Run,
        model: nn.Module,
        found: Splits,
        batches: Callable[[str], Iterable[Batch]],
    ):
        self.options, self.run, self.model, self.found, self.batches = options, run, model, found, batches
        self.metric = metric(options)

    def _measure(self, images: str) -> dict[str, float]:
        run = self.run
        batches = self.batches(images)
        return evaluate(self.model, batches, classes=self.found.classes, processes=run.processes, autocast=run.autocast)

    def after(self, epoch: int) -> dict[str, float]:
        """The epoch's figures on the images that choose, where it is time for them; the best epoch is kept."""
        if (epoch + 1) % self.options.eval_every and epoch + 1 < self.options.epochs:
            return {}
        figures = self._measure("choice")
        self.run.save_best(self.metric, figures[self.metric])
        group = "test" if self.found.chosen_on == TEST else "choice"
        return {f"{group}_{name}": value for name, value in figures.items() if name != "images"}

    def reckoning(self) -> dict[str, Any]:
        """The last and the best epoch on the test images, for result.json."""
        run = self.run
        accuracy = {"last": self._measure("test")}
        best = run.checkpoints / checkpoint.BEST
        kept = run.processes.main and best.is_file()  # it is missing where it could not be saved
        weights = run.processes.broadcast(checkpoint.load_model(best, averaged=True)[0] if kept else None)
        if weights is not None:
            self.model.load_state_dict(weights)
            accuracy["best"] = self._measure("test")
        for name, figures in accuracy.items():
            log.info("%s epoch, %d test images: %s", name, figures["images"], in_words(figures))
        log.info(
            "the best epoch, number %d, was chosen by %s on %s", run.best["epoch"], self.metric, self.found.chosen_on
        )
        return {"accuracy": accuracy, "metric": self.metric, "best_chosen_on": self.found.chosen_on}
