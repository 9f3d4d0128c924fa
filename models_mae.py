"""The masked autoencoder: encode the few visible patches, decode all, compare the hidden ones with the image.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. The model is timm's VisionTransformer with a
decoder attached, so its state has MAE's names. A method is this model plus named, weighted `Term`s; each is shown one
`View` of the forward pass and returns one scalar.

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
from torch import Tensor, nn

from models_targets import Pixels, Target, patchify, unpatchify
from models_vit import (
    ENCODER_INPUT,
    Block,
    Pretrainer,
    Reader,
    at_least_float32,
    patch_grid,
    require_sizes,
    resample_abs_pos_embed,
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
    """Which patches the encoder may see."""

    ids_keep: Tensor
    """`[N, V]` the visible patches, in the order in which the encoder gets them."""
    ids_restore: Tensor
    """`[N, L]` each patch's rank in the noise; ranks below V are visible."""
    mask: Tensor
    """`[N, L]` 1 where the encoder may not look, else 0."""


@dataclass
class View:
    """One forward pass, as the terms see it."""

    images: Tensor
    """`[N, C, H, W]` normalised."""
    labels: Tensor | None
    noise: Tensor
    """`[N, L]` of the mask or, where terms have rows of their own, `[N, R, L]` with the mask's first."""
    tokens: Tensor
    """`[N, L, D]` all patches embedded, with their positions."""
    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    latent: Tensor
    """`[N, 1 + V, D]` the encoder's output after its norm, class token first."""
    taps: dict[int, Tensor]
    """`[N, 1 + V, D]` the outputs, before the norm, of the encoder blocks that were asked for."""
    decoded: Tensor
    """`[N, L, E]` the decoder's output after its norm; of the predicted patches, where not all are; empty where nothing
    is predicted."""
    pred: Tensor
    """`[N, L, P]` the prediction in the target's space, float32 at least; likewise."""
    decoder_hidden: dict[int, Tensor] = field(default_factory=dict)
    """`[N, 1 + L, E]` the outputs, before the norm, of the decoder blocks that were asked for."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What one term has computed and others use too, such as a teacher's features."""


class Term(nn.Module):
    """A named, weighted addition to the loss: one paper, one subclass.

    `taps`, `needs_labels` and `noise_rows` are set on the class or in `__init__`; the model reads them when the term is
    added to it.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    """Frozen dataclass with a docstring under each field; `weight` is one of them."""

    needs_labels: bool = False
    reads_features: bool = True
    """Whether it uses the encoder's output after its norm, `view.latent`."""
    reads_decoder: bool = False
    """Whether it uses the decoder."""
    reads_prediction: bool = False
    """Whether it uses `view.decoded` or `view.pred`."""
    taps: tuple[int, ...] = ()
    """Encoder blocks, counted from 0, whose outputs the view must hold; ENCODER_INPUT for the first block's input."""
    decoder_hidden: tuple[int, ...] = ()
    """Decoder blocks, counted from 0, whose outputs the view must hold."""
    noise_rows: int = 0
    """Rows of noise beside the mask's own. The model sets `noise_row`: the first is `view.noise[:, noise_row]`."""
    noise_row: int = 1
    images_together: Literal["", "device", "ranks"] = ""
    """Which images the term compares with each other: none, those of a forward pass on one device, or on all."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def combines(self, batch_size: int) -> Literal["", "device", "ranks"]:
        """Return `images_together` for batches of `batch_size` images on each device; a run warns if it is not ""."""
        return self.images_together

    def settle(self, read: Reader) -> None:
        """Read the checkpoints that training needs and store in the options what they decide. Called before `attach`.

        Not called for a trained model that is loaded for inspection: its options hold all that its shapes depend on.
        """

    def learn_classes(self, classes: int) -> None:
        """Adapt to the number of classes of the training images. Raises ValueError where the options contradict it."""

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Learn mean and standard deviation of each channel with which the images are normalised."""

    def attach(self, model: "MaskedImageModel") -> None:
        """Create layers of the model's sizes. Called once, by the initialised model that the term is added to."""

    def check(self, model: "MaskedImageModel") -> None:
        """Raise ValueError where options and sizes do not fit.

        Called when all terms are attached, and for each new image size.
        """

    def scale(self, model: "MaskedImageModel") -> dict[str, float]:
        """Return numbers that show the effective strength of the weight in this model, for the log."""
        return {}

    def forward(self, model: "MaskedImageModel", view: View) -> Tensor:
        """Return the unweighted scalar."""
        raise NotImplementedError


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all processes; as every process's loss depends on it, so do gradients add up."""

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


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, `x` itself where there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return SumOverRanks.apply(x) / dist.get_world_size()


