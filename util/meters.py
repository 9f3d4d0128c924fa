"""Means of named losses, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from util.distributed import Processes


class Means:
    """Weighted means of named scalars: of the epoch, and since the last call of `recent`.

    A value that is not finite is left out of its mean, because its update is skipped.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._names: list[str] = []
        self._epoch = self._recent = torch.zeros(2, 0)  # sums, weights

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Add scalar tensors, without waiting for the device."""
        if not self._names:
            self._start(list(values))
        vector = torch.stack([values[name].detach().to(self._epoch.dtype) for name in self._names])
        finite = torch.isfinite(vector)
        both = torch.stack([torch.where(finite, vector, 0) * weight, finite * weight])
        self._epoch += both
        self._recent += both

    def _start(self, names: list[str]) -> None:
        device = self._processes.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
        self._names = names
        self._epoch = torch.zeros(2, len(names), dtype=dtype, device=device)
        self._recent = torch.zeros_like(self._epoch)

    def recent(self) -> dict[str, float]:
        """Return the means since the last call, over all ranks, which call it together. Synchronises the device."""
        means = self._read(self._recent)
        self._recent = torch.zeros_like(self._recent)
        return means

    def overall(self) -> dict[str, float]:
        """Return the means of the epoch so far, over all ranks, which call it together. Synchronises the device."""
        return self._read(self._epoch)

    def reset(self) -> None:
        """Start a new epoch."""
        self._epoch = torch.zeros_like(self._epoch)

    def _read(self, sums: Tensor) -> dict[str, float]:
        total, weight = self._processes.sum(sums).cpu()
        return dict(zip(self._names, (total / weight).tolist(), strict=True))

    def state_dict(self) -> dict[str, object]:
        """Return the sums over all ranks, for a checkpoint within an epoch. All ranks must call it together."""
        return {"names": list(self._names), "epoch": self._processes.sum(self._epoch).cpu()}

    def load_state_dict(self, state: Mapping) -> None:
        self._start(list(state["names"]))
        if self._processes.main:  # the saved sums are those of all ranks
            self._epoch += state["epoch"].to(self._epoch)
