"""The registry: method name -> model class, options, terms with the paper's weights. `build` makes the model.

Importing this module imports neither torch nor timm, so that `--help` is fast: model classes are named as
"module:Class" and imported when a model is built.

To add a method, write its model in a file of its own and its options in options/, and add an entry to `METHODS`. To add
a loss term, do the same and add it to `TERMS`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from options import OptionError, PretrainOptions, nearest
from options.beit import BEiTOptions
from options.cluster_mim import ClusterMIMOptions
from options.dino import DINOOptions
from options.mae import CrossMAEOptions, MAEOptions, SimMIMOptions
from options.maskfeat import MaskFeatOptions
from options.moco_v3 import MoCoV3Options
from options.nor_mae import NeighborOptions
from options.schema import Options, chosen, compose, from_dict, get_default, parse
from options.sup_mae import LabelOptions
from options.teacher import TeacherOptions
from options.tokenizer import VQKDTokenizerOptions, VQTokenizerOptions
from options.u_mae import UniformityOptions

if TYPE_CHECKING:
    from torch import Tensor

    from models_mae import Term
    from models_vit import Pretrainer


@dataclass(frozen=True)
class Method:
    """An entry of the registry."""

    model: str | type = "models_mae:MaskedAutoencoderViT"
    """The `Pretrainer` class, or where to import it from."""
    options: type[Options] = MAEOptions
    """The class of the method's options."""
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Loss terms with the options that differ from the term's defaults."""
    note: str = ""
    """One line for people."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Options of the run for which the method has its own default."""

    def model_class(self) -> type[Pretrainer]:
        return _imported(self.model)


@dataclass(frozen=True)
class TermEntry:
    """A loss term of the registry."""

    Options: type
    """The dataclass of its options."""
    term: str | type
    """The `Term` class, or where to import it from."""

    def term_class(self) -> type[Term]:
        return _imported(self.term)


def _imported(where: str | type) -> Any:
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


TERMS: dict[str, TermEntry] = {
    "neighbor": TermEntry(NeighborOptions, "models_nor_mae:NeighborTerm"),
    "label": TermEntry(LabelOptions, "models_sup_mae:LabelTerm"),
    "uniformity": TermEntry(UniformityOptions, "models_u_mae:UniformityTerm"),
    "teacher": TermEntry(TeacherOptions, "models_teacher:TeacherTerm"),
    "teacher2": TermEntry(TeacherOptions, "models_teacher:FurtherTeacherTerm"),
    "teacher3": TermEntry(TeacherOptions, "models_teacher:FurtherTeacherTerm"),
}

MAE_LITE = {
    **{"student_tap": "attention", "teacher_tap": "attention", "student_block": -1, "teacher_block": -1},
    **{"normalize": "none", "distance": "l2", "adaptor": "heads"},
}
"""MAE-Lite: logits of the last blocks' attention, the student's through a convolution over heads."""

TINY_MIM = {
    **{"extra_block": True, "teacher_block": 0.75, "adaptor": "none", "normalize": "softmax", "distance": "kl"},
}
AMD = {
    **{"teacher_input": "superset", "teacher_mask_ratio": 0.75, "normalize": "none", "distance": "l2"},
}
PROTEUS = {
    **{"student_tap": "features", "teacher_tap": "features", "teacher_input": "full", "adaptor": "norm_linear"},
    **{"normalize": "none", "distance": "l2"},
}

