"""The share of a training step that several processes on this machine lose to exchanging gradients.

    python benchmarks/communication.py                       # ViT-Tiny/16, 2 gloo processes
    python benchmarks/communication.py --processes 4 --batch 16

Every round takes one step with the exchange and one without it (DDP's `no_sync`), in random order, on the same batch;
the share is 1 - without / with, round by round. Without several processes there is nothing to exchange: both steps
compute the same. The machine's cores are shared out among the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # so that the file runs from any directory

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

import methods
from util import optim


def seconds_of_a_step(
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


def measure(rank: int, words: argparse.Namespace, meeting: str, output: str) -> None:
    """One process; rank 0 writes the seconds of every round, with and without the exchange."""
    torch.set_num_threads(max(1, (torch.get_num_threads()) // words.processes))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=words.processes)
    torch.manual_seed(0)
    model = methods.build(words.method, words.model, decoder_depth=words.decoder_depth, norm_pix_loss=True)
    optimizer = optim.adamw(optim.pretrain_groups(model, 0.05), 1e-4)
    images = torch.randn(words.batch, 3, *model.patch_embed.img_size)
    trained = DistributedDataParallel(model)
    order = random.Random(0)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(words.rounds + 1):
        for exchange in order.sample([True, False], 2):
            taken = seconds_of_a_step(trained, optimizer, images, exchange)
            if number:  # the first round warms up
                seconds[exchange].append(taken)
    if rank == 0:
        weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
        Path(output).write_text(json.dumps({"with": seconds[True], "without": seconds[False], "weights": weights}))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description="The share of a step lost to exchanging gradients.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="nor_mae")
    parser.add_argument("--model", default="mae_vit_tiny_patch16")
    parser.add_argument("--decoder_depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="images of each process")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "communication.json")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "seconds.json"
        multiprocessing.spawn(measure, (words, f"{folder}/meeting", str(found)), nprocs=words.processes)
        seconds = json.loads(found.read_text())
    shares = [1 - without / total for total, without in zip(seconds["with"], seconds["without"], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    result = {
        "what": f"{words.method}, {words.model}, decoder depth {words.decoder_depth}, {words.processes} gloo processes",
        "batch_per_process": words.batch,
        "rounds": words.rounds,
        "gradient_mb": seconds["weights"] * 4 / 1e6,
        "step_s_median": statistics.median(seconds["with"]),
        "share_lost_median": middle,
        "share_lost_quartiles": [low, high],
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads in all",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    words.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
