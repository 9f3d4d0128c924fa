"""The masked autoencoder: encode the visible patches, decode all patches, compare the hidden ones with the image.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. The model is timm's VisionTransformer with a
decoder, so the names in its state_dict are MAE's. A method is this model plus named, weighted `Term`s; each gets the
`View` of a forward pass and returns a scalar.

N images   L patches, row by row   V visible patches   D encoder channels   E decoder channels
P pixel values of a patch   R rows of noise   C H W image
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from models_targets import Pixels, Target, patchify, unpatchify
from models_vit import (
    ENCODER_INPUT,
    Block,
    ConvPatchEmbed,
    Pretrainer,
    Reader,
    at_least_float32,
    require_sizes,
    resample_abs_pos_embed,
    set_drop_path,
    take,
    without_autocast,
)
from options.mae import DecoderOptions, MAEOptions, MaskOptions

DECODERS: dict[str, tuple[int, int, int]] = {  # by size: channels, blocks, heads
    "tiny": (192, 8, 12),
    "small": (256, 8, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}


class Masking(NamedTuple):
    """Which patches are visible to the encoder."""

    ids_keep: Tensor
    """`[N, V]` indices of the visible patches, in the order in which the encoder gets them."""
    ids_restore: Tensor
    """`[N, L]` each patch's rank in the noise; ranks below V are visible."""
    mask: Tensor
    """`[N, L]` 1 for hidden patches, 0 for visible ones."""


@dataclass
class View:
    """The tensors of one forward pass, for the terms."""

    images: Tensor
    """`[N, C, H, W]` normalised."""
    labels: Tensor | None
    noise: Tensor
    """`[N, R, L]`: the mask's row first, then those of the terms."""
    tokens: Tensor
    """`[N, L, D]` embeddings of all patches, with positions; empty if only the visible patches were embedded."""
    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    latent: Tensor
    """`[N, 1 + V, D]` the encoder's output after its norm, class token first."""
    taps: dict[int, Tensor]
    """`[N, 1 + V, D]` the outputs, before the norm, of the encoder blocks that were asked for."""
    decoded: Tensor
    """`[N, L, E]` the decoder's output after its norm, for the predicted patches only if these are not all; empty if
    nothing is predicted."""
    pred: Tensor
    """`[N, L, P]` the prediction in the target's space, in float32 or a wider type; otherwise as `decoded`."""
    decoder_hidden: dict[int, Tensor] = field(default_factory=dict)
    """`[N, 1 + L, E]` the outputs, before the norm, of the decoder blocks that were asked for."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Results that several terms use, such as a teacher's features."""


class Term(nn.Module):
    """Base of the loss terms: named, weighted additions to the loss. Each paper has its own subclass.

    `taps`, `needs_labels` and `noise_rows` are set on the class or in `__init__`; the model reads them when the term is
    added.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    """Frozen dataclass with a docstring under each field; `weight` is one of them."""

    needs_labels: bool = False
    reads_tokens: bool = False
    """Whether the term uses `view.tokens`."""
    reads_features: bool = True
    """Whether the term uses `view.latent`, the encoder's output after its norm."""
    reads_decoder: bool = False
    """Whether the term uses the decoder."""
    reads_prediction: bool = False
    """Whether the term uses `view.decoded` or `view.pred`."""
    taps: tuple[int, ...] = ()
    """Encoder blocks, counted from 0, whose outputs the view must hold; ENCODER_INPUT for the first block's input."""
    decoder_hidden: tuple[int, ...] = ()
    """Decoder blocks, counted from 0, whose outputs the view must hold."""
    noise_rows: int = 0
    """Number of rows of noise that the term needs. The first of them is `view.noise[:, noise_row]`; the model sets
    `noise_row`."""
    noise_row: int = 1
    needs_two_images: bool = False
    """Whether a forward pass needs at least two images, as batch norm does."""
    images_together: Literal["", "device", "ranks"] = ""
    """Which images the term compares with each other: none, those of a forward pass on one device, or on all."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def combines(self, batch_size: int) -> Literal["", "device", "ranks"]:
        """Return `images_together` for batches of `batch_size` images per device; a run warns if it is not empty."""
        return self.images_together

    def read_checkpoints(self, read: Reader) -> None:
        """Read the checkpoints that training needs, and store in the options what depends on them.

        Called before `attach`; not called when a trained model is loaded for inference, whose stored options determine
        all shapes.
        """

    def learn_classes(self, classes: int) -> None:
        """Adapt to the number of classes of the training images; raise ValueError if the options contradict it."""

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Store the mean and standard deviation per channel with which the images are normalised."""

    def attach(self, model: "MaskedImageModel") -> None:
        """Create the term's layers, in the sizes of the model. Called once, after the model is initialised."""

    def check(self, model: "MaskedImageModel") -> None:
        """Raise ValueError if the options are invalid for the model's sizes.

        Called when all terms are attached, and for each new image size.
        """

    def scale(self, model: "MaskedImageModel") -> dict[str, float]:
        """Return the effective strength of the term in this model, by description, for the log."""
        return {}

    def forward(self, model: "MaskedImageModel", view: View) -> Tensor:
        """Return the unweighted value of the term, a scalar."""
        raise NotImplementedError


