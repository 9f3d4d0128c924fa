"""Fit a tokenizer for ClusterMIM or BEiT: k-means centres of the patches of images.

    python -m tools.tokenizer kmeans PHOTOS --output output/patches.pth                      # of pixels
    python -m tools.tokenizer kmeans PHOTOS --output output/features.pth --encoder output/dino --tokens 100
    python main_pretrain.py --method cluster_mim --tokenizer output/patches.pth --data_path PHOTOS

Images are resized, centre-cropped as for evaluation, and normalised. scikit-learn's MiniBatchKMeans is fitted on each
batch once per epoch, in an order drawn from the seed; only one batch is in memory. Every minute the state is written to
OUTPUT.partial, from which the same command resumes. The finished file contains the centres, the encoder if there is
one, a hash of the names of the images, and the number of patches of each centre.

Tokenizers with a decoder are trained: `python main_pretrain.py --method vq_tokenizer`.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

import methods
from data.loader import (
    Batch,
    EvalSamples,
    eval_batches,
    eval_transform,
    pixel_statistics,
    require_same_statistics,
)
from data.sources import Source, open_source
from models_tokenizer import KMEANS, KMeansTokenizer, encoder_from, find_checkpoint
from models_vit import patch_grid
from options.schema import read
from tools.command import reports_errors, require_at_least
from util import checkpoint
from util.distributed import pick_device
from util.logging import log_to_terminal

log = logging.getLogger(__name__)

SAVE_SECONDS, LOG_SECONDS = 60.0, 10.0
COUNTED = 10_000  # maximum number of images, evenly spaced, whose tokens are counted at the end


# ---- the state of a fit ----------------------------------------------------------------------------------------------


def estimator_state(kmeans: MiniBatchKMeans) -> dict[str, Any]:
    """Return the estimator's state as tensors and plain values."""
    state: dict[str, Any] = {}
    for name, value in vars(kmeans).items():
        if isinstance(value, np.random.RandomState):
            kind, key, *rest = value.get_state(legacy=True)
            value = {
                "kind": str(kind),
                "key": torch.from_numpy(np.asarray(key, np.int64)),
                "rest": list(map(float, rest)),
            }
        elif isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        elif isinstance(value, np.generic):
            value = value.item()
        if name != "labels_":  # labels of the last batch, which are not needed
            state[name] = value
    return state


def restored(state: Mapping[str, Any]) -> MiniBatchKMeans:
    """Create the estimator from a state that `estimator_state` returned."""
    kmeans = MiniBatchKMeans()
    for name, value in state.items():
        if isinstance(value, dict):
            generator = np.random.RandomState()
            position, has_gauss, gauss = value["rest"]
            key = value["key"].numpy().astype(np.uint32)
            generator.set_state((value["kind"], key, int(position), int(has_gauss), gauss))
            value = generator
        elif isinstance(value, Tensor):
            value = value.numpy()
        setattr(kmeans, name, value)
    return kmeans


# ---- fitting ---------------------------------------------------------------------------------------------------------


