"""Read the records of a run folder for reports: options, epochs, steps, results."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import methods
from options import FinetuneOptions, ProbeOptions, SegmentOptions, to_dict


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
    def updates(self) -> int:
        return max((record["step"] for record in [*self.epochs, *self.steps]), default=0)


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a file, one for each value of `key`, in the order of `key`.

    A resumed run repeats the lines of repeated steps: the later line is kept. An incomplete last line is dropped.
    """
    if not path.exists():
        return []
    found: dict[Any, dict[str, Any]] = {}
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
        found[record[key]] = record
    return [found[value] for value in sorted(found)]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def read_run(folder: Path) -> RunRecords:
    """Read a run folder. Raises ValueError if it is not one."""
    if not (folder / "options.yaml").exists():
        raise ValueError(f"{folder} is not a run folder: it has no options.yaml")
    return RunRecords(
        name=folder.resolve().name,
        folder=folder,
        options=yaml.safe_load((folder / "options.yaml").read_text()) or {},
        epochs=read_records(folder / "log.txt", "epoch"),
        steps=read_records(folder / "metrics.jsonl", "step"),
        result=_read_json(folder / "result.json"),
        knn=_read_json(folder / "knn.json"),
        starts=_read_json(folder / "environment.json") or [],
    )


def find_schema(options: Mapping[str, Any]) -> Any:
    """Return the option class of the program that stored `options`."""
    if options.get("method") in methods.METHODS:
        return methods.schema(options["method"])
    others = (FinetuneOptions, ProbeOptions, SegmentOptions)
    return max(others, key=lambda schema: len({field.name for field in dataclasses.fields(schema)} & options.keys()))


def read_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the program that stored `options`, including those of the method's terms."""
    defaults = to_dict(find_schema(options)())
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
