"""Every option of every command: declared once as a typed dataclass field, read from recipes (YAML) and flags, refused when wrong.

A front door calls `parse(PretrainOptions, sys.argv[1:], preset=methods.preset, term_options=...)`. What decides a value, weakest first:
the schema's default, the method's preset, the recipes given with `-c` from left to right, the flags from left to right.
The string under a field is its documentation: `--help` and the README's table are made of it. Each field is of a kind:
*result* options decide what is computed, *shape* options also decide which parameters the model has, *machine* options only say
where and how the same thing is computed. A run may be continued with other machine options, and with no others unasked.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ALIASES = {
    "nor_weight": "terms.neighbor.weight",
    "lamda": "terms.neighbor.weight",
    "data_dir": "data_path",
    "img_size": "input_size",
    "b": "batch_size",
    "grad_accum_steps": "accum_iter",
    "j": "num_workers",
    "workers": "num_workers",
    "output": "output_dir",
}
"""Other names under which users of NoR-MAE and timm know an option."""

_TORCHRUN = "use torchrun: it starts the processes and tells each its rank"
REFUSED = {
    "dist_url": _TORCHRUN,
    "dist_on_itp": _TORCHRUN,
    "world_size": _TORCHRUN,
    "local_rank": _TORCHRUN,
    "log_dir": "logs are written into output_dir",
    "start_epoch": "a checkpoint knows its epoch: use resume",
}
"""Flags of MAE's scripts that have no counterpart here, and what to do instead."""

COMMAND_LINE = "command line"