def block_number(name: str, block: float, depth: int) -> int:
    """Return the block, counted from 1, that an option means: its number, -1 for the last, or a share of the depth.

    Raises:
        ValueError: If there are not so many blocks.
    """
    number = depth if block == -1 else max(1, int(depth * block)) if block < 1 else int(block)
    if number > depth:
        raise ValueError(f"{name} is {block:g}, but there are {depth} blocks")
    return number


def random_masking(noise: Tensor, visible: int) -> Masking:
    """Keep the `visible` patches of the smallest `noise` `[N, L]`."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # thousands of float32 values do hold ties
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float())


class MaskedImageModel(Pretrainer):
    """Base of the methods that hide patches and predict a target for them, plus weighted terms.

    A subclass says what happens to hidden patches (`observe`), what is predicted (`make_target`) and which layers
    predict it (`build_decoder`).

    Args:
        sizes: See `Pretrainer`.
        terms: Loss terms by name.
    """

    Options: ClassVar[type] = MaskOptions
    takes_terms: ClassVar[bool] = True
    drops_hidden: ClassVar[bool] = True
    """Whether the encoder gets the visible patches only; otherwise it gets every place, hidden ones replaced."""

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
        self._check_mask(self.grid)
        self.target = self.make_target()
        self.build_decoder()
        self.init_weights()

        self.noise_rows = 1  # the mask's
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
            raise ValueError(f"outputs of blocks {sorted(taps)} are wanted; the encoder has blocks 0 to {depth - 1}")
        self.taps = tuple(sorted(taps))
        self.decoder_hidden = tuple(sorted({block for term in self.terms.values() for block in term.decoder_hidden}))
        self._check_everything_is_trained()

    def _check_everything_is_trained(self) -> None:
        """Raise ValueError where no loss reaches the top of the encoder."""
        reached = self.decodes and not self.reconstruct_block
        if not reached and not any(term.reads_features for term in self.terms.values()):
            raise ValueError(
                "no loss uses the encoder's output, so its last norm, and blocks after the last one that is compared, "
                "would stay as initialised: compare the student's 'features', use an extra_block, or set "
                "reconstruction_weight above 0 and reconstruct_block 0"
            )

    # ---- what a subclass decides

    def make_target(self) -> Target:
        """Create what is predicted."""
        return Pixels(self.patch_size, self.in_chans, self.options.norm_pix_loss)

    def build_decoder(self) -> None:
        """Create `mask_token` and the layers between the encoder and the prediction, `decoder_pred` included."""
        raise NotImplementedError

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Hide patches, encode and predict."""
        raise NotImplementedError

    def _check_mask(self, grid: tuple[int, int]) -> None:
        """Raise ValueError where `mask_ratio` hides nothing or everything of a grid."""
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
        """V, rounded in floating point as MAE does: 9 of 100 patches at 0.9."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_predicted(self) -> int:
        """Number of patches that training predicts."""
        return self.num_patches

    @property
    def patch_pixels(self) -> int:
        """P."""
        return self.patch_size * self.patch_size * self.in_chans

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size; position tables are resampled as timm resamples the encoder's."""
        if patch_size not in (None, self.patch_size, (self.patch_size, self.patch_size)):
            raise ValueError(
                f"this decoder predicts patches of {self.patch_size} pixels: build a model for patches of {patch_size}"
            )
        if img_size is None:
            return
        old_grid, new_grid = self.grid, patch_grid(img_size, self.patch_size)
        self._check_mask(new_grid)
        super().set_input_size((img_size, img_size) if isinstance(img_size, int) else img_size)
        if hasattr(self, "decoder_pos_embed"):
            table = resample_abs_pos_embed(self.decoder_pos_embed, new_size=list(new_grid), old_size=list(old_grid))
            self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        for term in self.terms.values():
            term.check(self)

    # ---- parts

    def prepare(self, read: Reader, classes: int | None) -> None:
        if classes is not None:
            for term in self.terms.values():
                term.learn_classes(classes)

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        for term in self.terms.values():
            term.learn_normalization(mean, std)

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Encode tokens `[N, V, D]` with positions: `[N, 1 + V, D]` after the norm, and the taps."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x, taps = self.run_blocks(self.blocks, torch.cat([cls_token, tokens], dim=1), self.taps)
        return self.norm(x), taps

    def _complete(self, noise: Tensor | None, images: Tensor) -> Tensor:
        """Return the noise as `[N, R, L]`; rows that were not given are drawn here."""
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
        """Return the mean error over the hidden patches of all images."""
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
            noise: Uniform numbers `[N, L]` for the mask alone or `[N, R, L]`; None draws them here.

        Returns:
            Scalars: `loss`, the target's part (`reconstruction`) and each term by name;
            loss = reconstruction_weight x target's part + sum of weight x term. A weight of 0 leaves the part out.

        Raises:
            ValueError: If a term needs labels and there are none.
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
        part = self.target_loss(view)  # last: its target need not be in memory while the terms work
        loss = part if self.reconstruction_weight == 1 else self.reconstruction_weight * part
        return {"loss": sum(weighted, loss), self.target.name: part, **terms}

    # ---- looking at the model

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the prediction `[N, L, P]` in the target's space and the mask `[N, L]`, 1 = removed."""
        if not self.predicts:
            raise ValueError("this model does not predict patches: its reconstruction_weight is 0")
        view = self.observe(images, noise=noise)
        return view.pred, view.mask

    @torch.no_grad()
    def pictures(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor] | None:
        """Return pictures `[N, C, H, W]`, float32, in the space of the normalised images.

        `original`; `masked`, hidden patches at 0, the mean colour; `reconstruction`, every patch as predicted;
        `pasted`, hidden patches as predicted among the original's visible ones. None where the target is no picture.
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
    """MAE: encode the visible patches, decode all of them.

    Of L patches, int(L * (1 - mask_ratio)) stay visible. Another decoder is a subclass that overrides `build_decoder`,
    `decode` and, if it reads features of the encoder, `decoder_taps`.
    """

    Options: ClassVar[type] = MAEOptions
    options: DecoderOptions

    def _check_mask(self, grid: tuple[int, int]) -> None:
        L, ratio = grid[0] * grid[1], self.mask_ratio
        visible = int(L * (1 - ratio))
        if not 0 < visible < L + (self.reconstruction_weight == 0):
            raise ValueError(
                f"mask_ratio {ratio} keeps {visible} and hides {L - visible} of {L} patches: both must be at least 1"
            )

    def decoder_sizes(self) -> tuple[int, int, int]:
        """Return channels, blocks and heads of the decoder. Raises ValueError where they do not fit together."""
        asked = (self.options.decoder_embed_dim, self.options.decoder_depth, self.options.decoder_num_heads)
        channels, blocks, heads = (own or usual for own, usual in zip(asked, DECODERS[self.size], strict=True))
        require_sizes("decoder", channels, blocks, heads)
        return channels, blocks, heads

    def build_decoder(self) -> None:
        """Create the decoder: self-attention among visible and mask tokens. Leave out what nothing would train."""
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
        """Decode `[N, 1 + V, D]` to every place: `[N, 1 + L, E]` before the decoder's norm, and `decoder_hidden`."""
        if self.reconstruct_block:
            latent = self.decoder_input_norm(taps[self.reconstruct_block - 1])
        visible = self.decoder_embed(latent)
        N, _, E = visible.shape
        places = F.pad(masking.ids_keep + 1, (1, 0))[:, :, None].expand(-1, -1, E)  # 0 is the class token's
        blank = self.mask_token.expand(N, 1 + self.num_patches, E)
        x = blank.scatter(1, places, visible.to(blank.dtype)) + self.decoder_pos_embed
        return self.run_blocks(self.decoder_blocks, x, self.decoder_hidden)

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """Decode `[N, 1 + V, D]` to every patch: `[N, L, E]`, after the decoder's norm, without the class token."""
        return self.decoder_norm(self.decode_blocks(latent, masking, taps)[0])[:, 1:]

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Mask, encode, decode and predict."""
        tokens = self.embed(images)
        noise = self._complete(noise, images)
        masking = random_masking(noise[:, 0], self.num_visible)
        latent, taps = self.encode_tokens(take(tokens, masking.ids_keep))
        decoded = pred = latent.new_empty(0)
        hidden: dict[int, Tensor] = {}
        if self.decoder_hidden:
            x, hidden = self.decode_blocks(latent, masking, taps)
            decoded = self.decoder_norm(x)[:, 1:] if self.predicts else decoded
        elif self.predicts:
            decoded = self.decode(latent, masking, taps)
        if self.predicts:
            pred = at_least_float32(self.decoder_pred(decoded))
        noise = noise if self.noise_rows > 1 else noise[:, 0]
        return View(images, labels, noise, tokens, *masking, latent, taps, decoded, pred, hidden)
