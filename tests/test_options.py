"""Options: recipes and flags, error messages for invalid values, and that every option is used."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

import methods
import models_vit
import options.run as options_module
from options import (
    Difference,
    FinetuneOptions,
    OptionError,
    RunOptions,
    SegmentOptions,
    changed,
    differences,
    from_dict,
    machine,
    nearest,
    option_table,
    parse,
    resolve_batch,
    result,
    to_dict,
)
from options.schema import _sections, documentation, field_types

PROJECT = Path(__file__).resolve().parent.parent
Pretrain = methods.schema("nor_mae")
SCHEMAS = [kind for kind in vars(options_module).values() if inspect.isclass(kind) and issubclass(kind, RunOptions)]


@dataclass(frozen=True)
class Neighbor:
    weight: float = 5e-5
    """How much it counts."""
    relation: Literal["off_diagonal", "alignment"] = "off_diagonal"
    """What is compared."""
    detached: bool = True
    """Whether one side has no gradient."""

    def __post_init__(self):
        if self.weight == 13:
            raise ValueError("13 is unlucky")


@dataclass(frozen=True)
class Label:
    weight: float = 0.01
    """How much it counts."""
    classes: int | None = None
    """How many, or none."""


TERMS = {"neighbor": Neighbor, "label": Label}


def preset(method):
    known = {"mae": {}, "nor_mae": {"neighbor": {}}, "weak_mae": {"neighbor": {"weight": 1e-6}}}
    if method not in known:
        raise ValueError(f"unknown method {method!r}; {nearest(method, known)}")
    return {"terms": known[method]}


def pretrain(*words):
    return parse(Pretrain, words, preset=preset, term_options=TERMS)


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refusal(*words, **keywords):
    with pytest.raises(OptionError) as caught:
        pretrain(*words, **keywords)
    return str(caught.value)


# ---- precedence and spelling


def test_later_options_win(recipe):
    first = recipe("epochs: 1\nblr: 1.0e-3\nseed: 1\nwarmup_epochs: 0\n", "first.yaml")
    second = recipe("seed: 2\nblr: 2.0e-3\n", "second.yaml")
    for config in (["-c", first, second], ["-c", first, "-c", second], ["--config", first, "--config", second]):
        options = pretrain("--blr", "3e-3", *config, "--blr", "4e-3")
        assert (options.epochs, options.seed, options.blr, options.weight_decay) == (1, 2, 4e-3, 0.05)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--data-path", "x-y"], "data_path", "x-y"),
        (["--data-dir=x_y"], "data_path", "x_y"),
        (["--img-size", "64"], "input_size", (64, 64)),
        (["--input_size", "160x96"], "input_size", (160, 96)),
        (["--input_size", "160", "96"], "input_size", (160, 96)),
        (["-b", "32"], "batch_size", 32),
        (["-j", "3"], "num_workers", 3),
        (["--workers", "3"], "num_workers", 3),
        (["--grad-accum-steps", "2"], "accum_iter", 2),
        (["--output", "here"], "output_dir", "here"),
        (["--norm_pix_loss"], "norm_pix_loss", True),
        (["--norm-pix-loss", "true"], "norm_pix_loss", True),
        (["--norm_pix_loss", "False"], "norm_pix_loss", False),
        (["--norm_pix_loss", "--no_norm_pix_loss"], "norm_pix_loss", False),
        (["--no-pin-mem"], "pin_mem", False),
        (["--blr", "5e-5"], "blr", 5e-5),
        (["--mean", ".1", "-2e-1", "0.3"], "mean", (0.1, -0.2, 0.3)),
        (["--mean=-0.1,0.2,0.3"], "mean", (-0.1, 0.2, 0.3)),
        (["--mean", ""], "mean", ()),
        (["--allow_change", "lr", "seed"], "allow_change", ("lr", "seed")),
    ],
)
def test_flags(words, name, value):
    assert getattr(pretrain(*words), name) == value


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("blr: 5e-5", "blr", 5e-5),  # text to PyYAML
        ("blr: 5.0e-5", "blr", 5e-5),
        ("lr: 1", "lr", 1.0),
        ("input_size: 64", "input_size", (64, 64)),
        ("input_size: 160x96", "input_size", (160, 96)),
        ("input_size: [160, 96]", "input_size", (160, 96)),
        ("in_chans: 1\nmean: 3e-1", "mean", (0.3,)),
        ("mean: [0.1, 2e-1, 1]", "mean", (0.1, 0.2, 1.0)),
        ("amp: none", "amp", "none"),
        ("data-path: somewhere", "data_path", "somewhere"),
        ("norm_pix_loss: yes", "norm_pix_loss", True),
        ("lamda: 1e-4", "terms", {"neighbor": {"weight": 1e-4, "relation": "off_diagonal", "detached": True}}),
        ("", "epochs", 400),
        ("# only a comment", "epochs", 400),
    ],
)
def test_recipes(recipe, text, name, value):
    found = getattr(pretrain("-c", recipe(text)), name)
    assert found == value and type(found) is type(value)


def test_defaults_are_the_papers():
    options = pretrain()
    assert (options.method, options.model) == ("nor_mae", "mae_vit_tiny_patch16")
    assert (options.blr, options.weight_decay, options.warmup_epochs, options.mask_ratio) == (1.5e-4, 0.05, 40, 0.75)
    assert (options.input_size, options.in_chans, options.min_scale, options.hflip) == ((224, 224), 3, 0.2, 0.5)


# ---- terms


def test_a_method_brings_its_terms_spelled_out():
    default = {"weight": 5e-5, "relation": "off_diagonal", "detached": True}
    assert pretrain().terms == {"neighbor": default}
    assert pretrain("--method", "mae").terms == {}
    assert pretrain("--method", "weak_mae").terms == {"neighbor": default | {"weight": 1e-6}}


@pytest.mark.parametrize("flag", ["--terms.neighbor.weight", "--nor_weight", "--nor-weight", "--lamda"])
@pytest.mark.parametrize("value", ["-5e-5", "1e-4", "-.5"])
def test_the_weight_of_the_neighbour_term(flag, value):
    for words in ([flag, value], [f"{flag}={value}"]):
        assert pretrain(*words).terms["neighbor"]["weight"] == float(value)


def test_recipes_change_add_and_remove_terms(recipe):
    change = recipe("terms: {neighbor: {weight: 1e-4}}", "change.yaml")
    add = recipe("terms: {label: {classes: 10}}", "add.yaml")
    remove = recipe("terms: {neighbor: null}", "remove.yaml")
    assert pretrain("-c", change).terms["neighbor"]["weight"] == 1e-4
    assert pretrain("-c", change, add).terms["label"] == {"weight": 0.01, "classes": 10}
    removed = pretrain("-c", change, add, remove)
    assert removed.terms == {"neighbor": None, "label": {"weight": 0.01, "classes": 10}}
    again = recipe(yaml.safe_dump(to_dict(removed)), "options.yaml")
    assert pretrain("-c", again) == removed
    assert pretrain("-c", add, recipe("terms: {label: null}", "without.yaml")).terms == pretrain().terms
    assert pretrain("-c", remove, "--terms", "{neighbor: {}}").terms["neighbor"]["weight"] == 5e-5
    assert pretrain("-c", add, "--terms.label.classes", "none").terms["label"]["classes"] is None
    assert pretrain("-c", change, "--terms.neighbor.detached", "false").terms["neighbor"]["detached"] is False


def test_an_option_of_a_term_that_is_not_there_is_an_unknown_key(recipe):
    for words in (["--method", "mae", "--lamda", "1"], ["-c", recipe("terms: {neighbor: null}"), "--nor_weight", "1"]):
        assert "unknown key 'terms.neighbor.weight'; the terms of this run are: none" in refusal(*words)
    assert "unknown key 'terms.label.weight'; the terms of this run are: neighbor" in refusal("--terms.label.weight=1")


def test_a_term_may_demand_an_option():
    @dataclass(frozen=True)
    class Teacher:
        checkpoint: str
        """Where the teacher comes from."""

    def taught(*words):
        return parse(Pretrain, words, preset=lambda _: {"terms": {"teacher": {}}}, term_options={"teacher": Teacher})

    assert taught("--terms.teacher.checkpoint", "best.pth").terms == {"teacher": {"checkpoint": "best.pth"}}
    with pytest.raises(OptionError, match="terms.teacher.checkpoint must be given: Where the teacher comes from."):
        taught()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{neighbour: {}}", "unknown key 'terms.neighbour'; did you mean 'terms.neighbor'?"),
        ("{neighbor: {wait: 1}}", "unknown key 'terms.neighbor.wait'; did you mean 'terms.neighbor.weight'?"),
        ("{neighbor: {weight: heavy}}", "terms.neighbor.weight: expected a number, found 'heavy'"),
        ("{neighbor: {relation: diagonal}}", "expected one of off_diagonal, alignment, found 'diagonal'"),
        ("{neighbor: 5}", "terms.neighbor: expected a mapping of names to values, found 5"),
        ("{neighbor: {weight: 13}}", "terms.neighbor: 13 is unlucky"),
        ("{label: }", "terms.label: null removes a term, but the run does not have it; {} adds it"),
        ("neighbor", "terms: expected a mapping of names to values, found 'neighbor'"),
        ("[neighbor]", "terms: expected a mapping of names to values, found ['neighbor']"),
    ],
)
def test_wrong_terms(recipe, text, message):
    file = recipe(f"terms: {text}")
    assert message in refusal("-c", file) and refusal("-c", file).startswith(file)
    assert message in refusal("--terms", text) and refusal("--terms", text).startswith("command line")


def test_the_real_menu():
    term_options = methods.term_options()

    def real(*words):
        return methods.parse_options(words)

    neighbor = real().terms["neighbor"]
    assert neighbor["weight"] == 5e-5 and neighbor["cnp"] == "closest" and neighbor["relation"] == "off_diagonal"
    assert set(neighbor) == {field.name for field in fields(term_options["neighbor"])}
    assert real("--method", "nor_mae_released").terms["neighbor"]["cnp"] == "released"
    assert real("--method", "mae").terms == {}
    for words in (["--terms.neighbor.relation", "diagnal"], ["--method", "nor_mea"]):
        with pytest.raises(OptionError):
            real(*words)
    for name, kind in term_options.items():
        assert all(documentation(kind).values()), f"an option of {name} has no documentation"


# ---- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("qwerty: 3", "unknown key 'qwerty'"),
        ("epochs: true", "epochs: expected a whole number, found true"),
        ("epochs: 2.0", "epochs: expected a whole number, found 2"),
        ("epochs: many", "epochs: expected a whole number, found 'many'"),
        ("epochs:", "epochs: expected a whole number, found nothing"),
        ("blr: true", "blr: expected a number, found true"),
        ("blr: .nan", "blr: expected a number, found nan"),
        ("blr: inf", "blr: expected a number, found 'inf'"),
        ("norm_pix_loss: 1", "norm_pix_loss: expected true or false, found 1"),
        ("data_path: 2024", "data_path: expected text, found 2024; put it in quotes"),
        ("data_path: 2024-01-02", "data_path: expected text, found 2024-01-02; put it in quotes"),
        ("data_path: 2024-31-02", "not valid YAML"),
        ("input_size: [1, 2, 3]", "input_size: expected 2 items, each a whole number, found [1, 2, 3]"),
        ("input_size: [224.5, 2]", "input_size: expected 2 items, each a whole number, found [224.5, 2]"),
        ("mean: {red: 1}", "mean: expected a list, each a number, found {red: 1}"),
        ("amp: half", "amp: expected one of auto, bf16, fp16, none, found 'half'"),
        ("device: off", "device: expected text, found false"),
        ("method: nor_mea", "unknown method 'nor_mea'; did you mean 'nor_mae'?"),
        ("method: 3", "method: expected text, found 3"),
        ("epochs: 3\nseed: 1\nepochs: 4", "line 3: epochs is given twice"),
        ("terms: {neighbor: {weight: 1, weight: 2}}", "line 1: weight is given twice"),
        ("data_dir: here\ndata_path: there", "data_path is given twice"),
        ("world_size: 8", "there is no option 'world_size' here; use torchrun"),
        ("config: base.yaml", "unknown key 'config'"),
        ("1: 2", "an option name must be a string, found 1"),
        ("[epochs, 3]", "expected lines of `option: value`, found ['epochs', 3]"),
        ("epochs: [", "not valid YAML"),
        ("epochs: !!python/name:os.system", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(recipe, text, message):
    file = recipe(text)
    found = refusal("-c", file)
    assert found.startswith(file + ": ") and message in found


def test_a_wrong_value_is_refused_even_where_a_later_one_replaces_it(recipe):
    assert "found 'many'" in refusal("-c", recipe("epochs: many"), "--epochs", "3")


def test_a_recipe_that_cannot_be_read(recipe, tmp_path):
    recipe("epochs: 3", "nor_mae_vit_tiny_in1k.yaml")
    missing = refusal("-c", str(tmp_path / "nor_mae_vit_tny_in1k.yaml"))
    assert "No such file" in missing and "did you mean 'nor_mae_vit_tiny_in1k.yaml'?" in missing
    assert "Is a directory" in refusal("-c", str(tmp_path))
    (tmp_path / "model.pth").write_bytes(b"\x80\x02\xff")
    assert "not a text file" in refusal("-c", str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epoch 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("--batch-sise=3", "unknown key 'batch_sise'; did you mean 'batch_size'?"),
        ("-epochs 3", "-epochs needs two dashes: --epochs"),
        ("--terms.neighbor.wait 1", "unknown key 'terms.neighbor.wait'; did you mean 'terms.neighbor.weight'?"),
        ("epochs=3", "unexpected argument 'epochs=3'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--epochs x", "epochs: expected a whole number, found 'x'"),
        ("--norm_pix_loss maybe", "norm_pix_loss: expected true or false, found 'maybe'"),
        ("--method maee", "unknown method 'maee'; did you mean 'mae'?"),
        *((f"--{flag} 1", "use torchrun") for flag in ("dist_url", "world_size", "local_rank", "local-rank")),
        ("--dist_on_itp", "use torchrun"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(words, message):
    found = refusal(*words.split())
    assert found.startswith("command line: ") and message in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask_ratio 0", "mask_ratio: must be more than 0, or no patch is masked"),
        ("--mask_ratio 1", "mask_ratio: must be less than 1, or no patch is visible"),
        ("--mask_ratio 1.5", "mask_ratio: must be from 0 to 1, found 1.5"),
        ("--epochs 0", "epochs: must be at least 1, found 0"),
        ("--lr -1", "lr: must be at least 0, found -1"),
        ("--blr 0", "lr: is 0, and so is blr"),
        ("--lr 1e-4 --min_lr 1e-3", "min_lr: 0.001 is more than lr 0.0001"),
        ("--input_size 0", "input_size: must be at least 1 pixel"),
        ("--mean .5 .5", "mean: 2 values for in_chans 3"),
        ("--in_chans 4 --std .5 .5 .5", "std: 3 values for in_chans 4"),
        ("--std 1 0 1", "std: must be positive"),
        ("--total_batch_size 100 --batch_size 30", "total_batch_size: 100 is not a multiple of batch_size 30"),
        ("--total_batch_size 60 --batch_size 30 --accum_iter 4", "not a multiple of batch_size 30 x accum_iter 4"),
        ("--batch_size -3", "batch_size: must be at least 0, found -3"),
        ("--min_scale 0", "min_scale: must be more than 0"),
        ("--device cpu --amp fp16", "amp: fp16 is for GPUs"),
        ("--dataset digits --data_path /images", "data_path: dataset digits reads no folder"),
        ("--overwrite --resume last.pth", "overwrite: starts from scratch"),
        ("--allow_change epoch", "allow_change: no option 'epoch' here; did you mean 'epochs'?"),
        ("--allow_change depth", "allow_change: depth decides which tensors a checkpoint holds"),
        ("--allow_change terms.label.weight", "allow_change: no option 'terms.label.weight' here"),
        ("--seed -1", "seed: must be from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    assert message in refusal(*words.split())


def test_a_conflict_is_reported_with_its_sources(recipe):
    one, two = recipe("total_batch_size: 100", "one.yaml"), recipe("batch_size: 8", "two.yaml")
    assert refusal("-c", one, two).startswith(f"{one}, {two}: total_batch_size: 100 ")
    assert refusal("-c", one, "--batch_size", "8").startswith(f"{one}, command line: ")


def test_terms_may_be_excused_by_their_options():
    assert pretrain("--allow_change", "terms.neighbor.weight", "blr").allow_change == ("terms.neighbor.weight", "blr")


# ---- a schema of another command


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(RunOptions):
    """Train a linear classifier."""

    epochs: int = result(90)
    checkpoint: str = result("", section="Encoder")
    """Where the encoder comes from."""
    pool: Literal["avg", "token"] = result("avg")
    """What is classified."""
    ema: float | None = machine(None)
    """Decay of averaged weights."""


def test_other_commands_share_the_options_and_have_their_own_defaults():
    options = parse(ProbeOptions, ["--pool", "token", "-b", "8", "--ema", "0.99"])
    assert (options.epochs, options.pool, options.batch_size, options.ema) == (90, "token", 8, 0.99)
    assert documentation(ProbeOptions)["epochs"] == documentation(RunOptions)["epochs"] != ""
    assert resolve_batch(options, 2).total_batch_size == 16
    with pytest.raises(OptionError, match="unknown key 'mask_ratio'"):
        parse(ProbeOptions, ["--mask_ratio", "0.5"])
    with pytest.raises(OptionError, match="unknown key 'lamda'"):
        parse(ProbeOptions, ["--lamda", "0.5"])
    with pytest.raises(OptionError, match="ema: expected a number or none, found 'x'"):
        parse(ProbeOptions, ["--ema", "x"])


# ---- help and documentation


def shown_help(capsys, parse_words, *words):
    with pytest.raises(SystemExit) as end:
        parse_words(*words)
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("word", ["--help-all", "--help_all"])
def test_help_all_shows_every_option_with_its_documentation(capsys, word):
    text = shown_help(capsys, pretrain, "--epochs", "3", word)
    for schema, prefix in ((Pretrain, ""), (Neighbor, "terms.neighbor."), (Label, "terms.label.")):
        for name, meaning in documentation(schema).items():
            assert f"--{prefix}{name}" in text and meaning.replace("`", "'") in text
    groups = ("Data:", "Model:", "Training:", "Run:", "Machine:", "Expert: Decoder:", "Expert: Run folder:")
    places = [text.index(f" {title} --") for title in groups]
    assert places == sorted(places)
    for name in documentation(Pretrain):
        assert text.count(f" --{name} ") + text.count(f" --{name}, ") == 1, name


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_the_common_options_and_counts_the_others(capsys, word):
    text = shown_help(capsys, pretrain, word)
    common = [name for names in RunOptions.COMMON.values() for name in names]
    names = [*documentation(Pretrain), *(f"terms.neighbor.{name}" for name in documentation(Neighbor))]
    names += [f"terms.label.{name}" for name in documentation(Label)]
    for name in names:
        assert (f" --{name} " in text or f" --{name}, " in text) == (name in common), name
    hidden = sum(name not in common for name in names)
    assert f"--help-all also lists the {hidden} expert options" in text and "Expert" not in text
    assert "Expert" not in shown_help(capsys, lambda *words: methods.parse_options(words), word)  # repeated terms


@pytest.mark.parametrize(
    ("method", "name", "default"),
    [
        ("dino", "blr", "0.0005"),
        ("mae", "blr", "0.00015"),
        ("amd", "mask_ratio", "0.9"),
        ("mae_lite_distill", "terms.teacher.distance", "l2"),
    ],
)
def test_help_shows_the_defaults_of_the_method(capsys, method, name, default):
    text = shown_help(capsys, lambda *words: methods.parse_options(words), "--method", method, "--help-all")
    assert re.search(rf" --{name} .*?\(default: ([^;]*);", text)[1] == default


def test_help_of_every_program_names_only_options_that_exist(capsys):
    found = set()
    for schema in [*map(methods.schema, ("mae", "dino")), FinetuneOptions, options_module.ProbeOptions, SegmentOptions]:
        text = shown_help(capsys, lambda *words, schema=schema: parse(schema, words), "--help")
        found |= {name for name in field_types(schema) if f"--{name} " in text or f"--{name}, " in text}
        assert {"data_path", "model", "epochs", "blr", "output_dir", "device"} <= found
    everywhere = {name for names in RunOptions.COMMON.values() for name in names if "." not in name}
    assert everywhere - {"terms"} <= found, "a common option that no program has"


def test_every_option_of_a_method_is_in_a_group_of_its_own():
    """Without its own section, the first option of a method would be in the program's last group of options."""
    for name in methods.METHODS:
        groups = _sections(methods.schema(name))
        own, program = set(methods.own_options(name)), {field.name for field in fields(methods.PretrainOptions)}
        for title, listed in groups.items():
            kinds = {field.name in own - program for field in listed}
            assert len(kinds) == 1, f"{name}: group {title} mixes options of the method and of the program"