class OptionError(ValueError):
    """An option that its user can mend; `keys` are the options concerned."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


# ---------------------------------------------------------------------------------------------------------------------
# Declaring


def _field(kind: str, default: Any, section: str) -> Any:
    metadata = {"kind": kind, "section": section}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def result(default: Any, section: str = "") -> Any:
    """A field that decides what is computed. `section` opens a group of `--help` that the following fields belong to."""
    return _field("result", default, section)


def shape(default: Any, section: str = "") -> Any:
    """A *result* field that also decides which parameters the model has, so that `allow_change` cannot excuse it."""
    return _field("shape", default, section)


def machine(default: Any, section: str = "") -> Any:
    """A field that says where or how the same thing is computed: it may differ when a run goes on."""
    return _field("machine", default, section)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training command shares."""

    output_dir: str = machine("output", section="Run folder")
    """Folder of the run: options, logs, checkpoints. It must be new, or hold an earlier part of this very run."""
    resume: str = machine("auto")
    """`auto` goes on from the run folder's own checkpoint if it holds one; else the path of a checkpoint to go on from."""
    overwrite: bool = machine(False)
    """Start anew in a folder that holds a run, whose files are lost."""
    allow_change: tuple[str, ...] = machine(())
    """Names of result options that may differ from the run that is continued (`terms` stands for all options of terms)."""
    init_from: str = result("")
    """Checkpoint to take weights from at the start (MAE, NoR-MAE, timm or ours); not a resume: step and optimizer are new."""
    save_every: int = machine(20)
    """Epochs between checkpoints that are kept (`epoch-0020.pth`); `last.pth` is written after every epoch."""
    save_minutes: float = machine(10.0)
    """Minutes after which `last.pth` is also written within an epoch; 0 never."""
    save_steps: int = machine(0)
    """Optimizer steps after which `last.pth` is also written within an epoch; 0 never."""
    keep: int = machine(3)
    """How many of the newest `epoch-NNNN.pth` stay on the disk."""
    log_every: int = machine(20)
    """Optimizer steps between two lines of the log, the only moments that wait for the device."""

    data_path: str = machine("", section="Data")
    """Folder of images (`train/CLASS/*`, `CLASS/*`, or flat or nested without labels), or the word `digits`."""
    dataset: Literal["auto", "folder", "digits"] = result("auto")
    """How data_path is read; `auto` takes `digits` for that word (scikit-learn's, no download) and a folder otherwise."""
    class_list: str = result("")
    """Use only these classes: a file with one class folder a line, or `imagenet100`; empty uses all."""
    input_size: tuple[int, int] = shape((224, 224))
    """Pixels of the images given to the model: one number, or rows and columns as `160x96`."""
    in_chans: int = shape(3)
    """Channels of the images."""
    mean: tuple[float, ...] = result(())
    """Mean of each channel on a scale of 0 to 1, subtracted; empty: ImageNet's for 3 channels, else 0.5 each."""
    std: tuple[float, ...] = result(())
    """Standard deviation of each channel on that scale, divided by; empty: ImageNet's for 3 channels, else 0.5 each."""
    num_workers: int = machine(4)
    """Processes that load images, for each device; 0 loads in the training process. The batches are the same."""
    pin_mem: bool = machine(True)
    """Load into page-locked memory, from where copies to a GPU are faster."""

    total_batch_size: int = result(0, section="Batch and optimizer")
    """Images of one optimizer step over all devices; 0: batch_size x accum_iter x processes."""
    batch_size: int = machine(0)
    """Images of one forward pass on one device; 0: total_batch_size / (accum_iter x processes), or 64 if that is 0 too."""
    accum_iter: int = machine(0)
    """Forward passes added up to one optimizer step; 0: what total_batch_size and batch_size ask for, else 1."""
    epochs: int = result(100)
    """Passes over the training images."""
    warmup_epochs: float = result(5.0)
    """Epochs over which the learning rate rises from 0; it then falls along half a cosine to min_lr."""
    blr: float = result(1e-3)
    """Learning rate for a batch of 256: the rate is blr x total_batch_size / 256. Ignored when lr is given."""
    lr: float = result(0.0)
    """Highest learning rate, whatever the batch; 0: from blr."""
    min_lr: float = result(0.0)
    """Learning rate at the end."""
    weight_decay: float = result(0.05)
    """AdamW's weight decay; biases and norms have none."""
    clip_grad: float = result(0.0)
    """Largest norm of the gradient, scaled down beyond it; 0: no limit."""
    seed: int = result(0)
    """Decides initial weights, order of images, crops, masks: two runs of one seed are the same run."""

    device: Literal["auto", "cpu", "cuda", "mps"] = machine("auto", section="Machine")
    """`auto` takes a GPU if there is one."""
    amp: Literal["auto", "bf16", "fp16", "none"] = result("auto")
    """Mixed precision; `auto`: bf16 on a GPU that has it, fp16 on another, none elsewhere."""
    compile: bool = machine(False)
    """Compile the training step: a slow start, then faster."""

    max_bad_steps: int = machine(10, section="Tolerance")
    """Stop after this many steps in a row whose loss or gradient is not finite; such steps never change the weights."""
    max_bad_fraction: float = machine(0.01)
    """Stop when more than this share of the images cannot be read; such images are replaced and listed."""
    max_save_failures: int = machine(5)
    """Stop after this many checkpoints in a row could not be written."""

    def __post_init__(self) -> None:
        for name, expected in field_types(type(self)).items():
            object.__setattr__(self, name, _read(getattr(self, name), expected, name))
        self._at_least(1, "in_chans", "epochs", "save_every", "keep", "log_every", "max_bad_steps", "max_save_failures")
        self._at_least(0, "save_minutes", "save_steps", "num_workers", "total_batch_size", "batch_size", "accum_iter")
        self._at_least(0, "warmup_epochs", "blr", "lr", "min_lr", "weight_decay", "clip_grad", "seed")
        self._between(0, 1, "max_bad_fraction")
        if min(self.input_size) < 1:
            raise OptionError(f"input_size: must be at least 1 pixel, found {_show(self.input_size)}", "input_size")
        for name in ("mean", "std"):
            given = len(getattr(self, name))
            if given not in (0, self.in_chans):
                raise OptionError(f"{name}: has {given} values, but in_chans is {self.in_chans}", name, "in_chans")
        if any(value <= 0 for value in self.std):
            raise OptionError(f"std: must be positive, found {_show(self.std)}", "std")
        if self.warmup_epochs > self.epochs:
            raise OptionError(
                f"warmup_epochs: {self.warmup_epochs:g} is more than epochs, {self.epochs}", "warmup_epochs", "epochs"
            )
        if not self.lr and not self.blr:
            raise OptionError("lr, blr: both are 0; give one of them", "lr", "blr")
        if self.lr and self.min_lr > self.lr:
            raise OptionError(f"min_lr: {self.min_lr:g} is more than lr, {self.lr:g}", "min_lr", "lr")
        self._check_batch()
        if self.device == "cpu" and self.amp == "fp16":
            raise OptionError("amp: fp16 does not train on a CPU; use bf16 or none", "amp", "device")
        if self.dataset == "digits" and self.data_path not in ("", "digits"):
            raise OptionError(
                f"data_path: dataset digits is embedded and reads no folder, found {self.data_path!r}",
                "data_path",
                "dataset",
            )
        if self.overwrite and self.resume != "auto":
            raise OptionError("overwrite, resume: one starts anew, the other goes on; give one", "overwrite", "resume")
        self._check_allow_change()

    def _at_least(self, low: float, *names: str) -> None:
        for name in names:
            if getattr(self, name) < low:
                raise OptionError(f"{name}: must be at least {low}, found {_show(getattr(self, name))}", name)

    def _between(self, low: float, high: float, *names: str) -> None:
        for name in names:
            if not low <= getattr(self, name) <= high:
                raise OptionError(f"{name}: must be from {low} to {high}, found {_show(getattr(self, name))}", name)

    def _check_batch(self) -> None:
        """What can be known of the batch without the number of processes."""
        part = (self.batch_size or 1) * (self.accum_iter or 1)
        if self.total_batch_size % part:
            parts = [f"{name} {getattr(self, name)}" for name in ("batch_size", "accum_iter") if getattr(self, name)]
            raise OptionError(
                f"total_batch_size: {self.total_batch_size} is not a multiple of {' x '.join(parts)}",
                "total_batch_size",
                "batch_size",
                "accum_iter",
            )

    def _check_allow_change(self) -> None:
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(self)}
        for name in self.allow_change:
            first = name.split(".")[0]
            if first not in kinds or (first != name and first != "terms"):
                raise OptionError(
                    f"allow_change: no option {name!r}; {nearest(name, kinds)}".rstrip("; "), "allow_change"
                )
            if kinds[first] == "shape":
                raise OptionError(
                    f"allow_change: {name} decides the model's parameters and cannot change within a run",
                    "allow_change",
                )


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Pretrain a masked autoencoder: one run, from images to a checkpoint."""

    epochs: int = result(400)
    warmup_epochs: float = result(40.0)
    blr: float = result(1.5e-4)

    min_scale: float = result(0.2, section="Crops")
    """Smallest share of an image's area that a random crop takes."""
    hflip: float = result(0.5)
    """Probability of mirroring an image left to right."""

    method: str = shape("nor_mae", section="Model and objective")
    """What is learned: a decoder and terms with their weights, e.g. `mae`, `nor_mae`, `nor_mae_released`."""
    model: str = shape("mae_vit_tiny_patch16")
    """`mae_vit_SIZE_patchP`, with SIZE one of tiny, small, base, large, huge and any patch size P in pixels."""
    embed_dim: int = shape(0)
    """Channels of the encoder; 0: the model's own, as for the five options that follow."""
    depth: int = shape(0)
    """Blocks of the encoder."""
    num_heads: int = shape(0)
    """Attention heads of the encoder."""
    decoder_embed_dim: int = shape(0)
    """Channels of the decoder."""
    decoder_depth: int = shape(0)
    """Blocks of the decoder: 8 in MAE, 12 in the NoR-MAE paper's script."""
    decoder_num_heads: int = shape(0)
    """Attention heads of the decoder."""
    mask_ratio: float = result(0.75)
    """Share of the patches that is hidden from the encoder."""
    norm_pix_loss: bool = result(False)
    """Reconstruct pixels standardised within each patch, not the pixels themselves."""
    terms: dict[str, dict[str, Any]] = result({})
    """Changes to the method's loss terms: `{neighbor: {weight: 1e-4}}` sets, `{label: {}}` adds, `{neighbor: null}` removes."""
    grad_checkpointing: bool = machine(False)
    """Compute the blocks twice to keep fewer activations: less memory, more time."""

    knn_every: int = machine(0, section="Watching")
    """Epochs between measurements of the encoder by k nearest neighbours, for data with labels; 0 never."""
    picture_every: int = machine(0)
    """Epochs between pictures of reconstructions, in `samples/` and TensorBoard; 0 never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "knn_every", "picture_every", "embed_dim", "depth", "num_heads")
        self._at_least(0, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        self._between(0, 1, "hflip", "min_scale", "mask_ratio")
        if not self.min_scale:
            raise OptionError("min_scale: must be more than 0, or a crop is empty", "min_scale")
        if self.mask_ratio in (0, 1):
            kept = "hides nothing" if self.mask_ratio == 0 else "keeps nothing"
            raise OptionError(f"mask_ratio: {self.mask_ratio:g} {kept}; it must lie between 0 and 1", "mask_ratio")


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """The declared type of each field, by name."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


