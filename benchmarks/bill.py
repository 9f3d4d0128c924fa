"""What pretraining costs on this machine: memory, time and price of an epoch, next to the paper's Tables 10 and 11.

    python benchmarks/bill.py --price 2.5                                   # a device for 2.50 an hour, one CPU thread
    python benchmarks/bill.py --device cuda --amp bf16 --batch_size 512 --price 2.5 --devices 2 --compile

Steps are timed on synthetic batches that lie on the device, so this is the device's share of the bill: what a run pays
if its loader keeps up (see input.py). More devices are taken to be as fast each. The paper's rows are its own and were
measured with its loader; its GPUs did half a percent of what they can, so they tell little about the step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # so that the file runs from any directory

from benchmarks.measure import RESULTS, machine, paired_ratios, progress, publish, quartiles, spread, table, where
from benchmarks.step import AMP, Setting, measure

IMAGENET = 1_281_167  # training images
ROWS = ("mae", "mae_mask50", "nor", "nor_r20", "dmae")  # ours, as rows of Tables 10 and 11
PAPER = (  # where, what, minutes an epoch, GB in all at batch 4096 (None: not stated)
    ("Table 11: 2 x H100, ViT-Tiny", "MAE, 75 % hidden", 25 + 20 / 60, 102),
    ("Table 11: 2 x H100, ViT-Tiny", "MAE, 50 % hidden", 33 + 7 / 60, None),
    ("Table 11: 2 x H100, ViT-Tiny", "NoR-MAE", 27 + 10 / 60, 108),
    ("Table 10: 4 x RTX 6000, ViT-Tiny", "MAE", 35.0, None),
    ("Table 10: 4 x RTX 6000, ViT-Tiny", "NoR-MAE", 36.0, None),
    ("Table 10: 4 x RTX 6000, ViT-Small", "MAE", 45.0, None),
    ("Table 10: 4 x RTX 6000, ViT-Small", "NoR-MAE", 47.0, None),
)


def epoch(seconds_a_step: float, batch_size: int, images: int, devices: int, price: float) -> dict[str, float]:
    """images/s in all, minutes and price of an epoch."""
    rate = devices * batch_size / seconds_a_step
    minutes = images / rate / 60
    return {"images_per_s": rate, "minutes": minutes, "price": devices * price * minutes / 60}


def bill(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each variant: what an epoch takes, and the megabytes that a step holds for each image."""
    batch_size, asked = result["setting"]["batch_size"], result["asked"]
    return {
        name: epoch(quartiles(times)["median"], batch_size, asked["images"], asked["devices"], asked["price"])
        | {"mb_per_image": result["peak_bytes"][name] / batch_size / 1e6}
        for name, times in result["seconds"].items()
    }


def markdown(result: Mapping[str, Any]) -> str:
    setting, asked, bills = result["setting"], result["asked"], result["bill"]
    baseline = next(iter(bills))
    ours = [
        [
            name,
            f"{each['images_per_s']:.1f}",
            f"{each['minutes']:.1f}",
            f"{each['price']:.2f}",
            f"{each['mb_per_image']:.1f}",
            "1" if name == baseline else spread(result["ratios"][f"{name}/{baseline}"]),
        ]
        for name, each in bills.items()
    ]
    first = {place: minutes for place, _, minutes, _ in reversed(PAPER)}  # of each place its first row, MAE
    paper = [
        [
            place,
            what,
            f"{IMAGENET / minutes / 60:.0f}",
            f"{minutes:.1f}",
            "-" if memory is None else f"{1000 * memory / 4096:.1f}",
            f"{minutes / first[place]:.3f}",
        ]
        for place, what, minutes, memory in PAPER
    ]
    return (
        f"# The bill: ViT-{setting['size'].capitalize()}/{setting['patch_size']}, decoder depth "
        f"{setting['decoder_depth']}, an epoch of {asked['images']:,} images\n\n"
        f"{where(result['machine'])} {asked['devices']} device(s) at {asked['price']:g} an hour each, batch "
        f"{setting['batch_size']}, amp {setting['amp']}, CPU threads: {setting['threads']}, {result['clock']}.\n\n"
        + table(["ours", "images / s", "minutes", "price", "MB / image", f"time / {baseline}"], ours)
        + "\nThe paper's, as printed there:\n\n"
        + table(["where", "method", "images / s", "minutes", "MB / image", "time / its MAE"], paper)
    )


def main(argv: Sequence[str] | None = None) -> None:
    default = Setting()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--price", type=float, required=True, help="of one device for an hour, in any currency")
    parser.add_argument("--devices", type=int, default=1, help="how many work together")
    parser.add_argument("--images", type=int, default=IMAGENET, help="images of an epoch")
    parser.add_argument("--compile", action="store_true", help="our steps compiled")
    parser.add_argument("--size", default=default.size, choices=["tiny", "small", "base", "large", "huge"])
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--amp", default=default.amp, choices=AMP)
    for name in ("decoder_depth", "batch_size", "threads", "rounds", "input_size", "patch_size"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="as in step.py")
    parser.add_argument("--output", type=Path, help="JSON file, the table beside it; None: in benchmarks/results/")
    given = vars(parser.parse_args(argv))
    asked = {name: given.pop(name) for name in ("price", "devices", "images")}
    names = [f"{name}+compile" if given["compile"] else name for name in ROWS]
    del given["compile"]
    output = given.pop("output") or RESULTS / f"bill_{given['device'].split(':')[0]}_{given['size']}.json"
    setting = Setting(**given)
    result = {"setting": asdict(setting), "asked": asked, "machine": machine(setting.device)}
    result |= measure(setting, names, say=progress)
    result |= {"ratios": paired_ratios(result["seconds"])}
    result["bill"] = bill(result)
    publish(result, markdown(result), output)


if __name__ == "__main__":
    main()