class SumOverRanks(torch.autograd.Function):
    """Sum a tensor over all processes; the gradient is summed over them too, because each process's loss uses it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over all processes, or `x` itself if there is only one."""
    return x if world_size() == 1 else SumOverRanks.apply(x) / world_size()


def all_ranks(x: Tensor) -> Tensor:
    """Return the rows of all processes in the order of their ranks, without gradient."""
    x = x.detach()
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class BatchNormOverRanks(nn.BatchNorm1d):
    """Batch norm of `[N, C]` with the statistics of the images of all processes, on any device.

    nn.SyncBatchNorm works on GPUs only. Every process must have the same number of images. Mean and variance are
    computed in float32 at least, the variance from the centred values.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        with without_autocast(x):
            values = at_least_float32(x)
            count = len(x) * world_size()
            mean = mean_over_ranks(values.mean(dim=0))
            centred = values - mean
            variance = mean_over_ranks(centred.square().mean(dim=0))
            if self.track_running_stats:
                with torch.no_grad():
                    self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                    unbiased = variance.detach() * (count / max(1, count - 1))
                    self.running_mean.lerp_(mean.detach().to(self.running_mean), self.momentum)  # type: ignore[union-attr, arg-type]
                    self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)  # type: ignore[union-attr, arg-type]
            normalized = centred * (variance + self.eps).rsqrt()
            if self.affine:
                normalized = normalized * self.weight + self.bias
        return normalized.to(x.dtype)


def block_number(name: str, block: float, depth: int) -> int:
    """Return the number of a block, counted from 1.

    Args:
        name: Name of the option, for the error message.
        block: A number from 1; -1 for the last block; or, between 0 and 1, a share of the depth, rounded down.
        depth: Number of blocks.

    Raises:
        ValueError: There are fewer blocks.
    """
    number = depth if block == -1 else max(1, int(depth * block)) if block < 1 else int(block)
    if number > depth:
        raise ValueError(f"{name} is {block:g}, but there are {depth} blocks")
    return number


GREY = 0.2989, 0.587, 0.114  # of red, green and blue, as in torchvision
JITTER_NUMBERS = 6  # uniform numbers of an image: three factors, and three that give their order


def compute_grey(images: Tensor) -> Tensor:
    """Return the grey value of each pixel of images `[N, C, H, W]`: `[N, 1, H, W]`."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def jitter_colours(images: Tensor, numbers: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation of each image by random factors, in random order.

    Each change is a blend, limited to 0..1: f x + (1 - f) y with y = 0 for brightness, the mean grey value of the image
    for contrast, and the grey image for saturation, which only images of three channels have.

    Args:
        images: `[N, C, H, W]`, on a scale of 0 to 1.
        numbers: Uniform numbers `[N, 6]`: the first three give the factors, f = 1 + strength (2 u - 1); the order is
            that of the other three.
        strength: From 0 to 1.

    Returns:
        `[N, C, H, W]`.
    """
    coloured = images.shape[1] == 3
    factors = 1 + strength * (2 * numbers[:, :3].to(images.dtype) - 1)
    order = numbers[:, 3:JITTER_NUMBERS].argsort(dim=1)
    for step in range(3):
        change = order[:, step : step + 1]
        factor, which = factors.gather(1, change)[:, :, None, None], change[:, :, None, None]
        grey = compute_grey(images)
        other = torch.where(which == 1, grey.mean(dim=(2, 3), keepdim=True), grey if coloured else images)
        other = torch.where(which == 0, torch.zeros_like(other), other)
        images = (factor * images + (1 - factor) * other).clamp(0, 1)
    return images


def by_rank(ids_restore: Tensor) -> Tensor:
    """Return the patches of each image by ascending noise, visible ones first: `[N, L]`."""
    return ids_restore.argsort(dim=1)


def random_masking(noise: Tensor, visible: int) -> Masking:
    """Keep the `visible` patches with the smallest `noise` `[N, L]` of each image."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # among thousands of float32 values there are ties
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float())


