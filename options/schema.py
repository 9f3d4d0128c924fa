"""Parse command lines and YAML recipes into dataclasses of options.

Every field of such a dataclass is a flag and a key of recipes, converted to the field's type. Values are merged in this
order, later ones override earlier ones: the field's default, the method's defaults, the recipes given with `-c` from
left to right, the flags from left to right. A recipe cannot include another one. The string under a field is its
documentation, from which `--help` and docs/options.md are generated.

Kinds of fields: *result* options decide what is computed; *shape* options also decide which tensors a checkpoint holds;
*machine* options only say where and how the same is computed, and may change when a run is resumed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

COMMAND_LINE = "command line"
HELP_ALL = "--help-all"
_NOTHING = object()

Schema = TypeVar("Schema")
Given = list[tuple[str, Any]]  # names and values, in the order in which they were given


class OptionError(ValueError):
    """An option has an invalid value; `keys` are the options concerned."""

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def require(holds: bool, message: str, *keys: str) -> None:
    """Raise OptionError about the first of `keys` unless the condition holds."""
    if not holds:
        raise OptionError(f"{keys[0]}: {message}", *keys)


def require_number(name: str, value: object, low: float = -math.inf) -> None:
    """Raise ValueError unless `value` is a finite number of at least `low`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < low:  # type: ignore[arg-type, operator]
        least = "" if low == -math.inf else f" of at least {low:g}"
        raise ValueError(f"{name} is {value!r}; it must be a finite number{least}")


