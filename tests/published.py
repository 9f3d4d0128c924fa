"""Reference outputs of the published programs, if NOR_MAE_VECTORS is set to a folder that contains them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from models_mae import MaskedAutoencoderViT
from options.mae import MAEOptions

FOLDER = os.environ.get("NOR_MAE_VECTORS", "")

needs_vectors = pytest.mark.skipif(not FOLDER, reason="NOR_MAE_VECTORS names no folder with reference outputs")


def read(name):
    """Return the arrays of one file as tensors."""
    return {key: torch.as_tensor(value) for key, value in np.load(Path(FOLDER, f"{name}.npz")).items()}


def model_of(vectors, **terms):
    """Return the model with the weights of the arrays, and its position tables before these were loaded."""
    size, patch, dim, depth, heads, *decoder = vectors["cfg"].tolist()
    norm_pix_loss, mask_ratio = bool(vectors["norm_pix_loss"]), float(vectors["mask_ratio"])
    names = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    options = MAEOptions(norm_pix_loss=norm_pix_loss, mask_ratio=mask_ratio, **dict(zip(names, decoder, strict=True)))
    model = MaskedAutoencoderViT(size, patch, 3, dim, depth, heads, options=options, terms=terms)
    tables = {name: model.state_dict()[name].clone() for name in ("pos_embed", "decoder_pos_embed")}
    model.load_state_dict({k.removeprefix("state:"): v for k, v in vectors.items() if k.startswith("state:")})
    return model, tables


def assert_as_published(found, model, vectors):
    """Assert that the results `found`, and all gradients in the arrays, agree within 1e-5; return their number."""
    found = found | {f"grad:{name}": p.grad for name, p in model.named_parameters() if f"grad:{name}" in vectors}
    for name, value in found.items():
        assert (value - vectors[name]).norm() <= 1e-5 * vectors[name].norm(), name
    return len(found)
