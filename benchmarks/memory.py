"""Measure the memory of a training step without weights and optimizer: our steps and the restated published ones.

    python -m benchmarks.memory --amp bf16                                 # ViT-Tiny/16, batch 32, CPU
    python -m benchmarks.memory --device cuda --amp bf16 --batch_size 512

Requested bytes are counted, not time, so a busy machine gives the same results as an idle one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.measure import progress, publish, where
from benchmarks.step import Setting, peak_bytes, prepared, setting_from, setting_parser
from tools.markdown import make_table

USUAL = ("mae", "nor", "nor_r20", "restated_mae", "restated_nor")


def markdown(result: Mapping[str, Any]) -> str:
    setting, peaks = Setting(**result["setting"]), result["peak_bytes"]
    first = next(iter(peaks))
    rows = [
        [name, f"{peak / 2**20:.1f}", f"{peak / setting.batch_size / 1e6:.2f}", f"{peak / peaks[first]:.4f}"]
        for name, peak in peaks.items()
    ]
    return (
        f"# Peak memory of a step: {setting.words}\n\n"
        f"{where(result['machine'])} Beyond what is held between steps: weights, gradients and optimizer.\n\n"
        + make_table(["variant", "MiB", "MB / image", f"times {first}"], rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    given = setting_parser(__doc__, USUAL).parse_args(argv)
    setting = setting_from(given)
    steps = prepared(setting, list(dict.fromkeys(given.variants)), progress)
    peaks = {name: peak_bytes(step, torch.device(setting.device)) for name, step in steps}
    publish(f"memory_{setting.file}", {"peak_bytes": peaks}, markdown, setting=asdict(setting), output=given.output)


if __name__ == "__main__":
    main()
