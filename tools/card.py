"""Facts about an exported model: for programs (`facts`, export.json) and as a model card (`readme`, README.md).

Exports are shared with others. Therefore they contain nothing about the machine that trained the model: options of kind
machine are left out, and paths are reduced to file names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

import methods
from data.images import describe_eval_crop
from options import FinetuneOptions
from tools.encoder import Encoder
from tools.markdown import make_table
from util.logging import environment

MACHINE = {
    field.name
    for schema in (*map(methods.schema, methods.METHODS), FinetuneOptions)
    for field in fields(schema)
    if field.metadata["kind"] == "machine"
}


def facts(encoder: Encoder) -> dict[str, Any]:
    """Return all facts as JSON data."""
    channels, height, width = encoder.image_shape
    mean, std = encoder.statistics
    here = environment()
    return {
        "model": {
            "patch_size": encoder.arguments["patch_size"],
            "patch_stem": encoder.patch_stem,
            "embed_dim": encoder.model.embed_dim,
            "depth": len(encoder.model.blocks),
            "num_heads": encoder.heads,
            "mlp_ratio": encoder.arguments["mlp_ratio"],
            "classes": encoder.classes,
            "class_names": encoder.class_names,
            "features": encoder.pooling,
        },
        "input": {
            "channels": channels,
            "height": height,
            "width": width,
            "scale": "0 to 1, then minus mean, over std",
            "mean": list(mean),
            "std": list(std),
            "value_range": list(encoder.value_range),
            "interpolation": "bicubic, antialiased",
            "crop": encoder.crop_share,
            "eval_crop": encoder.eval_crop,
        },
        "origin": {
            "checkpoint": encoder.checkpoint.name,
            "method": encoder.method,
            "updates": encoder.updates,
            "images_seen": encoder.updates and encoder.updates * encoder.options["total_batch_size"],
            "commit": _commit(encoder.run),
            "options": {name: _names_only(value) for name, value in encoder.options.items() if name not in MACHINE},
        },
        "measured": _measured(encoder),
        "exported": {"commit": here["commit"], "versions": here["versions"]},
    }


def _commit(run: Path) -> str:
    """Return the commit of this project at the last start of the run, or an empty string."""
    file = run / "environment.json"
    return json.loads(file.read_text())[-1]["commit"] if file.is_file() else ""


def _measured(encoder: Encoder) -> dict[str, Any]:
    """Return the results in the run folder; none if the export has another input size than the run."""
    if not encoder.options or tuple(encoder.options["input_size"]) != encoder.image_shape[1:]:
        return {}
    found, run = {}, encoder.run
    if (run / "knn.json").is_file():
        found["nearest_neighbours"] = json.loads((run / "knn.json").read_text())
    if (run / "result.json").is_file():
        result = json.loads((run / "result.json").read_text())
        found |= {
            name: result[name] for name in ("accuracy", "metric", "best_chosen_on", "eval_crop") if name in result
        }
    return found


def _names_only(value: Any) -> Any:
    """Reduce absolute paths in options to file names."""
    if isinstance(value, Mapping):
        return {name: _names_only(inside) for name, inside in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def readme(encoder: Encoder, facts: Mapping[str, Any], *, library: str, usage: str, checked: str) -> str:
    """Return a model card in the format of model hubs."""
    origin, shape = facts["origin"], facts["model"]
    head = {
        "library_name": library,
        "license": "other",
        "pipeline_tag": "image-classification" if encoder.classes else "image-feature-extraction",
        "tags": ["masked-autoencoder", "vision-transformer", *([encoder.method] if encoder.options else [])],
    }
    what = f"a classifier of {encoder.classes} classes" if encoder.classes else "an encoder, without decoder or head"
    name = f"{encoder.options['model']}, {encoder.method}" if encoder.options else encoder.checkpoint.stem
    trained = f"{origin['updates']:,} updates, {origin['images_seen']:,} images" if origin["updates"] else ""
    averaged = " with the moving average of its weights" if encoder.options.get("ema") else ""
    rows = {
        "method": encoder.method,
        "encoder": f"{shape['depth']} blocks of {shape['embed_dim']} channels, {shape['num_heads']} attention heads, "
        f"patches of {shape['patch_size']} x {shape['patch_size']} pixels"
        + (", embedded by convolutions within each patch" if shape["patch_stem"] == "conv" else ""),
        "images": _images(encoder),
        "preparation": _preparation(encoder),
        "mean": ", ".join(f"{value:g}" for value in facts["input"]["mean"]),
        "std": ", ".join(f"{value:g}" for value in facts["input"]["std"]),
        "`features`": f"{encoder.pooling}; all metrics below use these" if facts["measured"] else encoder.pooling,
        "trained for": trained or "not known",
        "trained with commit": origin["commit"] or "not known",
        "exported with commit": facts["exported"]["commit"] or "not known",
        "checked": checked,
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}\n\nThis is {what}, exported from `{origin['checkpoint']}`{averaged}.",
        make_table(["", ""], list(rows.items())).rstrip(),
        f"## Use\n\n```python\n{usage.strip()}\n```\n\n`images` are prepared as the table says.",
    ]
    if encoder.class_names:
        parts.append(f"## Classes, in the order of the logits\n\n{', '.join(encoder.class_names)}")
    if facts["measured"]:
        parts.append(f"## Measured\n\n```yaml\n{_yaml(facts['measured'])}```")
    if origin["options"]:
        parts.append(f"## Training options\n\n```yaml\n{_yaml(origin['options'])}```")
    return "\n\n".join([*parts, f"## Licence\n\n{licence(encoder)}"]) + "\n"


def licence(encoder: Encoder) -> str:
    """Return a text about the licence of the weights."""
    published = "The weights published with MAE and NoR-MAE are under CC BY-NC 4.0"
    if not encoder.options:
        return (
            f"These weights were not trained by this program but converted from another's checkpoint, whose licence "
            f"stays with them. {published}."
        )
    return (
        "Those who trained these weights decide on their licence: replace `license: other` above. The program that "
        "made them is under the Apache License 2.0 and claims nothing. Data sets have terms of their own, and so do "
        f"weights that training began with or learned from (`init_from`, a teacher). {published}."
    )


def _images(encoder: Encoder) -> str:
    channels, height, width = encoder.image_shape
    return f"{channels} channel{'s' if channels > 1 else ''}, {height} x {width} pixels (rows x columns)"


def _preparation(encoder: Encoder) -> str:
    how = describe_eval_crop(encoder.image_shape[1:], encoder.crop_share, encoder.eval_crop)
    scaled = "values from 0 to 1"
    if encoder.value_range:
        low, high = encoder.value_range
        scaled = f"values of 8 bits, and {low:g} to {high:g} of others, scaled to 0 to 1"
    return f"bicubic and antialiased, keeping proportions; {how}; {scaled}, minus mean, over std"


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None, width=110)
