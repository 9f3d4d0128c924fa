"""Options of ClusterMIM."""

from __future__ import annotations

from dataclasses import dataclass

from options.beit import TokenOptions
from options.mae import DecoderOptions, MaskOptions


@dataclass(frozen=True, kw_only=True)
class ClusterMIMOptions(TokenOptions, DecoderOptions, MaskOptions):
    """Options of ClusterMIM."""