@pytest.mark.parametrize("schema", [*SCHEMAS, *map(methods.schema, methods.METHODS)])
def test_every_field_is_documented_and_of_a_kind(schema):
    for field in fields(schema):
        assert field.metadata["kind"] in ("result", "shape", "machine")
        assert documentation(schema)[field.name].endswith((".", "?")), f"{field.name} has no documentation"


def test_the_table_of_a_program_beside_another_has_what_differs_in_default_or_meaning():
    table = option_table(SegmentOptions, beside=methods.PretrainOptions)
    assert "decays polynomially" in table and "| `dataset` | auto | result | How data_path is read; `ade20k`" in table
    assert "`weight_decay`" not in table


def test_the_table_for_the_readme():
    lines = option_table(Pretrain, TERMS).splitlines()
    assert lines[0] == "| option | default | kind | meaning |"
    assert len(lines) == 2 + len(fields(Pretrain)) + len(fields(Neighbor)) + len(fields(Label))
    meaning = documentation(Pretrain)["blr"]
    assert f"| `blr` | 0.00015 | result | {meaning} |" in lines
    assert "| `terms.neighbor.weight` | 5e-05 | result | How much it counts. |" in lines


def test_nearest():
    assert nearest("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert nearest("zzz", ["epochs", "seed"]) == ""


# ---- plain data


def test_options_survive_yaml_and_json(recipe):
    options = pretrain("--input_size", "160x96", "--lamda", "1e-4", "--allow_change", "lr")
    plain = to_dict(options)
    assert from_dict(Pretrain, plain) == options
    assert from_dict(Pretrain, json.loads(json.dumps(plain))) == options
    assert from_dict(Pretrain, yaml.safe_load(yaml.safe_dump(plain))) == options
    assert pretrain("-c", recipe(yaml.safe_dump(plain))) == options  # a run's options.yaml is a recipe
    with pytest.raises(OptionError, match="unknown key 'epoch'; did you mean 'epochs'"):
        from_dict(Pretrain, {"epoch": 3})
    with pytest.raises(OptionError, match="epochs: expected a whole number"):
        from_dict(Pretrain, {"epochs": "three"})


def test_options_made_in_python_are_checked_too():
    assert Pretrain(input_size=64, mean=[0, 0, 0]).input_size == (64, 64)
    with pytest.raises(OptionError, match="amp: expected one of"):
        Pretrain(amp="int8")
    with pytest.raises(OptionError, match="mask_ratio"):
        replace(Pretrain(), mask_ratio=1.0)


@pytest.mark.parametrize("name", ["vit_base_patch16", "mae_vit_base_patch16", "mae_vit_base_patch16_dec512d8b"])
def test_the_names_of_models_in_mae_are_accepted(name):
    assert pretrain("--model", name).model == "mae_vit_base_patch16"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mae_vit_bse_patch16", "did you mean 'mae_vit_base_patch16'"),
        ("resnet50", "a model is mae_vit_SIZE_patchP"),
        ("mae_vit_mini_patch0", ""),
    ],
)
def test_an_unknown_model_is_refused_before_data_is_read(name, hint):
    assert f"unknown model '{name}'" in (message := refusal("--model", name)) and hint in message


