"""Measure the time of a training step: our steps and the restated published ones, in one process.

    python -m benchmarks.step                                          # ViT-Tiny/16, batch 32, one CPU thread, fp32
    python -m benchmarks.step --device cuda --batch_size 256 --amp bf16 --variants restated_nor nor nor+compile
    python -m benchmarks.step --variants mae nor --before CHECKOUT     # and the same of an earlier version
    python -m benchmarks.step --help

A step is forward, backward, gradient norm and AdamW on one synthetic batch that is already on the device. In every
round the variants run in a new random order, and only ratios of the same round are compared: a machine
that is slow for a minute is slow for all of them. Medians with quartiles of these ratios go to a Markdown table on the
terminal and, with the raw times, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import methods
from benchmarks.measure import PROJECT, in_turn, parser, progress, publish, quartiles, spread, where
from benchmarks.restated_mae import RestatedMAE, RestatedStep
from benchmarks.restated_nor_mae import RestatedNoRMAE
from tools.markdown import make_table
from util.distributed import Processes
from util.logging import read_commit
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

    @property
    def patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def words(self) -> str:
        """Model and numbers, for a table's head."""
        return (
            f"ViT-{self.size.capitalize()}/{self.patch_size} at {self.input_size} px, decoder depth "
            f"{self.decoder_depth}, batch {self.batch_size}, amp {self.amp}, CPU threads: {self.threads}"
        )

    @property
    def file(self) -> str:
        """The part of a result's file name that tells settings apart."""
        return f"{self.device.split(':')[0]}_{self.size}{self.patch_size}_b{self.batch_size}_{self.amp}"

    def build(
        self, method: str, terms: dict[str, Any] | None = None, mask_ratio: float | None = None
    ) -> torch.nn.Module:
        """Build the model of a method; the same seed gives the same weights. `mask_ratio` None: that of the method."""
        with tempfile.TemporaryDirectory() as folder:
            if "teacher" in methods.METHODS[method].terms:
                teacher = self.write_teacher(Path(folder) / "teacher.pth", full_decoder=method == "g2sd")
                terms = {"teacher": {"checkpoint": teacher}}
            torch.manual_seed(self.seed)
            options = {"norm_pix_loss": self.norm_pix_loss, "mask_ratio": mask_ratio}
            if "decoder_depth" in methods.own_options(method):
                options["decoder_depth"] = self.decoder_depth
            return methods.build(
                method,
                model=f"mae_vit_{self.size}_patch{self.patch_size}",
                input_size=self.input_size,
                terms=terms,
                **options,
            )

    def write_teacher(self, path: Path, full_decoder: bool) -> str:
        """Write a ViT-Base of fresh weights, which takes as long as a trained one; its decoder is small or MAE's."""
        model = f"mae_vit_base_patch{self.patch_size}"
        decoder: dict[str, Any] = (
            {} if full_decoder else {"decoder_depth": 1, "decoder_embed_dim": 16, "decoder_num_heads": 1}
        )
        teacher: Any = methods.build("mae", model, input_size=self.input_size, **decoder)
        torch.save({"model": teacher.state_dict()}, path)
        return str(path)


class OurStep:
    """A step as engine_pretrain takes it, without the loader."""

    def __init__(self, setting: Setting, method: str, compiled: bool, **more: Any):
        self.device, self.amp = torch.device(setting.device), AMP[setting.amp]
        model = setting.build(method, **more).to(self.device)
        optimizer = adamw(pretrain_groups(model, 0.05), 1.5e-4, device=self.device)
        schedule = warmup_cosine(optimizer, epochs=1, warmup_epochs=0, steps_per_epoch=1_000_000, min_lr=0.0)
        if compiled:
            model.compile()
        self.model = model
        self.stepper = Stepper(model, optimizer, schedule, fp16=setting.amp == "fp16")
        self.means = Means(Processes(0, 1, 0, self.device))
        self.index = torch.arange(setting.batch_size)

    def __call__(self, images: Tensor, noise_NRL: Tensor) -> None:
        with self.stepper.micro_step():
            with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
                losses = self.model(images, noise=noise_NRL)
        self.means.add(losses, weight=len(images))
        self.stepper(losses, self.index)