def require_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless `value` is among the values of the Literal type `choices`."""
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(str, allowed))}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of option classes: convert every value to its declared type, then check the combination."""

    def __post_init__(self) -> None:
        for name, expected in field_types(type(self)).items():
            object.__setattr__(self, name, read(getattr(self, name), expected, name))
        self._check()

    def _check(self) -> None:
        """Raise OptionError for an invalid combination. Subclasses call `super()._check()` first."""

    def _at_least(self, low: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= low, f"must be at least {low}, found {show(value)}", name)

    def _between(self, low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(low <= value <= high, f"must be from {low} to {high}, found {show(value)}", name)

    def _below_one(self, *names: str) -> None:
        self._between(0, 1, *names)
        for name in names:
            require(getattr(self, name) < 1, "must be less than 1", name)


# ---- declaring ------------------------------------------------------------------------------------------------------


def result(default: Any, section: str = "") -> Any:
    """Declare a field that decides what is computed. `section` starts a group of `--help` with this field."""
    return _field("result", default, section)


def shape(default: Any, section: str = "") -> Any:
    """Declare a *result* field that also decides which parameters the model has: `allow_change` cannot accept it."""
    return _field("shape", default, section)


def machine(default: Any, section: str = "") -> Any:
    """Declare a field that says where or how the same is computed: it may change when a run is resumed."""
    return _field("machine", default, section)


def _field(kind: str, default: Any, section: str) -> Any:
    metadata = {"kind": kind, "section": section}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_types(schema: Any) -> dict[str, Any]:
    """Return the declared type of each field, by name."""
    return _field_types(schema)


@functools.cache
def _field_types(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


@functools.cache
def documentation(schema: Any) -> dict[str, str]:
    """Return the string under each field, its own or inherited; "" if there is none."""
    found = dict.fromkeys(field_types(schema), "")
    for owner in reversed(schema.__mro__):
        if "__dataclass_fields__" not in owner.__dict__:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError):  # defined interactively: no source file
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for declaration, below in zip(body, body[1:], strict=False):
            match declaration, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _sections(schema: Any) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return the fields in their groups: the schema's own groups first, then inherited ones, in order of declaration.

    A field that is declared again with another default stays in its group.
    """
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
    declared = {name: place for place, owner in enumerate(schema.__mro__) for name in inspect.get_annotations(owner)}
    return dict(sorted(groups.items(), key=lambda group: declared[group[1][0].name]))


def get_default(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field, or `dataclasses.MISSING` if it is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def compose(
    own: Any,
    base: Any,
    unused: tuple[tuple[str, str, Any], ...] = (),
    term_options: tuple[tuple[str, type], ...] = (),
) -> Any:
    """Return a dataclass with the options of `own` and of `base`, both subclasses of `Options`.

    `unused` are options that it does not have, each as (name, message, default): the default is ignored, so that a
    list of all options can be read, and any other value is refused with the message. `term_options` are the names of
    the loss terms with the dataclasses of their options.
    """
    members = {
        "__doc__": base.__doc__,
        "__module__": __name__,
        "FOREIGN": {**base.FOREIGN, **{name: message for name, message, _ in unused}},
        "UNUSED": {name: default for name, _, default in unused},
        "TERM_OPTIONS": dict(term_options),
    }
    return dataclass(frozen=True, kw_only=True)(type(f"{own.__name__}Of{base.__name__}", (own, base), members))


# ---- reading one value ----------------------------------------------------------------------------------------------


def nearest(word: str, words: Iterable[str]) -> str:
    """Return `"did you mean 'epochs'?"`, or "" if none of `words` is similar."""
    close = difflib.get_close_matches(word, list(words), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def unknown(key: str, words: Iterable[str], otherwise: str = "") -> OptionError:
    """Return the error for a key that is not in `words`, with the nearest of them, or with `otherwise`."""
    hint = nearest(key, words) or otherwise
    return OptionError(f"unknown key {key!r}" + (f"; {hint}" if hint else ""), key)


def read(value: Any, expected: Any, key: str) -> Any:
    """Convert `value` to the declared type. Only strings are parsed (PyYAML reads `5e-5` as a string)."""
    try:
        return _convert(value, expected)
    except ValueError:
        advice = "; put it in quotes" if expected is str and value is not None else ""
        raise OptionError(f"{key}: expected {_describe(expected)}, found {show(value)}{advice}", key) from None


def _convert(value: Any, expected: Any) -> Any:
    origin, inside = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin is Literal and value in inside and not isinstance(value, bool):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return _convert(value, next(choice for choice in inside if choice is not types.NoneType))
    if origin is tuple:
        return _convert_tuple(value, inside)
    if origin is dict and isinstance(value, Mapping):
        return {_convert(name, inside[0]): _convert(item, inside[1]) for name, item in value.items()}
    if expected is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if expected is int and not isinstance(value, bool) and isinstance(value, int | str):
        return int(value)
    if expected is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        if math.isfinite(float(value)):
            return float(value)
    if expected is str and isinstance(value, str):
        return value
    raise ValueError


def _convert_tuple(value: Any, inside: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert a list, or a string with commas, spaces or, between numbers, `x` (`160x96`). One item fills a pair."""
    if isinstance(value, str):
        value = [item for item in re.split(r"[\s,]+|(?<=\d)x(?=\d)", value.strip(" []()")) if item]
    items = list(value) if isinstance(value, list | tuple) else [value]
    if inside[-1] is Ellipsis:
        if inside[0] is str:  # YAML reads [0, 255] as numbers
            items = [str(item) if type(item) in (int, float) else item for item in items]
        return tuple(_convert(item, inside[0]) for item in items)
    if len(items) == 1:
        items *= len(inside)
    return tuple(_convert(item, kind) for item, kind in zip(items, inside, strict=True))


def _describe(expected: Any) -> str:
    """Describe a declared type."""
    origin, inside = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if choice is types.NoneType else _describe(choice) for choice in inside)
    if origin is tuple:
        return ("a list, each " if inside[-1] is Ellipsis else f"{len(inside)} items, each ") + _describe(inside[0])
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(expected, "a mapping of names to values")


