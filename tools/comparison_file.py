"""Read configs/comparisons.yaml: rows with their trainings, evaluations, budgets. Its header describes the fields."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

import methods
from tools import tables
from tools.tables import PROJECT

COMPARISONS = PROJECT / "configs" / "comparisons.yaml"


@dataclass(frozen=True)
class Training:
    """A pretraining: a recipe of configs/pretrain, options over it, and the trainings that it needs."""

    recipe: str
    set: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Training | Mapping[str, Any]] = field(default_factory=dict)
    """Of an option that takes a run, that run; `{kmeans: OPTIONS}` stands for a file of tools.tokenizer."""
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    """Options of the programs that evaluate it."""

    @property
    def options(self) -> dict[str, Any]:
        return {**tables.read_recipe(self.recipe), **self.set}

    @property
    def name(self) -> str:
        """Name of its folder: method, epochs, and a digest of everything that decides the result."""
        options = self.options
        content = json.dumps([self.recipe, dataclasses.asdict(self)], sort_keys=True)
        return f"{options['method']}-{options['epochs']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def over(self, **changes: Any) -> Training:
        """Return the training with other options."""
        return replace(self, set={**self.set, **changes})


@dataclass(frozen=True)
class Evaluation:
    """A program that evaluates a pretrained encoder, and the measures it gives as paths into result.json."""

    program: str
    measures: Mapping[str, str]
    recipe: str = ""
    set: Mapping[str, Any] = field(default_factory=dict)
    seed_options: Sequence[str] = ()
    """Options that take the seed, in addition to `seed`."""
    percent: bool = True
    """Whether its measures are in percent; if not, they are reported with three decimals."""


@dataclass(frozen=True)
class Row:
    name: str
    training: Training
    seeds: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A comparison of configs/comparisons.yaml, whose header describes the fields."""

    name: str
    title: str
    reference: str
    rows: tuple[Row, ...]
    evaluations: Mapping[str, Evaluation]
    images: Mapping[str, int]
    note: str = ""
    dataset: str = "torch/cifar10"
    rates: tuple[float, ...] = ()
    sweep: Mapping[str, Any] = field(default_factory=dict)
    chosen_by: str = ""
    seconds: float = 0
    clock: Literal["cpu", "wall"] = "cpu"


@functools.cache
def method_options() -> frozenset[str]:
    """Options that some methods have and others do not."""
    return frozenset(option for method in methods.METHODS for option in methods.own_options(method))


def parse_training(
    entry: Mapping[str, Any], shared: Mapping[str, Any] | None = None, override: Mapping[str, Any] | None = None
) -> Training:
    """Read a training. Shared options that its method does not have are left out, and so are values of its recipe."""
    recipe, own = tables.read_recipe(entry["recipe"]), entry.get("set", {})
    given = {**(shared or {}), **own, **(override or {})}
    method = given.get("method", recipe["method"])
    unknown = method_options() - set(methods.own_options(method)) - own.keys()
    changed = {name: value for name, value in given.items() if name not in unknown and recipe.get(name) != value}
    needs = {
        option: each if "kmeans" in each else parse_training(each) for option, each in entry.get("needs", {}).items()
    }
    return Training(entry["recipe"], changed, needs, entry.get("evaluate", {}))


def read_comparisons(path: Path = COMPARISONS) -> dict[str, Comparison]:
    """Return all comparisons of the file by name."""
    found = {}
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        entry = dict(entry)
        shared, override = entry.pop("set", {}), entry.pop("override", {})
        seeds, without = tuple(entry.pop("seeds")), entry.pop("without", ())
        rows = tuple(
            Row(row["row"], parse_training(row, shared, override), tuple(row.get("seeds", seeds)), row.get("note", ""))
            for row in entry.pop("rows")
            if row["row"] not in without
        )
        evaluations = {key: Evaluation(**value) for key, value in entry.pop("evaluations").items()}
        entry["rates"] = tuple(entry.get("rates", ()))
        found[name] = Comparison(name, rows=rows, evaluations=evaluations, **entry)
    return found
