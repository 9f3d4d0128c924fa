"""Tasks of a pretraining run between epochs: kNN accuracy and images of reconstructions."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.utils import make_grid

from data.folders import NoSplit
from data.images import CROP_SHARE, describe_eval_crop
from data.loader import EvalSamples, Source, eval_batches, eval_transform
from data.sources import open_split
from data.splits import align_classes
from options import PretrainOptions
from util.features import encode_source, select_reading
from util.knn import knn_accuracy
from util.run import Run
from util.tasks import EpochTask

log = logging.getLogger(__name__)

BANK_LIMIT = 50_000  # maximum number of images, evenly spaced, so that the evaluation is shorter than an epoch
PICTURES = 8
ROWS = {"pasted": "hidden patches pasted into the original"}  # captions, if they differ from the names


def open_validation(options: PretrainOptions, train: Source) -> Source | None:
    """Open the val split of the training data; None if there is no such split."""
    try:
        return open_split(options, "val", known=train.classes)
    except NoSplit:
        return None
    except ValueError as error:
        log.warning("the val split is not used: %s", error)
        return None


class OnlineKNN(EpochTask):
    """kNN accuracy of the encoder's features, every `knn_every` epochs.

    The training images are the bank, and the val split the queries. Without a val split, every tenth training image is
    a query, and the others are the bank.
    """

    def __init__(self, run: Run, model: nn.Module, options: PretrainOptions, train: Source):
        super().__init__(run, options.knn_every)
        if train.labels is None:
            raise ValueError("--knn_every needs labels, and the training images have none")
        self.model, self.options = model, options
        self.bank = self.queries = train
        self.bank_index = list(range(len(train)))
        validation = open_validation(options, train)
        if validation is not None and validation.labels is not None:
            self.queries, self.query_index = align_classes(train, validation), list(range(len(validation)))
            what = f"the {len(validation)} images of the val split"
        else:
            self.query_index = self.bank_index[::10]
            self.bank_index = [index for index in self.bank_index if index % 10]
            what = f"every tenth training image ({len(self.query_index)}), which the encoder has seen without its label"
        step = -(-len(self.bank_index) // BANK_LIMIT)
        self.bank_index = self.bank_index[::step]
        pooling = "class token" if getattr(self.model, "feature_pool", "avg") == "token" else "average of patch tokens"
        log.info(
            "online kNN (%s, k = 20, T = 0.07): %d training images classify %s", pooling, len(self.bank_index), what
        )
        log.info("online kNN: %s", describe_eval_crop(options.input_size, CROP_SHARE, options.eval_crop))

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Compute the accuracy in percent; every process encodes its share."""
        bank = self._encode(self.bank, self.bank_index)
        queries = self._encode(self.queries, self.query_index)
        accuracy = 0.0
        if self.run.processes.main:
            classes = len(self.bank.classes) if self.bank.classes else None
            accuracy = 100 * knn_accuracy(*bank, *queries, num_classes=classes)
        return {"knn_acc1": self.run.processes.broadcast(accuracy)}

    def _encode(self, source: Source, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the features and labels of all processes' shares; a share may be empty."""
        processes = self.run.processes
        share = index[processes.rank :: processes.world_size]
        shares = [both for both in processes.gather(self._encode_share(source, share) if share else None) if both]
        return torch.cat([features for features, _ in shares]), torch.cat([labels for _, labels in shares])

    def _encode_share(self, source: Source, share: Sequence[int]) -> tuple[Tensor, Tensor]:
        features, labels = encode_source(
            self.model,
            source,
            device=self.run.processes.device,
            autocast=self.run.autocast,
            indices=share,
            pool=getattr(self.model, "feature_pool", "avg"),
            **select_reading(self.options),
        )
        assert labels is not None
        return features, labels


@torch.no_grad()
def draw_reconstructions(run: Run, model: Any, options: PretrainOptions, source: Source, path: Path) -> Tensor | None:
    """Draw the model's reconstructions of fixed images with fixed masks, and write them to `path`.

    Returns:
        The image, uint8 `[H, W, 3]`; None if the model does not predict pixels.
    """
    samples = EvalSamples(source, eval_transform(options.input_size), mean=options.mean, std=options.std)
    count = min(PICTURES, len(source))
    spread = [number * len(source) // count for number in range(count)]
    batch = next(eval_batches(samples, batch_size=count, indices=spread)).to(run.processes.device)
    generator = torch.Generator().manual_seed(options.seed)
    if model.draw_noise is None:
        noise = torch.rand(len(batch), model.num_patches, generator=generator)
    else:
        noise = torch.stack([model.draw_noise(generator) for _ in range(len(batch))])
    was_training = model.training
    model.eval()
    with run.autocast():
        made = model.pictures(batch.images, noise=noise)
    model.train(was_training)
    if made is None:
        return None
    sheet = contact_sheet([picture.cpu() for picture in made.values()], options.mean, options.std)
    caption = f"rows: {', '.join(ROWS.get(name, name) for name in made)}"
    if getattr(options, "norm_pix_loss", False):
        caption += "; predictions are of standardised patches, undone with each patch's true mean and deviation"
    return write_sheet(sheet, caption, path)


def write_sheet(sheet_HWC: Tensor, caption: str, path: Path) -> Tensor:
    """Add the caption to an image, write it to `path` if possible, and return it as uint8 `[H, W, 3]`."""
    picture = with_caption(sheet_HWC, caption)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        log.warning("cannot write %s (%s); training continues", path, error)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def contact_sheet(rows: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Arrange rows of normalised images `[N, C, H, W]` in one uint8 image `[H', W', 3]`; small images are enlarged."""
    images = torch.cat(list(rows))
    pixels = images * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
    enlarge = max(1, 96 // pixels.shape[-1])
    pixels = select_rgb(pixels).repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    grid = make_grid(pixels.clamp(0, 1), nrow=len(rows[0]), padding=2, pad_value=1.0)
    return (grid * 255).round().to(torch.uint8).permute(1, 2, 0)


def select_rgb(pixels: Tensor) -> Tensor:
    """Return the first three channels of images `[..., C, H, W]`, or the first one three times if there are fewer."""
    channels = [0, 1, 2] if pixels.shape[-3] >= 3 else [0, 0, 0]
    return pixels[..., channels, :, :]


def with_caption(sheet_HWC: Tensor, caption: str) -> Any:
    """Add a line of text below an image, wrapped if it does not fit."""
    height, width, _ = sheet_HWC.shape
    lines = textwrap.wrap(caption, max(20, width // 6), break_long_words=False)
    picture = Image.new("RGB", (width, height + 14 * len(lines) + 4), "white")
    picture.paste(Image.fromarray(sheet_HWC.numpy()), (0, 0))
    ImageDraw.Draw(picture).multiline_text((3, height + 2), "\n".join(lines), fill="black")
    return picture
