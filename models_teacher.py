"""Teacher terms: train a student to match the features of a frozen, pretrained teacher for the same image.

A `TeacherTerm` compares a tap (an intermediate result) of the student with a tap of the teacher. A tap is either tokens
(a block's output, the features, a decoder block's output) or, for each attention head, a matrix of tokens by tokens
(attention logits, relations of queries, keys or values). The methods of several papers are settings of its options, see
`methods.METHODS`:

DMAE: Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", CVPR 2023. MAE-Lite and D2-MAE: Wang et
al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023, and its successor. TinyMIM: Ren et
al., CVPR 2023. G2SD: Huang et al., "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023. AMD: Zhao et
al., "Asymmetric Masked Distillation for Pre-Training Small Foundation Models", CVPR 2024. Proteus: Zhang et al.,
"Accessing Vision Foundation Models via ImageNet-1K", ICLR 2025.

The teacher is used in training only: it is not stored in checkpoints, and a trained model is loaded without it.

N images   L patches   V visible patches   S tokens, class token included   D student channels   T teacher channels
H attention heads
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from models_mae import DECODERS, MaskedAutoencoderViT, MaskedImageModel, Masking, Term, View, block_number, by_rank
from models_vit import (
    ENCODER_INPUT,
    FIRST_LAYERS,
    PATCH_STEMS,
    Block,
    FrozenNetwork,
    Normalization,
    Reader,
    VisionTransformer,
    at_least_float32,
    attention_heads,
    averages_before_norm,
    compute_digest,
    initialize,
    load_matching,
    parse_name,
    patch_grid,
    prepare_images,
    read_depth,
    read_patch_size,
    read_patch_stem,
    renormalization,
    require_plain_encoder,
    take,
    without_autocast,
)
from options.mae import MAEOptions
from options.teacher import RELATIONS, TeacherOptions

IMAGENET: Normalization = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

PAIRS = {"attention": (0, 1), "queries": (0, 0), "keys": (1, 1), "values": (2, 2)}
"""Which two of queries, keys and values are multiplied."""

EXTRA_PAIRS = {"attention": (0, 1), "queries": (0, 0), "keys": (0, 0), "values": (0, 0)}
"""The same for an extra block, which computes only the pair that is multiplied."""


# ---- comparing ------------------------------------------------------------------------------------------------------


def relation(x: Tensor, parts: int, pair: tuple[int, int], heads: int) -> Tensor:
    """Return A B^T / sqrt(d) for each head, `[N, H, S, S]`, at least float32.

    Args:
        x: Concatenated matrices, such as queries, keys and values: `[N, S, parts * channels]`.
        parts: Number of these matrices.
        pair: Which of them are A and B.
        heads: Number of heads H.
    """
    by_part = at_least_float32(x).unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)
    a, b = by_part[pair[0]], by_part[pair[1]]
    with without_autocast(x):
        return (a * a.shape[-1] ** -0.5) @ b.transpose(-2, -1)


def normalized(x: Tensor, how: str, temperature: float = 1.0) -> Tensor:
    """Normalise along the last axis; `how` is an option `normalize`. A softmax is returned as its logarithm."""
    if how == "l2":
        return F.normalize(x, dim=-1)
    if how == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return F.log_softmax(x / temperature, dim=-1) if how == "softmax" else x


def compare(student: Tensor, teacher: Tensor, options: TeacherOptions, weights: Tensor | None = None) -> Tensor:
    """Return the mean distance of tokens, or of rows of attention, after normalisation; at least float32.

    Args:
        student, teacher: Tokens `[N, K, T]`, or rows of attention.
        options: Normalisation and distance.
        weights: Weights of the tokens in the mean, `[N, K]`; None: equal weights. If all are 0, the result is 0.
    """
    with without_autocast(student):
        teacher = normalized(at_least_float32(teacher), options.normalize, options.temperature)
        student = at_least_float32(student)
        if options.normalize_only == "both":
            student = normalized(student, options.normalize, options.temperature)
        if weights is None:
            return _distance(student, teacher, options)
        each = _distance(student, teacher, options, reduction="none")
        return (each * weights).sum() / weights.sum().clamp(min=1)


def _distance(student: Tensor, teacher: Tensor, options: TeacherOptions, reduction: str = "mean") -> Tensor:
    """Return the distance of normalised tokens: the mean over all, or of each token with `reduction` "none"."""
    if options.distance == "kl":
        each = (teacher.exp() * (teacher - student)).sum(dim=-1)
        return each.mean() if reduction == "mean" else each
    if options.normalize == "softmax":
        teacher = teacher.exp()
        student = student.exp() if options.normalize_only == "both" else student
    if options.distance == "cosine":
        each = F.cosine_similarity(student, teacher, dim=-1)
        return 1 - (each.mean() if reduction == "mean" else each)
    if options.distance == "smooth_l1":
        each = F.smooth_l1_loss(student, teacher, beta=options.beta, reduction=reduction)
    else:
        each = (F.l1_loss if options.distance == "l1" else F.mse_loss)(student, teacher, reduction=reduction)
    return each if reduction == "mean" else each.mean(dim=-1)


# ---- the teacher ----------------------------------------------------------------------------------------------------


def encoder_weights(weights: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the weights of a plain encoder on which the outputs of its blocks depend.

    Raises:
        ValueError: If the checkpoint does not contain a plain encoder.
    """
    needed = ("cls_token", "pos_embed", FIRST_LAYERS[read_patch_stem(weights)], "blocks.0.attn.qkv.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise ValueError(
            f"checkpoint {path} does not contain a plain vision transformer: it lacks {', '.join(missing)}. For "
            "another encoder of timm's give --terms.teacher.model NAME"
        )
    require_plain_encoder(weights, where=f"the weights in checkpoint {path}")
    return {name: weights[name] for name in weights if name.startswith(("blocks.", "patch_embed.", *needed[:2]))}