@functools.cache
def documentation(schema: type) -> dict[str, str]:
    """The string that stands under each field, its own or the one it inherits; "" where there is none."""
    found = dict.fromkeys(field_types(schema), "")
    for owner in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except OSError:  # typed into a shell: there is no file to read
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for declaration, below in zip(body, body[1:], strict=False):
            if not (isinstance(declaration, ast.AnnAssign) and isinstance(declaration.target, ast.Name)):
                continue
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[declaration.target.id] = " ".join(below.value.value.split())
    return found


def _sections(schema: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields in their groups, in the order of declaration; a field declared again stays where it was."""
    opened: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        for field in owner.__dict__.get("__dataclass_fields__", {}).values():
            if field.metadata.get("section"):
                opened[field.name] = field.metadata["section"]
    groups: dict[str, list[dataclasses.Field[Any]]] = {}
    title = "Options"
    for field in dataclasses.fields(schema):
        title = opened.get(field.name, title)
        groups.setdefault(title, []).append(field)
    return groups


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# ---------------------------------------------------------------------------------------------------------------------
# Reading one value


def nearest(word: str, words: Iterable[str]) -> str:
    """`"did you mean 'epochs'?"`, or "" when nothing among `words` is near."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def _unknown(key: str, words: Iterable[str], detail: str = "") -> OptionError:
    hint = nearest(key, words) or detail
    return OptionError(f"unknown key {key!r}" + (f"; {hint}" if hint else ""), key)


def _read(value: Any, expected: Any, key: str) -> Any:
    """`value` as the declared type. Text is read by that type (YAML takes `5e-5` for text); nothing else is bent."""
    try:
        return _convert(value, expected)
    except ValueError:
        raise OptionError(f"{key}: expected {_describe(expected)}, found {_show(value)}", key) from None


def _convert(value: Any, expected: Any) -> Any:
    origin, inside = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in inside):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(choice for choice in inside if choice is not types.NoneType))
    if origin is tuple:
        return _convert_tuple(value, inside)
    if origin is dict and isinstance(value, Mapping):
        return {_convert(name, inside[0]): _convert(item, inside[1]) for name, item in value.items()}
    if expected is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif expected is int and not isinstance(value, bool) and isinstance(value, int | str):
        return int(value)
    elif expected is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        if math.isfinite(float(value)):
            return float(value)
    elif expected is str and isinstance(value, str):
        return value
    raise ValueError