METHODS: dict[str, Method] = {
    "mae": Method(note="MAE: reconstruction only"),
    "nor_mae": Method(
        terms={"neighbor": {}},
        note="NoR-MAE as its paper describes it: true closest neighbours, natural borders",
    ),
    "nor_mae_released": Method(
        terms={"neighbor": {"cnp": "released"}},
        note="NoR-MAE as its released code computes it: an unintended selection, wrapped borders",
    ),
    "noa_mae": Method(
        terms={"neighbor": {"relation": "alignment"}},
        note="the supplement's alignment; at weight 5e-5 far weaker than nor_mae, at 0.0192 equal to it",
    ),
    "random_asymmetry_mae": Method(
        terms={"neighbor": {"companion": "random"}},
        note="the supplement's control: an independent second mask in place of the neighbours",
    ),
    "sup_mae": Method(terms={"label": {}}, note="SupMAE: the visible patches also predict the class"),
    "sup_nor_mae": Method(terms={"label": {}, "neighbor": {}}, note="SupMAE and NoR-MAE together"),
    "u_mae": Method(terms={"uniformity": {}}, note="U-MAE: features of different images are kept apart"),
    "dmae": Method(terms={"teacher": {}}, note="DMAE: imitates a larger, trained encoder"),
    "nor_dmae": Method(terms={"teacher": {}, "neighbor": {}}, note="DMAE and NoR-MAE together"),
    "mae_lite_distill": Method(
        terms={"teacher": MAE_LITE},
        note="MAE-Lite with distillation: imitates the attention of a teacher's last block",
    ),
    "d2_mae": Method(
        terms={"teacher": MAE_LITE | {"extra_block": True}},
        note="D2-MAE: decodes an inner block's output and imitates attention from an additional block",
        defaults={"reconstruct_block": 0.67},
    ),
    "tiny_mim": Method(
        terms={
            "teacher": TINY_MIM | {"student_tap": "attention", "teacher_tap": "attention"},
            "teacher2": TINY_MIM | {"student_tap": "values", "teacher_tap": "values"},
        },
        note="TinyMIM: imitates attention and value relations of whole images, without masks and reconstruction",
        defaults={"mask_ratio": 0.0, "reconstruction_weight": 0.0, "input_jitter": 0.4, "drop_path": 0.1},
    ),
    "g2sd": Method(
        terms={
            "teacher": {
                **{"student_tap": "decoder", "student_block": -1, "teacher_tap": "decoder", "teacher_block": 0.5},
                **{"adaptor": "mlp", "normalize": "layer_norm", "normalize_only": "teacher"},
                **{"distance": "smooth_l1", "beta": 2.0},
            }
        },
        note="G2SD, generic stage: imitates the inner decoder of a masked autoencoder",
        defaults={"reconstruction_weight": 0.0},
    ),
    "amd": Method(
        terms={
            "teacher": AMD | {"weight": 0.5, "student_block": 0.5, "teacher_block": 0.5, "tokens": "visible"},
            "teacher2": AMD | {"weight": 0.5, "student_block": -1, "teacher_block": -1, "tokens": "visible"},
            "teacher3": AMD | {"student_block": -1, "teacher_block": -1, "tokens": "extra", "adaptor": "generator"},
        },
        note="AMD: imitates a teacher that sees more patches, also on those that only the teacher sees",
        defaults={"mask_ratio": 0.9},
    ),
    "proteus": Method(
        terms={
            "teacher": PROTEUS | {"tokens": "class"},
            "teacher2": PROTEUS | {"tokens": "visible"},
            "teacher3": PROTEUS
            | {"tokens": "hidden", "masked_pass": 0.1, "masked_pass_max": 0.5, "masked_images": 0.5},
        },
        note="Proteus: imitates the features of whole images, also where the student's patches are replaced",
        defaults={"mask_ratio": 0.0, "reconstruction_weight": 0.0},
    ),
    "cross_mae": Method(
        "models_cross_mae:CrossMAE",
        CrossMAEOptions,
        note="CrossMAE: hidden patches attend to visible ones, not to each other; a third of them is predicted",
    ),
    "simmim": Method(
        "models_simmim:SimMIM",
        SimMIMOptions,
        note="SimMIM: the encoder sees every place, hidden ones replaced; the decoder is one linear layer",
    ),
    "maskfeat": Method(
        "models_maskfeat:MaskFeat",
        MaskFeatOptions,
        note="MaskFeat: as SimMIM, with blocks hidden and histograms of oriented gradients predicted",
    ),
    "beit": Method(
        "models_beit:BEiT",
        BEiTOptions,
        note="BEiT: as SimMIM, with blocks hidden and the tokens of a trained tokenizer predicted",
    ),
    "peco": Method(
        "models_beit:BEiT",
        BEiTOptions,
        note="PeCo, an interpretation: BEiT with a vq_tokenizer that was trained with a perceptual loss",
    ),
    "cluster_mim": Method(
        "models_cluster_mim:ClusterMIM",
        ClusterMIMOptions,
        note="ClusterMIM: MAE that predicts the k-means tokens of hidden patches",
    ),
    "vq_tokenizer": Method(
        "models_tokenizer:VQTokenizer",
        VQTokenizerOptions,
        note="a tokenizer for beit, peco and cluster_mim: an autoencoder of pixels with discrete codes",
    ),
    "vqkd_tokenizer": Method(
        "models_tokenizer:VQKDTokenizer",
        VQKDTokenizerOptions,
        note="BEiT v2's tokenizer: discrete codes from which a teacher's features are reconstructed",
    ),
    "moco_v3": Method(
        "models_moco_v3:MoCoV3",
        MoCoV3Options,
        defaults={"min_scale": 0.08, "weight_decay": 0.1},
        note="MoCo-v3: contrasts two augmented views of an image with those of other images",
    ),
    "dino": Method(
        "models_dino:DINO",
        DINOOptions,
        defaults={"min_scale": 0.4, "weight_decay": 0.04, "blr": 5e-4, "min_lr": 1e-6, "warmup_epochs": 10.0},
        note="DINO: small and large crops predict what a moving average of the network sees in the large ones",
    ),
}

