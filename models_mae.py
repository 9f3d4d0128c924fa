"""The masked autoencoder: encode the few visible patches, decode all of them, compare the hidden ones with the image.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. The model is timm's VisionTransformer with a decoder attached, so its
state has MAE's names. A method is this model plus named, weighted `Term`s: each sees one `View` of the forward pass and returns one scalar.

N images   L patches, row-major   V visible patches   D encoder channels   E decoder channels   P pixel values of a patch   R rows of noise
C H W image
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models_vit import Block, VisionTransformer, initialize, patch_grid, position_table, resample_abs_pos_embed

ENCODER_INPUT = -1  # as a tap: what enters the first block


class Masking(NamedTuple):
    """Which patches the encoder sees."""

    ids_keep: Tensor
    """`[N, V]` the visible patches, in the order in which the encoder gets them."""
    ids_restore: Tensor
    """`[N, L]` each patch's rank in the noise; ranks below V are visible."""
    mask: Tensor
    """`[N, L]` 1 where the encoder may not look, else 0."""


@dataclass
class View:
    """One forward pass as the terms see it."""

    images: Tensor
    """`[N, C, H, W]` normalised."""
    labels: Tensor | None
    noise: Tensor
    """`[N, L]` the mask's noise or, where terms take rows of their own, `[N, R, L]` with the mask's first."""
    tokens: Tensor
    """`[N, L, D]` every patch embedded, with its position."""
    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor
    latent: Tensor
    """`[N, 1 + V, D]` the encoder's output after its norm, class token first."""
    taps: dict[int, Tensor]
    """`[N, 1 + V, D]` outputs of the encoder blocks that the terms asked for, before the norm."""
    decoded: Tensor
    """`[N, L, E]` the decoder's output after its norm."""
    pred: Tensor
    """`[N, L, P]` the prediction, in the target's space, at least float32."""


class Term(nn.Module):
    """A named, weighted addition to the reconstruction loss; one paper a subclass.

    Set `taps`, `needs_labels` and `noise_rows` on the class or in `__init__`; the model reads them once, when it takes the term.
    """

    name: ClassVar[str]
    Options: ClassVar[type]
    """A frozen dataclass with a docstring under each field, `weight` among them."""

    needs_labels: bool = False
    taps: tuple[int, ...] = ()
    """Encoder blocks whose outputs the view shall hold, counted from 0; `ENCODER_INPUT` for what enters the first."""
    noise_rows: int = 0
    """Rows of noise beside the mask's own, found from `view.noise[:, self.noise_row]` on."""
    noise_row: int = 1

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options

    def attach(self, model: "MaskedAutoencoderViT") -> None:
        """Called once by the model that takes the term, after its own initialisation: the place to create layers of the model's widths."""

    def check(self, model: "MaskedAutoencoderViT") -> None:
        """ValueError where the model's sizes and these options do not go together; asked again when the image size changes."""

    def scale(self, model: "MaskedAutoencoderViT") -> dict[str, float]:
        """Figures that tell the weight's real strength in this model, printed once at the start."""
        return {}

    def forward(self, model: "MaskedAutoencoderViT", view: View) -> Tensor:
        """The unweighted scalar."""
        raise NotImplementedError


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images `[N, C, H, W]` as patches `[N, L, P]`, each ordered by row, column, channel."""
    N, C, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    cut = images.reshape(N, C, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(N, rows * columns, patch_size * patch_size * C)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: `[N, L, P]` on a grid of rows and columns back to images `[N, C, H, W]`."""
    rows, columns = grid
    cut = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * patch_size, columns * patch_size)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Inside, nothing on the device of `x` is rounded to half precision."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` `[N, V]` of `x` `[N, L, D]`: `[N, V, D]`."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def standardize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Each row of the last axis minus its mean, over the root of its unbiased variance plus `eps`.

    This is a layer norm (biased variance) up to the factor (P - 1) / P on variance and eps: one kernel, which keeps nothing but its input.
    """
    width = x.shape[-1]
    ratio = (width - 1) / width
    return F.layer_norm(x, (width,), weight=x.new_full((width,), math.sqrt(ratio)), eps=eps * ratio)


def random_masking(noise: Tensor, visible: int) -> Masking:
    """Keep the `visible` patches with the smallest `noise` `[N, L]`."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # stable: float32 noise does hold equal values when L is in the thousands
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masking(ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float())