def _convert_tuple(value: Any, inside: tuple[Any, ...]) -> tuple[Any, ...]:
    """A list, or its text with commas or blanks (numbers also with an `x`, as in `160x96`). One item fills a pair."""
    if isinstance(value, str):
        value = [item for item in re.split(r"[\s,]+|(?<=\d)x(?=\d)", value.strip().strip("[]()")) if item]
    items = list(value) if isinstance(value, list | tuple) else [value]
    if inside[-1] is Ellipsis:
        return tuple(_convert(item, inside[0]) for item in items)
    if len(items) == 1:
        items *= len(inside)
    return tuple(_convert(item, kind) for item, kind in zip(items, inside, strict=True))


def _describe(expected: Any) -> str:
    """A declared type in words."""
    origin, inside = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if choice is types.NoneType else _describe(choice) for choice in inside)
    if origin is tuple:
        return f"{'any number' if inside[-1] is Ellipsis else len(inside)} of: {_describe(inside[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(expected, "a mapping of names to values")


def _show(value: Any) -> str:
    """A value as it would stand in a recipe."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_show, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_show(item)}" for name, item in value.items()) + "}"
    return repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading recipes and flags

Schema = TypeVar("Schema")
Run = TypeVar("Run", bound=RunOptions)
Given = list[tuple[str, Any]]


def parse(
    schema: type[Schema],
    argv: Sequence[str],
    *,
    preset: Callable[[str], Mapping[str, Any]] | None = None,
    term_options: Mapping[str, type] | None = None,
) -> Schema:
    """An instance of `schema` from the words of a command line.

    `preset` maps the value of the option `method` to the values that the method brings; recipes and flags change them.
    `term_options` maps the name of each loss term there is to the dataclass of its options; it gives the field `terms`
    its meaning, and every option of every term that the run has is spelled out in it.
    Raises OptionError, which names the option, what was found, what would be right, and where it stands.
    """
    term_options = term_options or {}
    files, flags = _read_flags(schema, argv, term_options)
    layers = [(file, _read_recipe(file)) for file in files]
    layers = [(source, _canonical(given, source)) for source, given in [*layers, (COMMAND_LINE, flags)]]
    if preset is not None and "method" in field_types(schema):
        layers.insert(0, _preset_layer(schema, layers, preset))

    merge = _Merge(schema, term_options)
    for source, given in layers:
        for key, value in given:
            try:
                merge.set(key, value, source)
            except OptionError as error:
                raise OptionError(f"{source}: {error}", *error.keys) from None
    return merge.finish()


def _canonical(given: Given, source: str) -> Given:
    """The same with one spelling for each option: aliases resolved, `-` as `_`; an option twice in one file is refused."""
    spelled: Given = []
    for key, value in given:
        if not isinstance(key, str):
            raise OptionError(f"{source}: an option's name is a word, found {_show(key)}")
        name = key.replace("-", "_")
        if name in REFUSED:
            raise OptionError(f"{source}: no option {key!r} here; {REFUSED[name]}", key)
        name = ALIASES.get(name, name)
        if source != COMMAND_LINE and any(name == other for other, _ in spelled):
            raise OptionError(f"{source}: {name} is given twice", name)
        spelled.append((name, value))
    return spelled


def _preset_layer(
    schema: type, layers: list[tuple[str, Given]], preset: Callable[[str], Mapping[str, Any]]
) -> tuple[str, Given]:
    """The values that the chosen method brings, as the first layer."""
    default = next(_default(field) for field in dataclasses.fields(schema) if field.name == "method")
    chosen = [(value, source) for source, given in layers for key, value in given if key == "method"]
    method, source = chosen[-1] if chosen else (default, "default")
    try:
        return f"method {method!r}", list(preset(_read(method, str, "method")).items())
    except ValueError as error:
        raise OptionError(f"{source}: {error}", "method") from None


class _Merge:
    """Values so far, later ones over earlier ones, with the place each comes from."""

    def __init__(self, schema: type, term_options: Mapping[str, type]) -> None:
        self.schema = schema
        self.types = field_types(schema)
        self.term_options = term_options if "terms" in self.types else {}
        self.values: dict[str, Any] = {}
        self.terms: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, str] = {}

    def set(self, key: str, value: Any, source: str) -> None:
        if key == "terms" and key in self.types:
            self._set_terms(value, source)
        elif key.startswith("terms.") and key.count(".") == 2:
            _, term, option = key.split(".")
            if term not in self.terms:
                there = ", ".join(self.terms) or "none"
                raise _unknown(key, [], f"the terms of this run are: {there}")
            self._set_term_option(term, option, value, source)
        elif key in self.types:
            self.values[key] = _read(value, self.types[key], key)
            self.sources[key] = source
        else:
            raise _unknown(key, [*self.types, *ALIASES])

    def _set_terms(self, value: Any, source: str) -> None:
        if isinstance(value, str):  # from the command line: --terms '{label: {}}'
            value = _load_yaml(value, "terms")
        for term, options in _read(value, dict[str, Any], "terms").items():
            if term not in self.term_options:
                raise _unknown(f"terms.{term}", [f"terms.{name}" for name in self.term_options])
            if options is None:
                if term not in self.terms:
                    raise OptionError(
                        f"terms.{term}: nothing removes a term, and there is none; `{term}: {{}}` adds it", "terms"
                    )
                del self.terms[term]
                continue
            self.terms.setdefault(term, {})
            for option, item in _read(options, dict[str, Any], f"terms.{term}").items():
                self._set_term_option(term, option.replace("-", "_"), item, source)

    def _set_term_option(self, term: str, option: str, value: Any, source: str) -> None:
        known, key = field_types(self.term_options[term]), f"terms.{term}.{option}"
        if option not in known:
            raise _unknown(key, [f"terms.{term}.{name}" for name in known])
        self.terms[term][option] = _read(value, known[option], key)
        self.sources[f"terms.{term}"] = source

    def finish(self) -> Any:
        """The schema's instance; what its parts refuse together is told with the places the values come from."""
        if "terms" in self.types:
            self.values["terms"] = {term: self._finish_term(term) for term in self.terms}
        try:
            return self.schema(**self.values)
        except OptionError as error:
            places = dict.fromkeys(self.sources[key] for key in error.keys if key in self.sources)
            raise OptionError(": ".join([*filter(None, [", ".join(places)]), str(error)]), *error.keys) from None

    def _finish_term(self, term: str) -> dict[str, Any]:
        try:
            return to_dict(self.term_options[term](**self.terms[term]))
        except (TypeError, ValueError) as error:
            place = self.sources.get(f"terms.{term}", "")
            raise OptionError(f"{place}: terms.{term}: {error}".removeprefix(": "), f"terms.{term}") from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a key may stand once only; PyYAML itself silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise OptionError(f"line {key_node.start_mark.line + 1}: {key_node.value} is given twice")
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise OptionError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except OptionError as error:
        raise OptionError(f"{source}: {error}") from None


