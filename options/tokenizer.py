"""Options of the tokenizers that are trained: `vq_tokenizer` and `vqkd_tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from options.mae import DecoderOptions
from options.schema import require, result, shape, show


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(DecoderOptions):
    """Options of every tokenizer that is trained."""

    quantizer: Literal["ema", "fsq"] = shape("ema", section="Codes")
    """How vectors become tokens: `ema`, by the nearest of unit vectors that follow the data by moving averages; `fsq`,
    by rounding each channel to a few levels, without a codebook."""
    codes: int = shape(8192)
    """Number of tokens of `ema`."""
    code_dim: int = shape(32)
    """Channels of a code of `ema`."""
    levels: tuple[int, ...] = shape((8, 8, 8, 4, 4))
    """Levels of each channel of `fsq`; there are as many tokens as their product."""
    code_decay: float = result(0.99)
    """Decay of the moving averages, of codes and of how often each is used, per optimizer step."""
    dead_codes: float = result(0.02)
    """A code is dead that is used less often than this share of the average code. Dead codes of `ema` are replaced by
    vectors of the current images; 0: none are."""
    commitment: float = result(1.0)
    """Weight of the mean squared difference between a vector and its code (`ema`), which moves the vector."""

    def _check(self) -> None:
        super()._check()
        self._at_least(2, "codes")
        self._at_least(1, "code_dim")
        self._at_least(0, "commitment")
        self._between(0, 1, "code_decay", "dead_codes")
        require(bool(self.levels) and min(self.levels) > 1, f"at least 2 each, found {show(self.levels)}", "levels")
        require(self.dead_codes < 1, "must be less than 1, or the average code is dead", "dead_codes")


@dataclass(frozen=True, kw_only=True)
class VQTokenizerOptions(TokenizerOptions):
    """Options of the VQ tokenizer, which reconstructs pixels."""

    perceptual: float = result(0.0, section="Perceptual loss")
    """Weight of the difference between the features of a reconstruction and of its image, as PeCo's tokenizer has it;
    0: none."""
    perceptual_encoder: str = result("")
    """The frozen encoder of these features: a checkpoint of MAE's, timm's or ours."""
    perceptual_heads: int = result(0)
    """Attention heads of the perceptual encoder; 0: from its checkpoint, or the usual number for its channels;
    with 192 channels there are two (12, and 3 in DeiT), so it must be given."""
    perceptual_blocks: tuple[int, ...] = result(())
    """Blocks, counted from 1, whose outputs are compared; empty: the end of each quarter (3, 6, 9 and 12 of 12)."""
    perceptual_digest: str = result("")
    """SHA-256 of the perceptual encoder's weights, which a run stores, so that it does not resume with another one."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "perceptual", "perceptual_heads")
        used = bool(self.perceptual) or not self.perceptual_encoder
        require(used, "has no effect with perceptual 0: give a weight", "perceptual_encoder", "perceptual")


@dataclass(frozen=True, kw_only=True)
class VQKDTokenizerOptions(TokenizerOptions):
    """Options of BEiT v2's tokenizer, which reconstructs the features of a teacher."""

    teacher: str = result("", section="Teacher")
    """The frozen encoder whose patch features are reconstructed: a checkpoint of MAE's, timm's or ours."""
    teacher_dim: int = shape(0)
    """Channels of the teacher; 0: from its checkpoint."""
    teacher_heads: int = result(0)
    """Attention heads of the teacher; 0: from its checkpoint, or the usual number for its channels;
    with 192 channels there are two (12, and 3 in DeiT), so it must be given."""
    teacher_digest: str = result("")
    """SHA-256 of the teacher's weights, which a run stores, so that it does not resume with another teacher."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "teacher_dim", "teacher_heads")
