"""Options of the masked autoencoder and related methods."""

from __future__ import annotations

from dataclasses import dataclass

from options.schema import Options, require, result, shape


@dataclass(frozen=True, kw_only=True)
class MaskOptions(Options):
    """Options of every method that masks patches."""

    mask_ratio: float = result(0.75, section="Method")
    """Share of the patches that is masked."""

    @property
    def _reconstructs(self) -> bool:
        return True

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "mask_ratio")
        require(
            self.mask_ratio > 0 or not self._reconstructs, "must be more than 0, or no patch is masked", "mask_ratio"
        )
        require(self.mask_ratio < 1, "must be less than 1, or no patch is visible", "mask_ratio")


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(Options):
    """Options of every method with a decoder of transformer blocks."""

    decoder_embed_dim: int = shape(0, section="Decoder")
    """Channels of the decoder; 0: the default of the model's size, as for the next two options."""
    decoder_depth: int = shape(0)
    """Blocks of the decoder: 8 in MAE, 12 in the NoR-MAE paper's script."""
    decoder_num_heads: int = shape(0)
    """Attention heads of the decoder."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")


@dataclass(frozen=True, kw_only=True)
class MAEOptions(MaskOptions, DecoderOptions):
    """Options of MAE."""

    norm_pix_loss: bool = result(False)
    """Reconstruct pixels normalised by the mean and standard deviation of each patch."""
    reconstruction_weight: float = result(1.0)
    """Weight of the reconstruction in the loss; 0 leaves it out, and the decoder where no term uses it."""
    reconstruct_block: float = shape(0.0)
    """Encoder block whose output, normalised, is decoded: its number from 1, or between 0 and 1 a share of the blocks,
    rounded down. 0: the encoder's output."""
    input_jitter: float = result(0.0)
    """Strength of random changes of brightness, contrast and saturation of the encoder's input in training: factors
    between 1 - strength and 1 + strength. The target and teachers get the image as it is."""
    drop_path: float = result(0.0)
    """Stochastic depth in pretraining: rate at which each block of the encoder is skipped for an image."""

    @property
    def _reconstructs(self) -> bool:
        return self.reconstruction_weight > 0

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "reconstruction_weight", "reconstruct_block")
        self._between(0, 1, "input_jitter")
        self._below_one("drop_path")
        whole = self.reconstruct_block < 1 or self.reconstruct_block == int(self.reconstruct_block)
        require(
            whole, f"must be a block's number or less than 1, found {self.reconstruct_block:g}", "reconstruct_block"
        )


@dataclass(frozen=True, kw_only=True)
class CrossMAEOptions(MAEOptions):
    """Options of CrossMAE."""

    predict_ratio: float = result(0.0)
    """Share of the patches that is predicted in training, at most mask_ratio; 0: 0.25."""

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "predict_ratio")
        require(
            self.reconstruction_weight > 0,
            "this decoder has no other use: must be more than 0",
            "reconstruction_weight",
        )
        require(self.reconstruct_block == 0, "this decoder reads the output of every block", "reconstruct_block")


@dataclass(frozen=True, kw_only=True)
class SimMIMOptions(MaskOptions):
    """Options of SimMIM."""

    mask_ratio: float = result(0.6)
    mask_cell: int = result(0)
    """Side of the square cells that are masked together, in pixels; 0: two patches."""
    norm_pix_loss: bool = result(False)
    """Reconstruct pixels normalised by the mean and standard deviation of each patch."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "mask_cell")