def _read_recipe(file: str) -> Given:
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        near = nearest(path.name, (other.name for other in path.parent.glob("*.yaml")))
        raise OptionError(f"cannot read recipe {file!r}: {reason}" + (f"; {near}" if near else ""), "config") from None
    content = _load_yaml(text, file)
    if content is None:
        return []
    if not isinstance(content, dict):
        raise OptionError(f"{file}: a recipe holds lines `option: value`, found {_show(content)}", "config")
    return list(content.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise OptionError(f"{COMMAND_LINE}: {message}")


class _Collect(argparse.Action):
    """Keep flags in the order in which they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        value = self.const if self.nargs == 0 else values
        if isinstance(value, list):
            value = " ".join(value)
        namespace.flags.append((self.dest, value.removeprefix(" ")))


_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?([,x\s].*)?", re.IGNORECASE)


def _read_flags(schema: type, argv: Sequence[str], term_options: Mapping[str, type]) -> tuple[list[str], Given]:
    """The recipes' paths and the flags, each in the order given; `--help` ends the program here."""
    parser = _parser(schema, term_options)
    words = []
    for word in argv:
        if _NEGATIVE_NUMBER.fullmatch(word):
            word = " " + word  # argparse would take -5e-5 for a flag
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        words.append(word)
    found, extra = parser.parse_known_args(words, argparse.Namespace(flags=[], config=[]))
    for word in extra:
        name = word.partition("=")[0].lstrip("-")
        if not word.startswith("-"):
            raise OptionError(f"{COMMAND_LINE}: {word!r} follows no option; options are given as --name value")
        if name in REFUSED:
            raise OptionError(f"{COMMAND_LINE}: no option {name!r} here; {REFUSED[name]}", name)
        known = [flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise OptionError(f"{COMMAND_LINE}: {_unknown(name, known)}", name)
    return [file for files in found.config for file in files], found.flags


def _parser(schema: type, term_options: Mapping[str, type]) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [-c RECIPE.yaml ...] [--option value ...]",
        description=inspect.getdoc(schema),
        epilog="Later words win: defaults, the method, recipes from left to right, flags. `-` and `_` in names are alike. "
        "A run goes on only with the same options of the kinds result and shape; those of the kind machine may change.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", nargs="+", action="append", metavar="RECIPE.yaml", help="files of options; later ones win"
    )
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(("-" if len(alias) == 1 else "--") + alias)
    for title, fields in _sections(schema).items():
        group = parser.add_argument_group(title)
        for field in fields:
            _add_flag(group, field.name, field, schema, aliases.get(field.name, []))
    for term, options in term_options.items() if "terms" in field_types(schema) else ():
        group = parser.add_argument_group(f"Term {term}", f"For runs whose method or recipe has the term {term}.")
        for field in dataclasses.fields(options):
            name = f"terms.{term}.{field.name}"
            _add_flag(group, name, field, options, aliases.get(name, []))
    return parser


def _add_flag(group: Any, name: str, field: dataclasses.Field[Any], schema: type, aliases: list[str]) -> None:
    expected = field_types(schema)[field.name]
    flags = [*aliases, f"--{name}"]
    notes = [f"default: {_default_text(field)}", field.metadata.get("kind", "result")]
    text = f"{documentation(schema)[field.name]} ({', '.join(notes)})".replace("%", "%%").replace("`", "'")
    nargs = {bool: "?", tuple: "+"}.get(typing.get_origin(expected) or expected)
    words = {bool: "true|false", int: "N", float: "X", str: "TEXT", tuple: "X"}
    metavar = words.get(typing.get_origin(expected) or expected, "YAML")
    if typing.get_origin(expected) is Literal:
        metavar = "|".join(map(str, typing.get_args(expected)))
    group.add_argument(*flags, dest=name, action=_Collect, nargs=nargs, const="true", metavar=metavar, help=text)
    if expected is bool:
        off = f"--{name.rpartition('.')[0]}.no_{field.name}" if "." in name else f"--no_{name}"
        group.add_argument(off, dest=name, action=_Collect, nargs=0, const="false", help=argparse.SUPPRESS)


def _default_text(field: dataclasses.Field[Any]) -> str:
    value = _default(field)
    if value is dataclasses.MISSING:
        return "none, must be given"
    return "empty" if value in ("", (), {}) else _show(value).replace("'", "")


# ---------------------------------------------------------------------------------------------------------------------
# Using options


def resolve_batch(options: Run, processes: int) -> Run:
    """The options with total_batch_size, batch_size and accum_iter all known on so many processes."""
    total, batch, accum = options.total_batch_size, options.batch_size, options.accum_iter
    if not total:
        batch, accum = batch or 64, accum or 1
        total = batch * accum * processes
    elif not batch:
        accum = accum or 1
        batch = total // (accum * processes)
    else:
        accum = accum or total // (batch * processes)
    if batch * accum * processes != total or not total:
        fitting = [size for size in range(1, (options.batch_size or total) + 1) if total % (size * processes) == 0]
        advice = f"; batch_size {fitting[-1]} would do" if fitting else ""
        asked = [f"{name} {getattr(options, name)}" for name in ("batch_size", "accum_iter") if getattr(options, name)]
        raise OptionError(
            f"total_batch_size: {total} does not divide into {' x '.join([*asked, f'{processes} processes'])}{advice}",
            "total_batch_size",
            "batch_size",
            "accum_iter",
        )
    return dataclasses.replace(options, total_batch_size=total, batch_size=batch, accum_iter=accum)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_dict(options: Any) -> dict[str, Any]:
    """The options as what YAML, JSON and a checkpoint hold: numbers, text, lists and dictionaries."""
    return {field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def from_dict(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """The inverse of `to_dict`; an unknown name is refused, a missing one has its default."""
    known = field_types(schema)
    for key in values:
        if key not in known:
            raise _unknown(key, known)
    return schema(**{key: _read(value, known[key], key) for key, value in values.items()})


@dataclass(frozen=True)
class Difference:
    """An option that would change the result of a run: by dotted name, with both values (None: the term is not there)."""

    name: str
    old: Any
    new: Any
    kind: str


def differences(schema: type, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """What differs between two `to_dict`s in options of the kinds result and shape. A missing name counts as its default.

    Of the terms, each option is a result; a term that only one of them has is one difference of the kind shape.
    """
    found = []
    for field in dataclasses.fields(schema):
        before, after = (_plain(values.get(field.name, _default(field))) for values in (old, new))
        if field.metadata["kind"] == "machine" or before == after:
            continue
        if field.name != "terms":
            found.append(Difference(field.name, before, after, field.metadata["kind"]))
            continue
        for term in dict.fromkeys([*before, *after]):
            found += _term_differences(f"terms.{term}", before.get(term), after.get(term))
    return found


def _term_differences(name: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[Difference]:
    if old is None or new is None:
        return [Difference(name, old, new, "shape")]
    options = dict.fromkeys([*old, *new])
    changed = [option for option in options if old.get(option) != new.get(option)]
    return [Difference(f"{name}.{option}", old.get(option), new.get(option), "result") for option in changed]


def option_table(schema: type, term_options: Mapping[str, type] | None = None) -> str:
    """All options as a Markdown table: name, default, kind, documentation."""
    rows = [("option", "default", "kind", "meaning"), ("---", "---", "---", "---")]
    for prefix, owner in [("", schema), *((f"terms.{term}.", kind) for term, kind in (term_options or {}).items())]:
        for field in dataclasses.fields(owner):
            meaning = documentation(owner)[field.name].replace("|", r"\|")
            default = _default_text(field).replace("|", r"\|")
            rows.append((f"`{prefix}{field.name}`", default, field.metadata.get("kind", "result"), meaning))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
