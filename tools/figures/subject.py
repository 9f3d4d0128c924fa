"""The input of a figure: models, images, and one mask for all models.

N images   L patches, row by row   C H W image
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from data.images import eval_transform, is_image_name, picture_pixels, read_image
from data.loader import EvalSamples, eval_batches
from data.sources import Source, open_source
from models_mae import Masking, patchify, random_masking
from models_nor_mae import closest_neighbors, neighbor_similarities, released_neighbors
from tools.figures.models import FigureModel

log = logging.getLogger(__name__)

PHOTOS = "photos"
"""Name of the two photographs of scikit-learn."""
BLANK = 0.86  # grey level of patches that are not shown

Similarity = Literal["embed_pos", "embed", "pixels"]
SPACES: dict[Similarity, str] = {
    "pixels": "normalised pixels",
    "embed": "patch embedding",
    "embed_pos": "patch embedding + position",
}


@dataclass(frozen=True)
class Subject:
    """Models of one image size, images `[N, C, H, W]` (uint8), their names, and settings."""

    models: Sequence[FigureModel]
    pixels: Tensor
    names: Sequence[str]
    seed: int = 0
    mask_ratio: float = 0.75
    similarity: Similarity | None = None
    """Similarity by which closest neighbours are found; None: the default of the figure."""
    cnp: Literal["closest", "released"] = "closest"

    @property
    def only(self) -> FigureModel:
        """The model of a figure that shows a single model."""
        if len(self.models) > 1:
            raise ValueError(f"this figure shows one model; found {', '.join(shown.label for shown in self.models)}")
        return self.models[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches. Raises ValueError if they differ between models, which share the mask."""
        grids = {shown.label: shown.grid for shown in self.models}
        if len(set(grids.values())) > 1:
            found = ", ".join(f"{label} {rows} x {columns}" for label, (rows, columns) in grids.items())
            raise ValueError(f"the same masks need the same grid of patches; found {found}")
        return self.models[0].grid

    @functools.cached_property
    def noise(self) -> Tensor:
        """Noise `[N, L]`; patches with the smallest values are visible. It depends only on the seed."""
        rows, columns = self.grid
        return torch.rand(len(self.pixels), rows * columns, generator=torch.Generator().manual_seed(self.seed))

    @functools.cached_property
    def masking(self) -> Masking:
        """Indices of visible patches."""
        patches = self.noise.shape[1]
        visible = int(patches * (1 - self.mask_ratio))
        if not 0 < visible < patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves {visible} of {patches} patches; choose between")
        return random_masking(self.noise, visible)

    def displayed(self, shown: FigureModel, images: Tensor) -> np.ndarray:
        """Convert normalised images `[N, C, H, W]` to `[N, H, W, 3]` (or `[N, H, W]` for grey) between 0 and 1."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in shown.statistics)
        return as_pictures(images.float().cpu() * std + mean)

    @property
    def photographs(self) -> np.ndarray:
        """The images as returned by `displayed`."""
        return as_pictures(self.pixels / 255)

    @property
    def channels_note(self) -> list[str]:
        """Return a note for images that cannot be displayed directly."""
        channels = self.pixels.shape[1]
        if channels in (1, 3):
            return []
        what = "channel" if channels == 2 else "3 channels, as red, green and blue,"
        return [f"Shown: the first {what} of {channels}."]

    @torch.inference_mode()
    def neighbors(self, shown: FigureModel, similarity: Similarity) -> tuple[Tensor, Tensor]:
        """Return the companion of every patch `[N, L]` and their cosine similarity `[N, L]`, on the CPU."""
        tokens = compared(shown, shown.normalized(self.pixels), similarity)
        if self.cnp == "released":
            companions = released_neighbors(tokens, shown.grid)
        else:
            companions = closest_neighbors(tokens, shown.grid)
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        partner = unit.gather(1, companions[:, :, None].expand(-1, -1, unit.shape[-1]))
        return companions.cpu(), (unit * partner).sum(dim=-1).cpu()

    @property
    def companions_note(self) -> str:
        """Description of the selection of companions."""
        if self.cnp == "released":
            return "companions as the released code selects them"
        return "closest of up to 8 neighbours"


def compared(shown: FigureModel, images: Tensor, similarity: Similarity) -> Tensor:
    """Return the values `[N, L, ...]` of normalised images by which neighbours are compared."""
    if similarity == "pixels":
        return patchify(images, shown.patch[0])
    embedded, with_position = shown.embed(images)
    return with_position if similarity == "embed_pos" else embedded


def highest_similarity(shown: FigureModel, images: Tensor, similarity: Similarity) -> Tensor:
    """Return the cosine similarity of every patch and its closest neighbour, `[N, L]`, for normalised images."""
    similarities, _ = neighbor_similarities(compared(shown, images, similarity), shown.grid, "natural")
    return similarities.amax(dim=-1)


def as_pictures(images: Tensor) -> np.ndarray:
    """Convert images `[N, C, H, W]` between 0 and 1 to `[N, H, W, 3]`, or `[N, H, W]` for grey."""
    images = images.clamp(0, 1)
    channels = images.shape[1]
    return images[:, 0].numpy() if channels < 3 else images[:, :3].movedim(1, -1).numpy()


def only_patches(picture: np.ndarray, patches: Sequence[int], grid: tuple[int, int]) -> np.ndarray:
    """Return an image `[H, W, ...]` in which all other patches are blank."""
    rows, columns = grid
    shown = np.zeros(rows * columns, dtype=bool)
    shown[list(patches)] = True
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    mask = shown.reshape(grid).repeat(height, 0).repeat(width, 1)
    return np.where(mask.reshape(mask.shape + (1,) * (picture.ndim - 2)), picture, np.float32(BLANK))


def photos(in_chans: int) -> Source:
    """Return the two photographs of scikit-learn, a pavilion and a flower."""
    found = load_sample_images()
    names = [Path(name).name for name in found.filenames]
    return Source(names, lambda index: picture_pixels(Image.fromarray(found.images[index]), in_chans))


def open_images(paths: Sequence[str], models: Sequence[FigureModel]) -> tuple[Source, bool]:
    """Open the images; also return whether they are individual files, of which all are shown.

    Args:
        paths: Image files; or one folder, list or shard, `digits` or `photos`; or empty: the held-out images of the
            first run, or the photos if there is no run or its images no longer exist.
        models: Models, whose runs may be used.

    Raises:
        ValueError: If the paths are anything else.
    """
    in_chans = models[0].size[0]
    origin = next((shown.origin for shown in models if shown.origin), None)
    value_range = origin.options.get("value_range", ()) if origin else ()
    files = [path for path in paths if Path(path).is_file() and is_image_name(Path(path).name)]
    if files and len(files) == len(paths):
        return Source(files, lambda index: read_image(files[index], in_chans, value_range)), True
    if len(paths) > 1:
        wrong = ", ".join(path for path in paths if path not in files)
        raise ValueError(f"--images takes image files, or one folder; no image file: {wrong}")
    if paths and paths[0] != PHOTOS:
        return _held_out(
            lambda split: open_source("auto", paths[0], split, in_chans=in_chans, value_range=value_range)
        ), False
    if origin is not None and not paths:
        kind, place, classes = (origin.options[name] for name in ("dataset", "data_path", "class_list"))
        try:
            return _held_out(
                lambda split: open_source(
                    kind, place, split, in_chans=in_chans, class_list=classes, value_range=value_range
                )
            ), False
        except ValueError as error:
            log.warning("%s; showing scikit-learn's photos instead", error)
    return photos(in_chans), True


def _held_out(opened: Callable[[str], Source]) -> Source:
    """Open the validation split; if there is none, the training images or the folder itself."""
    try:
        return opened("val")
    except ValueError:
        return opened("train")


def chosen(source: Source, count: int | None, seed: int) -> list[int]:
    """Draw the indices of `count` images; return all if there are not more, or `count` is None."""
    everything = range(len(source))
    return list(everything) if count is None or count >= len(source) else random.Random(seed).sample(everything, count)


def read_images(source: Source, size: tuple[int, int, int], numbers: Sequence[int]) -> tuple[Tensor, list[str]]:
    """Read centre crops as uint8 `[N, C, H, W]`, and their names."""
    samples = EvalSamples(source, eval_transform(size[1:]), mean=(0.0,) * size[0], std=(1.0,) * size[0])
    (batch,) = eval_batches(samples, batch_size=len(numbers), indices=numbers)  # a single batch
    return batch.images, [source.names[number] for number in batch.index.tolist()]