def show(value: Any) -> str:
    """Format a value as in a recipe."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {show(item)}" for name, item in value.items()) + "}"
    return repr(value) if isinstance(value, str) else str(value)


# ---- recipes and flags ----------------------------------------------------------------------------------------------


def parse(
    schema: type[Schema],
    argv: Sequence[str],
    *,
    base: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    preset: Callable[[str], Mapping[str, Any]] | None = None,
    term_options: Mapping[str, type] | None = None,
) -> Schema:
    """Parse a command line into an instance of `schema`.

    Args:
        base: Maps the given options, as they were typed, to values that every other source overrides: the options
            that a named checkpoint was trained with.
        preset: Maps the value of the option `method` to the defaults of that method.
        term_options: The dataclass of options of each loss term. The field `terms` then holds every option of every
            term of the run, and None for a term of the method that a recipe has removed, so that a stored `terms` has
            the same meaning everywhere.

    Raises:
        OptionError: names the option, the value found, what is allowed, and the file or "command line" it comes from.
        SystemExit: after `--help`, which prints the common options, or `--help-all`, which prints all.
    """
    term_options = (term_options or {}) if "terms" in field_types(schema) else {}
    if wanted := {word.replace("_", "-") for word in argv} & {"-h", "--help", HELP_ALL}:
        defaults = preset(chosen(schema, argv, "method")[0]) if preset else {}
        shown: Literal["common", "all"] = "all" if HELP_ALL in wanted else "common"
        sys.stdout.write(_make_parser(schema, term_options, shown, defaults).format_help())
        raise SystemExit(0)
    files, flags = _read_flags(schema, argv, term_options)
    layers = [*((file, _read_recipe(file)) for file in files), (COMMAND_LINE, flags)]
    layers = [(source, _canonical(schema, given, source)) for source, given in layers]
    brought: Mapping[str, Any] = {}
    if preset is not None and "method" in field_types(schema):
        layers.insert(0, _preset_layer(schema, layers, preset))
        brought = dict(layers[0][1]).get("terms", {})
    if base is not None:
        given_words = {key: value for _, given in layers for key, value in given}
        layers.insert(0, ("checkpoint", list(base(given_words).items())))

    merge = _Merge(schema, term_options, brought)
    for source, given in layers:
        for key, value in given:
            try:
                merge.set(key, value, source)
            except OptionError as error:
                raise OptionError(f"{source}: {error}", *error.keys) from None
    return merge.finish()


def chosen(schema: Any, argv: Sequence[str], name: str) -> tuple[str, str]:
    """Return the string option `name`, which decides which further options exist, and where it was given."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", nargs="+", action="append", default=[])
    parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(list(argv))
    field = next(field for field in dataclasses.fields(schema) if field.name == name)
    value, source = get_default(field), "default"
    for file in (file for files in given.config for file in files):
        for key, found in _read_recipe(file):
            if key == name:
                value, source = found, file
    if getattr(given, name) is not None:
        value, source = getattr(given, name), COMMAND_LINE
    try:
        return read(value, str, name), source
    except OptionError as error:
        raise OptionError(f"{source}: {error}", name) from None


def _canonical(schema: Any, given: Given, source: str) -> Given:
    """Resolve aliases and replace `-` by `_` in names. Duplicates in one recipe are refused."""
    spelled: Given = []
    for key, value in given:
        if not isinstance(key, str):
            raise OptionError(f"{source}: an option name must be a string, found {show(key)}")
        name = key.replace("-", "_")
        if source != COMMAND_LINE and value == getattr(schema, "UNUSED", {}).get(name, _NOTHING):
            continue
        _refuse_foreign(schema, name, source)
        name = _aliases(schema).get(name, name)
        if source != COMMAND_LINE and any(name == other for other, _ in spelled):
            raise OptionError(f"{source}: {name} is given twice", name)
        if isinstance(value, str) and (name in getattr(schema, "PATHS", ()) or name.endswith(".checkpoint")):
            value = os.path.expanduser(value)
        spelled.append((name, value))
    return spelled


def _aliases(schema: Any) -> Mapping[str, str]:
    return getattr(schema, "ALIASES", {})