def resolved(options: TeacherOptions, weights: Mapping[str, Tensor], trained_with: Mapping[str, Any]) -> TeacherOptions:
    """Return the options, completed with the sizes and the digest of a plain teacher.

    Args:
        options: The configured options.
        weights: See `encoder_weights`; those of the last norm and of a decoder may be there as well.
        trained_with: The options of the teacher's run; empty if they are unknown.

    Raises:
        ValueError: If a configured option contradicts the teacher.
    """
    path = options.checkpoint
    embed_dim = weights["cls_token"].shape[-1]
    depth = read_depth(weights)
    heads = attention_heads(
        trained_with, embed_dim, options.num_heads, option="terms.teacher.num_heads", file=f"the teacher in {path}"
    )
    return _agreed(options, embed_dim=embed_dim, depth=depth, num_heads=heads, digest=compute_digest(weights))


def _agreed(options: TeacherOptions, **found: Any) -> TeacherOptions:
    """Set options to the values `found`. Raises ValueError if an option is set to another value."""
    for name, value in found.items():
        configured = getattr(options, name)
        if configured and configured != value:
            raise ValueError(f"{name} is {configured}, and the teacher in checkpoint {options.checkpoint} has {value}")
    return replace(options, **found)


def build_plain(
    options: TeacherOptions,
    weights: Mapping[str, Tensor],
    trained_with: Mapping[str, Any],
    grid: tuple[int, int],
    decoder: bool,
) -> VisionTransformer:
    """Build a plain teacher, with its decoder if that is compared, for images of `grid` patches; load its weights."""
    patch_size, stem = read_patch_size(weights, trained_with), read_patch_stem(weights)
    sizes: dict[str, Any] = {
        "img_size": (grid[0] * patch_size, grid[1] * patch_size),
        "patch_size": patch_size,
        "in_chans": weights[FIRST_LAYERS[stem]].shape[1],
        "embed_layer": PATCH_STEMS[stem],
        "embed_dim": options.embed_dim,
        "depth": options.depth,
        "num_heads": options.num_heads,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / options.embed_dim,
    }
    if decoder:
        depth = read_depth(weights, "decoder_blocks.")
        width, heads = options.decoder_embed_dim, options.decoder_num_heads
        own = MAEOptions(decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
        teacher: VisionTransformer = MaskedAutoencoderViT(**sizes, options=own)
    else:
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        teacher = VisionTransformer(
            **sizes, num_classes=0, global_pool="token", weight_init="skip", norm_layer=norm_layer
        )
    old_grid = None
    if "input_size" in trained_with:
        old_grid = patch_grid(tuple(trained_with["input_size"]), patch_size)
    known = teacher.state_dict()
    load_matching(teacher, {name: weights[name] for name in weights if name in known}, grid=old_grid)
    return teacher


def build_timm(options: TeacherOptions, weights: Mapping[str, Tensor], grid: tuple[int, int]) -> Any:
    """Build timm's model `options.model` for images of `grid` patches and load its weights."""
    teacher = timm_model(options.model)
    patch_size = teacher.patch_embed.patch_size
    if hasattr(teacher, "set_input_size"):
        teacher.set_input_size((grid[0] * patch_size[0], grid[1] * patch_size[1]))
    convert = getattr(sys.modules[type(teacher).__module__], "checkpoint_filter_fn", None)
    fitting = convert(dict(weights), teacher) if convert else dict(weights)
    own = teacher.state_dict()
    missing = [name for name in own if name not in fitting]
    wrong = [name for name in own if name in fitting and fitting[name].shape != own[name].shape]
    others = ("head", "fc_norm", "mask_token", "decoder")
    strange = [name for name in fitting if name not in own and not name.startswith(others)]
    for names, problem in ((missing, "lacks"), (wrong, "has other sizes of"), (strange, "also has")):
        if names:
            raise ValueError(
                f"these are not the weights of timm's {options.model}: the file {problem} {', '.join(names[:4])}"
            )
    teacher.load_state_dict({name: fitting[name] for name in own})
    return teacher


def timm_model(name: str) -> Any:
    """Create a model of timm without pretrained weights and classification head.

    Raises:
        ValueError: If timm does not have this model, or it is not a vision transformer with a class token.
    """
    if not timm.is_model(name):
        raise ValueError(
            f"model is {name!r}, which timm {timm.__version__} does not have; see timm.list_models('*vit*')"
        )
    # Keep the configured position embedding of registers and class token, so that the file's position table fits.
    made = timm.create_model(name, pretrained=False, num_classes=0)
    if not isinstance(made, VisionTransformer | Eva):
        raise ValueError(f"model is {name!r}, which is a {type(made).__name__}; a teacher is a vision transformer")
    if made.cls_token is None:
        raise ValueError(f"model is {name!r}, which has no class token")
    if getattr(made, "rope_mixed", False):
        raise ValueError(f"model is {name!r}, whose rotary positions differ between blocks: not supported")
    return made


class Teacher(nn.Module):
    """A frozen encoder that returns the requested taps, and computes only the layers that they need.

    Args:
        encoder: timm's VisionTransformer or Eva; or a masked autoencoder if its decoder is compared.
        normalization: Normalisation of the teacher's input; None: the student's.
    """

    def __init__(self, encoder: Any, normalization: Normalization | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalization = normalization
        self.in_chans: Any = self.encoder.patch_embed.proj.in_channels
        self.prefix: Any = self.encoder.num_prefix_tokens
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def learn_normalization(self, student: Normalization) -> None:
        """Store the affine map from the student's normalised images to the teacher's; None if they are the same."""
        self.scale = self.shift = None
        if self.normalization in (None, student):
            return
        assert self.normalization is not None
        (mean, _), (own_mean, _) = student, self.normalization
        if len(mean) not in (1, self.in_chans) or len(own_mean) != self.in_chans:
            raise ValueError(
                f"the images are normalised for {len(mean)} channels, and the teacher for {len(own_mean)} of "
                f"{self.in_chans}: give --terms.teacher.mean and --terms.teacher.std with {self.in_chans} numbers"
            )
        device = self.encoder.cls_token.device
        self.scale, self.shift = (values.to(device) for values in renormalization(student, self.normalization))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resample the position embedding for images of `grid` patches."""
        if self.encoder.patch_embed.grid_size != grid:
            rows, columns = self.encoder.patch_embed.patch_size
            self.encoder.set_input_size((grid[0] * rows, grid[1] * columns))
            self.requires_grad_(False)

    def keep_only(self, taps: set[tuple[str, int]]) -> None:
        """Remove layers that no tap `(kind, block)` depends on."""
        if not any(kind == "decoder" for kind, _ in taps):
            deepest = max(len(self.encoder.blocks) if kind == "features" else block for kind, block in taps)
            self.encoder.blocks = self.encoder.blocks[:deepest]
            if not any(kind == "features" for kind, _ in taps):
                self.encoder.norm = nn.Identity()
        elif decoded := sorted(block - 1 for kind, block in taps if kind == "decoder"):
            self.encoder.decoder_hidden = tuple(decoded)
            self.encoder.decoder_blocks = self.encoder.decoder_blocks[: decoded[-1] + 1]

    def prepare(self, images: Tensor) -> Tensor:
        """Convert the student's images to the channels, normalisation and size that the teacher expects."""
        return prepare_images(images, self.in_chans, self.scale, self.shift, self.encoder.patch_embed.img_size)

    def embed(self, images: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the tokens `[N, prefix + patches, T]` of the patches `ids` (None: all) and their rotary positions."""
        embedded = self.encoder._pos_embed(self.encoder.patch_embed(self.prepare(images)))
        x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        if ids is not None:
            x = torch.cat([x[:, : self.prefix], take(x[:, self.prefix :], ids)], dim=1)
            if rope is not None:
                rope = rope[ids][:, None]  # one table for all heads
        return self.encoder.norm_pre(x), rope

    def queries_keys_values(self, block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        """Return the queries, keys and values of a block's attention, `[N, S, 3 T]`, before the division by sqrt(d).

        They are normalised and rotated as in the block: with rotary positions, `rope` is applied to the queries and
        keys of the patches.
        """
        attention = block.attn
        x = x if isinstance(block, EvaBlockPostNorm) else block.norm1(x)
        if attention.qkv is None:
            parts = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        else:
            qkv = attention.qkv(x)
            if getattr(attention, "q_bias", None) is not None:
                qkv = qkv + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            if rope is None and isinstance(attention.q_norm, nn.Identity):
                return qkv
            parts = list(qkv.chunk(3, dim=-1))
        channels = parts[0].shape[-1] // attention.num_heads
        q, k, v = (part.unflatten(-1, (-1, channels)).transpose(1, 2) for part in parts)  # [N, H, S, d]
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))  # grouped queries
        q, k = attention.q_norm(q), attention.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(part, rope, attention).to(v.dtype) for part in (q, k))
        return torch.cat([part.transpose(1, 2).flatten(2) for part in (q, k, v)], dim=-1)

    def _rotated(self, x: Tensor, rope: Tensor, attention: Any) -> Tensor:
        """Apply rotary positions to the queries or keys `[N, H, S, d]` of the patches; other tokens are unchanged."""
        patches = apply_rot_embed_cat(x[:, :, self.prefix :], rope, half=attention.rotate_half)
        return torch.cat([x[:, :, : self.prefix], patches], dim=2)

    @torch.no_grad()
    def forward(
        self, images: Tensor, masking: Masking, ids: Tensor | None, taps: tuple[tuple[str, int], ...]
    ) -> dict[str, Tensor]:
        """Return the tap `(kind, block)` under the name `kind block`, for each of `taps`.

        A tap is tokens `[N, 1 + patches, T]`, or queries, keys and values `[N, 1 + patches, 3 T]`. The class token is
        first; registers are left out.

        Args:
            images: The student's images, with the student's normalisation.
            masking: The student's masking.
            ids: The patches that the teacher encodes, in this order; None: all, row by row.
        """
        found: dict[str, Tensor] = {}
        x, rope = self.embed(images, ids)
        outputs = {block for kind, block in taps if kind == "block"}
        attended = {block for kind, block in taps if kind in RELATIONS}
        to_the_top = any(kind in ("features", "decoder") for kind, _ in taps)
        depth = len(self.encoder.blocks) if to_the_top else max(outputs | attended)
        for number, block in enumerate(self.encoder.blocks[:depth], start=1):
            if number in attended:
                found[f"qkv {number}"] = self.queries_keys_values(block, x, rope)
            if number == depth and not to_the_top and number not in outputs:
                break
            x = block(x) if rope is None else block(x, rope=rope)
            if number in outputs:
                found[f"block {number}"] = x
        if to_the_top:
            x = self.encoder.norm(x)
        if any(kind == "features" for kind, _ in taps):
            found["features 0"] = x
        if any(kind == "decoder" for kind, _ in taps):
            _, hidden = self.encoder.decode_blocks(x, masking, {})
            found |= {f"decoder {block + 1}": value for block, value in hidden.items()}
        if self.prefix > 1:
            found = {name: torch.cat([x[:, :1], x[:, self.prefix :]], dim=1) for name, x in found.items()}
        return found


# ---- the student ----------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """AMD's generator: predict the teacher's tokens of patches that the student does not encode.

    The input of its blocks is the student's tokens and, for each further patch, a learned token with the patch's
    position.
    """

    def __init__(self, channels: int, heads: int, depth: int, out_channels: int) -> None:
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.blocks = nn.Sequential(
            *(Block(channels, heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth))
        )
        self.norm = norm_layer(channels)
        self.head = nn.Linear(channels, out_channels)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Predict `[N, K, T]` for the positions `[N, K, D]` of K patches from the student's tokens `[N, S, D]`."""
        extra = self.mask_token + positions
        x = self.blocks(torch.cat([x, extra.to(x.dtype)], dim=1))
        return self.head(self.norm(x[:, -positions.shape[1] :]))


class TeacherTerm(Term):
    """Distance between a tap of the student, after an adaptor, and a tap of a frozen teacher."""

    name: ClassVar[str] = "teacher"
    Options: ClassVar[type] = TeacherOptions
    options: TeacherOptions
    head: nn.Module
    own_teacher: ClassVar[bool] = True
    """Whether the term needs its own checkpoint; otherwise it may use that of the term `teacher`."""

    def __init__(self, options: TeacherOptions) -> None:
        super().__init__(options)
        self.reads_tokens = options.masked_pass > 0
        self.reads_features = options.student_tap == "features" or options.extra_block
        self.reads_decoder = options.student_tap == "decoder"
        self.noise_rows = int(options.masked_pass > 0) + options.masks_vary
        if options.masks_vary:  # the mean is over the hidden tokens of the batch, whose number varies
            self.images_together = "device"
        self.images_normalized: Normalization | None = None
        self.teacher = FrozenNetwork()
        self.wanted: dict[str, tuple[tuple[str, int], ...]] = {}  # of all terms that use this teacher, by `input_name`
        self._weights: dict[str, Tensor] = {}
        self._trained_with: Mapping[str, Any] = {}
        self._last_norm = True
        self._holder: tuple[TeacherTerm, ...] = ()  # in a tuple, so that it is not a submodule
        self._holder_name = ""

    # ---- building

    def read_checkpoints(self, read: Reader) -> None:
        if not self.options.checkpoint:
            if self.own_teacher:
                raise ValueError("no teacher is given: --terms.teacher.checkpoint FILE")
            return
        weights, self._trained_with = read(self.options.checkpoint)
        if self.options.model:
            with torch.device("meta"):
                made = timm_model(self.options.model)
            heads = made.blocks[0].attn.num_heads
            found = {"embed_dim": made.embed_dim, "depth": len(made.blocks), "num_heads": heads}
            self.options = _agreed(self.options, **found, digest=compute_digest(weights))
            self._weights = dict(weights)
            self._last_norm = not isinstance(made.norm, nn.Identity)
            return
        plain = encoder_weights(weights, self.options.checkpoint)
        parts = ("norm.", "decoder", "mask_token")
        self._weights = plain | {name: weights[name] for name in weights if name.startswith(parts)}
        self._last_norm = not averages_before_norm(weights)
        if self.options.digest == compute_digest(plain):  # of a run that was started before the digest had all parts
            self.options = replace(self.options, digest="")
        self.options = resolved(self.options, self._weights, self._trained_with)
        if self.options.teacher_tap == "decoder":
            self.options = self._with_decoder()

    def _with_decoder(self) -> TeacherOptions:
        path = self.options.checkpoint
        if "decoder_embed.weight" not in self._weights:
            raise ValueError(
                f"checkpoint {path} has no decoder, which teacher_tap 'decoder' needs: use MAE's full file"
            )
        width = self._weights["decoder_embed.weight"].shape[0]
        heads = self.options.decoder_num_heads
        if "model" in self._trained_with:
            size, _ = parse_name(self._trained_with["model"])
            heads = self._trained_with.get("decoder_num_heads") or DECODERS[size][2]
        return _agreed(self.options, decoder_embed_dim=width, decoder_num_heads=heads or width // 32)

    def attach(self, model: MaskedImageModel) -> None:
        options = self.options
        holder = model.terms["teacher"] if "teacher" in model.terms else self
        self._holder = (self if options.checkpoint or self.own_teacher else holder,)  # type: ignore[assignment]
        self._holder_name = next(name for name, term in model.terms.items() if term is self._holder[0])
        if self._holder[0] is not self:
            theirs = self._holder[0].options
            names = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_num_heads", "digest")
            options = self.options = replace(options, **{name: getattr(theirs, name) for name in names})
        if not options.embed_dim:
            raise ValueError(
                "the teacher's channels are not known: give --terms.teacher.checkpoint FILE (terms without a "
                "checkpoint use the teacher of the term 'teacher', which must precede them)"
            )
        self._attach_taps(model)
        self._attach_adaptor(model)

    def _attach_taps(self, model: MaskedImageModel) -> None:
        """Determine the blocks that are compared, and register them in the model and the teacher."""
        options = self.options
        self.student_block, self.teacher_block = 0, 0
        if options.student_tap == "decoder":
            blocks = getattr(model, "decoder_blocks", None)
            if not isinstance(model, MaskedAutoencoderViT) or not isinstance(blocks[0], Block):  # type: ignore[index]
                raise ValueError("student_tap 'decoder' needs a decoder of self-attention, as MAE's")
            self.student_block = block_number("student_block", options.student_block or 0.75, len(blocks))  # type: ignore[arg-type]
            self.decoder_hidden = (self.student_block - 1,)
        elif options.student_tap == "block" or options.relates and not options.extra_block:
            self.student_block = block_number("student_block", options.student_block or 0.75, len(model.blocks))
            self.taps = (self.student_block - 1 - options.relates,)
            assert min(self.taps) >= ENCODER_INPUT
        depth = options.depth
        if options.teacher_tap == "decoder" and self._holder[0]._weights:
            depth = read_depth(self._holder[0]._weights, "decoder_blocks.")
        if options.teacher_tap == "features" and not self._holder[0]._last_norm:
            raise ValueError(
                f"the teacher in {self._holder[0].options.checkpoint} has no norm before its tokens are averaged, so "
                "teacher_tap 'features' does not exist: use teacher_tap 'block' with teacher_block -1"
            )
        if options.teacher_tap != "features":
            self.teacher_block = block_number("teacher_block", options.teacher_block or 0.75, depth)
        wanted, tap = self._holder[0].wanted, (options.teacher_tap, self.teacher_block)
        wanted[self.input_name] = tuple(sorted({*wanted.get(self.input_name, ()), tap}))

    def _attach_adaptor(self, model: MaskedImageModel) -> None:
        """Create the layers between the student's tap and the comparison."""
        options = self.options
        student, teacher = model.embed_dim, options.embed_dim
        if options.student_tap == "decoder":
            student = model.decoder_embed.out_features  # type: ignore[union-attr, assignment]
        if options.teacher_tap == "decoder":
            teacher = options.decoder_embed_dim
        if options.relates:
            self._attach_heads(model)
        elif options.adaptor == "none" and student != teacher:
            raise ValueError(f"adaptor 'none' needs equal channels; the student has {student}, the teacher {teacher}")
        elif options.adaptor == "linear":
            self.head = nn.Linear(student, teacher)
        elif options.adaptor == "norm_linear":
            self.head = nn.Sequential(nn.LayerNorm(student), nn.Linear(student, teacher))
        elif options.adaptor == "mlp":
            layers = nn.Linear(student, teacher), nn.GELU(), nn.Linear(teacher, teacher)
            self.head = nn.Sequential(*layers).apply(initialize)
        elif options.adaptor == "generator":
            heads: int = model.blocks[0].attn.num_heads  # type: ignore[union-attr, assignment]
            self.head = Generator(student, heads, options.generator_depth, teacher)
        if options.masked_pass:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, model.embed_dim))
            nn.init.normal_(self.mask_token, std=0.02)

    def _attach_heads(self, model: MaskedImageModel) -> None:
        options, channels = self.options, model.embed_dim
        self.heads: int = model.blocks[0].attn.num_heads  # type: ignore[union-attr, assignment]
        if options.extra_block:
            if options.adaptor == "none":
                self.heads = options.num_heads
            if channels % self.heads:
                raise ValueError(f"{self.heads} heads do not divide {channels} channels: use adaptor 'heads'")
            self.qkv = nn.Linear(channels, (1 + max(EXTRA_PAIRS[options.student_tap])) * channels)
            initialize(self.qkv)
        if options.adaptor == "heads":
            self.head = nn.Conv2d(self.heads, options.num_heads, kernel_size=1)
        elif self.heads != options.num_heads:
            raise ValueError(
                f"the student has {self.heads} attention heads and the teacher {options.num_heads}: use "
                "adaptor 'heads' or extra_block"
            )

    def learn_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images_normalized = (tuple(mean), tuple(std))
        if self.teacher.network is not None:
            self.teacher.network.learn_normalization(self.images_normalized)

    def normalization(self, channels: int) -> Normalization | None:
        """Return the normalisation that the teacher expects for `channels`; None: that of the student."""
        if self.options.mean and self.options.std:
            return self.options.mean, self.options.std
        if self._trained_with:
            known = self._trained_with
            own = tuple(known.get("mean") or ()), tuple(known.get("std") or ())
            return own if all(own) else None
        if self.options.model:
            cfg = timm.get_pretrained_cfg(self.options.model, allow_unregistered=False)
            if cfg is not None:
                return tuple(cfg.mean), tuple(cfg.std)
        return IMAGENET if channels == 3 else None

    def check(self, model: MaskedImageModel) -> None:
        if not model.drops_hidden:
            raise ValueError("teacher terms need an encoder that gets only the visible patches")
        least = model.num_visible + (self.options.tokens == "extra")
        if self.options.teacher_input == "superset" and self._teacher_patches(model) < least:
            raise ValueError(
                f"teacher_mask_ratio {self.options.teacher_mask_ratio} gives the teacher "
                f"{self._teacher_patches(model)} patches, fewer than {least}: the student has {model.num_visible}"
            )
        if self.teacher.network is not None:
            self.teacher.network.set_grid(model.grid)
        elif self._weights:
            self._build_teacher(model)

    def _build_teacher(self, model: MaskedImageModel) -> None:
        """Build the teacher with the layers that the terms need, without changing the state of the random generator."""
        taps = {tap for taps in self.wanted.values() for tap in taps}
        try:
            with torch.random.fork_rng(devices=[]):
                encoder: Any
                if self.options.model:
                    encoder = build_timm(self.options, self._weights, model.grid)
                else:
                    decoder = any(kind == "decoder" for kind, _ in taps)
                    encoder = build_plain(self.options, self._weights, self._trained_with, model.grid, decoder)
            known = Block | EvaBlock | EvaBlockPostNorm
            if any(kind in RELATIONS for kind, _ in taps) and not isinstance(encoder.blocks[0], known):
                raise ValueError(
                    f"attention and relations cannot be taken from its blocks ({type(encoder.blocks[0]).__name__})"
                )
            channels = encoder.patch_embed.proj.in_channels
            if model.in_chans not in (1, channels):
                raise ValueError(f"its images have {channels} channels and the student's {model.in_chans}")
            teacher = Teacher(encoder, self.normalization(channels))
            if self.images_normalized or model.in_chans == 3:
                teacher.learn_normalization(self.images_normalized or IMAGENET)
        except ValueError as problem:
            raise ValueError(f"checkpoint {self.options.checkpoint} cannot teach this model: {problem}") from problem
        teacher.keep_only(taps)
        self.teacher.hold(teacher)
        self._weights = {}

    # ---- which tokens

    @property
    def input_name(self) -> str:
        """Return the name of the teacher's input. Terms with the same input share the teacher's forward pass."""
        options = self.options
        ratio = f" {options.teacher_mask_ratio:g}" if options.teacher_input == "superset" else ""
        return options.teacher_input + ratio

    def _teacher_patches(self, model: MaskedImageModel) -> int:
        return int(model.num_patches * (1 - self.options.teacher_mask_ratio))

    def teacher_tokens(self, model: MaskedImageModel, view: View) -> Tensor:
        """Return the teacher's tap: tokens, or queries, keys and values, of the patches that it encodes."""
        holder = self._holder[0]
        teacher = holder.teacher.network
        if teacher is None:
            raise ValueError(
                "this model was loaded for inspection, without its teacher: to train it, build it with methods.build"
            )
        key = f"{self._holder_name} {self.input_name}"
        if key not in view.shared:
            ids = None
            if self.options.teacher_input == "visible":
                ids = view.ids_keep
            elif self.options.teacher_input == "superset":
                ids = by_rank(view.ids_restore)[:, : self._teacher_patches(model)]
            masking = Masking(view.ids_keep, view.ids_restore, view.mask)
            view.shared[key] = teacher(view.images, masking, ids, holder.wanted[self.input_name])
        kind = "qkv" if self.options.relates else self.options.teacher_tap
        return view.shared[key][f"{kind} {self.teacher_block}"]

    def student_tokens(self, model: MaskedImageModel, view: View) -> tuple[Tensor, Tensor]:
        """Return the student's tap, and the patches of its tokens as ids `[N, patches]` (empty: all, row by row)."""
        options, everywhere = self.options, view.ids_keep.new_empty(0)
        if options.masked_pass:
            return self.masked_features(model, view), everywhere
        if options.student_tap == "decoder":
            return view.decoder_hidden[self.student_block - 1], everywhere
        if options.student_tap == "block":
            return view.taps[self.student_block - 1], view.ids_keep
        if options.student_tap == "features":
            return view.latent, view.ids_keep
        if options.extra_block:
            return self.qkv(view.latent), view.ids_keep
        block: Any = model.blocks[self.student_block - 1]
        return block.attn.qkv(block.norm1(view.taps[self.student_block - 2])), view.ids_keep

    def masked_ids(self, model: MaskedImageModel, view: View) -> tuple[Tensor, Tensor | None]:
        """Return the patches `[N, K]` that the additional pass may mask, and which of them it masks, 1 or 0.

        The latter is None if all of them are masked. One row of noise gives the order of the patches. If the number of
        masked patches differs between images, the next row is also used: its first value determines whether an image
        has masked patches, its second value how many.
        """
        options, L = self.options, model.num_patches
        order = view.noise[:, self.noise_row].argsort(dim=1)
        if not options.masks_vary:
            return order[:, : max(1, int(options.masked_pass * L))], None
        drawn, low = view.noise[:, self.noise_row + 1], options.masked_pass
        high = max(low, options.masked_pass_max)
        counts = ((low + (high - low) * drawn[:, 1:2]) * L).int().clamp(min=1)
        ranks = torch.arange(max(1, int(high * L)), device=order.device)
        chosen = (ranks < counts) & (drawn[:, :1] < options.masked_images)
        return order[:, : len(ranks)], chosen.to(view.mask.dtype)

    def masked_features(self, model: MaskedImageModel, view: View) -> Tensor:
        """Encode all patches, some of them replaced by the mask token: `[N, 1 + L, D]`."""
        ids, chosen = self.masked_ids(model, view)
        mask = torch.zeros_like(view.mask).scatter(1, ids, torch.ones_like(view.mask) if chosen is None else chosen)
        blank = self.mask_token + model.pos_embed[:, 1:]
        tokens = torch.where(mask[:, :, None] > 0, blank.to(view.tokens.dtype), view.tokens)
        return model.encode_tokens(tokens)[0]

    def paired(
        self, model: MaskedImageModel, view: View, student: Tensor, ids: Tensor, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's tokens that are compared, in the same order.

        `ids` are the student's patches.
        """
        tokens = self.options.tokens
        if tokens == "class":
            return student[:, :1], teacher[:, :1]
        V = view.ids_keep.shape[1]
        student_everywhere = ids.numel() == 0
        teacher_everywhere = self.options.teacher_tap == "decoder" or self.options.teacher_input == "full"
        if tokens == "hidden":
            masked = self.options.masked_pass > 0
            wanted = self.masked_ids(model, view)[0] if masked else by_rank(view.ids_restore)[:, V:]
            return take(student, wanted + 1), take(teacher, wanted + 1)
        if tokens == "all" and student_everywhere:
            return student, teacher
        first = 1 if tokens == "visible" else 0
        wanted = F.pad(view.ids_keep + 1, (1, 0))[:, first:]  # position 0 is the class token
        student = take(student, wanted) if student_everywhere else student[:, first:]
        return student, take(teacher, wanted) if teacher_everywhere else teacher[:, first : 1 + V]

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        options = self.options
        teacher = self.teacher_tokens(model, view)
        student, ids = self.student_tokens(model, view)
        if options.tokens == "extra":
            V = view.ids_keep.shape[1]
            extra = by_rank(view.ids_restore)[:, V : self._teacher_patches(model)]
            positions = take(model.pos_embed[:, 1:].expand(len(extra), -1, -1), extra)
            return compare(self.head(student, positions), teacher[:, 1 + V :], options)
        student, teacher = self.paired(model, view, student, ids, teacher)
        if options.relates:
            pair = EXTRA_PAIRS[options.student_tap] if options.extra_block else PAIRS[options.student_tap]
            parts = 1 + max(pair) if options.extra_block else 3
            student = relation(student, parts, pair, self.heads)
            teacher = relation(teacher, 3, PAIRS[options.teacher_tap], options.num_heads)
        if options.adaptor != "none":
            student = self.head(student)
        weights = self.masked_ids(model, view)[1] if options.masked_pass else None
        return compare(student, teacher, options, weights)


class FurtherTeacherTerm(TeacherTerm):
    """A second or third teacher term, with the teacher of the term `teacher` or with another one."""

    own_teacher: ClassVar[bool] = False