def test_the_options_know_the_sizes_of_models():
    assert tuple(models_vit.SIZES) == options_module.SIZES


@pytest.mark.parametrize(
    ("term", "given", "kept"),
    [
        ("neighbor", {}, {}),
        ("neighbor", {"border": "natural"}, {}),  # what `auto` means
        ("neighbor", {"weight": 1e-3, "fraction": 1.0}, {"weight": 1e-3}),
        ("neighbor", {"cnp": "released"}, {"cnp": "released", "border": "wrap"}),
        ("teacher", {"checkpoint": "dmae.pth"}, {"checkpoint": "dmae.pth"}),
    ],
)
def test_changed_returns_the_options_that_differ_from_the_defaults(term, given, kept):
    declared = methods.TERMS[term].Options
    assert changed(declared, to_dict(declared(**given))) == kept


def test_differences_are_of_results_only():
    old = to_dict(pretrain("--num_workers", "1", "--lr", "1e-3"))
    new = to_dict(pretrain("--num_workers", "2", "--lr", "2e-3", "--depth", "3", "--lamda", "1e-4"))
    assert differences(Pretrain, old, new) == [
        Difference("lr", 1e-3, 2e-3, "result"),
        Difference("depth", 0, 3, "shape"),
        Difference("terms.neighbor.weight", 5e-5, 1e-4, "result"),
    ]
    assert differences(Pretrain, old, json.loads(json.dumps(old))) == []
    assert differences(Pretrain, {name: value for name, value in old.items() if name != "seed"}, old) == []


