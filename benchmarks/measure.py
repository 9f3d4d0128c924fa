"""Functions shared by all benchmarks: command line, random order within rounds, ratios per round, JSON and Markdown.

Only times of the same round are compared, and each round runs the variants in a new random order: a machine that is
slow for a minute is slow for all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from util.logging import DECODERS, installed, processor, read_commit

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"


def parser(description: str, **numbers: tuple[int, str]) -> argparse.ArgumentParser:
    """Create the parser of a benchmark; `numbers` are flags with default and meaning."""
    made = argparse.ArgumentParser(
        description=description.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, (value, text) in numbers.items():
        made.add_argument(f"--{name}", type=int, default=value, help=text)
    made.add_argument("--output", type=Path, help="JSON file, the table beside it; None: in benchmarks/results/")
    return made


def in_turn(
    variants: Mapping[str, Callable[[], float]], rounds: int, seed: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the results of each variant, by round."""
    order = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            found[name].append(variants[name]())
        newest = ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items())
        say(f"round {number + 1} of {rounds}: {newest}")
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": q1, "q3": q3}


def paired_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return for `"a/b"` median and quartiles of the times of a divided by those of b in the same rounds."""
    return {
        f"{a}/{b}": quartiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
        for a in seconds
        for b in seconds
        if a != b
    }


def machine(device: str) -> dict[str, Any]:
    """Describe the machine."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": installed("torch", "torchvision", "timm", "numpy", *DECODERS),
        "commit": read_commit(PROJECT, digits=10),
    }


def progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def where(machine: Mapping[str, Any]) -> str:
    """Describe the machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    commit = machine["commit"] or "not known"
    return f"{machine['device']} ({machine['cores']} cores), {machine['date']}, {versions}, commit {commit}."


def spread(values: Mapping[str, float], digits: int = 3) -> str:
    """Format a median with its quartiles."""
    return f"{values['median']:.{digits}f} [{values['q1']:.{digits}f}, {values['q3']:.{digits}f}]"


def publish(
    name: str,
    found: Mapping[str, Any],
    markdown: Callable[[Mapping[str, Any]], str],
    *,
    setting: Mapping[str, Any],
    output: Path | None,
) -> None:
    """Write results with setting, machine and ratios as JSON to `output` or benchmarks/results/NAME.json.

    The table is written beside it and to the terminal.
    """
    result = {"setting": dict(setting), "machine": machine(setting.get("device", "cpu")), **found}
    if "seconds" in found:
        result["ratios"] = paired_ratios(found["seconds"])
    text = markdown(result)
    output = output or RESULTS / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
