"""Tokenizers: convert each patch of an image into one of K tokens, which BEiT, PeCo and ClusterMIM predict.

`VQTokenizer` is an autoencoder of pixels with a discrete bottleneck (van den Oord et al., "Neural Discrete
Representation Learning", NeurIPS 2017), with transformers as encoder and decoder. With a perceptual loss it is the
tokenizer of PeCo as far as the paper's abstract describes it (Dong et al., "PeCo", AAAI 2023; no code or codebook was
released). `VQKDTokenizer` reconstructs the features of a frozen teacher (Peng et al., "BEiT v2", 2022). Both are
trained like every other method; `KMeansTokenizer` is fitted by `python -m tools.tokenizer kmeans`.

Codes are unit vectors that follow the vectors assigned to them by moving averages, with dead ones replaced, or the
points of a grid (Mentzer et al., "Finite Scalar Quantization", ICLR 2024).

N images   L patches, row by row   D encoder channels   E decoder channels   T teacher channels   K tokens
Z channels of a code   P pixel values of a patch   M vectors
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models_mae import DECODERS, all_ranks, world_size
from models_targets import Pixels, Target, nearest_center, patchify, scaled_to, unpatchify
from models_vit import (
    Block,
    FrozenNetwork,
    Pretrainer,
    Progress,
    Reader,
    VisionTransformer,
    at_least_float32,
    attention_heads,
    averages_before_norm,
    compute_digest,
    encoder_sizes,
    initialize,
    load_matching,
    patch_grid,
    position_table,
    read_depth,
    read_patch_stem,
    require_plain_encoder,
    require_sizes,
    without_autocast,
)
from options.tokenizer import TokenizerOptions, VQKDTokenizerOptions, VQTokenizerOptions

FIXED_POINT = 2**32  # sums of integers do not depend on the order of their terms, sums of floats do
STRIDE = 2_654_435_761  # odd: multiples of it, modulo any number, spread well


# ---- codes -----------------------------------------------------------------------------------------------------------


class Quantized(NamedTuple):
    """Vectors and their codes."""

    codes: Tensor
    """`[N, L, Z]` the code of each vector; its gradient goes to the vector."""
    tokens: Tensor
    """`[N, L]` their numbers."""
    commitment: Tensor | None
    """Mean squared difference between vectors and codes; None where there is no such loss."""


class Quantizer(nn.Module):
    """Base of the quantizers: counts how often each token occurs.

    Args:
        tokens: K.
        width: Channels of the vectors (Z).
        decay: Decay of the counts per optimizer step.
        dead: A token is dead that occurs less often than this share of the average.
    """

    usage: Tensor

    def __init__(self, tokens: int, width: int, decay: float, dead: float) -> None:
        super().__init__()
        self.tokens, self.width, self.decay, self.dead = tokens, width, decay, dead
        self.register_buffer("usage", torch.zeros(tokens))  # moving average of the count per update
        self._counts: Tensor | None = None  # of the micro-batches since the last update

    def forward(self, vectors: Tensor) -> Quantized:
        """Quantise vectors `[N, L, Z]`, float32 at least."""
        raise NotImplementedError

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return the codes `[..., Z]` of tokens `[...]`."""
        raise NotImplementedError

    def count(self, tokens: Tensor) -> None:
        """Add a micro-batch to the counts."""
        counts = torch.zeros(self.tokens, dtype=torch.int64, device=tokens.device)
        counts.index_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten()))
        self._counts = counts if self._counts is None else self._counts + counts

    def forget(self) -> None:
        """Discard the counts since the last update."""
        self._counts = None

    def after_update(self, taken: Tensor) -> None:
        """Add the counts of all ranks to the moving average, unless the update was skipped."""
        if self._counts is not None:
            counts = total_over_ranks(self._counts)
            usage = self.decay * self.usage + (1 - self.decay) * counts
            self.usage.copy_(torch.where(taken, usage, self.usage))
        self.forget()

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Return `perplexity`, e to the entropy of the tokens, and `usage`, the share of tokens that are not dead.

        Both are of the moving average over past updates; before the first one they are 1 and 0.
        """
        share = self.usage / self.usage.sum().clamp(min=torch.finfo(self.usage.dtype).tiny)
        alive = share * self.tokens > self.dead
        return {"perplexity": (-torch.xlogy(share, share).sum()).exp(), "usage": alive.float().mean()}


class EMACodebook(Quantizer):
    """Unit vectors, each of which follows the mean of the vectors that it is the nearest to.

    Per update, a code that was used becomes decay x code + (1 - decay) x mean of its vectors, scaled to length 1; an
    unused code stays. A dead code is replaced by a vector of the current images. So the first update fills the
    codebook with vectors, as far as there are enough. All ranks compute the same codes.
    """

    vectors: Tensor

    def __init__(self, tokens: int, width: int, decay: float, dead: float) -> None:
        super().__init__(tokens, width, decay, dead)
        self.register_buffer("vectors", F.normalize(torch.randn(tokens, width), dim=1))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.updates: Tensor
        self._sums: Tensor | None = None
        self._seen: Tensor | None = None

    def forward(self, vectors: Tensor) -> Quantized:
        vectors = F.normalize(vectors, dim=-1)
        tokens = nearest_center(vectors, self.vectors)
        codes = self.lookup(tokens)
        if self.training and torch.is_grad_enabled():
            self._note(vectors.detach(), tokens)
        commitment = F.mse_loss(vectors, codes)
        return Quantized(vectors + (codes - vectors).detach(), tokens, commitment)

    def lookup(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.vectors)

    @torch.no_grad()
    def _note(self, vectors: Tensor, tokens: Tensor) -> None:
        self.count(tokens)
        fixed = (vectors.double() * FIXED_POINT).round().long().flatten(0, 1)
        sums = torch.zeros(self.tokens, self.width, dtype=torch.int64, device=vectors.device)
        sums.index_add_(0, tokens.flatten(), fixed)
        self._sums = sums if self._sums is None else self._sums + sums
        self._seen = vectors

    def forget(self) -> None:
        super().forget()
        self._sums = self._seen = None

    @torch.no_grad()
    def after_update(self, taken: Tensor) -> None:
        if self._counts is None or self._sums is None or self._seen is None:
            return
        counts = total_over_ranks(self._counts)
        sums = total_over_ranks(self._sums).double().div_(FIXED_POINT)
        mean = F.normalize(sums / counts.clamp(min=1)[:, None], dim=1).to(self.vectors.dtype)
        moved = F.normalize(self.decay * self.vectors + (1 - self.decay) * mean, dim=1)
        vectors = torch.where((counts > 0)[:, None], moved, self.vectors)
        usage = self.decay * self.usage + (1 - self.decay) * counts
        if self.dead:
            average = counts.sum() / self.tokens
            dead = usage < self.dead * average
            candidates = all_ranks(self._candidates(self._seen))
            rank = dead.cumsum(0) - 1
            replaced = dead & (rank < len(candidates))
            chosen = candidates[rank.clamp(0, len(candidates) - 1)]
            vectors = torch.where(replaced[:, None], chosen, vectors)
            usage = torch.where(replaced, average.to(usage.dtype), usage)
        self.vectors.copy_(torch.where(taken, vectors, self.vectors))
        self.usage.copy_(torch.where(taken, usage, self.usage))
        self.updates.add_(taken.long())
        self.forget()

    def _candidates(self, vectors: Tensor) -> Tensor:
        """Return at least K of the vectors `[N, L, Z]` over all ranks, if there are so many.

        The number is the same for each image, and the positions change with every update.
        """
        N, L, _ = vectors.shape
        each = min(L, math.ceil(self.tokens / (N * world_size())))
        first = self.updates * STRIDE
        places = (first + torch.arange(each, device=vectors.device) * L // each) % L
        return vectors[:, places].flatten(0, 1)


class FSQ(Quantizer):
    """Each channel is squashed and rounded to a few levels; a token is the number of a point of that grid.

    There is no codebook, so no code can be lost, and no loss of its own.

    Args:
        levels: Number of levels of each channel.
        decay, dead: See `Quantizer`; they change only what is reported.
    """

    half_range: Tensor
    offset: Tensor
    basis: Tensor
    steps: Tensor

    def __init__(self, levels: tuple[int, ...], decay: float, dead: float) -> None:
        super().__init__(math.prod(levels), len(levels), decay, dead)
        counts = torch.tensor(levels)
        basis = torch.cat([torch.ones(1, dtype=torch.int64), counts.cumprod(0)[:-1]])
        self.register_buffer("half_range", (counts - 1) * (1 + 1e-3) / 2, persistent=False)
        self.register_buffer("offset", torch.where(counts % 2 == 0, 0.5, 0.0), persistent=False)
        self.register_buffer("steps", counts // 2, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("levels", counts, persistent=False)
        self.levels: Tensor

    def codes(self, vectors: Tensor) -> Tensor:
        """Round vectors `[..., Z]` to the grid, in -1 to 1; the gradient is that of the squashing."""
        shift = (self.offset / self.half_range).atanh()
        squashed = (vectors + shift).tanh() * self.half_range - self.offset
        return (squashed + (squashed.round() - squashed).detach()) / self.steps

    def number(self, codes: Tensor) -> Tensor:
        """Return the tokens `[...]` of points `[..., Z]` of the grid."""
        digits = (codes.detach() * self.steps).round().long() + self.steps
        return (digits * self.basis).sum(dim=-1)

    def forward(self, vectors: Tensor) -> Quantized:
        codes = self.codes(vectors)
        tokens = self.number(codes)
        if self.training and torch.is_grad_enabled():
            self.count(tokens)
        return Quantized(codes, tokens, None)

    def lookup(self, tokens: Tensor) -> Tensor:
        digits = tokens[..., None] // self.basis % self.levels
        return (digits - self.steps) / self.steps


def total_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradient."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total


# ---- frozen encoders -------------------------------------------------------------------------------------------------


class Encoder(VisionTransformer):
    """A frozen encoder from a checkpoint of this project, MAE or timm."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, img_size: tuple[int, int]) -> None:
        first = weights["patch_embed.proj.weight"]
        super().__init__(
            img_size=img_size,
            patch_size=first.shape[-1],
            in_chans=first.shape[1],
            num_classes=0,
            global_pool="token",
            embed_dim=first.shape[0],
            depth=read_depth(weights),
            num_heads=heads,
            mlp_ratio=weights["blocks.0.mlp.fc1.weight"].shape[0] / first.shape[0],
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.blocks[0].attn.num_heads  # type: ignore[union-attr, return-value]

    def resize(self, grid: tuple[int, int]) -> None:
        """Take images of (rows, columns) patches from now on."""
        if grid != self.patch_embed.grid_size:
            self.set_input_size((grid[0] * self.patch_size, grid[1] * self.patch_size))

    def features(self, images: Tensor, blocks: tuple[int, ...] = ()) -> list[Tensor]:
        """Patch features `[N, L, D]`: the outputs of `blocks`, counted from 1; without them, of the last norm."""
        images = scaled_to(images, self.patch_embed.img_size)
        if not blocks:
            return [self.forward_features(images)[:, 1:]]
        indices = [block - 1 for block in blocks]
        outputs = self.forward_intermediates(
            images, indices=indices, intermediates_only=True, output_fmt="NLC", stop_early=True
        )
        return cast(list[Tensor], outputs)


def encoder_from(
    weights: Mapping[str, Tensor],
    trained_with: Mapping[str, Any],
    path: str,
    in_chans: int,
    heads: int = 0,
    heads_option: str = "encoder_heads",
) -> tuple[Encoder, str]:
    """Build the encoder of a checkpoint.

    Args:
        weights: Those of the checkpoint, with or without a decoder and a head.
        trained_with: Its run's options; empty for a checkpoint of another project.
        path: Of the checkpoint, for messages.
        in_chans: Channels of the images.
        heads: Attention heads, if the options do not contain them; 0: the only usual number for the channels.
        heads_option: The option of `heads`, for messages.

    Returns:
        The encoder and the SHA-256 of its weights.

    Raises:
        ValueError: If there is no encoder in the checkpoint, its heads are not known, it takes another number of
            channels, or it has no norm before its tokens are averaged.
    """
    if read_patch_stem(weights) == "conv":
        raise ValueError(f"{path} has a convolutional patch stem, which encoders of tokenizers cannot have")
    wanted = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(f"{path} contains no encoder: {', '.join(missing)} missing")
    require_plain_encoder(weights, where=f"the weights in {path}")
    if averages_before_norm(weights):
        raise ValueError(f"{path} is a classifier without a norm before its tokens are averaged: use its encoder's run")
    theirs = weights["patch_embed.proj.weight"].shape[1]
    if theirs != in_chans:
        raise ValueError(f"{path} takes {theirs} channels, not {in_chans}")
    own = {n: w for n, w in weights.items() if n.startswith(("blocks.", "patch_embed.", "norm.", *wanted[:2]))}
    width, patch_size = own["cls_token"].shape[-1], own["patch_embed.proj.weight"].shape[-1]
    heads = attention_heads(trained_with, width, heads, option=heads_option, file=path)
    side = math.isqrt(own["pos_embed"].shape[1] - 1) * patch_size
    size = tuple(trained_with.get("input_size", (side, side)))
    encoder = Encoder(own, heads, size)
    try:
        load_matching(encoder, own, grid=patch_grid(size, patch_size))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    return encoder, compute_digest(own)


def require_digest(name: str, expected: str, found: str, path: str) -> None:
    """Raise ValueError where a run was made with other weights than those that are found now."""
    if expected and expected != found:
        raise ValueError(
            f"{path} has other weights than at the start of this run: {name} was {expected[:12]}..., and is now "
            f"{found[:12]}...; use the original file, or start a new run"
        )


# ---- tokenizers that are trained -------------------------------------------------------------------------------------


class Tokenizer(Pretrainer):
    """Base of the tokenizers that are trained: encode the image, quantise each patch, decode all of them.

    A subclass creates the prediction layer (`make_head`) and computes the loss (`parts`).
    """

    Options: ClassVar[type] = TokenizerOptions
    options: TokenizerOptions
    takes_conv_stem: ClassVar[bool] = False
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)  # BEiT v2's
    decoder_pos_embed: nn.Parameter
    decoder_pred: nn.Module

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        options, D = self.options, self.embed_dim
        quantizer: dict[str, Any] = {"decay": options.code_decay, "dead": options.dead_codes}
        self.quantizer: Quantizer
        if options.quantizer == "fsq":
            self.quantizer = FSQ(options.levels, **quantizer)
        else:
            self.quantizer = EMACodebook(options.codes, options.code_dim, **quantizer)
        asked = (options.decoder_embed_dim, options.decoder_depth, options.decoder_num_heads)
        E, depth, heads = (own or usual for own, usual in zip(asked, DECODERS[self.size], strict=True))
        require_sizes("decoder", E, depth, heads)
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.to_code = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, self.quantizer.width))
        self.decoder_embed = nn.Linear(self.quantizer.width, E)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, E), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(E, heads, self.mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.decoder_norm = norm_layer(E)
        self.make_head(E)
        self.pos_embed.requires_grad_(False)
        self.init_weights()

    def make_head(self, width: int) -> None:
        """Create `decoder_pred`, from the decoder's channels to what it predicts."""
        raise NotImplementedError

    def _set_positions(self) -> None:
        self.pos_embed.data = position_table(self.grid, self.embed_dim).to(self.pos_embed)
        table = position_table(self.grid, self.decoder_pos_embed.shape[-1])
        self.decoder_pos_embed.data = table.to(self.decoder_pos_embed)

    def resized(self, before: tuple[int, int]) -> None:
        self.pos_embed.requires_grad_(False)
        self._set_positions()

    # ---- what is computed

    @property
    def tokens(self) -> int:
        """K."""
        return self.quantizer.tokens

    def quantize(self, images: Tensor) -> Quantized:
        """Encode images `[N, C, H, W]` and quantise every patch, in float32."""
        latent = self.encode(images)[:, 1:]
        with without_autocast(latent):
            return self.quantizer(self.to_code(at_least_float32(latent)))

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes `[N, L, Z]` to what is predicted of every patch, float32 at least."""
        x = self.decoder_embed(codes) + self.decoder_pos_embed[:, 1:]  # there is no class token
        x, _ = self.run_blocks(self.decoder_blocks, x)
        return at_least_float32(self.decoder_pred(self.decoder_norm(x)))

    def parts(self, images: Tensor, decoded: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the parts of the reconstruction's loss by name, and their weighted sum."""
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor | None = None, *, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of a batch, and how the tokens are used: see `Quantizer.statistics`.

        Args:
            images: `[N, C, H, W]`, normalised.
            labels: Not used.
            noise: Not used.
        """
        self._check_images(images)
        codes, _, commitment = self.quantize(images)
        decoded = self.decode(codes)
        with without_autocast(decoded):
            parts, loss = self.parts(images, decoded)
        if commitment is not None:
            parts["commitment"] = commitment
            loss = loss + self.options.commitment * commitment
        return {"loss": loss, **parts, **self.quantizer.statistics()}

    def before_step(self, progress: Progress) -> None:
        self.quantizer.forget()

    @torch.no_grad()
    def after_update(self, taken: Tensor) -> None:
        self.quantizer.after_update(taken)

    # ---- for those who predict tokens

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return the token of every patch, int64 `[N, L]`."""
        return self.quantize(images).tokens

    def show(self, tokens: Tensor) -> Tensor | None:
        """Return tokens `[N, L]` as normalised patches `[N, L, P]`; None where they are no picture."""
        return None


class VQTokenizer(Tokenizer):
    """Reconstruct pixels: the mean absolute difference and, optionally, the difference of a frozen encoder's features.

    The perceptual loss is the mean over patches and tapped blocks of the squared distance between unit features.
    """

    Options: ClassVar[type] = VQTokenizerOptions
    options: VQTokenizerOptions

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        self.perceptual = FrozenNetwork()

    def make_head(self, width: int) -> None:
        self.target: Target = Pixels(self.patch_size, self.in_chans, norm="l1")
        self.decoder_pred = nn.Linear(width, self.target.width)

    def prepare(self, read: Reader, classes: int | None) -> None:
        options = self.options
        if not options.perceptual or self.perceptual.network is not None:
            return
        if not options.perceptual_encoder:
            raise ValueError("a perceptual loss needs --perceptual_encoder CHECKPOINT")
        path = find_checkpoint(options.perceptual_encoder)
        weights, trained_with = read(path)
        heads, option = options.perceptual_heads, "perceptual_heads"
        encoder, digest = encoder_from(weights, trained_with, path, self.in_chans, heads, option)
        require_digest("perceptual_digest", options.perceptual_digest, digest, path)
        depth, blocks = len(encoder.blocks), options.perceptual_blocks
        blocks = blocks or tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
        if not 1 <= min(blocks) <= max(blocks) <= depth:
            raise ValueError(f"perceptual_blocks are {list(blocks)}; the encoder in {path} has blocks 1 to {depth}")
        encoder.resize(patch_grid(self.input_size, self.patch_size))
        self.perceptual.hold(encoder)
        self.helpers = {path: trained_with}
        self.options = replace(options, perceptual_blocks=blocks, perceptual_digest=digest)

    def resized(self, before: tuple[int, int]) -> None:
        super().resized(before)
        if self.perceptual.network is not None:
            self.perceptual.network.resize(self.grid)
            self.perceptual.hold(self.perceptual.network)

    def parts(self, images: Tensor, decoded: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        reconstruction = self.target.error(decoded, self.target(images)).mean()
        parts, loss = {"reconstruction": reconstruction}, reconstruction
        if self.options.perceptual:
            parts["perceptual"] = self.perceptual_loss(images, unpatchify(decoded, self.patch_size, self.grid))
            loss = loss + self.options.perceptual * parts["perceptual"]
        return parts, loss

    def perceptual_loss(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Compare the features of images and of their reconstructions `[N, C, H, W]`."""
        encoder, blocks = self.perceptual.network, self.options.perceptual_blocks
        if encoder is None:
            raise ValueError("this model was loaded without its perceptual encoder: build it with methods.build")
        with torch.no_grad():
            wanted = encoder.features(at_least_float32(images), blocks)
        found = encoder.features(reconstruction, blocks)
        pairs = zip(found, wanted, strict=True)
        return torch.stack([squared_distance(*(F.normalize(x, dim=-1) for x in pair)) for pair in pairs]).mean()

    def show(self, tokens: Tensor) -> Tensor:
        return self.decode(self.quantizer.lookup(tokens))

    @torch.no_grad()
    def pictures(self, images: Tensor, *, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Return `original` and `reconstruction`, `[N, C, H, W]`, float32, in the space of the normalised images."""
        decoded = self.decode(self.quantize(images).codes)
        return {"original": images.float(), "reconstruction": unpatchify(decoded, self.patch_size, self.grid).float()}

    def constant_loss(self, images: Tensor) -> float | None:
        return None if self.options.perceptual else self.target.constant_loss(images)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared distance of vectors."""
    return (a - b).square().sum(dim=-1).mean()


class VQKDTokenizer(Tokenizer):
    """Reconstruct the patch features of a frozen teacher: one minus the mean cosine similarity."""

    Options: ClassVar[type] = VQKDTokenizerOptions
    options: VQKDTokenizerOptions

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        self.teacher = FrozenNetwork()

    def make_head(self, width: int) -> None:
        teacher_dim = self.options.teacher_dim or 1  # `prepare` makes it again with the teacher's
        self.decoder_pred = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, teacher_dim))

    def prepare(self, read: Reader, classes: int | None) -> None:
        options = self.options
        if self.teacher.network is not None:
            return
        if not options.teacher:
            raise ValueError("vqkd_tokenizer reconstructs the features of a teacher: give --teacher CHECKPOINT")
        path = find_checkpoint(options.teacher)
        weights, trained_with = read(path)
        heads, option = options.teacher_heads, "teacher_heads"
        teacher, digest = encoder_from(weights, trained_with, path, self.in_chans, heads, option)
        require_digest("teacher_digest", options.teacher_digest, digest, path)
        teacher.resize(self.grid)
        self.teacher.hold(teacher)
        self.helpers = {path: trained_with}
        if options.teacher_dim not in (0, teacher.embed_dim):
            raise ValueError(f"teacher_dim is {options.teacher_dim}, and the teacher in {path} has {teacher.embed_dim}")
        self.options = replace(options, teacher_dim=teacher.embed_dim, teacher_digest=digest)
        if not options.teacher_dim:
            self.make_head(self.decoder_pos_embed.shape[-1])
            self.decoder_pred.apply(initialize)

    def resized(self, before: tuple[int, int]) -> None:
        super().resized(before)
        if self.teacher.network is not None:
            self.teacher.network.resize(self.grid)
            self.teacher.hold(self.teacher.network)

    def parts(self, images: Tensor, decoded: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if self.teacher.network is None:
            raise ValueError("this model was loaded without its teacher: build it with methods.build")
        with torch.no_grad():
            (wanted,) = self.teacher.network.features(at_least_float32(images))
        distillation = (1 - F.cosine_similarity(decoded, at_least_float32(wanted), dim=-1)).mean()
        return {"distillation": distillation}, distillation


# ---- k-means ---------------------------------------------------------------------------------------------------------


class KMeansTokenizer(nn.Module):
    """The number of the nearest centre, of raw patches or of an encoder's features.

    Args:
        centers: `[K, P]`, or `[K, D]` with an encoder.
        patch_size: Side of a patch in pixels.
        encoder: Whose features are clustered; None for normalised pixels.
        cosine: Scale features to length 1 first.
    """

    centers: Tensor

    def __init__(
        self,
        centers: Tensor,
        patch_size: int,
        grid: tuple[int, int],
        encoder: Encoder | None = None,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("centers", centers)
        self.patch_size, self.grid, self.encoder, self.cosine = patch_size, grid, encoder, cosine

    @property
    def tokens(self) -> int:
        """K."""
        return len(self.centers)

    def set_input_size(self, size: tuple[int, int]) -> None:
        """Take images of (height, width) pixels from now on."""
        self.grid = patch_grid(size, self.patch_size)
        if self.encoder is not None:
            self.encoder.resize(self.grid)

    @torch.no_grad()
    def vectors(self, images: Tensor) -> Tensor:
        """Return what is clustered of normalised images: `[N, L, P or D]`, float32 at least."""
        if self.encoder is None:
            return patchify(at_least_float32(images), self.patch_size)
        (features,) = self.encoder.features(images)
        return F.normalize(at_least_float32(features), dim=-1) if self.cosine else at_least_float32(features)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Tensor:
        """Return the token of every patch, int64 `[N, L]`."""
        return nearest_center(self.vectors(images), self.centers)

    def show(self, tokens: Tensor) -> Tensor | None:
        """Return the centres of tokens `[N, L]` as normalised patches; None for centres of features."""
        return F.embedding(tokens, self.centers) if self.encoder is None else None


# ---- from a file -----------------------------------------------------------------------------------------------------

TRAINED: dict[str, type[Tokenizer]] = {"vq_tokenizer": VQTokenizer, "vqkd_tokenizer": VQKDTokenizer}
KMEANS = "kmeans"  # in the place of a method's name


def find_checkpoint(path: str) -> str:
    """Return the path of a checkpoint: the latest one of a run folder, or the given file."""
    inside = Path(path) / "checkpoints" / "last.pth"
    return str(inside) if inside.is_file() else path


def load_tokenizer(read: Reader, path: str) -> tuple[Any, str, Mapping[str, Any]]:
    """Build the tokenizer of a run of this project or of a k-means file. Nothing in the file is executed.

    Returns:
        The tokenizer, the SHA-256 of what decides its tokens, and the options that it was made with.

    Raises:
        ValueError: If there is no tokenizer.
    """
    path = find_checkpoint(path)
    weights, made_with = read(path)
    kind = made_with.get("method", "")
    if kind == KMEANS:
        grid = patch_grid(tuple(made_with["input_size"]), made_with["patch_size"])
        encoder = None
        if made_with["encoder"]:
            own = {n.removeprefix("encoder."): w for n, w in weights.items() if n.startswith("encoder.")}
            side = own["patch_embed.proj.weight"].shape[-1]
            size = {"input_size": (grid[0] * side, grid[1] * side)}
            encoder, _ = encoder_from(own, size, path, made_with["in_chans"], made_with["encoder_heads"])
        kmeans = KMeansTokenizer(weights["centers"], made_with["patch_size"], grid, encoder, made_with["cosine"])
        return kmeans, compute_digest(weights), made_with
    if kind not in TRAINED:
        raise ValueError(
            f"{path} is {f'a run of the method {kind}' if kind else 'not a checkpoint of this project'}, not a "
            f"tokenizer: give a run of {' or '.join(TRAINED)}, or a file of `python -m tools.tokenizer kmeans`"
        )
    tokenizer_class = TRAINED[kind]
    own_options = {field.name for field in fields(tokenizer_class.Options)}
    options = tokenizer_class.Options(**{name: value for name, value in made_with.items() if name in own_options})
    tokenizer = tokenizer_class(**encoder_sizes(made_with["model"], made_with), options=options)
    tokenizer.load_state_dict(dict(weights))
    decides = {n: w for n, w in weights.items() if not n.startswith(("decoder", "quantizer.usage"))}
    return tokenizer, compute_digest(decides), made_with