def test_a_term_more_is_another_model():
    mae, nor = to_dict(pretrain("--method", "mae")), to_dict(pretrain())
    found = {difference.name: difference for difference in differences(Pretrain, mae, nor)}
    assert found["terms.neighbor"] == Difference("terms.neighbor", None, nor["terms"]["neighbor"], "shape")
    assert found["method"].kind == "shape" and len(found) == 2
    assert not differences(Pretrain, mae, {**mae, "terms": {"label": None}})


# ---- batches


@pytest.mark.parametrize(
    ("given", "processes", "resolved"),
    [
        ({}, 2, (128, 64, 1)),
        ({"batch_size": 32, "accum_iter": 2}, 2, (128, 32, 2)),
        ({"total_batch_size": 4096}, 1, (4096, 256, 16)),
        ({"total_batch_size": 4096}, 8, (4096, 256, 2)),
        ({"total_batch_size": 128}, 1, (128, 128, 1)),
        ({"total_batch_size": 600}, 2, (600, 150, 2)),
        ({"total_batch_size": 4096, "batch_size": 512}, 4, (4096, 512, 2)),
        ({"total_batch_size": 4096, "accum_iter": 4}, 4, (4096, 256, 4)),
        ({"total_batch_size": 4096, "batch_size": 1024, "accum_iter": 2}, 2, (4096, 1024, 2)),
    ],
)
def test_the_batch_is_computed_for_any_number_of_processes(given, processes, resolved):
    options = resolve_batch(Pretrain(**given), processes)
    assert (options.total_batch_size, options.batch_size, options.accum_iter) == resolved