ENCODER_OVERRIDES = (
    *("input_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "patch_stem", "grad_checkpointing"),
    *("mean", "std"),
)
"""What `build` accepts for every method, besides `terms` and the method's own options."""


# ---- options --------------------------------------------------------------------------------------------------------


def preset(method: str) -> dict[str, Any]:
    """Return what the method sets before recipes and flags: `{"terms": {name: {option: value}}}`, and other options."""
    _known("method", method, METHODS)
    return {"terms": copy.deepcopy(METHODS[method].terms), **METHODS[method].defaults}


def own_options(method: str) -> list[str]:
    """Return the names of the options that the method itself declares."""
    _known("method", method, METHODS)
    return [option.name for option in fields(METHODS[method].options)]


def schema(method: str) -> Any:
    """Return the dataclass of all options of a pretraining run with this method."""
    own = own_options(method)
    elsewhere = {option.name: option for entry in METHODS.values() for option in fields(entry.options)}
    unused = []
    for name, option in elsewhere.items():
        if name not in own:
            users = [other for other in METHODS if name in own_options(other)]
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            message = f"the method {method} does not use it; methods that do: {', '.join(users[:3])}{more}"
            unused.append((name, message, get_default(option)))
    own_class: Any = METHODS[method].options
    return compose(own_class, PretrainOptions, unused=tuple(unused), term_options=tuple(term_options().items()))


def term_options() -> dict[str, type]:
    return {name: entry.Options for name, entry in TERMS.items()}


def parse_options(argv: Sequence[str]) -> PretrainOptions:
    """Read the options of a pretraining run from a command line; the method decides which there are."""
    method, source = chosen(PretrainOptions, argv, "method")
    try:
        _known("method", method, METHODS)
    except ValueError as error:
        raise OptionError(f"{source}: {error}", "method") from None
    return parse(schema(method), argv, preset=preset, term_options=term_options())


def read_options(stored: Mapping[str, Any]) -> PretrainOptions:
    """Read the options that a run has stored, without those of other methods, which older versions stored too."""
    made = schema(stored["method"])
    elsewhere = {option for name in METHODS for option in own_options(name)} - {option.name for option in fields(made)}
    return from_dict(made, {name: value for name, value in stored.items() if name not in elsewhere})


# ---- models ---------------------------------------------------------------------------------------------------------


def build(method: str, model: str = "mae_vit_tiny_patch16", **overrides: Any) -> Pretrainer:
    """Build a method's model of a size `mae_vit_<tiny|small|base|large|huge>_patch<pixels>`.

    Args:
        method: A key of `METHODS`.
        model: Name of the encoder's size and patch size.
        overrides: `input_size` (pixels of one side, or height and width), `in_chans`, `embed_dim`, `depth`,
            `num_heads`, `mlp_ratio` (0 or None: the default of the size), `patch_stem` ("linear" or "conv"),
            `grad_checkpointing`; `mean` and `std` of the channels with which images are normalised, for teachers that
            expect others; every option that the method declares (see `own_options`); `terms`, `{name: {option: value}}`
            over the method's own, option by option, or `{name: None}` to remove a term.

    Returns:
        The model, on the CPU, with what training needs: checkpoints named in the options are read.

    Raises:
        ValueError: For an unknown name or an impossible value.
    """
    terms = build_terms(method, overrides.get("terms") or {})
    for name, term in terms.items():
        with _named(name):
            term.read_checkpoints(load_pretrained)
    built = _assemble(method, model, overrides, terms)
    built.prepare(load_pretrained, None)
    return built


def _assemble(method: str, model: str, overrides: Mapping[str, Any], terms: Mapping[str, Term]) -> Pretrainer:
    from models_vit import encoder_sizes

    own = own_options(method)
    for name, value in overrides.items():
        elsewhere = any(name in own_options(other) for other in METHODS)
        if name not in own and elsewhere and value:
            raise ValueError(f"{name} is {value}, but the method {method!r} does not use it")
        if not elsewhere:
            _known("option", name, [*ENCODER_OVERRIDES, "terms", *own])
    given = {name: value for name, value in overrides.items() if value is not None}
    entry = METHODS[method]
    own_defaults = {name: value for name, value in entry.defaults.items() if name in own}
    options = entry.options(**own_defaults | {name: value for name, value in given.items() if name in own})
    chosen_class = entry.model_class()
    more: dict[str, Any] = {"terms": terms} if chosen_class.takes_terms else {}
    if terms and not more:
        raise ValueError(f"the method {method!r} takes no loss terms, found {', '.join(terms)}")
    if given.get("patch_stem") == "conv" and not chosen_class.takes_conv_stem:
        raise ValueError(f"patch_stem is conv, and the method {method!r} only works with linear")
    built = chosen_class(**encoder_sizes(model, given), options=options, **more)
    built.set_grad_checkpointing(given.get("grad_checkpointing", False))
    if given.get("mean") and given.get("std"):
        built.learn_normalization(tuple(given["mean"]), tuple(given["std"]))
    return built


def build_terms(method: str, overrides: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Term]:
    """Build the method's terms, with `overrides` as in `build`, before they have read anything."""
    wanted = preset(method)["terms"]
    for name, options in overrides.items():
        _known("term", name, TERMS)
        wanted[name] = None if options is None else {**(wanted.get(name) or {}), **options}
    terms = {}
    for name, options in wanted.items():
        if options is None:
            continue
        declared = TERMS[name].Options
        for option in options:
            _known(f"option of the term {name!r}", option, [known.name for known in fields(declared)])
        with _named(name):
            terms[name] = TERMS[name].term_class()(declared(**options))
    return terms


@contextlib.contextmanager
def _named(term: str) -> Iterator[None]:
    """Name the term in errors that are raised inside."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"term {term!r}: {problem}") from problem


def from_options(options: Mapping[str, Any]) -> Pretrainer:
    """Build the model of a run's stored options. A term of the method that is not in their `terms` was removed.

    The model is for inspection: what only training needs, such as a teacher's checkpoint, is not read.
    """
    method = options["method"]
    wanted = [name for name in (*ENCODER_OVERRIDES, *own_options(method)) if name in options]
    terms = {name: None for name in preset(method)["terms"]} | dict(options.get("terms") or {})
    return _assemble(method, options["model"], {n: options[n] for n in wanted}, build_terms(method, terms))


def from_checkpoint(path: str | Path) -> tuple[Pretrainer, dict[str, Any]]:
    """Load the trained model of one of our checkpoints, on the CPU in evaluation mode, and its run's options."""
    from util.checkpoint import find_program, load

    state = load(path)
    if "method" not in state["options"]:
        held = {
            "finetune": "a fine-tuned model. tools.encoder.load_encoder(path) loads its encoder",
            "segment": "a segmenter. Give the checkpoint that it was trained from",
            "probe": "a linear classifier without its encoder. Give the checkpoint that it was trained on",
        }[find_program(state)]
        raise ValueError(f"{path} is not a pretraining checkpoint: it contains {held}")
    model = from_options(state["options"])
    model.load_state_dict(state["model"])
    return model.eval(), state["options"]


def encoder_weights(weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the weights of the encoder that is evaluated and exported, under plain names.

    For most methods that is all weights; for DINO it is the teacher's encoder.
    """
    from models_vit import PLAIN_TENSORS

    prefix = _trained_class(options).encoder_prefix if options.get("method") in METHODS else ""
    if not prefix:
        return weights
    plain = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in plain.items() if PLAIN_TENSORS.fullmatch(name)}


def feature_pool(options: Mapping[str, Any]) -> str:
    """Return what the features of an image are: `avg`, of the patch tokens, or `token`, the class token."""
    return _trained_class(options).feature_pool if options.get("method") in METHODS else "avg"


def load_pretrained(path: str | Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Load the weights of any checkpoint for another model to start from, and its run's options, if it is one of ours.

    The moving average of the weights, if the run has one; see also `encoder_weights`.
    """
    from util.checkpoint import load_model

    weights, options = load_model(path, averaged=True)
    return encoder_weights(weights, options), options


def _trained_class(options: Mapping[str, Any]) -> type[Pretrainer]:
    return METHODS[options["method"]].model_class()


def resolved_options(options: PretrainOptions, model: Pretrainer) -> dict[str, Any]:
    """Return the options that building and preparing the model has decided: the method's own, and its terms'."""
    terms = {name: asdict(term.options) for name, term in model.loss_terms.items()}
    return asdict(model.options) | {"terms": options.terms | terms}


def _known(what: str, word: str, words: Iterable[str]) -> None:
    """Raise ValueError, with the nearest of `words`, unless `word` is one of them."""
    if word not in words:
        raise ValueError(f"unknown {what} {word!r}; {nearest(word, words) or 'there are ' + ', '.join(words)}")
