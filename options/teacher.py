"""Options of the teacher terms: what the student imitates of a frozen teacher, and how the two are compared."""

from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

from options.schema import require_choice, require_number

Tap = Literal["block", "features", "attention", "queries", "keys", "values", "decoder"]
RELATIONS = ("attention", "queries", "keys", "values")


@dataclass(frozen=True)
class TeacherOptions:
    """The teacher, and where and how it is compared with the student. The defaults are DMAE's."""

    weight: float = 1.0
    """Weight of the term."""
    checkpoint: str = ""
    """The teacher's weights: a file of MAE's, timm's or this project's. The terms teacher2 and teacher3 leave it empty
    to use the teacher of the term teacher, which then runs once."""
    model: str = ""
    """timm's name of the teacher, such as vit_small_patch14_dinov2. Needed for teachers with registers, layer scale,
    rotary positions or another patch size than the file states; empty: a plain ViT of the sizes in the checkpoint."""
    student_tap: Tap = "block"
    """What is taken from the student: `block`, a block's output before the norm; `features`, the encoder's output after
    its last norm; `attention`, the logits of a block's attention, q k / sqrt(d); `queries`, `keys`, `values`, the same
    product of each of these with itself; `decoder`, the output of a decoder block before the norm."""
    student_block: float = 0.0
    """Block of the student that is meant, counted from 1; -1: the last; between 0 and 1: a share of its blocks, rounded
    down; 0: three quarters."""
    extra_block: bool = False
    """Take the student's attention or relations from an additional layer of queries, keys and values on the features,
    which is discarded after training, instead of from a block."""
    teacher_tap: Tap = "block"
    """What is taken from the teacher, as for student_tap."""
    teacher_block: float = 0.0
    """Block of the teacher, as for student_block."""
    teacher_input: Literal["visible", "superset", "full"] = "visible"
    """Patches that the teacher gets: those that the student gets; these and further ones; all patches."""
    teacher_mask_ratio: float = 0.75
    """Share of the patches that is hidden from the teacher, with teacher_input superset."""
    tokens: Literal["all", "visible", "hidden", "extra", "class"] = "all"
    """Tokens that are compared: `all` that the student's tap has, class token included; `visible` patches; `hidden`
    patches (decoder, masked_pass); `extra` patches that only the teacher gets (generator); the `class` token."""
    masked_pass: float = 0.0
    """Share of the patches that is replaced by a learned token in a further pass of the student, for this term only;
    tokens hidden then means these. 0: no further pass."""
    masked_pass_max: float = 0.0
    """Largest such share: each image's is drawn between masked_pass and this. 0: masked_pass for all images."""
    masked_images: float = 1.0
    """Probability that patches of an image are replaced in the further pass."""
    adaptor: Literal["linear", "norm_linear", "mlp", "heads", "generator", "none"] = "linear"
    """Layers between student and comparison: `linear`; layer norm and linear; linear, GELU, linear; a 1x1 convolution
    over attention `heads`; a `generator` of the extra patches' tokens; none, where the sizes are equal."""
    generator_depth: int = 2
    """Blocks of the generator."""
    normalize: Literal["none", "l2", "layer_norm", "softmax"] = "l2"
    """Normalisation of each token, or of each row of attention, before the comparison. Layer norm has no weights."""
    normalize_only: Literal["both", "teacher"] = "both"
    """Whether the student is normalised as well."""
    temperature: float = 1.0
    """Divisor of what the softmax gets."""
    distance: Literal["l1", "l2", "smooth_l1", "cosine", "kl"] = "l1"
    """`l1`, `l2`, `smooth_l1`: mean over all values of the absolute, squared or smoothed difference; `cosine`: mean of
    1 - cosine; `kl`: mean over rows of KL(teacher || student), after a softmax."""
    beta: float = 1.0
    """Difference at which smooth_l1 changes from squared to absolute."""
    embed_dim: int = 0
    """Channels of the teacher; 0: from its checkpoint, as for the next two options."""
    depth: int = 0
    """Blocks of the teacher."""
    num_heads: int = 0
    """Attention heads of the teacher. Checkpoints of this project and timm's names determine it; for others 0 means the
    usual number for those channels; 192 channels have 12 heads in this family and 3 in DeiT, so it must be given."""
    decoder_embed_dim: int = 0
    """Channels of the teacher's decoder, where it is compared; 0: from its checkpoint."""
    decoder_num_heads: int = 0
    """Attention heads of the teacher's decoder; 0: from its checkpoint, or the channels divided by 32."""
    mean: tuple[float, ...] = ()
    """Mean of the pixels for which the teacher was trained; empty: from the checkpoint's run or timm's configuration,
    for other files ImageNet's."""
    std: tuple[float, ...] = ()
    """Standard deviation of these pixels; empty: as for mean."""
    digest: str = ""
    """SHA-256 of the teacher's weights, recorded so that a run does not resume with another teacher."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            if hasattr(hints[option.name], "__args__") and option.name not in ("mean", "std"):
                require_choice(option.name, getattr(self, option.name), hints[option.name])
        for name in ("weight", "teacher_mask_ratio", "masked_pass", "masked_pass_max", "temperature", "beta"):
            require_number(name, getattr(self, name))
        for name in ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_num_heads"):
            require_number(name, getattr(self, name), 0)
        require_number("generator_depth", self.generator_depth, 1)
        for name in ("student_block", "teacher_block"):
            block = getattr(self, name)
            require_number(name, block)
            if block != -1 and (block < 0 or block > 1 and block != int(block)):
                raise ValueError(
                    f"{name} is {block:g}; it can be a block's number from 1, a share of the depth, 0 or -1"
                )
        for name in ("temperature", "beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be more than 0")
        require_number("masked_images", self.masked_images)
        if not 0 < self.masked_images <= 1:
            raise ValueError(f"masked_images is {self.masked_images:g}; it must be more than 0 and at most 1")
        if self.masked_pass_max and not 0 < self.masked_pass <= self.masked_pass_max:
            raise ValueError(
                f"masked_pass_max is {self.masked_pass_max:g}; it must be at least masked_pass, which is "
                f"{self.masked_pass:g} and must be more than 0"
            )
        for name in ("teacher_mask_ratio", "masked_pass", "masked_pass_max"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be from 0 to less than 1")
        self._check_taps()
        self._check_tokens()

    @property
    def masks_vary(self) -> bool:
        """Whether the further pass replaces different numbers of patches in different images."""
        return self.masked_pass > 0 and (self.masked_pass_max > self.masked_pass or self.masked_images < 1)

    @property
    def relates(self) -> bool:
        """Whether matrices of tokens by tokens are compared, not tokens."""
        return self.student_tap in RELATIONS

    def _check_taps(self) -> None:
        if self.relates != (self.teacher_tap in RELATIONS):
            raise ValueError(
                f"student_tap is {self.student_tap!r} and teacher_tap {self.teacher_tap!r}: attention and relations "
                "can only be compared with each other"
            )
        if self.relates and self.adaptor not in ("heads", "none"):
            raise ValueError(f"adaptor is {self.adaptor!r}; for attention and relations it can be 'heads' or 'none'")
        if not self.relates and self.adaptor == "heads":
            raise ValueError(f"adaptor is 'heads'; the student_tap {self.student_tap!r} has no heads")
        if self.extra_block and not self.relates:
            raise ValueError(f"extra_block is for attention and relations; student_tap is {self.student_tap!r}")
        if self.distance == "kl" and self.normalize != "softmax":
            raise ValueError(f"distance is 'kl', which needs normalize 'softmax', not {self.normalize!r}")
        if self.distance == "kl" and self.normalize_only != "both":
            raise ValueError("distance is 'kl', which needs normalize_only 'both'")
        if self.masked_pass and self.student_tap != "features":
            raise ValueError(f"masked_pass needs student_tap 'features', not {self.student_tap!r}")

    def _check_tokens(self) -> None:
        everywhere = self.student_tap == "decoder" or self.masked_pass > 0
        teacher_everywhere = self.teacher_tap == "decoder" or self.teacher_input == "full"
        if self.relates and self.tokens != "all":
            raise ValueError(f"tokens is {self.tokens!r}; for attention and relations it can only be 'all'")
        if self.tokens == "hidden" and not everywhere:
            raise ValueError("tokens is 'hidden', which needs student_tap 'decoder' or a masked_pass")
        if self.masked_pass and self.tokens != "hidden":
            raise ValueError(f"masked_pass compares tokens 'hidden', not {self.tokens!r}")
        if (self.tokens == "hidden" or self.tokens == "all" and everywhere) and not teacher_everywhere:
            raise ValueError(
                f"tokens is {self.tokens!r}, which includes patches that the teacher does not get: use teacher_input "
                "'full' or teacher_tap 'decoder'"
            )
        if self.teacher_tap == "decoder" and self.teacher_input != "visible":
            raise ValueError(f"teacher_tap 'decoder' needs teacher_input 'visible', not {self.teacher_input!r}")
        if (self.tokens == "extra") != (self.adaptor == "generator"):
            raise ValueError("tokens 'extra' and adaptor 'generator' need each other")
        if self.tokens == "extra" and (self.teacher_input != "superset" or self.student_tap == "decoder"):
            raise ValueError("tokens 'extra' needs teacher_input 'superset' and a tap of the student's encoder")
