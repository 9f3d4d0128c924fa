"""The menu: method name -> decoder and terms with the paper's weights; `build` makes the model.

To add a term, write it in its paper's file, list it in `TERMS` and name it in a method. To add a decoder, write a
subclass of MaskedAutoencoderViT that overrides `build_decoder` and `decode`, and name it in a method. Options of its
own it takes as further arguments.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from models_cross_mae import CrossMAE
from models_dmae import TeacherTerm
from models_mae import MaskedAutoencoderViT, Term
from models_nor_mae import NeighborTerm
from models_simmim import SimMIM
from models_sup_mae import LabelTerm
from models_u_mae import UniformityTerm
from models_vit import SIZES, parse_name
from options import nearest


@dataclass(frozen=True)
class Method:
    """A decoder, as the class that has it; terms, with the options that differ from the term's defaults; a note for
    people; and the run's options of which the method has its own default."""

    decoder: type[MaskedAutoencoderViT] = MaskedAutoencoderViT
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)


TERMS: dict[str, type[Term]] = {term.name: term for term in (NeighborTerm, LabelTerm, UniformityTerm, TeacherTerm)}

METHODS: dict[str, Method] = {
    "mae": Method(note="MAE: reconstruction alone"),
    "nor_mae": Method(
        terms={"neighbor": {}},
        note="NoR-MAE as its paper describes it: true closest neighbours, natural borders",
    ),
    "nor_mae_released": Method(
        terms={"neighbor": {"cnp": "released"}},
        note="NoR-MAE as its released code computes it: a selection by mistake, wrapped borders",
    ),
    "noa_mae": Method(
        terms={"neighbor": {"relation": "alignment"}},
        note="the supplement's alignment; at weight 5e-5 far weaker than nor_mae, at 0.0192 equal to it",
    ),
    "random_asymmetry_mae": Method(
        terms={"neighbor": {"companion": "random"}},
        note="the supplement's control: an independent second mask in the neighbours' place",
    ),
    "sup_mae": Method(terms={"label": {}}, note="SupMAE: the visible patches also tell the class"),
    "sup_nor_mae": Method(terms={"label": {}, "neighbor": {}}, note="SupMAE and NoR-MAE together"),
    "u_mae": Method(terms={"uniformity": {}}, note="U-MAE: features of different images are kept apart"),
    "dmae": Method(terms={"teacher": {}}, note="DMAE: a larger, trained encoder is imitated"),
    "nor_dmae": Method(terms={"teacher": {}, "neighbor": {}}, note="DMAE and NoR-MAE together"),
    "cross_mae": Method(
        decoder=CrossMAE,
        note="CrossMAE: hidden patches look at the visible ones, not at each other; a third of them is predicted",
    ),
    "simmim": Method(
        decoder=SimMIM,
        options={"mask_ratio": 0.6},
        note="SimMIM: the encoder sees the whole image with blanks; no decoder but one layer",
    ),
}