class Fit:
    """A fit that can be stopped between any two batches.

    Args:
        source: The images.
        tokenizer: Computes the vectors of an image that are clustered.
        options: Options that affect the result; a fit does not resume with other values.
        partial: File of the state.
        device: Device of the encoder.
        num_workers: Processes that load images.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: KMeansTokenizer,
        options: dict[str, Any],
        partial: Path,
        *,
        device: torch.device,
        num_workers: int = 0,
    ) -> None:
        self.source, self.tokenizer, self.options, self.partial = source, tokenizer.to(device), options, partial
        self.device, self.num_workers, self.batch_size = device, num_workers, options["batch_size"]
        self.samples = EvalSamples(
            source, eval_transform(options["input_size"]), mean=options["mean"], std=options["std"]
        )
        self.kmeans = MiniBatchKMeans(
            options["tokens"],
            random_state=options["seed"],
            batch_size=options["batch_size"] * math.prod(tokenizer.grid),
            n_init="auto",
        )
        self.epoch = self.batch = 0

    def resume(self) -> None:
        """Load the state from the partial file, if it exists. Raises ValueError if it is of another fit."""
        if not self.partial.is_file():
            return
        state = checkpoint.load(self.partial)
        changed = [name for name, value in self.options.items() if state["options"].get(name) != value]
        if changed:
            raise ValueError(
                f"{self.partial} is the state of a fit with another {', '.join(changed)}: delete it to start again"
            )
        self.kmeans, self.epoch, self.batch = restored(state["kmeans"]), state["epoch"], state["batch"]
        log.info("resuming in epoch %d of %d, after %d batches", self.epoch + 1, self.options["epochs"], self.batch)

    def save(self) -> None:
        state = {"kmeans": estimator_state(self.kmeans), "epoch": self.epoch, "batch": self.batch}
        checkpoint.save(
            self.partial, {"program": "tokenizer", "format": checkpoint.FORMAT, "options": self.options} | state
        )

    def batches(self) -> Iterator[Batch]:
        """Yield the remaining batches of the epoch."""
        generator = torch.Generator().manual_seed(self.options["seed"] * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.source), generator=generator)[self.batch * self.batch_size :].tolist()
        if order:
            yield from eval_batches(
                self.samples, batch_size=self.batch_size, num_workers=self.num_workers, indices=order
            )

    def vectors(self, batch: Batch) -> np.ndarray:
        """Return the vectors to cluster, `[M, P or D]`."""
        vectors = self.tokenizer.vectors(batch.to(self.device).images)
        return vectors.flatten(0, 1).float().cpu().numpy()

    def run(self) -> None:
        """Run the fit to the end, and save its state regularly."""
        count = math.ceil(len(self.source) / self.batch_size)
        saved = logged = time.monotonic()
        while self.epoch < self.options["epochs"]:
            for batch in self.batches():
                vectors = self.vectors(batch)
                if not hasattr(self.kmeans, "cluster_centers_") and len(vectors) < self.options["tokens"]:
                    raise ValueError(
                        f"tokens is {self.options['tokens']}, and a batch has {len(vectors)} patches: the first one "
                        "must have at least as many; use a larger batch_size"
                    )
                self.kmeans.partial_fit(vectors)
                self.batch += 1
                now = time.monotonic()
                if now - logged > LOG_SECONDS or self.batch == count:
                    logged = now
                    log.info(
                        "epoch %d of %d, batch %d of %d: mean squared distance %.4g",
                        *(self.epoch + 1, self.options["epochs"], self.batch, count),
                        self.kmeans.inertia_ / vectors.size,
                    )
                if now - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
            self.epoch, self.batch = self.epoch + 1, 0
            self.save()
            saved = time.monotonic()

    def finished(self) -> dict[str, Any]:
        """Return the content of the finished file, with the token counts of up to 10,000 images."""
        centers = torch.from_numpy(np.ascontiguousarray(self.kmeans.cluster_centers_)).float()
        if self.tokenizer.cosine:  # the nearest of unit vectors has the largest cosine similarity
            centers = F.normalize(centers, dim=1)
        encoder = self.tokenizer.encoder
        final = KMeansTokenizer(
            centers, self.tokenizer.patch_size, self.tokenizer.grid, encoder, self.tokenizer.cosine
        ).to(self.device)
        chosen = np.unique(np.linspace(0, len(self.source) - 1, min(COUNTED, len(self.source))).astype(int))
        counts = torch.zeros(final.tokens, dtype=torch.int64)
        batches = eval_batches(
            self.samples, batch_size=self.batch_size, num_workers=self.num_workers, indices=chosen.tolist()
        )
        for batch in batches:
            tokens = final.tokenize(batch.to(self.device).images)
            counts += torch.bincount(tokens.flatten(), minlength=final.tokens).cpu()
        share = counts.double() / counts.sum()
        entropy = -torch.xlogy(share, share).sum().item()
        log.info(
            "%d of %d tokens are used; a constant prediction has a loss of %.3f (with equal probabilities: %.3f)",
            *(int((counts > 0).sum()), final.tokens, entropy, math.log(final.tokens)),
        )
        weights = {"centers": centers}
        if encoder is not None:
            weights |= {f"encoder.{name}": value.cpu() for name, value in encoder.state_dict().items()}
        return {
            "program": "tokenizer",
            "format": checkpoint.FORMAT,
            "model": weights,
            "options": self.options | {"entropy": entropy},
            "counts": counts,
        }


def fit_kmeans(words: argparse.Namespace) -> str:
    """Fit a tokenizer and write it; return a message for the user."""
    size = read(words.input_size, tuple[int, int], "input_size")
    require_at_least(words, tokens=2, epochs=1, batch_size=1, patch_size=1, num_workers=0)
    given = {name: read(getattr(words, name), tuple[float, ...], name) for name in ("mean", "std")}
    for name, values in given.items():
        if values and len(values) != words.in_chans:
            raise ValueError(f"{name}: {len(values)} values for in_chans {words.in_chans}")
    mean, std = pixel_statistics(words.in_chans, given["mean"], given["std"])
    if not words.encoder and (words.cosine or words.encoder_heads):
        raise ValueError("cosine and encoder_heads have no effect without --encoder")
    grid = patch_grid(size, words.patch_size)
    output = Path(words.output)
    source = open_source(words.dataset, words.images, words.split, in_chans=words.in_chans, class_list=words.class_list)
    encoder, digest = None, ""
    if words.encoder:
        path = find_checkpoint(words.encoder)
        weights, made_with = methods.load_pretrained(path)
        encoder, digest = encoder_from(weights, made_with, path, words.in_chans, words.encoder_heads)
        require_same_statistics((mean, std), path, made_with)
        encoder.requires_grad_(False).eval()
    tokenizer = KMeansTokenizer(torch.zeros(words.tokens, 1), words.patch_size, grid, encoder, words.cosine)
    tokenizer.set_input_size(size)
    options = {
        "method": KMEANS,
        "model": KMEANS,
        "tokens": words.tokens,
        "patch_size": words.patch_size,
        "input_size": list(size),
        "in_chans": words.in_chans,
        "mean": list(mean),
        "std": list(std),
        "encoder": digest,
        "encoder_heads": encoder.heads if encoder is not None else 0,
        "cosine": words.cosine,
        "data": source.fingerprint,
        "images": len(source),
        "epochs": words.epochs,
        "batch_size": words.batch_size,
        "seed": words.seed,
    }
    partial = output.with_name(f"{output.name}.partial")
    if words.overwrite:
        partial.unlink(missing_ok=True)
    elif output.exists():
        raise ValueError(f"{output} exists; give another --output, or --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    fit = Fit(source, tokenizer, options, partial, device=pick_device(words.device), num_workers=words.num_workers)
    fit.resume()
    fit.run()
    checkpoint.save(output, fit.finished())
    partial.unlink(missing_ok=True)
    return f"Written: {output}\n  {words.tokens} centres of {len(source)} images; use it with --tokenizer {output}\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit a tokenizer for ClusterMIM or BEiT.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kmeans = kinds.add_parser("kmeans", help="k-means centres of patches", description="K-means centres of patches.")
    kmeans.add_argument("images", help="a folder, or anything that --data_path of a run accepts")
    kmeans.add_argument("--output", required=True, metavar="FILE", help="file to write")
    kmeans.add_argument("--overwrite", action="store_true", help="replace an existing file, and start again")
    kmeans.add_argument("--dataset", default="auto", help="how the images are read, as --dataset of a run")
    kmeans.add_argument("--split", default="train", choices=["train", "val"], help="of a folder that holds both")
    kmeans.add_argument("--class_list", default="", help="use only these classes, as --class_list of a run")
    kmeans.add_argument("--tokens", type=int, default=50, help="number of centres (default: 50)")
    kmeans.add_argument("--patch_size", type=int, default=16, help="pixels (default: 16)")
    kmeans.add_argument("--input_size", default="224", help="pixels, 224 or 160x96 (default: 224)")
    kmeans.add_argument("--in_chans", type=int, default=3, help="channels of the images (default: 3)")
    kmeans.add_argument("--mean", default="", help="of each channel, as --mean of the run that will use the tokens")
    kmeans.add_argument("--std", default="", help="standard deviation of each channel")
    kmeans.add_argument("--encoder", default="", help="cluster features of this run or checkpoint instead of pixels")
    kmeans.add_argument(
        "--encoder_heads", type=int, default=0, help="its attention heads, if they are not stored in its checkpoint"
    )
    kmeans.add_argument("--cosine", action="store_true", help="scale features to length 1 first")
    kmeans.add_argument("--epochs", type=int, default=10, help="passes over the images (default: 10)")
    kmeans.add_argument("--batch_size", type=int, default=256, help="images (default: 256)")
    kmeans.add_argument("--seed", type=int, default=0)
    kmeans.add_argument("--device", default="auto", help="of the encoder: auto, cpu, cuda, cuda:N or mps")
    kmeans.add_argument("--num_workers", type=int, default=4)
    return parser.parse_args(argv)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    words = parse(argv)
    log_to_terminal(True)
    message = fit_kmeans(words)
    sys.stdout.write(message)
    return 0


if __name__ == "__main__":
    sys.exit(main())