def _refuse_foreign(schema: Any, name: str, source: str) -> None:
    """Raise OptionError for an option that only other projects have, with what to use instead."""
    foreign = getattr(schema, "FOREIGN", {})
    if name in foreign:
        raise OptionError(f"{source}: there is no option {name!r} here; {foreign[name]}", name)


def _preset_layer(
    schema: Any, layers: list[tuple[str, Given]], preset: Callable[[str], Mapping[str, Any]]
) -> tuple[str, Given]:
    """Return the defaults of the chosen method, as the first layer."""
    chosen = [(value, source) for source, given in layers for key, value in given if key == "method"]
    default = next(get_default(field) for field in dataclasses.fields(schema) if field.name == "method")
    method, source = chosen[-1] if chosen else (default, "default")
    try:
        return f"method {method}", list(preset(read(method, str, "method")).items())
    except ValueError as error:
        raise OptionError(f"{source}: {error}", "method") from None


class _Merge:
    """Merge values, later ones overriding earlier ones, and record where each was given."""

    def __init__(self, schema: Any, term_options: Mapping[str, type], brought: Mapping[str, Any]) -> None:
        self.schema, self.term_options, self.brought = schema, term_options, brought
        self.types = field_types(schema)
        self.values: dict[str, Any] = {}
        self.terms: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, str] = {}

    def set(self, key: str, value: Any, source: str) -> None:
        """Convert and store one value. An error names the option; the caller adds where it was given."""
        if key.startswith("terms.") and key.count(".") == 2:
            _, term, option = key.split(".")
            if term not in self.terms:
                raise unknown(key, [], f"the terms of this run are: {', '.join(self.terms) or 'none'}")
            self._set_term_option(term, option, value, source)
        elif key not in self.types:
            raise unknown(key, [*self.types, *_aliases(self.schema)])
        elif key == "terms":
            self._set_terms(value, source)
        else:
            self.values[key] = read(value, self.types[key], key)
            self.sources[key] = source

    def _set_terms(self, value: Any, source: str) -> None:
        if isinstance(value, str):  # a flag: --terms '{label: {}}'
            value = _load_yaml(value, "terms")
        for term, options in read(value, dict[str, Any], "terms").items():
            if term not in self.term_options:
                known = [f"terms.{name}" for name in self.term_options]
                raise unknown(f"terms.{term}", known, f"there are: {', '.join(known)}")
            if options is not None:
                self.terms.setdefault(term, {})
                self.sources[f"terms.{term}"] = source
                for option, item in read(options, dict[str, Any], f"terms.{term}").items():
                    self._set_term_option(term, option.replace("-", "_"), item, source)
            elif self.terms.pop(term, None) is None:
                raise OptionError(
                    f"terms.{term}: null removes a term, but the run does not have it; {{}} adds it", "terms"
                )

    def _set_term_option(self, term: str, option: str, value: Any, source: str) -> None:
        known, key = field_types(self.term_options[term]), f"terms.{term}.{option}"
        if option not in known:
            raise unknown(key, [f"terms.{term}.{name}" for name in known])
        self.terms[term][option] = read(value, known[option], key)
        self.sources[f"terms.{term}"] = source

    def finish(self) -> Any:
        """Create the instance. An error about a combination names where the values were given."""
        terms: dict[str, Any] = {term: None for term in self.brought if term not in self.terms}
        for term, values in self.terms.items():
            terms[term] = to_dict(self._make(self.term_options[term], values, f"terms.{term}"))
        return self._make(self.schema, {**self.values, "terms": terms} if "terms" in self.types else self.values, "")

    def _make(self, schema: Any, values: dict[str, Any], name: str) -> Any:
        for field in dataclasses.fields(schema):
            if field.name not in values and get_default(field) is dataclasses.MISSING:
                key = f"{name}.{field.name}".lstrip(".")
                raise OptionError(f"{key} must be given: {documentation(schema)[field.name]}", key)
        try:
            return schema(**values)
        except ValueError as error:
            keys = [name] if name else getattr(error, "keys", ())
            places = dict.fromkeys(self.sources[key] for key in keys if key in self.sources)
            parts = [", ".join(places), name, str(error)]
            raise OptionError(": ".join(part for part in parts if part), *keys) from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise OptionError(f"line {key.start_mark.line + 1}: {key.value} is given twice", key.value)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _load_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _RecipeLoader)  # a SafeLoader
    except OptionError as error:
        raise OptionError(f"{source}: {error}", *error.keys) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date
        raise OptionError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_recipe(file: str) -> Given:
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        hint = nearest(path.name, (other.name for other in path.parent.glob("*.yaml")))
        raise OptionError(f"cannot read recipe {file}: {reason}" + (f"; {hint}" if hint else ""), "config") from None
    content = _load_yaml(text, file)
    if not isinstance(content, dict | None):
        raise OptionError(f"{file}: expected lines of `option: value`, found {show(content)}", "config")
    return list((content or {}).items())


