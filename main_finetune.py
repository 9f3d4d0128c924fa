"""Train a classifier end to end, from a pretrained encoder or from scratch; or evaluate one with `--eval`.

    python main_finetune.py -c configs/finetune/quickstart.yaml --init_from output/quickstart/checkpoints/last.pth
    torchrun --nproc_per_node 8 main_finetune.py -c configs/finetune/mae_base_in1k.yaml --init_from CHECKPOINT \\
        --data_path IMAGENET
    python main_finetune.py --eval --resume output/finetune/checkpoints/best.pth --data_path IMAGENET

Options that the checkpoint decides (model, input size, channels, mean and deviation) need not be repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import programs
from options import FinetuneOptions


def parse_options(argv: Sequence[str]) -> FinetuneOptions:
    """Parse recipes and flags into options."""
    return programs.parse_options("finetune", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return programs.front_door(parse_options, "finetune", argv)


if __name__ == "__main__":
    sys.exit(main())
