"""Estimate memory, time and price of an epoch of pretraining on this machine, beside the paper's Tables 10 and 11.

    python -m benchmarks.bill --price 2.5                                   # a device for 2.50 an hour, one CPU thread
    python -m benchmarks.bill --device cuda --amp bf16 --batch_size 512 --price 2.5 --devices 2 --compile

Steps are timed on synthetic batches in device memory, so loading is not included (see input.py). Several devices are
assumed to be equally fast. The paper's rows were measured by its authors with their loader, and used half a percent of
the GPUs' arithmetic, so they say little about the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import progress, publish, quartiles, spread, where
from benchmarks.step import VARIANTS, Setting, measure, setting_from, setting_parser
from tools.markdown import make_table

PROJECT = Path(__file__).resolve().parent.parent

IMAGENET = 1_281_167  # training images
ROWS = ("mae", "mae_mask50", "nor", "nor_r20", "dmae")  # ours, as rows of Tables 10 and 11
TABLES = PROJECT / "configs" / "tables.yaml"  # where the paper's figures stand
DEVICES = {"10": "4 x RTX 6000", "11": "2 x H100"}


def papers_rows() -> list[list[str]]:
    """Return Tables 10 and 11 of the paper in the columns of ours."""
    tables, rows = yaml.safe_load(TABLES.read_text()), []
    for number, devices in DEVICES.items():
        baseline: dict[str, float] = {}  # minutes of each model's first row, MAE
        for row in tables[number]["rows"]:
            *model, method = row["row"]
            figures = row["paper"]
            minutes, price = figures["minutes"], figures.get("price")
            rows.append(
                [
                    f"Table {number}, {devices}: {', '.join(model) or 'ViT-Tiny'}, {method}",
                    f"{IMAGENET / minutes / 60:.0f}",
                    f"{minutes:.1f}",
                    "-" if price is None else f"{price:.2f} USD",
                    f"{1000 * figures['GB'] / 4096:.1f}",
                    f"{minutes / baseline.setdefault(' '.join(model), minutes):.3f}",
                ]
            )
    return rows


def epoch(seconds_a_step: float, batch_size: int, images: int, devices: int, price: float) -> dict[str, float]:
    """Return the total images/s, and minutes and price of an epoch."""
    rate = devices * batch_size / seconds_a_step
    minutes = images / rate / 60
    return {"images_per_s": rate, "minutes": minutes, "price": devices * price * minutes / 60}


def bill(setting: Setting, asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return for each variant the time of an epoch, and the megabytes of a step per image."""
    return {
        name: epoch(quartiles(times)["median"], setting.batch_size, asked["images"], asked["devices"], asked["price"])
        | {"mb_per_image": found["peak_bytes"][name] / setting.batch_size / 1e6}
        for name, times in found["seconds"].items()
    }


def markdown(result: Mapping[str, Any]) -> str:
    setting, asked, bills = Setting(**result["setting"]), result["asked"], result["bill"]
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
    return (
        f"# The bill for an epoch of {asked['images']:,} images: {setting.words}\n\n"
        f"{where(result['machine'])} {asked['devices']} device(s) at {asked['price']:g} an hour each, {setting.rounds} "
        f"rounds, {result['clock']}. Memory is what a step takes beyond weights and optimizer.\n\n"
        + make_table(["ours", "images / s", "minutes", "price", "MB / image", f"time / {baseline}"], ours)
        + "\nThe paper's, loader included; memory of 4096 images, in all:\n\n"
        + make_table(["where", "images / s", "minutes", "price", "MB / image", "time / its MAE"], papers_rows())
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = setting_parser(__doc__, ROWS)
    parser.add_argument("--price", type=float, required=True, help="of one device for an hour, in any currency")
    parser.add_argument("--devices", type=int, default=1, help="how many work together")
    parser.add_argument("--images", type=int, default=IMAGENET, help="images of an epoch")
    parser.add_argument("--compile", action="store_true", help="our steps compiled")
    given = parser.parse_args(argv)
    setting = setting_from(given)
    asked = {name: getattr(given, name) for name in ("price", "devices", "images")}
    compiled = {name: f"{name}+compile" for name in given.variants if given.compile and f"{name}+compile" in VARIANTS}
    found = measure(setting, [compiled.get(name, name) for name in given.variants], say=progress)
    found |= {"asked": asked, "bill": bill(setting, asked, found)}
    publish(f"bill_{setting.file}", found, markdown, setting=asdict(setting), output=given.output)


if __name__ == "__main__":
    main()