# ---- the command line -----------------------------------------------------------------------------------------------


class _Collect(argparse.Action):
    """Collect flags in the order in which they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        text = self.const if self.nargs == 0 else " ".join(values) if isinstance(values, list) else values
        namespace.flags.append((self.dest, text.replace(_GUARD, "")))


_GUARD = "\0"  # before a negative number, which argparse would read as a flag (-5e-5)


def _read_flags(schema: Any, argv: Sequence[str], term_options: Mapping[str, type]) -> tuple[list[str], Given]:
    """Return the paths of the recipes and the flags, in the order given."""
    parser = _make_parser(schema, term_options)
    words = []
    for word in argv:
        if re.match(r"-\.?\d", word):
            word = _GUARD + word
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            word = "--" + name.replace("-", "_") + equals + value
        words.append(word)
    found, extra = parser.parse_known_args(words, argparse.Namespace(flags=[], config=[]))
    if extra:
        name = extra[0].partition("=")[0].lstrip("-")
        if not extra[0].startswith("-"):
            raise OptionError(f"{COMMAND_LINE}: unexpected argument {extra[0]!r}; give options as --name value")
        _refuse_foreign(schema, name, COMMAND_LINE)
        if name in parser.flags():
            raise OptionError(f"{COMMAND_LINE}: {extra[0]} needs two dashes: --{name}", name)
        raise OptionError(f"{COMMAND_LINE}: {unknown(name, parser.flags())}", name)
    return [file for files in found.config for file in files], found.flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise OptionError(f"{COMMAND_LINE}: {message}")

    def flags(self) -> list[str]:
        """Return the long names of all flags."""
        return [flag[2:] for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def _make_parser(
    schema: Any,
    term_options: Mapping[str, type],
    shown: Literal["common", "all"] = "all",
    defaults: Mapping[str, Any] | None = None,
) -> _Parser:
    """Return a parser of all flags, or, to print the common ones, of these only, with the defaults of a method."""
    groups = _help_groups(schema, term_options)
    same, _ = _repeated(term_options)
    hidden = 0
    if shown == "common":
        expert = {title: groups.pop(title) for title in list(groups) if title.startswith(_EXPERT)}
        hidden = sum(len(flags) for title, flags in expert.items() if title.removeprefix(_TERM) not in same)
    more = f"{HELP_ALL} also lists the {hidden} expert options. " if hidden else ""
    kinds = "A run can be resumed with other options of kind machine, not of kinds result and shape."
    parser = _Parser(
        usage="%(prog)s [-c RECIPE.yaml ...] [--option value ...]",
        description=inspect.getdoc(schema),
        epilog=f"{more}Later values override earlier ones: defaults, method, recipes from left to right, flags. In "
        f"names, - and _ are equivalent. {'' if hidden else kinds}",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30, width=110),
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print the common options and exit")
    parser.add_argument(HELP_ALL, action="store_true", help="print all options and exit")
    parser.add_argument(
        "-c",
        "--config",
        nargs="+",
        action="append",
        metavar="RECIPE.yaml",
        help="files of options; later ones override earlier ones",
    )
    preset_defaults = flatten(defaults or {})
    for title, flags in groups.items():
        term = title.removeprefix(_TERM)
        group = parser.add_argument_group(title, f"The options of term {same[term]}." if term in same else None)
        for name, owner, field in flags:
            default = _default_text(preset_defaults.get(name, get_default(field)))
            kind = "" if hidden else f"; {_kind(field)}"
            text = f"{documentation(owner)[field.name]} (default: {default}{kind})"
            _add_flag(group, owner, field, name, _aliases(schema), argparse.SUPPRESS if term in same else text)
    return parser


_EXPERT = "Expert: "  # starts the titles of the groups that only `--help-all` prints
_TERM = f"{_EXPERT}term "


def _help_groups(schema: Any, term_options: Mapping[str, type]) -> dict[str, list[tuple[str, Any, Any]]]:
    """Return the flags in the groups of `--help-all`, each as name, owner and field; the common ones come first."""
    flags = {field.name: (field.name, schema, field) for field in dataclasses.fields(schema)}
    sections = {title: [field.name for field in listed] for title, listed in _sections(schema).items()}
    groups = {_EXPERT + title: names for title, names in sections.items()}
    for term, options in term_options.items():
        own = {f"terms.{term}.{field.name}": field for field in dataclasses.fields(options)}
        flags.update({name: (name, options, field) for name, field in own.items()})
        groups[_TERM + term] = list(own)
    common: Mapping[str, tuple[str, ...]] = getattr(schema, "COMMON", {})
    taken = {name for names in common.values() for name in names}
    rest = {title: [name for name in names if name not in taken] for title, names in groups.items()}
    listed = {**common, **rest}
    found = {title: [flags[name] for name in names if name in flags] for title, names in listed.items()}
    return {title: flags for title, flags in found.items() if flags}


def _repeated(term_options: Mapping[str, type]) -> tuple[dict[str, str], dict[str, type]]:
    """Return the terms that have the options of an earlier term, with its name, and the options of the others."""
    first: dict[str, type] = {}
    same = {}
    for term, options in term_options.items():
        earlier = next((other for other, theirs in first.items() if theirs is options), None)
        if earlier is None:
            first[term] = options
        else:
            same[term] = earlier
    return same, first


def _add_flag(
    group: Any,
    schema: Any,
    field: dataclasses.Field[Any],
    name: str,
    aliases: Mapping[str, str],
    text: str,
) -> None:
    expected = field_types(schema)[field.name]
    others = [alias for alias, meant in aliases.items() if meant == name]
    flags = [f"-{alias}" for alias in others if len(alias) == 1]
    flags += [f"--{name}", *(f"--{alias}" for alias in others if len(alias) > 1)]
    base, inside = typing.get_origin(expected) or expected, typing.get_args(expected)
    words = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    metavar = "|".join(map(str, inside)) if base is Literal else words.get(inside[0] if base is tuple else base, "YAML")
    group.add_argument(
        *flags,
        dest=name,
        action=_Collect,
        nargs={bool: "?", tuple: "+"}.get(base),
        const="true",
        metavar=metavar,
        help=text if text == argparse.SUPPRESS else text.replace("%", "%%").replace("`", "'").strip(),
    )
    if expected is bool:
        group.add_argument(f"--no_{name}", dest=name, action=_Collect, nargs=0, const="false", help=argparse.SUPPRESS)


def _kind(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("kind", "result")  # options of terms are plain fields, of kind result


def _default_text(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    return "empty" if value in ("", (), {}) else show(value).strip("'")


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names: `{"terms": {"label": {"weight": 1}}}` to `{"terms.label.weight": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def option_table(schema: Any, term_options: Mapping[str, type] | None = None, beside: Any = None) -> str:
    """Return a Markdown table of options: name, default, kind, documentation.

    Options that the schema `beside` has with the same default and documentation are left out.
    """

    def describe(owner: Any, field: dataclasses.Field[Any]) -> tuple[str, str, str]:
        return field.name, _default_text(get_default(field)), documentation(owner)[field.name]

    known = [describe(beside, field) for field in dataclasses.fields(beside)] if beside else []
    own = [field for fields in _sections(schema).values() for field in fields]
    listed = [("", schema, field) for field in own if describe(schema, field) not in known]
    same, first = _repeated(term_options or {})
    for term, options in first.items():
        listed += [(f"terms.{term}.", options, field) for field in dataclasses.fields(options)]
    rows = ["| option | default | kind | meaning |", "|---|---|---|---|"]
    for prefix, owner, field in listed:
        name, default, text = describe(owner, field)
        cells = [f"`{prefix}{name}`", default, _kind(field), text]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    rows += [f"| `terms.{term}.*` | | | The options of `terms.{other}`. |" for term, other in same.items()]
    return "\n".join(rows) + "\n"


# ---- options as plain data ------------------------------------------------------------------------------------------


def to_dict(options: Any) -> dict[str, Any]:
    """Convert options to plain data for YAML, JSON and checkpoints: numbers, strings, lists and dictionaries."""
    return {field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def changed(declared: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the defaults of the dataclass `declared`.

    Options that the class completes itself, such as an `auto`, are compared with what it makes of the default.
    """
    required = [field.name for field in dataclasses.fields(declared) if get_default(field) is dataclasses.MISSING]
    usual = to_dict(declared(**{name: values[name] for name in required}))
    return {name: value for name, value in values.items() if name in required or value != usual.get(name)}


