"""Train UPerNet on a vision transformer to segment images; or evaluate a segmenter with `--eval`.

    python main_segment.py -c configs/segment/quickstart.yaml --output_dir output/scenes
    torchrun --nproc_per_node 8 main_segment.py -c configs/segment/ade20k.yaml --init_from CHECKPOINT --data_path ADE20K
    python main_segment.py --eval --resume output/ade20k/checkpoints/best.pth --data_path ADE20K

Options that the checkpoint decides (model, channels, mean and deviation) need not be repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import programs
from options import SegmentOptions


def parse_options(argv: Sequence[str]) -> SegmentOptions:
    """Parse recipes and flags into options."""
    return programs.parse_options("segment", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return programs.front_door(parse_options, "segment", argv)


if __name__ == "__main__":
    sys.exit(main())
