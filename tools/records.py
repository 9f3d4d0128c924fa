"""Read the records of a run folder for reports: options, epochs, steps, results."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import methods
from options import FinetuneOptions, ProbeOptions, SegmentOptions
from options.schema import get_default

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecords:
    """The records of a run folder; each epoch and step once, in order."""

    name: str
    folder: Path
    options: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    knn: Mapping[str, Any] | None
    starts: Sequence[Mapping[str, Any]]
    """Environment of each start of the run."""

    def values(self, key: str) -> list[float]:
        """Return the values of `key` of all epochs that have it."""
        return [record[key] for record in self.epochs if is_number(record.get(key))]

    def last(self, key: str) -> float | None:
        """Return the latest value of `key`; None if no epoch has it."""
        return next(iter(self.values(key)[::-1]), None)

    @property
    def accuracies(self) -> list[str]:
        """Return the names of the epoch values that are accuracies."""
        return list(dict.fromkeys(name for record in self.epochs for name in record if "acc" in name))

    @property
    def epochs_done(self) -> int:
        """Return the number of epochs, those of a run in another folder from which this one resumed included."""
        return self.epochs[-1]["epoch"] + 1 if self.epochs else 0

    @property
    def updates(self) -> int:
        return max((record["step"] for record in [*self.epochs, *self.steps]), default=0)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_records(path: Path, key: str, *others: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, in the order of `key`.

    A resumed run repeats steps and epochs: where `key` goes back, the lines from there on are forgotten. An incomplete
    last line is dropped. Lines in which `key` or one of `others` is not a number are skipped with a warning.
    """
    if not path.exists():
        return []
    kept: list[dict[str, Any]] = []
    skipped = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                continue
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not all(is_number(record.get(name)) for name in (key, *others)):
            skipped.append(number)
            continue
        while kept and kept[-1][key] >= record[key]:
            kept.pop()
        kept.append(record)
    if skipped:
        needed = " and ".join((key, *others))
        log.warning(
            "%s: skipped %d damaged lines, without the numbers %s; the first is line %d",
            *(path, len(skipped), needed, skipped[0]),
        )
    return kept


def drop_replaced(
    epochs: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], starts: Sequence[Mapping[str, Any]], end: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drop what a later start of the run has replaced, as its records of the other file show.

    A start that resumes with another batch size may end before a step that an earlier start had logged.

    Args:
        epochs: Records of epochs, see `read_records`.
        steps: Records of steps.
        starts: Environments of the starts, in their order.
        end: The last step of a finished run, otherwise infinity.
    """
    names = (record.get("run_id") for record in (*starts, *steps, *epochs))
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = [(order[record.get("run_id")], record["step"], False, record) for record in steps]
    found += [(order[record.get("run_id")], record["step"], True, record) for record in epochs]
    kept: list[tuple[int, float, bool, dict[str, Any]]] = []
    for line in sorted(found, key=lambda line: line[:3]):  # the line of an epoch follows that of its last step
        while kept and kept[-1][0] < line[0] and kept[-1][1:3] >= line[1:3]:
            kept.pop()
        kept.append(line)
    kept = [line for line in kept if line[1] <= end]
    return [line[3] for line in kept if line[2]], [line[3] for line in kept if not line[2]]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist. Raises ValueError if it is damaged."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); restore it, or delete it and run the command that writes it again"
        ) from error


def read_options(folder: Path) -> dict[str, Any]:
    """Return the options of a run; {} if they are not stored or empty. Raises ValueError if the file is damaged."""
    path = folder / "options.yaml"
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML ({error}); restore it") from error
    if not isinstance(options or {}, dict):
        raise ValueError(f"{path} contains no options by name, but {options!r}; restore it")
    return options or {}


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the environment of each start; an unreadable file counts as empty, as for a run that is resumed."""
    try:
        return read_json(path) or []
    except ValueError as error:
        log.warning("the starts of the run are not reported: %s", error)
        return []


def read_run(folder: Path) -> RunRecords:
    """Read a run folder. Raises ValueError if it is not one."""
    if not (folder / "options.yaml").exists():
        raise ValueError(f"{folder} is not a run folder: it has no options.yaml")
    result, starts = read_json(folder / "result.json"), _read_starts(folder / "environment.json")
    epochs, steps = drop_replaced(
        read_records(folder / "log.txt", "epoch", "step"),
        read_records(folder / "metrics.jsonl", "step"),
        starts,
        (result or {}).get("steps", math.inf),
    )
    return RunRecords(
        name=folder.resolve().name,
        folder=folder,
        options=read_options(folder),
        epochs=epochs,
        steps=steps,
        result=result,
        knn=read_json(folder / "knn.json"),
        starts=starts,
    )


def find_schema(options: Mapping[str, Any]) -> Any:
    """Return the option class of the program that stored `options`."""
    if options.get("method") in methods.METHODS:
        return methods.schema(options["method"])
    others = (FinetuneOptions, ProbeOptions, SegmentOptions)
    return max(others, key=lambda schema: len({field.name for field in dataclasses.fields(schema)} & options.keys()))


def read_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the program that stored `options`, including those of the method's terms."""
    fields = {field.name: get_default(field) for field in dataclasses.fields(find_schema(options))}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    if options.get("method") in methods.METHODS:
        brought = methods.preset(options["method"])
        terms = {
            name: dataclasses.asdict(methods.TERMS[name].Options(**given)) for name, given in brought["terms"].items()
        }
        defaults |= brought | {"method": options["method"], "terms": terms}
    return defaults


def machine_options(options: Mapping[str, Any]) -> set[str]:
    """Return the names of the options that do not change the results of a run."""
    return {field.name for field in dataclasses.fields(find_schema(options)) if field.metadata["kind"] == "machine"}