class MaskedAutoencoderViT(VisionTransformer):
    """MAE for images of `img_size` pixels (one side, or height and width) cut into patches of `patch_size`.

    `mask_ratio` is the hidden share: int(L * (1 - mask_ratio)) patches stay visible. With `norm_pix_loss` the target is each patch standardised
    by itself. `terms` are added to the loss by name. Wrong sizes raise ValueError. Another decoder overrides `build_decoder` and `decode`.
    """

    decoder_taps: tuple[int, ...] = ()
    """Encoder blocks whose outputs `decode` wants (see `Term.taps`)."""

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
        patch_grid(img_size, patch_size)
        for part, width, heads in (("encoder", embed_dim, num_heads), ("decoder", decoder_embed_dim, decoder_num_heads)):
            if heads < 1 or width < 1 or width % heads or width % 4:
                raise ValueError(f"{part}: {heads} heads of {width} channels; 4 and the heads must divide the channels")
        if min(in_chans, depth, decoder_depth) < 1:
            raise ValueError(f"in_chans {in_chans}, depth {depth} and decoder_depth {decoder_depth} must be at least 1")
        if norm_pix_loss and patch_size**2 * in_chans < 2:
            raise ValueError("norm_pix_loss standardises each patch, and a patch of one value has no variance: use larger patches or leave it off")
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
        self._check_mask()
        self.build_decoder(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.pos_embed.requires_grad_(False)
        self.init_weights()

        self.noise_rows = 1  # the mask's
        self.terms = nn.ModuleDict()
        for name, term in (terms or {}).items():
            term.noise_row = self.noise_rows
            self.noise_rows += term.noise_rows
            self.terms[name] = term
            term.attach(self)
            term.check(self)
        self.taps = tuple(sorted({tap for holder in self.terms.values() for tap in holder.taps} | set(self.decoder_taps)))
        if self.taps and not ENCODER_INPUT <= self.taps[0] <= self.taps[-1] < depth:
            raise ValueError(f"blocks {self.taps} are wanted by the terms or the decoder; the encoder has blocks 0 to {depth - 1}")

    # ---- sizes

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
        """V; rounded down in floating point as MAE does, so 100 patches at 0.9 leave 9."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def patch_pixels(self) -> int:
        """P."""
        return self.patch_size**2 * self.in_chans

    def _check_mask(self) -> None:
        if not 0 < self.mask_ratio < 1 or not 0 < self.num_visible < self.num_patches:
            visible = self.num_visible if math.isfinite(self.mask_ratio) else "no countable number"
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves {visible} of {self.num_patches} patches visible: "
                f"at least 1 must be visible and at least 1 hidden, so choose between {1 / self.num_patches:.3g} and {1 - 1 / self.num_patches:.3g}"
            )

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size from now on: both position tables are interpolated, everything else stays."""
        if patch_size not in (None, self.patch_size):
            raise ValueError(f"the decoder predicts patches of {self.patch_size} pixels: build another model for patches of {patch_size}")
        if img_size is None:
            return
        old_grid, new_grid = self.grid, patch_grid(img_size, self.patch_size)
        super().set_input_size(img_size)
        table = resample_abs_pos_embed(self.decoder_pos_embed, new_size=list(new_grid), old_size=list(old_grid))
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self._check_mask()
        for term in self.terms.values():
            term.check(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Refused: this model's output is a loss."""
        raise ValueError(
            "a masked autoencoder has no classifier: build a timm VisionTransformer of the same sizes with the classes wanted "
            "and load this model's encoder into it with models_vit.load_matching"
        )

    def no_weight_decay(self) -> set[str]:
        """None by name: as in MAE's pretraining, vectors and biases alone are exempt, the class and mask tokens decay."""
        return set()

    # ---- parts

    def build_decoder(self, decoder_embed_dim: int, decoder_depth: int, decoder_num_heads: int) -> None:
        """Create the decoder: self-attention over visible and mask tokens."""
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, decoder_embed_dim), requires_grad=False)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, self.mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_pixels)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """MAE's initial weights; timm's arguments are accepted and have no meaning here."""
        with torch.no_grad():
            for name in ("pos_embed", "decoder_pos_embed"):
                table = getattr(self, name, None)
                if table is not None:
                    table.copy_(position_table(self.grid, table.shape[-1]))
            for name in ("cls_token", "mask_token"):
                nn.init.normal_(getattr(self, name), std=0.02)
            self.apply(initialize)

    def run_blocks(self, blocks: nn.Module, x: Tensor, taps: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """`x` after all blocks, and the outputs of those in `taps`."""
        seen = {ENCODER_INPUT: x} if ENCODER_INPUT in taps else {}
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in taps:
                seen[index] = x
        return x, seen

    def embed(self, images: Tensor) -> Tensor:
        """`[N, L, D]`: every patch embedded, with its position."""
        if images.shape[1:] != (self.in_chans, *self.patch_embed.img_size):
            expected = " x ".join(str(n) for n in (self.in_chans, *self.patch_embed.img_size))
            raise ValueError(f"images are {tuple(images.shape)}; this model takes [N, {expected}] (set_input_size for another size)")
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The encoder on tokens `[N, V, D]` that hold their positions: `[N, 1 + V, D]` after the norm, and the taps."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x, taps = self.run_blocks(self.blocks, torch.cat([cls_token, tokens], dim=1), self.taps)
        return self.norm(x), taps

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """From the encoder's `[N, 1 + V, D]` to every patch: `[N, L, E]` after the decoder's norm, without the class token."""
        visible = self.decoder_embed(latent)
        N, _, E = visible.shape
        places = F.pad(masking.ids_keep + 1, (1, 0))[:, :, None].expand(-1, -1, E)  # the class token's place is 0
        x = self.mask_token.expand(N, 1 + self.num_patches, E).scatter(1, places, visible.to(self.mask_token.dtype))
        x, _ = self.run_blocks(self.decoder_blocks, x + self.decoder_pos_embed)
        return self.decoder_norm(x)[:, 1:]

    def observe(self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None) -> View:
        """Mask, encode, decode."""
        tokens = self.embed(images)
        noise = self._complete(noise, images)
        masking = random_masking(noise[:, 0], self.num_visible)
        latent, taps = self.encode_tokens(take(tokens, masking.ids_keep))
        decoded = self.decode(latent, masking, taps)
        pred = at_least_float32(self.decoder_pred(decoded))
        return View(images, labels, noise if self.noise_rows > 1 else noise[:, 0], tokens, *masking, latent, taps, decoded, pred)

    def _complete(self, noise: Tensor | None, images: Tensor) -> Tensor:
        """`[N, R, L]`: the noise that was given and, for the rows that were not, uniform noise drawn here."""
        shape = (images.shape[0], self.noise_rows, self.num_patches)
        if noise is None:
            return torch.rand(shape, device=images.device)
        if noise.ndim not in (2, 3) or (noise.shape[0], noise.shape[-1]) != (shape[0], shape[2]):
            raise ValueError(f"noise is {tuple(noise.shape)}; {shape[0]} images of {shape[2]} patches need [N, L] or {list(shape)}")
        noise = noise.to(images.device).reshape(shape[0], -1, shape[2])
        missing = shape[1] - noise.shape[1]
        if missing > 0:
            noise = torch.cat([noise, torch.rand(shape[0], missing, shape[2], dtype=noise.dtype, device=noise.device)], dim=1)
        return noise

    # ---- the objective

    def target(self, images: Tensor) -> Tensor:
        """What is to be predicted, `[N, L, P]`: the patches or, with `norm_pix_loss`, the patches standardised one by one."""
        with torch.no_grad():
            patches = patchify(at_least_float32(images), self.patch_size)
            return standardize(patches) if self.norm_pix_loss else patches

    def reconstruction_loss(self, view: View) -> Tensor:
        """Mean squared error over the hidden patches of all images."""
        with without_autocast(view.pred):
            error_NL = F.mse_loss(view.pred, self.target(view.images), reduction="none").mean(dim=-1)
            return (error_NL * view.mask).sum() / view.mask.sum()

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`loss`, `reconstruction` and each term by its name, unweighted; loss = reconstruction + the sum of weight x term.

        `images` `[N, C, H, W]` are normalised floats; `noise` is uniform, `[N, L]` for the mask or `[N, noise_rows, L]`, and drawn here where
        it is None. Labels are needed where a term needs them.
        """
        for name, term in self.terms.items():
            if term.needs_labels and labels is None:
                raise ValueError(f"the term {name!r} needs labels and the batch has none")
        view = self.observe(images, labels, noise=noise)
        losses = {"reconstruction": self.reconstruction_loss(view)}
        loss = losses["reconstruction"]
        for name, term in self.terms.items():
            losses[name] = term(self, view)
            loss = loss + term.options.weight * losses[name]
        return {"loss": loss, **losses}

    # ---- looking at the model

    def encode(self, images: Tensor) -> Tensor:
        """Features `[N, 1 + L, D]` of whole images, after the norm, class token first: no mask and nothing random."""
        return self.forward_features(images)

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction `[N, L, P]` in the target's space, and the mask `[N, L]`, 1 = removed."""
        view = self.observe(images, noise=noise)
        return view.pred, view.mask

    @torch.no_grad()
    def reconstruct(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Pictures `[N, C, H, W]`, float32, in the space of the normalised images.

        `original`; `masked`, hidden patches at 0 (the mean colour); `reconstruction`, every patch as predicted; `pasted`, the hidden patches
        as predicted among the visible ones of the original. Under `norm_pix_loss` each prediction gets its patch's true mean and deviation.
        """
        pred, mask = self.predict(images, noise=noise)
        patches = patchify(at_least_float32(images), self.patch_size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            pred = pred * (variance + 1e-6).sqrt() + mean
        hidden = mask[:, :, None]
        pictures = {
            "original": patches,
            "masked": patches * (1 - hidden),
            "reconstruction": pred,
            "pasted": torch.where(hidden > 0, pred, patches),
        }
        return {name: unpatchify(picture, self.patch_size, self.grid).float() for name, picture in pictures.items()}

    @torch.no_grad()
    def baseline(self, images: Tensor) -> Tensor:
        """The reconstruction loss, over all patches, of a model that has learned nothing of the image.

        It predicts the mean patch of these images or, under `norm_pix_loss`, zeros: the mean of every standardised patch.
        """
        target = self.target(images)
        return target.square().mean() if self.norm_pix_loss else target.var(dim=(0, 1), correction=0).mean()
