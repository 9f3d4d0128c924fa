"""Evaluate a frozen encoder with a linear classifier on its features and with k nearest neighbours.

    python main_linprobe.py -c configs/linprobe/quickstart.yaml --init_from output/quickstart/checkpoints/last.pth
    torchrun --nproc_per_node 8 main_linprobe.py -c configs/linprobe/mae_base_in1k.yaml --init_from CHECKPOINT \\
        --data_path IMAGENET
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import programs
from options import ProbeOptions


def parse_options(argv: Sequence[str]) -> ProbeOptions:
    """Parse recipes and flags into options."""
    return programs.parse_options("probe", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return programs.front_door(parse_options, "probe", argv)


if __name__ == "__main__":
    sys.exit(main())
