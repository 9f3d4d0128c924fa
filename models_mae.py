"""The masked autoencoder: encode the few visible patches, decode all, compare the hidden ones with the image.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. The model is timm's VisionTransformer with a
decoder attached, so its state has MAE's names. A method is this model plus named, weighted `Term`s; each is shown one
`View` of the forward pass and returns one scalar.

N images   L patches, row by row   V visible patches   D encoder channels   E decoder channels
P pixel values of a patch   R rows of noise   C H W image
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models_vit import Block, VisionTransformer, initialize, patch_grid, position_table, resample_abs_pos_embed

ENCODER_INPUT = -1  # the tap of what enters the first block
POSITION_TABLES = ("pos_embed", "decoder_pos_embed")


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
    """`[N, L, E]` the decoder's output after its norm; of the predicted patches, where not all are."""
    pred: Tensor
    """`[N, L, P]` the prediction in the target's space, float32 at least; likewise."""


Reader = Callable[[str], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
"""From a checkpoint's path its weights by name and, where it is one of ours, its run's options."""


class Term(nn.Module):
    """A named, weighted addition to the reconstruction loss: one paper, one subclass.

    `taps`, `needs_labels` and `noise_rows` are set on the class or in `__init__`; the model reads them when it takes
    the term.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    """A frozen dataclass with a docstring under each field; `weight` is one of them."""

    needs_labels: bool = False
    taps: tuple[int, ...] = ()
    """Encoder blocks, counted from 0, whose outputs the view shall hold; ENCODER_INPUT for what enters the first."""
    noise_rows: int = 0
    """Rows of noise beside the mask's own. The model sets `noise_row`: the first is `view.noise[:, noise_row]`."""
    noise_row: int = 1
    images_together: Literal["", "device", "ranks"] = ""
    """Which images the term looks at together: none, those of a forward pass on one device, or on all of them."""

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def settle(self, read: Reader) -> None:
        """Read the checkpoints that training needs, and note in the options what they decide. Called before `attach`.

        Not called where a trained model is only looked at: its options hold all that its shapes depend on.
        """

    def learn_classes(self, classes: int) -> None:
        """Hear how many classes the training images have; ValueError where options say otherwise."""

    def attach(self, model: "MaskedAutoencoderViT") -> None:
        """Create layers of the model's sizes. Called once by the model that takes the term, itself initialised."""

    def check(self, model: "MaskedAutoencoderViT") -> None:
        """ValueError where options and sizes do not go together. Called after `attach` and for each new image size."""

    def scale(self, model: "MaskedAutoencoderViT") -> dict[str, float]:
        """Figures that tell what the weight amounts to in this model, for the log."""
        return {}

    def forward(self, model: "MaskedAutoencoderViT", view: View) -> Tensor:
        """The scalar, unweighted."""
        raise NotImplementedError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images `[N, C, H, W]` as patches `[N, L, P]`; within a patch the order is row, column, channel."""
    N, C, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    cut = images.reshape(N, C, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(N, rows * columns, patch_size * patch_size * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Patches `[N, L, P]` on a grid of (rows, columns) as images `[N, C, H, W]`: the inverse of `patchify`."""
    N, (rows, columns) = patches.shape[0], grid
    cut = patches.reshape(N, rows, columns, patch_size, patch_size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(N, -1, rows * patch_size, columns * patch_size)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """From `x` `[N, L, D]` the rows `ids` `[N, V]`: `[N, V, D]`."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay as they are."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, nothing on the device of `x` is rounded to half precision."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def require_number(name: str, value: object, low: float = -math.inf) -> None:
    """ValueError unless `value` is a finite number, and at least `low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low:  # type: ignore[arg-type, operator]
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number{least}")


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


def standardize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Along the last axis: minus the mean, over the root of the unbiased variance plus `eps`.

    A layer norm has the biased variance, which is the unbiased one times (P - 1) / P, so with a smaller eps and a
    constant weight it does the same, in one kernel that keeps nothing but its input.
    """
    width = x.shape[-1]
    ratio = (width - 1) / width
    return F.layer_norm(x, (width,), weight=x.new_full((width,), math.sqrt(ratio)), eps=eps * ratio)


def random_masking(noise: Tensor, visible: int) -> Masking:
    """Keep the `visible` patches of the smallest `noise` `[N, L]`."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # thousands of float32 values do hold ties
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float())


class MaskedAutoencoderViT(VisionTransformer):
    """MAE for images of `img_size` pixels, one side or (height, width), in square patches of `patch_size` pixels.

    Of L patches, int(L * (1 - mask_ratio)) stay visible. With `norm_pix_loss` the target is each patch standardised by
    itself. `terms` are taken by name. ValueError where sizes do not go together.

    Another decoder is a subclass that overrides `build_decoder`, `decode` and, if it looks into the encoder,
    `decoder_taps`. One that needs options of its own takes them as further arguments and names them in `choices`.
    """

    choices: ClassVar[tuple[str, ...]] = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    """The options of a run that concern this decoder, each an argument."""
    drops_hidden: ClassVar[bool] = True
    """Whether the encoder gets the visible patches alone; if not, it gets all, and hidden ones are blank."""

    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    decoder_pos_embed: nn.Parameter

    decoder_taps: tuple[int, ...] = ()
    """Encoder blocks whose outputs `decode` is handed, as `Term.taps`."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 192,
        decoder_depth: int = 8,
        decoder_num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        mask_ratio: float = 0.75,
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        grid = patch_grid(img_size, patch_size)
        parts = (
            ("encoder", embed_dim, depth, num_heads),
            ("decoder", decoder_embed_dim, decoder_depth, decoder_num_heads),
        )
        for part, channels, blocks, heads in parts:
            if min(channels, blocks, heads) < 1 or channels % heads or channels % 4:
                raise ValueError(
                    f"{part}: {blocks} blocks of {channels} channels in {heads} heads: "
                    "each must be positive, and the heads and 4 must divide the channels"
                )
        if in_chans < 1:
            raise ValueError(f"images have at least one channel, not {in_chans}")
        if norm_pix_loss and patch_size * patch_size * in_chans == 1:
            raise ValueError("norm_pix_loss standardises each patch, and patches of a single value have no variance")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="token",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.patch_size = patch_size
        self.mlp_ratio = mlp_ratio
        self.norm_pix_loss = norm_pix_loss
        self.mask_ratio = mask_ratio
        self._check_mask(grid)
        self.build_decoder(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.init_weights()
        for table in self._position_tables():
            table.requires_grad_(False)

        self.noise_rows = 1  # the mask's
        self.terms: dict[str, Term] = nn.ModuleDict()  # type: ignore[assignment]
        taps = set(self.decoder_taps)
        for name, term in (terms or {}).items():
            term.noise_row = self.noise_rows
            self.noise_rows += term.noise_rows
            self.terms[name] = term
            term.attach(self)
            term.check(self)
            taps.update(term.taps)
        if taps and not ENCODER_INPUT <= min(taps) <= max(taps) < depth:
            raise ValueError(f"outputs of blocks {sorted(taps)} are wanted; the encoder has blocks 0 to {depth - 1}")
        self.taps = tuple(sorted(taps))

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def num_visible(self) -> int:
        """V, with floating point's rounding as MAE has it: 9 of 100 patches at 0.9."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_predicted(self) -> int:
        """How many patches training predicts."""
        return self.num_patches

    @property
    def patch_pixels(self) -> int:
        """P."""
        return self.patch_size * self.patch_size * self.in_chans

    def _check_mask(self, grid: tuple[int, int]) -> None:
        L, ratio = grid[0] * grid[1], self.mask_ratio
        if not 0 <= ratio <= 1:
            raise ValueError(f"mask_ratio is the share of patches that is hidden, between 0 and 1, not {ratio}")
        visible = int(L * (1 - ratio))
        if not 0 < visible < L:
            raise ValueError(
                f"mask_ratio {ratio} keeps {visible} and hides {L - visible} of {L} patches: both must be at least 1"
            )

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size from now on; both position tables are resampled as timm does the encoder's."""
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

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Refused: there is no classifier to reset."""
        raise ValueError(
            "a masked autoencoder returns losses and has no classifier: build a timm VisionTransformer of the same "
            "sizes with num_classes, and load into it the part of this model's state that is the encoder's"
        )

    def no_weight_decay(self) -> set[str]:
        """Nothing by name: as in MAE's pretraining the class and mask tokens decay, vectors and biases do not."""
        return set()

    # ---- parts ------------------------------------------------------------------------------------------------------

    def build_decoder(self, decoder_embed_dim: int, decoder_depth: int, decoder_num_heads: int) -> None:
        """Create the decoder: self-attention among visible and mask tokens."""
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, self.mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_pixels)

    def _position_tables(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in POSITION_TABLES if hasattr(self, name)]

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """MAE's initial weights and positions. The arguments are timm's and mean nothing here."""
        for table in self._position_tables():
            table.copy_(position_table(self.grid, table.shape[-1]))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(initialize)

    def _run(
        self, blocks: Iterable[nn.Module], x: Tensor, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`x` through the blocks; also the outputs of those in `taps`."""
        seen = {ENCODER_INPUT: x} if ENCODER_INPUT in taps else {}
        for index, block in enumerate(blocks):
            x = self._through(block, x)
            if index in taps:
                seen[index] = x
        return x, seen

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """One block, which is computed again for its gradient under gradient checkpointing."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.in_chans, *self.patch_embed.img_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {list(images.shape)}; this model takes [images, {', '.join(map(str, expected))}]"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Every patch embedded, with its position: `[N, L, D]`."""
        self._check_images(images)
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The encoder on tokens `[N, V, D]` with positions: `[N, 1 + V, D]` after the norm, and the taps."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x, taps = self._run(self.blocks, torch.cat([cls_token, tokens], dim=1), self.taps)
        return self.norm(x), taps

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """From `[N, 1 + V, D]` to every patch: `[N, L, E]`, after the decoder's norm and without the class token."""
        visible = self.decoder_embed(latent)
        N, _, E = visible.shape
        places = F.pad(masking.ids_keep + 1, (1, 0))[:, :, None].expand(-1, -1, E)  # 0 is the class token's
        blank = self.mask_token.expand(N, 1 + self.num_patches, E)
        x = blank.scatter(1, places, visible.to(blank.dtype)) + self.decoder_pos_embed
        x, _ = self._run(self.decoder_blocks, x)
        return self.decoder_norm(x)[:, 1:]

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Mask, encode, decode and predict."""
        tokens = self.embed(images)
        noise = self._complete(noise, images)
        masking = random_masking(noise[:, 0], self.num_visible)
        latent, taps = self.encode_tokens(take(tokens, masking.ids_keep))
        decoded = self.decode(latent, masking, taps)
        pred = at_least_float32(self.decoder_pred(decoded))
        noise = noise if self.noise_rows > 1 else noise[:, 0]
        return View(images, labels, noise, tokens, *masking, latent, taps, decoded, pred)

    def _complete(self, noise: Tensor | None, images: Tensor) -> Tensor:
        """The noise as `[N, R, L]`; rows that were not given are drawn here."""
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

    # ---- the objective ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted: the patches `[N, L, P]`, standardised one by one under `norm_pix_loss`."""
        patches = patchify(at_least_float32(images), self.patch_size)
        return standardize(patches) if self.norm_pix_loss else patches

    def patch_error(self, pred: Tensor, target: Tensor) -> Tensor:
        """How far each patch is off, `[N, L]`: its mean squared difference."""
        return F.mse_loss(pred, target, reduction="none").mean(dim=-1)

    def reconstruction_loss(self, view: View) -> Tensor:
        """The mean error over the hidden patches of all images."""
        with without_autocast(view.pred):
            error_NL = self.patch_error(view.pred, self.target(view.images))
            return (error_NL * view.mask).sum() / view.mask.sum()

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss`, `reconstruction` and each term by name: loss = reconstruction + the sum of weight x term.

        `images` `[N, C, H, W]` are normalised floats. `noise`, uniform, is `[N, L]` for the mask alone or
        `[N, noise_rows, L]`; None has it drawn here. ValueError where a term needs labels and there are none.
        """
        view = self.observe(images, labels, noise=noise)
        terms = {}
        for name, term in self.terms.items():
            if term.needs_labels and labels is None:
                raise ValueError(f"the term {name!r} needs labels, and these images have none")
            terms[name] = term(self, view)
        reconstruction = self.reconstruction_loss(view)  # last: its target need not be there while the terms work
        loss = reconstruction
        for name, term in self.terms.items():
            loss = loss + term.options.weight * terms[name]
        return {"loss": loss, "reconstruction": reconstruction, **terms}

    # ---- looking at the model ---------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """Features of whole images: `[N, 1 + L, D]` after the norm, class token first. No mask, nothing random."""
        self._check_images(images)
        return self.forward_features(images)

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction `[N, L, P]` in the target's space and the mask `[N, L]`, 1 = removed."""
        view = self.observe(images, noise=noise)
        return view.pred, view.mask

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Pictures `[N, C, H, W]`, float32, in the space of the normalised images.

        `original`; `masked`, with hidden patches at 0, the mean colour; `reconstruction`, every patch as predicted;
        `pasted`, hidden patches as predicted among the original's visible ones. Under `norm_pix_loss` a prediction
        gets the mean and the deviation of the true patch, which the model does not know.
        """
        pred, mask = self.predict(images, noise=noise)
        patches = patchify(at_least_float32(images), self.patch_size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        hidden = mask[:, :, None] > 0
        pictures = {
            "original": patches,
            "masked": patches.masked_fill(hidden, 0.0),
            "reconstruction": pred,
            "pasted": torch.where(hidden, pred, patches),
        }
        return {name: unpatchify(patches, self.patch_size, self.grid).float() for name, patches in pictures.items()}

    @torch.no_grad()
    def baseline(self, images: Tensor) -> Tensor:
        """The reconstruction loss of the best prediction that does not look at the image, over all patches.

        That is the mean patch of `images`; under `norm_pix_loss` it is zeros, the mean of any standardised patch.
        """
        target = self.target(images)
        return target.square().mean() if self.norm_pix_loss else target.var(dim=(0, 1), correction=0).mean()