class MaskedImageModel(Pretrainer):
    """Base of the methods that hide patches and predict a target for them, with optional loss terms.

    A subclass defines how hidden patches are treated (`observe`), what is predicted (`make_target`) and which layers
    predict it (`build_decoder`).

    Args:
        sizes: See `Pretrainer`.
        terms: Loss terms by name.
    """

    Options: ClassVar[type] = MaskOptions
    takes_terms: ClassVar[bool] = True
    drops_hidden: ClassVar[bool] = True
    """Whether the encoder gets the visible patches only; otherwise hidden patches are replaced by a token."""

    decoder_blocks: nn.ModuleList
    decoder_pred: nn.Linear
    mask_token: nn.Parameter
    decoder_pos_embed: nn.Parameter

    decoder_taps: tuple[int, ...] = ()
    """Encoder blocks whose outputs `decode` receives, as `Term.taps`."""
    reconstruct_block: int = 0
    """Encoder block, counted from 1, whose output the decoder reads; 0: the encoder's output after its norm."""

    def __init__(self, *sizes: Any, terms: Mapping[str, Term] | None = None, **more: Any) -> None:
        super().__init__(*sizes, **more)
        options = self.options
        self.mask_ratio: float = options.mask_ratio
        self.reconstruction_weight: float = getattr(options, "reconstruction_weight", 1.0)
        added = (terms or {}).values()
        self.predicts = self.reconstruction_weight > 0 or any(term.reads_prediction for term in added)
        self.decodes = self.predicts or any(term.reads_decoder for term in added)
        self.check_grid(self.grid)
        self.target = self.make_target()
        self.build_decoder()
        self.init_weights()

        self.noise_rows = 1  # the mask's
        self._prepare_jitter(getattr(options, "input_jitter", 0.0))
        self.terms: dict[str, Term] = nn.ModuleDict()  # type: ignore[assignment]
        taps = set(self.decoder_taps)
        for name, term in (terms or {}).items():
            term.noise_row = self.noise_rows
            self.noise_rows += term.noise_rows
            self.terms[name] = term
            term.attach(self)
            taps.update(term.taps)
        for term in self.terms.values():
            term.check(self)
        depth = len(self.blocks)
        if taps and not ENCODER_INPUT <= min(taps) <= max(taps) < depth:
            raise ValueError(f"outputs of blocks {sorted(taps)} are required; the encoder has blocks 0 to {depth - 1}")
        self.taps = tuple(sorted(taps))
        self.decoder_hidden = tuple(sorted({block for term in self.terms.values() for block in term.decoder_hidden}))
        if self.decoder_hidden and not self.predicts:  # no loss would train the blocks after them
            self.decoder_blocks = self.decoder_blocks[: self.decoder_hidden[-1] + 1]
        self._check_everything_is_trained()

    def _prepare_jitter(self, strength: float) -> None:
        """Reserve a row of noise for `input_jitter`, and remember how images are normalised."""
        self.input_jitter, self.jitter_row = strength, self.noise_rows
        self.noise_rows += int(strength > 0)
        if strength and self.num_patches < JITTER_NUMBERS:
            raise ValueError(f"input_jitter needs at least {JITTER_NUMBERS} patches, and there are {self.num_patches}")
        usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if self.in_chans == 3 else ((0.5,), (0.5,))
        mean, std = (torch.tensor(values)[:, None, None] if strength else None for values in usual)
        self.image_mean: Tensor | None
        self.image_std: Tensor | None
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)

    def encoder_input(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the images as the encoder gets them: in training with changed colours where `input_jitter` is set.

        Args:
            images: `[N, C, H, W]`, normalised.
            noise: `[N, R, L]`.
        """
        if self.image_mean is None or self.image_std is None or not self.training:
            return images
        pixels = at_least_float32(images) * self.image_std + self.image_mean
        pixels = jitter_colours(pixels, noise[:, self.jitter_row], self.input_jitter)
        return ((pixels - self.image_mean) / self.image_std).to(images.dtype)

    def _check_everything_is_trained(self) -> None:
        """Raise ValueError if no part of the loss uses the last layer of the encoder."""
        reached = self.decodes and not self.reconstruct_block
        if not reached and not any(term.reads_features for term in self.terms.values()):
            raise ValueError(
                "no loss uses the encoder's output, so its last norm, and blocks after the last one that is compared, "
                "would stay as initialised: compare the student's 'features', use an extra_block, or set "
                "reconstruction_weight above 0 and reconstruct_block 0"
            )

    # ---- overridden by subclasses

    def make_target(self) -> Target:
        """Create the target of the prediction."""
        return Pixels(self.patch_size, self.in_chans, self.options.norm_pix_loss)

    def build_decoder(self) -> None:
        """Create `mask_token` and the layers between the encoder and the prediction, `decoder_pred` included."""
        raise NotImplementedError

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Hide patches, encode and predict."""
        raise NotImplementedError

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise ValueError if `mask_ratio` hides none or all of the patches of a grid."""
        raise NotImplementedError

    @property
    def main_part(self) -> str:
        return self.target.name

    @property
    def loss_terms(self) -> dict[str, Any]:
        return dict(self.terms.items())

    # ---- sizes

    @property
    def num_visible(self) -> int:
        """V. It is rounded down in floating point, as in MAE: 9 of 100 patches at a mask ratio of 0.9."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_predicted(self) -> int:
        """Number of patches that training predicts."""
        return self.num_patches

    @property
    def patch_pixels(self) -> int:
        """P, the number of pixel values of a patch."""
        return self.patch_size * self.patch_size * self.in_chans

    def resized(self, before: tuple[int, int]) -> None:
        if hasattr(self, "decoder_pos_embed"):
            table = resample_abs_pos_embed(self.decoder_pos_embed, new_size=list(self.grid), old_size=list(before))
            self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        for term in self.terms.values():
            term.check(self)

    # ---- parts

    def prepare(self, read: Reader, classes: int | None) -> None:
        if classes is not None:
            for term in self.terms.values():
                term.learn_classes(classes)

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        for buffer, values in ((self.image_mean, mean), (self.image_std, std)):
            if buffer is not None:
                buffer.data = torch.tensor(values, device=buffer.device)[:, None, None]
        for term in self.terms.values():
            term.learn_normalization(mean, std)

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode tokens `[N, V, D]` that have positions; return `[N, 1 + V, D]` after the norm, and the taps."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x, taps = self.run_blocks(self.blocks, torch.cat([cls_token, tokens], dim=1), self.taps)
        return self.norm(x), taps

    def _complete(self, noise: Tensor | None, images: Tensor) -> Tensor:
        """Return the noise as `[N, R, L]`; missing rows are drawn."""
        N, R, L = images.shape[0], self.noise_rows, self.num_patches
        if noise is None:
            return torch.rand(N, R, L, device=images.device)
        if noise.ndim not in (2, 3) or noise.shape[0] != N or noise.shape[-1] != L:
            raise ValueError(f"noise is {list(noise.shape)}; {N} images of {L} patches take {[N, L]} or {[N, R, L]}")
        noise = noise.to(images.device).reshape(N, -1, L)
        missing = R - noise.shape[1]
        if missing > 0:
            noise = torch.cat([noise, torch.rand(N, missing, L, device=images.device)], dim=1)
        return noise

    # ---- the objective

    def target_loss(self, view: View) -> Tensor:
        """Return the mean error over all hidden patches."""
        with without_autocast(view.pred):
            error_NL = self.target.error(view.pred, self.target(view.images))
            return (error_NL * view.mask).sum() / view.mask.sum()

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            images: `[N, C, H, W]`, normalised.
            labels: Class numbers `[N]`, for terms that need them.
            noise: Uniform random numbers, `[N, L]` for the mask only or `[N, R, L]`; None: they are drawn.

        Returns:
            Scalars by name: `loss`, the error of the prediction (`reconstruction`) and each term, with
            loss = reconstruction_weight x reconstruction + sum of weight x term. With reconstruction_weight 0,
            `reconstruction` is not computed.

        Raises:
            ValueError: A term needs labels and there are none.
        """
        view = self.observe(images, labels, noise=noise)
        terms = {}
        for name, term in self.terms.items():
            if term.needs_labels and labels is None:
                raise ValueError(f"the term {name!r} needs labels, and these images have none")
            terms[name] = term(self, view)
        weighted = [term.options.weight * terms[name] for name, term in self.terms.items()]
        if self.reconstruction_weight == 0:
            return {"loss": sum(weighted[1:], weighted[0]), **terms}
        part = self.target_loss(view)  # last, so that the target is not in memory while the terms are computed
        loss = part if self.reconstruction_weight == 1 else self.reconstruction_weight * part
        return {"loss": sum(weighted, loss), self.target.name: part, **terms}

    # ---- inspection

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction for a mask.

        Args:
            images: `[N, C, H, W]`, normalised.
            noise: As for `forward`.

        Returns:
            The prediction `[N, L, P]` in the target's space, and the mask `[N, L]`, 1 for hidden patches.

        Raises:
            ValueError: The model predicts no patches (reconstruction_weight 0).
        """
        if not self.predicts:
            raise ValueError("this model does not predict patches: its reconstruction_weight is 0")
        view = self.observe(images, noise=noise)
        return view.pred, view.mask

    @torch.no_grad()
    def pictures(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor] | None:
        """Return pictures of a reconstruction, in the space of the normalised images.

        Returns:
            `[N, C, H, W]` float32 by name: `original`; `masked`, with hidden patches in the mean colour;
            `reconstruction`, all patches as predicted; `pasted`, the original with hidden patches as predicted.
            None if the target is not an image.
        """
        if not self.predicts:
            return None
        pred, mask = self.predict(images, noise=noise)
        predicted = self.target.pixels(pred, images)
        if predicted is None:
            return None
        patches = patchify(at_least_float32(images), self.patch_size)
        hidden = mask[:, :, None] > 0
        pictures = {
            "original": patches,
            "masked": patches.masked_fill(hidden, 0.0),
            "reconstruction": predicted,
            "pasted": torch.where(hidden, predicted, patches),
        }
        return {name: unpatchify(patches, self.patch_size, self.grid).float() for name, patches in pictures.items()}

    def constant_loss(self, images: Tensor) -> float | None:
        return self.target.constant_loss(images) if self.reconstruction_weight > 0 else None


class MaskedAutoencoderViT(MaskedImageModel):
    """MAE: encode the visible patches, decode all patches.

    Of L patches, int(L * (1 - mask_ratio)) stay visible. For another decoder, override `build_decoder`, `decode` and,
    if it uses the outputs of encoder blocks, `decoder_taps`.
    """

    Options: ClassVar[type] = MAEOptions
    options: DecoderOptions

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        if rate := getattr(self.options, "drop_path", 0.0):
            set_drop_path(self.blocks, rate, uniform=True)

    def check_grid(self, grid: tuple[int, int]) -> None:
        L, ratio = grid[0] * grid[1], self.mask_ratio
        visible = int(L * (1 - ratio))
        if not 0 < visible < L + (self.reconstruction_weight == 0):
            raise ValueError(
                f"mask_ratio {ratio} keeps {visible} and hides {L - visible} of {L} patches: both must be at least 1"
            )

    def decoder_sizes(self) -> tuple[int, int, int]:
        """Return channels, blocks and heads of the decoder; raise ValueError if they do not fit together."""
        asked = (self.options.decoder_embed_dim, self.options.decoder_depth, self.options.decoder_num_heads)
        channels, blocks, heads = (own or usual for own, usual in zip(asked, DECODERS[self.size], strict=True))
        require_sizes("decoder", channels, blocks, heads)
        return channels, blocks, heads

    def build_decoder(self) -> None:
        """Create the decoder with self-attention, without layers that no part of the loss would train."""
        if not self.decodes:
            return
        channels, blocks, heads = self.decoder_sizes()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        options = self.options
        if asked := getattr(options, "reconstruct_block", 0.0):
            self.reconstruct_block = block_number("reconstruct_block", asked, len(self.blocks))
            self.decoder_taps = (self.reconstruct_block - 1,)
            self.decoder_input_norm = norm_layer(self.embed_dim)
        self.decoder_embed = nn.Linear(self.embed_dim, channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, channels))
        self.decoder_blocks = nn.ModuleList(
            Block(channels, heads, self.mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(blocks)
        )
        if self.predicts:
            self.decoder_norm = norm_layer(channels)
            self.decoder_pred = nn.Linear(channels, self.target.width)

    def decode_blocks(
        self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Decode `[N, 1 + V, D]`; return `[N, 1 + L, E]` before the decoder's norm, and outputs of `decoder_hidden`."""
        if self.reconstruct_block:
            latent = self.decoder_input_norm(taps[self.reconstruct_block - 1])
        visible = self.decoder_embed(latent)
        N, _, E = visible.shape
        places = F.pad(masking.ids_keep + 1, (1, 0))[:, :, None].expand(-1, -1, E)  # 0 is the class token
        blank = self.mask_token.expand(N, 1 + self.num_patches, E)
        x = blank.scatter(1, places, visible.to(blank.dtype)) + self.decoder_pos_embed
        return self.run_blocks(self.decoder_blocks, x, self.decoder_hidden)

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """Decode `[N, 1 + V, D]`; return `[N, L, E]` after the decoder's norm, without the class token."""
        return self.decoder_norm(self.decode_blocks(latent, masking, taps)[0])[:, 1:]

    def embed_visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Embed the patches `ids_keep` only, with their positions: `[N, V, D]`."""
        self._check_images(images)
        patches = take(patchify(images, self.patch_size), ids_keep)
        row = unpatchify(patches, self.patch_size, (1, self.num_visible))
        positions = take(self.pos_embed[:, 1:].expand(len(images), -1, -1), ids_keep)
        return self.patch_embed.proj(row).flatten(2).transpose(1, 2) + positions

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Mask, encode, decode and predict."""
        noise = self._complete(noise, images)
        seen = self.encoder_input(images, noise)
        masking = random_masking(noise[:, 0], self.num_visible)
        if isinstance(self.patch_embed, ConvPatchEmbed) and not any(term.reads_tokens for term in self.terms.values()):
            tokens, visible = seen.new_empty(0), self.embed_visible(seen, masking.ids_keep)
        else:
            tokens = self.embed(seen)
            visible = take(tokens, masking.ids_keep)
        latent, taps = self.encode_tokens(visible)
        decoded = pred = latent.new_empty(0)
        hidden: dict[int, Tensor] = {}
        if self.decoder_hidden:
            x, hidden = self.decode_blocks(latent, masking, taps)
            decoded = self.decoder_norm(x)[:, 1:] if self.predicts else decoded
        elif self.predicts:
            decoded = self.decode(latent, masking, taps)
        if self.predicts:
            pred = at_least_float32(self.decoder_pred(decoded))
        return View(images, labels, noise, tokens, *masking, latent, taps, decoded, pred, hidden)