@pytest.mark.parametrize(
    ("given", "processes", "message"),
    [
        ({"total_batch_size": 100}, 8, "100 does not divide into 8 processes"),
        ({"total_batch_size": 4}, 8, "4 does not divide into 8 processes"),
        ({"total_batch_size": 4096, "batch_size": 1024}, 8, "each process takes 512, which batch_size must divide"),
        ({"total_batch_size": 96, "accum_iter": 32}, 8, "accum_iter 32 x 8 processes"),
        ({"total_batch_size": 96, "batch_size": 16, "accum_iter": 2}, 2, "batch_size 16 x accum_iter 2 x 2 processes"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(given, processes, message):
    with pytest.raises(OptionError, match=message):
        resolve_batch(Pretrain(**given), processes)


# ---- every option is used


def unread_options(schema: type) -> set[str]:
    """Return the options of `schema` that neither its program nor an imported module reads.

    An option is read by `options.NAME`, also as an attribute as in `self.options.NAME`, by `getattr(options, "NAME")`,
    or by a tuple `names = ("NAME", ...)` of options that are read in a loop. Writing all options to a file, or
    comparing them, does not count.
    """
    modules = {".".join(p.relative_to(PROJECT).with_suffix("").parts): p for p in PROJECT.glob("*.py")}
    modules |= {f"{room}.{p.stem}": p for room in ("programs", "util", "data") for p in PROJECT.glob(f"{room}/*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    scripts = [
        name for name, tree in trees.items() if name.startswith("programs.") and schema.__name__ in imported_names(tree)
    ]
    assert scripts, f"no command takes {schema.__name__}"
    reached: set[str] = set()
    while scripts:
        name = scripts.pop()
        if name in trees and name not in reached:
            reached.add(name)
            scripts += imported_names(trees[name])
    read = {option for name in reached for option in options_read(trees[name])}
    return {field.name for field in fields(schema)} - read


def imported_names(tree: ast.AST) -> set[str]:
    """Return all modules and names that a file imports, names also with their module: `util`, `data`, `data.loader`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(alias.name for alias in node.names)}
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def options_read(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="options") | ast.Attribute(attr="options"), ctx=ast.Load()):
                yield name
            case ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="options"), ast.Constant(value=name), *_]):
                yield name
            case ast.Assign(targets=[ast.Name(id="names")], value=ast.Tuple(elts=elements)):
                yield from (element.value for element in elements if isinstance(element, ast.Constant))


@pytest.mark.parametrize("schema", [schema for schema in SCHEMAS if not schema.__subclasses__()])
def test_every_option_is_read_by_something(schema):
    assert unread_options(schema) == set()


@pytest.mark.parametrize("declared", dict.fromkeys(entry.options for entry in methods.METHODS.values()))
def test_every_option_of_a_method_is_read_by_its_model(declared):
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PROJECT.glob("models_*.py")]
    assert {field.name for field in fields(declared)} <= {name for tree in trees for name in options_read(tree)}


def test_the_search_for_readers_tells_reading_from_naming():
    tree = ast.parse(
        "a = options.lr + run.options.seed\noptions.epochs = 3\nkeep, b = other.blr, getattr(options, 'amp')"
    )
    assert set(options_read(tree)) == {"lr", "seed", "amp"}


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--nproc_per_node", "8"], "torchrun --nproc_per_node N"),
        (["--sched", "cosine"], "linear warm-up and half a cosine"),
        (["--opt", "adamw"], "main_finetune.py has optimizer"),
        (["--pretrained"], "init_from"),
        (["--device", "gpu"], "expected auto, cpu, cuda, cuda:N or mps, found 'gpu'"),
    ],
)
def test_flags_of_other_programs_are_refused_with_advice(words, advice):
    with pytest.raises(OptionError, match=re.escape(advice)):
        methods.parse_options(words)


@pytest.mark.parametrize(
    ("schema", "words", "advice"),
    [
        (SegmentOptions, ["--sched", "cosine"], "a linear warm-up and polynomial decay, see power"),
        (options_module.ProbeOptions, ["--opt", "adamw"], "LARS is used"),
    ],
)
def test_the_advice_is_that_of_the_program(schema, words, advice):
    with pytest.raises(OptionError, match=advice):
        parse(schema, words)


def test_flags_that_users_of_timm_know():
    options = methods.parse_options(["--learning-rate", "1e-3", "--wd", "0.1", "--device", "cuda:1"])
    assert (options.lr, options.weight_decay, options.device) == (1e-3, 0.1, "cuda:1")
    assert parse(FinetuneOptions, ["--opt", "sgd"]).optimizer == "sgd"
