"""Measure the share of a training step that several processes on this machine spend on exchanging gradients.

    python -m benchmarks.communication                       # ViT-Tiny/16, 2 gloo processes
    python -m benchmarks.communication --processes 4 --batch_size 16

Every round takes one step with the exchange and one without it (DDP's `no_sync`), in random order, on the same batch;
the share is 1 - without / with, round by round. Without several processes there is nothing to exchange: both steps
compute the same. The cores of the machine are divided among the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

import methods
from benchmarks.measure import in_turn, parser, progress, publish, quartiles, spread, where
from tools.markdown import make_table
from util import optim


def compute_step_seconds(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, images: torch.Tensor, exchange: bool
) -> float:
    dist.barrier()
    began = time.perf_counter()
    with contextlib.nullcontext() if exchange else model.no_sync():
        optimizer.zero_grad(set_to_none=True)
        model(images)["loss"].backward()
        optimizer.step()
    dist.barrier()
    return time.perf_counter() - began


def measure(rank: int, given: argparse.Namespace, meeting: str, output: str) -> None:
    """Run one of several processes, which all draw the same order of variants; rank 0 writes the result."""
    torch.set_num_threads(max(1, torch.get_num_threads() // given.processes))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=given.processes)
    torch.manual_seed(0)
    model = methods.build(given.method, given.model, decoder_depth=given.decoder_depth, norm_pix_loss=True)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-4)
    images = torch.randn(given.batch_size, 3, *model.patch_embed.img_size)
    step = functools.partial(compute_step_seconds, DistributedDataParallel(model), optimizer, images)
    turns = {"with": functools.partial(step, True), "without": functools.partial(step, False)}
    for warm_up in turns.values():
        warm_up()
    seconds = in_turn(turns, given.rounds, 0, progress if rank == 0 else lambda text: None)
    if rank == 0:
        numbers = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        Path(output).write_text(json.dumps({"seconds": seconds, "gradient_bytes": 4 * numbers}))
    dist.destroy_process_group()


def markdown(result: Mapping[str, Any]) -> str:
    setting, ratio = result["setting"], result["ratios"]["without/with"]
    lost = {"median": 1 - ratio["median"], "q1": 1 - ratio["q3"], "q3": 1 - ratio["q1"]}
    row = [spread(quartiles(result["seconds"][name])) for name in ("with", "without")]
    return (
        f"# Exchange of gradients: {setting['processes']} gloo processes\n\n"
        f"{where(result['machine'])} {setting['method']}, {setting['model']}, decoder depth "
        f"{setting['decoder_depth']}, batch {setting['batch_size']} each, {setting['rounds']} rounds; medians and "
        "quartiles, the share within a round.\n\n"
        + make_table(
            ["gradients, MB", "s / step", "s / step without", "share lost"],
            [[f"{result['gradient_bytes'] / 1e6:.0f}", *row, spread(lost)]],
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(
        __doc__,
        processes=(2, "how many share the machine"),
        decoder_depth=(12, "decoder blocks"),
        batch_size=(8, "images of each process"),
        rounds=(10, "how often both steps are timed"),
    )
    made.add_argument("--method", default="nor_mae", help="as for main_pretrain.py")
    made.add_argument("--model", default="mae_vit_tiny_patch16", help="as for main_pretrain.py")
    given = made.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        multiprocessing.spawn(measure, (given, f"{folder}/meeting", str(found)), nprocs=given.processes)
        setting = {name: value for name, value in vars(given).items() if name != "output"}
        publish("communication", json.loads(found.read_text()), markdown, setting=setting, output=given.output)


if __name__ == "__main__":
    main()