DECODERS: dict[str, tuple[int, int, int]] = {  # by size: channels, blocks, heads
    "tiny": (192, 8, 12),
    "small": (256, 8, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}

INPUT_SIZE, IN_CHANS, MLP_RATIO, MASK_RATIO = 224, 3, 4.0, 0.75

OVERRIDES = (
    "input_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "decoder_embed_dim",
    "decoder_depth",
    "decoder_num_heads",
    "mlp_ratio",
    "predict_ratio",
    "mask_cell",
    "mask_ratio",
    "norm_pix_loss",
    "grad_checkpointing",
    "terms",
)

DECODER_OPTIONS = {name for method in METHODS.values() for name in method.decoder.choices}


def preset(method: str) -> dict[str, Any]:
    """What the method brings, before recipes and flags: `{"terms": {name: {option: value}}}`, and other options."""
    _known("method", method, METHODS)
    return {"terms": copy.deepcopy(METHODS[method].terms), **METHODS[method].options}


def build(method: str, model: str = "mae_vit_tiny_patch16", **overrides: Any) -> MaskedAutoencoderViT:
    """A method's model, of a size `mae_vit_<tiny|small|base|large|huge>_patch<pixels>`.

    `overrides` are `input_size` (pixels of one side, or height and width), `in_chans`, `embed_dim`, `depth`,
    `num_heads`, `decoder_embed_dim`, `decoder_depth`, `decoder_num_heads`, `mlp_ratio` (0 or None: the size's own),
    `predict_ratio`, `mask_cell` (0 or None: the decoder's own), `mask_ratio`, `norm_pix_loss`, `grad_checkpointing` and
    `terms`: `{name: {option: value}}` over the method's own, option by option, or `{name: None}` to leave a term out.
    Checkpoints that terms learn from are read. ValueError for an unknown name or an impossible value.
    """
    terms = build_terms(method, overrides.get("terms") or {})
    for name, term in terms.items():
        with _named(name):
            term.settle(_read_checkpoint)
    return _assemble(method, model, overrides, terms)


def _read_checkpoint(path: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    from util.checkpoint import load_model  # a run's business, needed only where a term has a teacher

    return load_model(path)


def _assemble(method: str, model: str, overrides: Mapping[str, Any], terms: Mapping[str, Term]) -> MaskedAutoencoderViT:
    size, patch_size = parse_name(model)
    decoder = METHODS[method].decoder
    for name in overrides:
        _known("option", name, OVERRIDES)
        if name in DECODER_OPTIONS and overrides[name] and name not in decoder.choices:
            raise ValueError(f"{name} is {overrides[name]}, but the method {method!r} has no use for it")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    own = {name: overrides.get(name) or 0 for name in decoder.choices if name not in MaskedAutoencoderViT.choices}

    encoder, (decoder_embed_dim, decoder_depth, decoder_num_heads) = SIZES[size], DECODERS[size]
    built = decoder(
        img_size=_height_and_width(overrides.get("input_size") or INPUT_SIZE),
        patch_size=patch_size,
        in_chans=overrides.get("in_chans") or IN_CHANS,
        embed_dim=overrides.get("embed_dim") or encoder.embed_dim,
        depth=overrides.get("depth") or encoder.depth,
        num_heads=overrides.get("num_heads") or encoder.num_heads,
        decoder_embed_dim=overrides.get("decoder_embed_dim") or decoder_embed_dim,
        decoder_depth=overrides.get("decoder_depth") or decoder_depth,
        decoder_num_heads=overrides.get("decoder_num_heads") or decoder_num_heads,
        mlp_ratio=overrides.get("mlp_ratio") or MLP_RATIO,
        norm_pix_loss=overrides.get("norm_pix_loss", False),
        mask_ratio=overrides.get("mask_ratio", METHODS[method].options.get("mask_ratio", MASK_RATIO)),
        terms=terms,
        **own,
    )
    built.set_grad_checkpointing(overrides.get("grad_checkpointing", False))
    return built


def build_terms(method: str, overrides: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Term]:
    """The method's terms, with `overrides` as in `build`, before they have read anything."""
    chosen = preset(method)["terms"]
    for name, options in overrides.items():
        _known("term", name, TERMS)
        chosen[name] = None if options is None else {**(chosen.get(name) or {}), **options}
    terms = {}
    for name, options in chosen.items():
        if options is None:
            continue
        schema = TERMS[name].Options
        for option in options:
            _known(f"option of the term {name!r}", option, [known.name for known in fields(schema)])
        with _named(name):
            terms[name] = TERMS[name](schema(**options))
    return terms


@contextlib.contextmanager
def _named(term: str) -> Iterator[None]:
    """Errors inside say which term they are about."""
    try:
        yield
    except ValueError as problem:
        raise ValueError(f"term {term!r}: {problem}") from problem


def from_options(options: Mapping[str, Any]) -> MaskedAutoencoderViT:
    """The model of a run's resolved options, in which `terms` are all there are: one of the method's may be gone.

    It is for looking at: what only training needs, such as a teacher's checkpoint, is not read.
    """
    given = {name: options[name] for name in OVERRIDES if name in options}
    chosen = {name: None for name in preset(options["method"])["terms"]} | dict(given.get("terms") or {})
    return _assemble(options["method"], options["model"], given, build_terms(options["method"], chosen))


def from_checkpoint(path: str | Path) -> tuple[MaskedAutoencoderViT, dict[str, Any]]:
    """The trained model in one of our checkpoints, on the CPU in evaluation mode, and its run's options."""
    from util.checkpoint import load  # a run's business, needed by nothing else here

    state = load(path)
    model = from_options(state["options"])
    model.load_state_dict(state["model"])
    return model.eval(), state["options"]


def _height_and_width(input_size: int | Iterable[int]) -> tuple[int, int]:
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sides) != 2:
        raise ValueError(f"input_size is {list(sides)}; it is one side in pixels, or height and width")
    return sides


def _known(what: str, word: str, words: Iterable[str]) -> None:
    """ValueError, with the nearest of `words`, unless `word` is one of them."""
    if word not in words:
        raise ValueError(f"unknown {what} {word!r}; {nearest(word, words) or 'there are ' + ', '.join(words)}")
