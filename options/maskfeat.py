"""Options of block-wise masks, and of MaskFeat."""

from __future__ import annotations

from dataclasses import dataclass

from options.mae import MaskOptions
from options.schema import result


@dataclass(frozen=True, kw_only=True)
class BlockMaskOptions(MaskOptions):
    """Options of every method that hides rectangles of patches."""

    min_block: int = result(0)
    """Smallest area, in patches, that is drawn for a block while that many may still be hidden; 0: the share of the
    hidden patches that the method's paper has."""

    def _check(self) -> None:
        super()._check()
        self._at_least(0, "min_block")


@dataclass(frozen=True, kw_only=True)
class MaskFeatOptions(BlockMaskOptions):
    """Options of MaskFeat."""

    mask_ratio: float = result(0.4)
