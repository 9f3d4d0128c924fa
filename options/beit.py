"""Options of methods that predict tokens, and of BEiT."""

from __future__ import annotations

from dataclasses import dataclass

from options.maskfeat import BlockMaskOptions
from options.schema import Options, machine, result, shape


@dataclass(frozen=True, kw_only=True)
class TokenOptions(Options):
    """Options of every method that predicts the token of each hidden patch."""

    tokenizer: str = machine("")
    """Where tokens come from: a run (folder or checkpoint) of `vq_tokenizer` or `vqkd_tokenizer`, or a file written by
    `python -m tools.tokenizer kmeans`."""
    tokens: int = shape(0)
    """Number of different tokens; 0: as many as the tokenizer has."""
    token_digest: str = result("")
    """SHA-256 of the tokenizer's weights, which a run stores, so that it does not resume with another tokenizer."""
    label_smoothing: float = result(0.0)
    """Share of the target that is spread over all tokens."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "tokens")
        self._below_one("label_smoothing")


@dataclass(frozen=True, kw_only=True)
class BEiTOptions(TokenOptions, BlockMaskOptions):
    """Options of BEiT."""

    mask_ratio: float = result(0.3827)
    """Share of the patches that is hidden from the encoder, at most; 0.3827 hides 75 of 196."""
    drop_path: float = result(0.0)
    """Stochastic depth: share of the images that skip the last block; earlier blocks are skipped less."""
    color_jitter: float = result(0.0)
    """Strength of the random changes of brightness, contrast and saturation of each crop; the release has 0.4. Model
    and tokenizer see the same pixels. Not with data_on_device."""

    def _check(self) -> None:
        super()._check()
        self._between(0, 1, "color_jitter")
        self._below_one("drop_path")
