"""The menu: each method's decoder and terms with the paper's weights, and `build` to make a model of it.

A new term: write it in its paper's file, add it to `TERMS`, name it in a method's preset. A new decoder: a subclass of MaskedAutoencoderViT
that overrides `build_decoder` and `decode`, named in a method.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from models_mae import MaskedAutoencoderViT, Term
from models_nor_mae import NeighborTerm
from models_vit import SIZES, parse_name


@dataclass(frozen=True)
class Method:
    """A decoder (as the class that has it) and terms with the options in which they differ from their defaults."""

    decoder: type[MaskedAutoencoderViT] = MaskedAutoencoderViT
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    note: str = ""


TERMS: dict[str, type[Term]] = {term.name: term for term in (NeighborTerm,)}

METHODS: dict[str, Method] = {
    "mae": Method(note="MAE: reconstruction alone"),
    "nor_mae": Method(terms={"neighbor": {}}, note="NoR-MAE as its paper describes it: true closest neighbours, natural borders"),
    "nor_mae_released": Method(terms={"neighbor": {"cnp": "released"}}, note="NoR-MAE as released: another gather axis, wrapped borders"),
    "noa_mae": Method(terms={"neighbor": {"relation": "alignment"}}, note="the supplement's neighbour alignment, at the literal weight 5e-5"),
    "random_asymmetry_mae": Method(terms={"neighbor": {"companion": "random"}}, note="the supplement's control: a second random mask as companion"),
}

DECODERS: dict[str, tuple[int, int, int]] = {  # channels, blocks, heads
    "tiny": (192, 8, 12),
    "small": (256, 8, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}

DEFAULTS: dict[str, Any] = {  # 0 or None: the model's own
    "input_size": 0,
    "in_chans": 0,
    "embed_dim": 0,
    "depth": 0,
    "num_heads": 0,
    "decoder_embed_dim": 0,
    "decoder_depth": 0,
    "decoder_num_heads": 0,
    "mlp_ratio": 0,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
    "grad_checkpointing": False,
    "terms": None,
}


def preset(method: str) -> dict[str, Any]:
    """What the method settles before any recipe or flag: `{"terms": {name: {option: value}}}`."""
    if method not in METHODS:
        raise ValueError(_unknown("method", method, METHODS))
    return {"terms": copy.deepcopy(METHODS[method].terms)}


def build(method: str, model: str = "mae_vit_tiny_patch16", **overrides: Any) -> MaskedAutoencoderViT:
    """The model of a method at a size, `mae_vit_<tiny|small|base|large|huge>_patch<pixels>`.

    Overrides are `input_size` (one side in pixels, or height and width), `in_chans`, `embed_dim`, `depth`, `num_heads`, `decoder_embed_dim`,
    `decoder_depth`, `decoder_num_heads`, `mlp_ratio`, `mask_ratio`, `norm_pix_loss`, `grad_checkpointing` and `terms`; 0 or None for a size
    means the model's own. `terms` `{name: {option: value}}` goes over the method's own, option by option; None for a name removes the term.
    Unknown names and impossible sizes raise ValueError.
    """
    terms = build_terms(method, overrides.get("terms"))
    size, patch_size = parse_name(model)
    for name in overrides:
        if name not in DEFAULTS:
            raise ValueError(_unknown("option", name, DEFAULTS))
    given = {name: value for name, value in overrides.items() if value is not None}
    chosen = {**DEFAULTS, **given}
    encoder = SIZES[size]
    decoder_embed_dim, decoder_depth, decoder_num_heads = DECODERS[size]
    built = METHODS[method].decoder(
        img_size=_pixels(chosen["input_size"] or 224),
        patch_size=patch_size,
        in_chans=chosen["in_chans"] or 3,
        embed_dim=chosen["embed_dim"] or encoder.embed_dim,
        depth=chosen["depth"] or encoder.depth,
        num_heads=chosen["num_heads"] or encoder.num_heads,
        decoder_embed_dim=chosen["decoder_embed_dim"] or decoder_embed_dim,
        decoder_depth=chosen["decoder_depth"] or decoder_depth,
        decoder_num_heads=chosen["decoder_num_heads"] or decoder_num_heads,
        mlp_ratio=chosen["mlp_ratio"] or 4.0,
        norm_pix_loss=chosen["norm_pix_loss"],
        mask_ratio=chosen["mask_ratio"],
        terms=terms,
    )
    built.set_grad_checkpointing(chosen["grad_checkpointing"])
    return built


def build_terms(method: str, overrides: Mapping[str, Mapping[str, Any] | None] | None = None) -> dict[str, Term]:
    """The method's terms with the overrides applied."""
    chosen: dict[str, dict[str, Any]] = preset(method)["terms"]
    for name, options in (overrides or {}).items():
        if name not in TERMS:
            raise ValueError(_unknown("term", name, TERMS))
        if options is None:
            chosen.pop(name, None)
        else:
            chosen[name] = {**chosen.get(name, {}), **options}
    terms = {}
    for name, options in chosen.items():
        known = TERMS[name].Options.__dataclass_fields__
        for option in options:
            if option not in known:
                raise ValueError(_unknown(f"option of the term {name!r}", option, known))
        try:
            terms[name] = TERMS[name](TERMS[name].Options(**options))
        except ValueError as problem:
            raise ValueError(f"term {name!r}: {problem}") from problem
    return terms


def from_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of one of our checkpoints, in evaluation mode on the CPU, and the options it was trained with."""
    from util.checkpoint import load

    state = load(path)
    options: dict[str, Any] = state["options"]
    sizes = {name: options[name] for name in DEFAULTS if name in options and name != "terms"}
    # the stored terms are all there were: a preset's term that the run had removed must not come back
    terms = {name: options["terms"].get(name) for name in {**preset(options["method"])["terms"], **options["terms"]}}
    model = build(options["method"], options["model"], **sizes, terms=terms)
    model.load_state_dict(state["model"])
    return model.eval(), options


def _pixels(input_size: int | Iterable[int]) -> tuple[int, int]:
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(sides) != 2:
        raise ValueError(f"input_size is {input_size!r}; it must be one side in pixels or height and width")
    return sides


def _unknown(what: str, word: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(str(word), list(known), n=1)
    return f"unknown {what} {word!r}" + (f"; did you mean {near[0]!r}?" if near else f": it can be {', '.join(known)}")
