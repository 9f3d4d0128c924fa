"""How long a training step takes: our steps and the restated published ones, in turn, in one process.

    python benchmarks/step.py                                          # ViT-Tiny/16, batch 32, one CPU thread, fp32
    python benchmarks/step.py --device cuda --batch_size 256 --amp bf16 --variants restated_nor nor nor+compile
    python benchmarks/step.py --help

A step is forward, backward, gradient norm and AdamW on one synthetic batch that is already on the device. In every
round each variant takes its turn, in an order drawn anew, and only ratios of the same round are compared: a machine
that is slow for a minute is slow for all of them. Medians with quartiles of these ratios go to a Markdown table on the
terminal and, with the raw times, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # so that the file runs from any directory

import timm
import torch
from torch import Tensor

import methods
from benchmarks.restated_mae import RestatedMAE, RestatedStep
from benchmarks.restated_nor_mae import RestatedNoRMAE
from util.distributed import Processes
from util.meters import Means
from util.optim import adamw, pretrain_groups, warmup_cosine
from util.stepper import Stepper

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[Tensor, Tensor], object]


@dataclass(frozen=True)
class Setting:
    """What is the same for every variant."""

    size: str = "tiny"
    patch_size: int = 16
    input_size: int = 224
    decoder_depth: int = 12
    norm_pix_loss: bool = True
    batch_size: int = 32
    device: str = "cpu"
    amp: str = "none"
    threads: int = 1
    rounds: int = 7
    warmup: int = 2
    steps: int = 1
    seed: int = 0

    def build(self, method: str) -> torch.nn.Module:
        """Our model of that method; the same weights for the same seed."""
        torch.manual_seed(self.seed)
        return methods.build(
            method,
            model=f"mae_vit_{self.size}_patch{self.patch_size}",
            input_size=self.input_size,
            decoder_depth=self.decoder_depth,
            norm_pix_loss=self.norm_pix_loss,
        )


class OurStep:
    """A step as engine_pretrain takes it, without the loader."""

    def __init__(self, setting: Setting, method: str, compiled: bool):
        self.device, self.amp = torch.device(setting.device), AMP[setting.amp]
        model = setting.build(method).to(self.device)
        optimizer = adamw(pretrain_groups(model, 0.05), 1.5e-4, device=self.device)
        schedule = warmup_cosine(optimizer, epochs=1, warmup_epochs=0, steps_per_epoch=1_000_000, min_lr=0.0)
        if compiled:
            model.compile()
        self.model = model
        self.stepper = Stepper(model, optimizer, schedule, fp16=setting.amp == "fp16")
        self.means = Means(Processes(0, 1, 0, self.device))
        self.index = torch.arange(setting.batch_size)

    def __call__(self, images: Tensor, noise_NL: Tensor) -> None:
        with self.stepper.micro_step():
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                losses = self.model(images, noise=noise_NL)
        self.means.add(losses, weight=len(images))
        self.stepper(losses, self.index)


def restated(setting: Setting, model_class: type[RestatedMAE], **more: Any) -> RestatedStep:
    """A restated step with the very weights that our model starts from."""
    ours: Any = setting.build("mae")
    model = model_class(
        img_size=setting.input_size,
        patch_size=setting.patch_size,
        embed_dim=ours.embed_dim,
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        decoder_embed_dim=ours.decoder_embed.out_features,
        decoder_depth=len(ours.decoder_blocks),
        decoder_num_heads=ours.decoder_blocks[0].attn.num_heads,
        norm_pix_loss=setting.norm_pix_loss,
        **more,
    )
    model.load_state_dict(ours.state_dict())
    device = torch.device(setting.device)
    return RestatedStep(model.to(device), device, AMP[setting.amp])


VARIANTS: dict[str, Callable[[Setting], Step]] = {
    "restated_mae": lambda setting: restated(setting, RestatedMAE),
    "mae": lambda setting: OurStep(setting, "mae", compiled=False),
    "restated_nor": lambda setting: restated(setting, RestatedNoRMAE, amp=AMP[setting.amp]),
    "nor": lambda setting: OurStep(setting, "nor_mae", compiled=False),
    "mae+compile": lambda setting: OurStep(setting, "mae", compiled=True),
    "nor+compile": lambda setting: OurStep(setting, "nor_mae", compiled=True),
}


def clock_of(setting: Setting) -> tuple[str, Callable[[], float]]:
    """One CPU thread is timed by its CPU time, which other programs disturb least; all else by the wall."""
    if setting.device == "cpu" and setting.threads == 1:
        return "CPU time", time.process_time
    return "wall time", time.perf_counter


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setting: Setting, names: Sequence[str], say: Callable[[str], None] = lambda text: None) -> dict:
    """Time the named variants; returns seconds per step by round, and peak memory where the device can tell."""
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    generator = torch.Generator().manual_seed(setting.seed)
    patches = (setting.input_size // setting.patch_size) ** 2
    images = torch.randn(setting.batch_size, 3, setting.input_size, setting.input_size, generator=generator).to(device)
    noise = torch.rand(setting.batch_size, patches, generator=generator).to(device)
    clock_name, clock = clock_of(setting)

    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}
    for name in names:
        say(f"preparing {name}")
        steps[name] = VARIANTS[name](setting)
        for _ in range(max(setting.warmup, 1)):  # the first step also makes optimizer state and, compiled, the code
            steps[name](images, noise)
        if device.type == "cuda":
            wait(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            steps[name](images, noise)
            wait(device)
            memory[name] = torch.cuda.max_memory_allocated(device) - before

    order = random.Random(setting.seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(setting.rounds):
        for name in order.sample(list(names), len(names)):
            wait(device)
            begin = clock()
            for _ in range(setting.steps):
                steps[name](images, noise)
            wait(device)
            seconds[name].append((clock() - begin) / setting.steps)
        newest = ", ".join(f"{name} {seconds[name][-1]:.3f} s" for name in names)
        say(f"round {number + 1} of {setting.rounds}: {newest}")
    return {"clock": clock_name, "seconds": seconds, "peak_bytes": memory}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": q1, "q3": q3}


def paired_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """`"a/b"`: median and quartiles, over the rounds, of a's time divided by b's time in the same round."""
    return {
        f"{a}/{b}": quartiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)])
        for a in seconds
        for b in seconds
        if a != b
    }


def machine(device: str) -> dict[str, str | int | None]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        processor = lines[0] if lines else processor
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": answer.stdout.strip() or None,
    }


def markdown(result: Mapping) -> str:
    """The figures as a table: one row a variant, one column a baseline."""
    setting, where, seconds = result["setting"], result["machine"], result["seconds"]
    names = list(seconds)
    memory = ["peak MiB over rest"] if result["peak_bytes"] else []
    columns = ["variant", "s / step", *memory, *names]
    lines = [
        f"# Step time: ViT-{setting['size'].capitalize()}/{setting['patch_size']} at {setting['input_size']} px, "
        f"decoder depth {setting['decoder_depth']}",
        "",
        f"{where['device']}, {where['date']}, torch {where['torch']}, timm {where['timm']}, commit {where['commit']}. "
        f"Batch {setting['batch_size']}, amp {setting['amp']}, CPU threads: {setting['threads']}, "
        f"rounds: {setting['rounds']} of {setting['steps']} step(s), {result['clock']}.",
        "Medians over rounds; ratios are taken within a round, with their quartiles. A row's time / the column's time.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for name in names:
        cells = [name, f"{quartiles(seconds[name])['median']:.4f}"]
        if memory:
            cells.append(f"{result['peak_bytes'][name] / 2**20:.0f}")
        for other in names:
            if other == name:
                cells.append("1")
                continue
            ratio = result["ratios"][f"{name}/{other}"]
            cells.append(f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse(argv: Sequence[str] | None) -> tuple[Setting, list[str], Path]:
    default = Setting()
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", default=list(VARIANTS)[:4], choices=VARIANTS, help="what is timed", metavar="NAME"
    )
    parser.add_argument("--size", default=default.size, choices=["tiny", "small", "base", "large", "huge"])
    for name, text in {
        "patch_size": "side of a patch in pixels",
        "input_size": "side of the image in pixels",
        "decoder_depth": "decoder blocks (12 as in the released script, 8 as in MAE)",
        "batch_size": "images a step",
        "threads": "CPU threads",
        "rounds": "how often every variant is timed",
        "warmup": "untimed steps of each variant",
        "steps": "steps a variant takes in its turn",
        "seed": "of weights, batch and order",
    }.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=text)
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--amp", default=default.amp, choices=AMP)
    parser.add_argument("--raw_pixels", action="store_true", help="targets that are not normalised by patch")
    parser.add_argument("--output", type=Path, help="JSON file, the table goes beside it; None: in benchmarks/results/")
    given = vars(parser.parse_args(argv))
    names = list(dict.fromkeys(given.pop("variants")))
    output = given.pop("output")
    setting = Setting(norm_pix_loss=not given.pop("raw_pixels"), **given)
    if output is None:
        device, size = setting.device.split(":")[0], f"{setting.size}{setting.patch_size}"
        name = f"step_{device}_{size}_b{setting.batch_size}_{setting.amp}.json"
        output = PROJECT / "benchmarks" / "results" / name
    return setting, names, output


def progress(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(argv: Sequence[str] | None = None) -> None:
    setting, names, output = parse(argv)
    result = {"setting": asdict(setting), "machine": machine(setting.device)}
    result |= measure(setting, names, say=progress)
    result["ratios"] = paired_ratios(result["seconds"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(result))
    sys.stdout.write(markdown(result))


if __name__ == "__main__":
    main()
