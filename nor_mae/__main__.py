"""`python -m nor_mae COMMAND ...`, for torchrun: `torchrun --nproc_per_node 8 -m nor_mae pretrain ...`."""

import sys

from nor_mae.cli import main

if __name__ == "__main__":
    sys.exit(main())
