"""Repeat a dumped bad step and report where its numbers stop being finite.

    python -m tools.replay output/nor/debug/bad-step-00001234.json

A run that stops because its updates were not finite writes a dump of its weights and the indices of its last batches.
This tool repeats the last step with the same images, masks and random numbers, on a CPU or a GPU. It checks the weights
first, then the outputs of all modules in the order of computation, the losses, and the gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import programs
from data.loader import Batch
from tools.command import reports_errors
from util import checkpoint, precision
from util.distributed import Processes, pick_device
from util.logging import log_to_terminal
from util.stepper import Progress, seed_micro_step

ALL_FINITE = 1  # exit code if the problem does not occur again


class Replay:
    """The model, the options and the batches of one dump."""

    def __init__(self, dump: Path, *, device: str, amp: str, data_path: str):
        try:
            self.record = json.loads(dump.read_text())
            self.ranks = [rank[-1] for rank in self.record["recent_by_process"]]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{dump} is not a dump of a bad step: give a run's debug/bad-step-NNNNNNNN.json"
            ) from error
        state = checkpoint.load(dump.with_suffix(".pth"))
        program = checkpoint.find_program(state)
        if program not in programs.PLANNED:
            raise ValueError(f"{dump} is of {program}, whose steps cannot be replayed")
        options = programs.read_options(program, state["options"])
        self.options = replace(options, num_workers=0, data_path=data_path or options.data_path)
        self.device = pick_device(device)
        self.autocast = precision.autocast(
            precision.resolve_amp(amp or self.record.get("amp", options.amp), self.device), self.device
        )
        self._plan = programs.load(program).make_plan(self.options, Processes(0, 1, 0, self.device))
        self.model, self.source = self._plan.model, self._plan.source
        self.trained = self._plan.make_objective(self.model)
        self.model.load_state_dict(state["model"])
        self.trained.to(self.device).train()

    def micro_batches(self) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of the last step of every process. Raises ValueError if the data has changed."""
        for rank, last in enumerate(self.ranks):
            batches = self._plan.make_batches(Processes(rank, len(self.ranks), 0, self.device))
            step, accum = last["step"], self.options.accum_iter
            epoch, done = divmod(step, batches.steps_per_epoch)
            found = list(islice(batches.epoch(epoch, done), accum))
            if last["index"] != found[-1].index.tolist():
                raise ValueError(
                    f"the images of step {step} are not those of the run: "
                    f"{len(self.source)} images in {self.options.data_path}; give the data of the run with --data_path"
                )
            if hasattr(self.model, "before_step"):  # scheduled values, such as DINO's temperature
                total = batches.steps_per_epoch * self.options.epochs
                self.model.before_step(Progress(step, total, batches.steps_per_epoch, []))
            for number, batch in enumerate(found):
                seed_micro_step(self.options.seed, step * accum + number, rank)
                yield f"step {step}, process {rank}, micro-batch {number}", batch.to(self.device)

    def findings(self, batch: Batch) -> list[str]:
        """Repeat the step with a batch; return messages about non-finite values, in the order of computation."""
        if bad := [name for name, value in self.model.state_dict().items() if not _finite(value)]:
            return [f"weights are not finite before the step: {', '.join(bad[:5])}"]
        self.model.zero_grad(set_to_none=True)
        with _Watch(self.model) as watch, self.autocast():
            losses = self.trained(batch.images, batch.labels, noise=batch.noise)
        values = {name: value.detach() for name, value in losses.items()}
        found = [f"first output that is not finite: {watch.first}"] if watch.first else []
        found += [f"loss {name} is {float(value):g}" for name, value in values.items() if not _finite(value)]
        for name, term in getattr(self.model, "terms", {}).items():
            weighted = term.options.weight * values[name]
            if _finite(values[name]) and not _finite(weighted):
                found.append(f"term {name} is {float(values[name]):g}, but not finite x weight {term.options.weight:g}")
        return found or self._bad_gradients(losses["loss"])

    def _bad_gradients(self, loss: Tensor) -> list[str]:
        loss.backward()
        named = [(name, value.grad) for name, value in self.model.named_parameters() if value.grad is not None]
        bad = [name for name, gradient in named if not _finite(gradient)]
        if not bad:
            norm = torch.nn.utils.get_total_norm([gradient for _, gradient in named])
            return [] if _finite(norm) else ["every gradient is finite, but their norm is not"]
        return [
            f"every output and loss is finite, {len(bad)} of {len(named)} gradients are not; the first one in "
            f"the backward pass is that of {bad[-1]}"
        ]


class _Watch:
    """Record the first module whose output is not finite; inner modules are checked before outer ones."""

    def __init__(self, model: nn.Module):
        self.model, self.first = model, ""
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, module in self.model.named_modules():
            if module is not self.model:
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not self.first and not _finite(output):
                before = "finite" if _finite(inputs) else "not finite either"
                self.first = f"{name} ({type(module).__name__}), whose inputs are {before}"

        return look

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _finite(value: Any) -> bool:
    """Return whether every number in a tensor, or in nested tensors, is finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(part) for part in value.values())
    return not isinstance(value, tuple | list) or all(_finite(part) for part in value)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "dump", type=Path, help="debug/bad-step-NNNNNNNN.json of a run; with its .pth in the same folder"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--amp", default="", choices=["none", "bf16", "fp16"], help="(default: as in the run)")
    parser.add_argument("--data_path", default="", help="folder of the images (default: that of the run)")
    given = parser.parse_args(argv)
    log_to_terminal(main=True)
    replay = Replay(given.dump, device=given.device, amp=given.amp, data_path=given.data_path)
    report = [(where, found) for where, batch in replay.micro_batches() for found in replay.findings(batch)]
    for where, found in report:
        sys.stdout.write(f"{where}: {found}\n")
    if not report:
        ran = replay.record.get("device", "its own device")
        sys.stdout.write(
            f"Everything is finite on {replay.device}. The run was on {ran} with precision "
            f"{replay.record.get('amp', replay.options.amp)}: try --device and --amp\n"
        )
    return 0 if report else ALL_FINITE


if __name__ == "__main__":
    sys.exit(main())
