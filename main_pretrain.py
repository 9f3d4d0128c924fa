"""Pretrain a vision transformer on images without labels.

python main_pretrain.py -c configs/pretrain/quickstart.yaml --output_dir output/digits
torchrun --nproc_per_node 8 main_pretrain.py -c configs/pretrain/nor_mae_vit_tiny_in1k.yaml --data_path IMAGENET
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import programs
from options import PretrainOptions


def parse_options(argv: Sequence[str]) -> PretrainOptions:
    """Parse recipes and flags into options."""
    return programs.parse_options("pretrain", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return programs.front_door(parse_options, "pretrain", argv)


if __name__ == "__main__":
    sys.exit(main())