def from_dict(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Invert `to_dict`. Unknown names are refused; missing ones have their default."""
    known, values = field_types(schema), current_names(schema, values)
    for key in values:
        if key not in known:
            raise unknown(key, known)
    return schema(**{key: read(value, known[key], key) for key, value in values.items()})


def current_names(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored options under their current names; an earlier name of an option is one of its aliases."""
    known, aliases = field_types(schema), _aliases(schema)
    return {name if name in known else aliases.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Difference:
    """An option that changes what a run computes, by dotted name, with its two values."""

    name: str
    old: Any
    new: Any
    kind: str


def differences(schema: type, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Compare two results of `to_dict`, ignoring options of kind machine. A missing name means its default.

    Options of terms are of kind result. A term that only one side has is a single difference of kind shape, with None
    for the other side.
    """
    term_options: Mapping[str, type] = getattr(schema, "TERM_OPTIONS", {})
    found = []
    old, new = current_names(schema, old), current_names(schema, new)
    for field in dataclasses.fields(schema):
        before, after = (_plain(values.get(field.name, get_default(field))) for values in (old, new))
        if field.name == "terms":
            for term in dict.fromkeys([*before, *after]):
                options = dataclasses.fields(term_options[term]) if term in term_options else ()
                defaults = {option.name: get_default(option) for option in options}
                found += _term_differences(f"terms.{term}", before.get(term), after.get(term), defaults)
        elif _kind(field) != "machine" and before != after:
            found.append(Difference(field.name, before, after, _kind(field)))
    return found


def _term_differences(
    name: str, old: dict[str, Any] | None, new: dict[str, Any] | None, defaults: Mapping[str, Any]
) -> list[Difference]:
    if old is None or new is None:
        return [] if old == new else [Difference(name, old, new, "shape")]
    old, new = _plain({**defaults, **old}), _plain({**defaults, **new})
    changed = [option for option in dict.fromkeys([*old, *new]) if old.get(option) != new.get(option)]
    return [Difference(f"{name}.{option}", old.get(option), new.get(option), "result") for option in changed]
