"""The menu: method name -> decoder and terms with the paper's weights; `build` makes the model.

To add a term, write it in its paper's file, list it in `TERMS` and name it in a method. To add a decoder, write a
subclass of MaskedAutoencoderViT that overrides `build_decoder` and `decode`, and name it in a method.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from models_mae import MaskedAutoencoderViT, Term
from models_nor_mae import NeighborTerm
from models_vit import SIZES, parse_name
from util.options import nearest


@dataclass(frozen=True)
class Method:
    """A decoder, as the class that has it, and terms, with the options that differ from the term's defaults."""

    decoder: type[MaskedAutoencoderViT] = MaskedAutoencoderViT
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""


TERMS: dict[str, type[Term]] = {term.name: term for term in (NeighborTerm,)}

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
}

DECODERS: dict[str, tuple[int, int, int]] = {  # by size: channels, blocks, heads
    "tiny": (192, 8, 12),
    "small": (256, 8, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}

INPUT_SIZE, IN_CHANS, MLP_RATIO = 224, 3, 4.0

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
    "mask_ratio",
    "norm_pix_loss",
    "grad_checkpointing",
    "terms",
)


def preset(method: str) -> dict[str, Any]:
    """What the method brings, before recipes and flags: `{"terms": {name: {option: value}}}`."""
    _known("method", method, METHODS)
    return {"terms": copy.deepcopy(METHODS[method].terms)}


def build(method: str, model: str = "mae_vit_tiny_patch16", **overrides: Any) -> MaskedAutoencoderViT:
    """A method's model, of a size `mae_vit_<tiny|small|base|large|huge>_patch<pixels>`.

    `overrides` are `input_size` (pixels of one side, or height and width), `in_chans`, `embed_dim`, `depth`,
    `num_heads`, `decoder_embed_dim`, `decoder_depth`, `decoder_num_heads`, `mlp_ratio` (0 or None: the size's own),
    `mask_ratio`, `norm_pix_loss`, `grad_checkpointing` and `terms`: `{name: {option: value}}` over the method's own,
    option by option, or `{name: None}` to leave a term out. ValueError for an unknown name or an impossible value.
    """
    _known("method", method, METHODS)
    size, patch_size = parse_name(model)
    for name in overrides:
        _known("option", name, OVERRIDES)
    terms = build_terms(method, overrides.get("terms") or {})

    encoder, (decoder_embed_dim, decoder_depth, decoder_num_heads) = SIZES[size], DECODERS[size]
    built = METHODS[method].decoder(
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
        mask_ratio=overrides.get("mask_ratio", 0.75),
        terms=terms,
    )
    built.set_grad_checkpointing(overrides.get("grad_checkpointing", False))
    return built


def build_terms(method: str, overrides: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Term]:
    """The method's terms, with `overrides` as in `build`."""
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
        try:
            terms[name] = TERMS[name](schema(**options))
        except ValueError as problem:
            raise ValueError(f"term {name!r}: {problem}") from problem
    return terms


def from_options(options: Mapping[str, Any]) -> MaskedAutoencoderViT:
    """The model of a run's resolved options, in which `terms` are all there are: one of the method's may be gone."""
    given = {name: options[name] for name in OVERRIDES if name in options}
    given["terms"] = {name: None for name in preset(options["method"])["terms"]} | dict(given.get("terms") or {})
    return build(options["method"], options["model"], **given)


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
