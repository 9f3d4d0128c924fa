"""Compare arithmetic and memory traffic of a training step with the measured limits of the device.

    python -m benchmarks.roofline --device cuda --amp bf16 --batch_size 512 --variants mae nor nor+compile
    python -m benchmarks.roofline --batch_size 8                       # a CPU has a roof as well

The limits are the best of several large matrix products and large copies on the device. The arithmetic of a step is
that of its matrix products and attentions; its bytes are those that all operations read and write, without fusion
(eager) or as the compiler counts them for its fused kernels (compiled). The lower bound of the time is the larger of
both, and the share is that bound divided by the measured time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import progress, publish, quartiles, where
from benchmarks.step import AMP, VARIANTS, Setting, choose_clock, measure, setting_from, setting_parser, wait
from tools.markdown import make_table

VIEWS = frozenset(
    "view as_strided expand transpose permute slice select detach alias unsqueeze squeeze split unbind unsafe_view t "
    "reshape empty empty_like new_empty".split()
)


class BytesMoved(TorchDispatchMode):
    """Counts what operations read and write; views move nothing."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.lstrip("_") not in VIEWS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return found


def ceilings(setting: Setting, seconds: float = 1.0) -> dict[str, float]:
    """Return the best rate of a large matrix product (FLOP/s) and of a large copy (bytes/s)."""
    device, dtype = torch.device(setting.device), AMP[setting.amp] or torch.float32
    _, clock = choose_clock(setting)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    large = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(large)
    return {
        "flop_per_s": 2 * side**3 / best(lambda: a @ b, device, clock, seconds),
        "bytes_per_s": 2 * large.numel() * 4 / best(lambda: target.copy_(large), device, clock, seconds),
    }


def best(work: Callable[[], object], device: torch.device, clock: Callable[[], float], seconds: float) -> float:
    """Return the shortest time."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    while shortest == float("inf") or time.perf_counter() < end:
        wait(device)
        began = clock()
        work()
        wait(device)
        shortest = min(shortest, clock() - began)
    return shortest


def moved(setting: Setting, name: str) -> dict[str, float]:
    """Return the FLOP of a step, and its bytes without fusion: in all, and outside forward and backward pass."""
    device = torch.device(setting.device)
    images = torch.randn(setting.batch_size, 3, setting.input_size, setting.input_size, device=device)
    noise = torch.rand(setting.batch_size, 2, setting.patches, device=device)
    step: Any = VARIANTS[name.removesuffix("+compile")](setting)
    step(images, noise)  # makes the optimizer's state
    with FlopCounterMode(display=False) as flop, BytesMoved() as count:
        step(images, noise)
    found = {"flop": float(flop.get_total_flops()), "bytes": float(count.total)}
    if name.endswith("+compile"):
        with BytesMoved() as inside, torch.autocast(device.type, dtype=step.amp, enabled=step.amp is not None):
            step.model(images, noise=noise)["loss"].backward()
        found["bytes_beside"] = found["bytes"] - inside.total
    return found


def compute_roof_share(setting: Setting, name: str, roof: Mapping[str, float]) -> dict[str, float]:
    """Return for one variant its rate, the bytes of a step, and its shares of the limits."""
    metrics.reset()
    seconds = quartiles(measure(setting, [name], say=progress)["seconds"][name])["median"]
    work = moved(setting, name)
    if name.endswith("+compile"):  # what the compiler counted, when it compiled for the measurement
        work["bytes"] = metrics.num_bytes_accessed + work["bytes_beside"]
    times = {what: work[what] / roof[f"{what}_per_s"] for what in ("flop", "bytes")}
    return {
        **work,
        "images_per_s": setting.batch_size / seconds,
        "flop_share": times["flop"] / seconds,
        "byte_share": times["bytes"] / seconds,
        "share": max(times.values()) / seconds,
    }


def markdown(result: Mapping[str, Any]) -> str:
    setting, roof = Setting(**result["setting"]), result["ceilings"]
    rows = [
        [
            name,
            f"{each['images_per_s']:.1f}",
            f"{each['flop'] / setting.batch_size / 1e9:.2f}",
            f"{each['bytes'] / setting.batch_size / 1e6:.0f}",
            f"{100 * each['flop_share']:.1f} %",
            f"{100 * each['byte_share']:.1f} %",
            f"{100 * each['share']:.1f} %",
        ]
        for name, each in result["roofline"].items()
    ]
    columns = [
        "variant",
        "images / s",
        "GFLOP / image",
        "MB / image",
        "of the FLOP/s",
        "of the bytes/s",
        "of the floor",
    ]
    return (
        f"# Roofline: {setting.words}\n\n"
        f"{where(result['machine'])} Measured ceilings: {roof['flop_per_s'] / 1e12:.3g} TFLOP/s and "
        f"{roof['bytes_per_s'] / 1e9:.4g} GB/s.\n\n" + make_table(columns, rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    given = setting_parser(__doc__, ("mae", "nor")).parse_args(argv)
    setting = setting_from(given)
    torch.set_num_threads(setting.threads)
    roof = ceilings(setting)
    shares = {name: compute_roof_share(setting, name, roof) for name in dict.fromkeys(given.variants)}
    found = {"ceilings": roof, "roofline": shares}
    publish(f"roofline_{setting.file}", found, markdown, setting=asdict(setting), output=given.output)


if __name__ == "__main__":
    main()