def restated(setting: Setting, model_class: type[RestatedMAE], **more: Any) -> RestatedStep:
    """Create a restated step with the initial weights of our model."""
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


OURS: dict[str, dict[str, Any]] = {
    "mae": {"method": "mae"},
    "mae_mask50": {"method": "mae", "mask_ratio": 0.5},
    "nor": {"method": "nor_mae"},
    "nor_r25": {"method": "nor_mae", "terms": {"neighbor": {"fraction": 0.25}}},
    "nor_r20": {"method": "nor_mae", "terms": {"neighbor": {"fraction": 0.2}}},
    **{  # a ViT-Base teaches
        name: {"method": name} for name in ("dmae", "mae_lite_distill", "d2_mae", "tiny_mim", "g2sd", "amd", "proteus")
    },
}


def restated_step(model_class: type[RestatedMAE], **more: Any) -> Callable[[Setting], Step]:
    def make(setting: Setting) -> Step:
        amp = {"amp": AMP[setting.amp]} if model_class is RestatedNoRMAE else {}
        step = restated(setting, model_class, **more, **amp)
        return lambda images, noise_NRL: step(images, noise_NRL[:, 0])

    return make


def our_step(words: Mapping[str, Any], compiled: bool) -> Callable[[Setting], Step]:
    return lambda setting: OurStep(setting, compiled=compiled, **words)


VARIANTS: dict[str, Callable[[Setting], Step]] = {
    "restated_mae": restated_step(RestatedMAE),
    "restated_nor": restated_step(RestatedNoRMAE),
    **{name: our_step(words, False) for name, words in OURS.items()},
    **{f"{name}+compile": our_step(words, True) for name, words in OURS.items()},
}
USUAL = ("restated_mae", "mae", "restated_nor", "nor", "nor_r20")


def choose_clock(setting: Setting) -> tuple[str, Callable[[], float]]:
    """Return the clock: CPU time for one CPU thread, which other programs disturb least, otherwise wall time."""
    if setting.device == "cpu" and setting.threads == 1:
        return "CPU time", time.process_time
    return "wall time", time.perf_counter


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(work: Callable[[], object], setting: Setting) -> float:
    """Return the mean time of `setting.steps` steps."""
    (_, clock), device = choose_clock(setting), torch.device(setting.device)
    wait(device)
    began = clock()
    for _ in range(setting.steps):
        work()
    wait(device)
    return (clock() - began) / setting.steps


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the device memory in a step minus that before the step."""
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what earlier work left behind is not to be freed within this step
    gc.disable()
    try:
        # The profiler counts a free only if it saw the allocation; the second step frees gradients of the first.
        for _ in range(2):
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                step()
    finally:
        gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def prepared(
    setting: Setting, names: Sequence[str], say: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each variant by name as a warmed-up step on the same synthetic batch."""
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.randn(setting.batch_size, 3, setting.input_size, setting.input_size, generator=generator).to(device)
    noise = torch.rand(setting.batch_size, 2, setting.patches, generator=generator).to(device)
    for name in names:
        say(f"preparing {name}")
        step = functools.partial(VARIANTS[name](setting), images, noise)
        for _ in range(max(setting.warmup, 1)):  # the first step also makes optimizer state and, compiled, the code
            step()
        yield name, step


@contextlib.contextmanager
def use_checkout(checkout: Path) -> Iterator[Any]:
    """Context in which this project's modules are those of another checkout; gives its `benchmarks.step`."""
    own = {path.stem for path in PROJECT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}

    def remove() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}

    kept = remove()
    sys.path.insert(0, str(checkout))
    try:
        yield importlib.import_module("benchmarks.step")
    finally:
        sys.path.remove(str(checkout))
        remove()
        sys.modules.update(kept)


def measure(
    setting: Setting,
    names: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Time the named variants: seconds per step by round, and the peak memory of a step beyond what is always held.

    With `before`, a checkout of an earlier version, also its variants of these names, as `before:NAME`.
    """
    device = torch.device(setting.device)
    turns: dict[str, Callable[[], float]] = {}
    memory: dict[str, int] = {}
    steps = list(prepared(setting, names, say))
    if before:
        with use_checkout(before) as other:
            theirs = other.prepared(other.Setting(**asdict(setting)), names, say)
            steps += [(f"before:{name}", step) for name, step in theirs]
    for name, step in steps:
        memory[name] = peak_bytes(step, device)
        turns[name] = functools.partial(measure_seconds, step, setting)
    return {
        "clock": choose_clock(setting)[0],
        "seconds": in_turn(turns, setting.rounds, setting.seed, say),
        "peak_bytes": memory,
        **({"before": read_commit(before, digits=10)} if before else {}),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Return the results as a table: one row per variant, one column per baseline."""
    setting, seconds = Setting(**result["setting"]), result["seconds"]
    rows = [
        [
            name,
            f"{quartiles(times)['median']:.4f}",
            f"{result['peak_bytes'][name] / 2**20:.0f}",
            *("1" if other == name else spread(result["ratios"][f"{name}/{other}"]) for other in seconds),
        ]
        for name, times in seconds.items()
    ]
    before = f"`before` is commit {result['before']}. " if "before" in result else ""
    return (
        f"# Step time: {setting.words}\n\n"
        f"{where(result['machine'])} {before}{setting.rounds} rounds of {setting.steps} step(s), {result['clock']}.\n"
        "Medians over rounds; ratios within a round, with their quartiles: a row's time / the column's time.\n\n"
        + make_table(["variant", "s / step", "peak MiB over rest", *seconds], rows)
    )


def setting_parser(description: str, variants: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Create the parser of the setting, and of `variants` if it is given."""
    default = Setting()
    numbers = {
        "patch_size": "side of a patch in pixels",
        "input_size": "side of the image in pixels",
        "decoder_depth": "decoder blocks (12 as in the released script, 8 as in MAE)",
        "batch_size": "images a step",
        "threads": "CPU threads",
        "rounds": "how often every variant is timed",
        "warmup": "untimed steps of each variant",
        "steps": "steps a variant takes in its turn",
        "seed": "of weights, batch and order",
    }
    made = parser(description, **{name: (getattr(default, name), text) for name, text in numbers.items()})
    if variants is not None:
        made.add_argument(
            "--variants", nargs="+", default=variants, choices=VARIANTS, metavar="NAME", help="what is run"
        )
    made.add_argument("--size", default=default.size, choices=["tiny", "small", "base", "large", "huge"])
    made.add_argument("--device", default=default.device, help="cpu or cuda")
    made.add_argument("--amp", default=default.amp, choices=AMP)
    made.add_argument("--raw_pixels", action="store_true", help="targets that are not normalised by patch")
    return made


def setting_from(given: argparse.Namespace) -> Setting:
    known = {field.name for field in fields(Setting)}
    return Setting(norm_pix_loss=not given.raw_pixels, **{k: v for k, v in vars(given).items() if k in known})


def main(argv: Sequence[str] | None = None) -> None:
    flags = setting_parser(__doc__, USUAL)
    flags.add_argument("--before", type=Path, metavar="CHECKOUT", help="also its variants, in the same process")
    given = flags.parse_args(argv)
    setting = setting_from(given)
    found = measure(setting, list(dict.fromkeys(given.variants)), progress, given.before)
    publish(
        f"step_{'versions_' * bool(given.before)}{setting.file}",
        found,
        markdown,
        setting=asdict(setting),
        output=given.output,
    )


if __name__ == "__main__":
    main()
