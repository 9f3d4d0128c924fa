"""Export a pretrained encoder or a fine-tuned classifier to timm, Hugging Face transformers or ONNX.

    python -m tools.export timm output/mine                      # a folder for timm.create_model("local-dir:...")
    python -m tools.export hf output/mine --output FOLDER        # a folder for transformers' from_pretrained
    python -m tools.export onnx output/mine --input_size 160x96  # a graph for ONNX Runtime, for images of another size
    python -m tools.export timm mae_pretrain_vit_base.pth        # a checkpoint of another MAE

The export is loaded with the library that it is made for, and its outputs must agree with those of the trained model to
within 1e-5; otherwise nothing is kept. The folder also contains export.json, with the facts that programs need to use
the model, and a model card, README.md. hf and onnx need `pip install -r requirements/export.txt`.

N images   L patches   D channels
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from data.files import new_folder, write_json, write_text
from options.schema import read
from tools import card, export_segmenter, segmenter
from tools import encoder as encoders
from tools.command import reports_errors
from tools.encoder import Encoder
from util import checkpoint
from util.extras import EXPORT_PACKAGES, require_packages
from util.logging import log_to_terminal

TIMED_RUNS, TIMED_SECONDS = 50, 5.0

Outputs = Callable[[Tensor], Mapping[str, Tensor]]
"""A function from normalised images to the outputs of an `Encoder`, or some of them."""


@dataclass(frozen=True)
class Format:
    """An export format."""

    library: str
    """The library that loads it."""
    write: Callable[[Encoder, Path], None]
    read: Callable[[Path], Outputs]
    usage: Callable[[Encoder], str]
    """Code that loads it, for the model card; FOLDER stands for the export."""


# ---- timm ------------------------------------------------------------------------------------------------------------


def write_timm(encoder: Encoder, folder: Path) -> None:
    """Write model.safetensors and config.json, which records what weights do not show, such as the number of heads."""
    mean, std = encoder.statistics
    images = {"input_size": encoder.image_shape, "interpolation": "bicubic", "crop_pct": encoder.crop_share}
    origin = {"tag": encoder.options.get("method", "mae"), "license": "other"}  # timm's refer to its own weights
    save_for_hf(
        encoder.model,
        str(folder),
        safe_serialization=True,
        model_config={"pretrained_cfg": origin, "label_names": encoder.class_names},
        data_config=images | {"mean": mean, "std": std},
    )
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["num_classes"]  # also given outside, and transformers refuses duplicates
    write_json(folder / "config.json", config)


def read_timm(folder: Path) -> Outputs:
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def outputs(images: Tensor) -> Mapping[str, Tensor]:
        tokens = model.forward_features(images)
        return {
            "tokens": tokens,
            "features": model.forward_head(tokens, pre_logits=True),
            "logits": model.forward_head(tokens),
        }

    return outputs


def use_timm(encoder: Encoder) -> str:
    output = "logits" if encoder.classes else "features"
    return f"""
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{output} = model(images)
tokens = model.forward_features(images)
"""


# ---- Hugging Face transformers ---------------------------------------------------------------------------------------

HF_NAMES = {
    "pos_embed": "embeddings.position_embeddings",
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "norm": "layernorm",
    "head": "classifier",
}


def hf_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename timm's weights as in transformers, which stores queries, keys and values separately."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in HF_NAMES.items():
            name = f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
        if ".attn.qkv." in name:
            for part, share in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.{part}_proj")] = share
        else:
            renamed[name] = value
    return renamed


def write_hf(encoder: Encoder, folder: Path) -> None:
    """Write a ViTModel or a ViTForImageClassification, and its image processor."""
    from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTModel

    if encoder.model.num_prefix_tokens == 2:
        raise ValueError(
            "transformers' ViT has no distillation token: export it for timm, which transformers loads too"
        )
    if encoder.classes and encoder.arguments["global_pool"] != "token":
        raise ValueError(
            "transformers' ViT classifies the class token, and this classifier was fine-tuned with average pooling. "
            "Export it for timm: transformers loads that folder too, with AutoModelForImageClassification"
        )
    (channels, height, width), (mean, std) = encoder.image_shape, encoder.statistics
    config = ViTConfig(
        hidden_size=encoder.model.embed_dim,
        num_hidden_layers=len(encoder.model.blocks),
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.model.blocks[0].mlp.fc1.out_features,
        layer_norm_eps=encoder.model.norm.eps,
        image_size=height if height == width else (height, width),
        patch_size=encoder.arguments["patch_size"],
        num_channels=channels,
        pooler_act="linear",
        image_features="class_token" if encoder.arguments["global_pool"] == "token" else "patch_average",
    )
    weights = hf_weights(encoder.model.state_dict())
    if encoder.classes:
        names = encoder.class_names or [f"LABEL_{label}" for label in range(encoder.classes)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: label for label, name in enumerate(names)}
        model: Any = ViTForImageClassification(config)
        weights = {name if name.startswith("classifier") else f"vit.{name}": value for name, value in weights.items()}
    else:
        model = ViTModel(config)
    # ViTModel has one more layer on the class token, the pooler, which AutoModel initialises randomly at each load if
    # it is not in the file. The identity makes `pooler_output` the class token. A classifier's own class has no pooler.
    prefix = "vit." if encoder.classes else ""
    weights[f"{prefix}pooler.dense.weight"] = torch.eye(encoder.model.embed_dim)
    weights[f"{prefix}pooler.dense.bias"] = torch.zeros(encoder.model.embed_dim)
    unknown = model.load_state_dict(weights, strict=not encoder.classes)
    if unknown.missing_keys:
        raise ValueError(f"transformers' ViT has weights that this encoder lacks: {', '.join(unknown.missing_keys)}")
    with _quiet_transformers():
        model.save_pretrained(folder, state_dict=weights)
    if has_hf_processor(encoder):
        processor = CLIPImageProcessor(  # the one that resizes and then crops the centre
            size={"shortest_edge": int(height / encoder.crop_share)},
            crop_size={"height": height, "width": width},
            resample=3,  # bicubic
            image_mean=list(mean),
            image_std=list(std),
        )
        processor.save_pretrained(folder)


def has_hf_processor(encoder: Encoder) -> bool:
    """Return whether transformers has the same preprocessing for these images: it has for square RGB images."""
    channels, height, width = encoder.image_shape
    return channels == 3 and height == width


def read_hf(folder: Path) -> Outputs:
    import transformers

    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    with _quiet_transformers():
        model = getattr(transformers, kind).from_pretrained(folder).eval()

    def outputs(images: Tensor) -> Mapping[str, Tensor]:
        if kind == "ViTForImageClassification":
            tokens = model.vit(images).last_hidden_state
            return {"tokens": tokens, "features": tokens[:, 0], "logits": model(images).logits}
        tokens = model(images).last_hidden_state
        class_token = model.config.image_features == "class_token"
        return {"tokens": tokens, "features": tokens[:, 0] if class_token else tokens[:, 1:].mean(dim=1)}

    return outputs


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable progress bars."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def use_hf(encoder: Encoder) -> str:
    pooled = "tokens[:, 0]" if encoder.arguments["global_pool"] == "token" else "tokens[:, 1:].mean(dim=1)"
    kind, output = "AutoModel", f"tokens = model(images).last_hidden_state\nfeatures = {pooled}"
    if encoder.classes:
        kind, output = "AutoModelForImageClassification", "logits = model(images).logits"
    model = f'model = {kind}.from_pretrained("FOLDER").eval()'
    if not has_hf_processor(encoder):
        return f"from transformers import {kind}\n\n{model}\n{output}"
    return f"""
from transformers import AutoImageProcessor, {kind}

{model}
prepare = AutoImageProcessor.from_pretrained("FOLDER")  # its crop may lie one pixel beside that of the table
images = prepare(picture, return_tensors="pt")["pixel_values"]
{output}
"""


# ---- ONNX ------------------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """The encoder with a tuple of outputs."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder.model
        self.names = list(encoder.compute_outputs(encoder.probe(1)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.model.forward_features(images)
        features = self.model.forward_head(tokens, pre_logits=True)
        return (tokens, features, self.model.forward_head(tokens))[: len(self.names)]


def write_onnx(encoder: Encoder, folder: Path) -> None:
    """Write model.onnx, for any number of images of one size. The text of export.json is part of its metadata."""
    graph = Graph(encoder).eval()
    export_segmenter.write_onnx(graph, encoder.probe(3), card.facts(encoder), folder / "model.onnx", graph.names)


def read_onnx(folder: Path) -> Outputs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def outputs(images: Tensor) -> Mapping[str, Tensor]:
        found = session.run(names, {"images": images.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return outputs


def use_onnx(encoder: Encoder) -> str:
    names = ", ".join(encoder.compute_outputs(encoder.probe(1)))
    return f"""
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx", providers=["CPUExecutionProvider"])
{names} = session.run(None, {{"images": images}})  # float32
"""


# ---- all of them -----------------------------------------------------------------------------------------------------

FORMATS: dict[str, Format] = {
    "timm": Format("timm", write_timm, read_timm, use_timm),
    "hf": Format("transformers", write_hf, read_hf, use_hf),
    "onnx": Format("onnx", write_onnx, read_onnx, use_onnx),
}


@torch.inference_mode()
def check(encoder: Encoder, name: str, folder: Path) -> dict[str, float]:
    """Compare the outputs of the export in `folder` with those of the encoder.

    Returns:
        The largest difference of each output.

    Raises:
        Mismatch: a difference exceeds rounding.
    """
    found = FORMATS[name].read(folder)(encoder.probe())
    return encoders.compare(encoder, found, f"the {name} export, loaded again,")


@torch.inference_mode()
def milliseconds(rivals: Mapping[str, Outputs], image: Tensor) -> dict[str, float]:
    """Measure the median time of each function for one image, in turns, so that other load affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for outputs in rivals.values():
        outputs(image)  # warm-up
    began = time.perf_counter()
    for _ in range(TIMED_RUNS):
        for name, outputs in rivals.items():
            start = time.perf_counter()
            outputs(image)
            times[name].append(1000 * (time.perf_counter() - start))
        if time.perf_counter() - began > TIMED_SECONDS:
            break
    return {name: statistics.median(each) for name, each in times.items()}


def export(name: str, encoder: Encoder, output: Path, *, replace: bool = False) -> str:
    """Write the encoder in a format to a new or empty folder, and check it.

    Args:
        replace: Replace an earlier export in the folder, once the new one is complete.

    Returns:
        A sentence about the check.

    Raises:
        ValueError: the encoder has no such format, or the folder is not empty.
        Mismatch: the check failed; what was written is removed.
    """
    if encoder.patch_stem == "conv" and name != "onnx":
        raise ValueError(
            f"{FORMATS[name].library} has no convolutional patch stem, which this encoder has: export it to onnx"
        )
    with new_folder(output, replace=replace) as growing:
        FORMATS[name].write(encoder, growing)
        differences = check(encoder, name, growing)
        checked = "the largest difference is " + ", ".join(
            f"{difference:.1e} in {output_name}" for output_name, difference in differences.items()
        )
        facts = card.facts(encoder) | {"format": name, "largest_difference": differences}
        if name == "onnx":
            threads = torch.get_num_threads()
            rivals = {"onnxruntime": FORMATS[name].read(growing), "torch": encoder.compute_outputs}
            facts["milliseconds"] = times = milliseconds(rivals, encoder.probe(1))
            checked += (
                f"; one image takes {times['onnxruntime']:.2f} ms in ONNX Runtime and {times['torch']:.2f} ms in "
                f"PyTorch on {threads} CPU thread{'s' if threads > 1 else ''}"
            )
        write_json(growing / "export.json", facts)
        usage = FORMATS[name].usage(encoder)
        text = card.readme(encoder, facts, library=FORMATS[name].library, usage=usage, checked=checked)
        write_text(growing / "README.md", text)
    return checked


def choose_output(words: argparse.Namespace, run: Path) -> tuple[Path, bool]:
    """Return the folder to write to, and whether an earlier export in it is replaced."""
    output = words.output or run / "export" / words.format
    return output, words.overwrite and (output / "export.json").is_file()


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Export a pretrained encoder or a fine-tuned classifier to timm, Hugging Face transformers or ONNX."
    )
    parser.add_argument(
        "format", choices=[*FORMATS, "torch"], help="torch: segmenters only, which can also be exported to onnx"
    )
    parser.add_argument("model", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--output", type=Path, help="a new folder (default: export/FORMAT in the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    parser.add_argument("--input_size", help="pixels of the images, e.g. 224 or 160x96 (default: as in training)")
    parser.add_argument("--num_heads", type=int, default=0, help="attention heads, for weights of other programs")
    words = parser.parse_args(argv)
    log_to_terminal(True)
    for library in ("onnxscript", "onnx_ir", "timm"):
        logging.getLogger(library).setLevel(logging.WARNING)  # they log every step of writing and loading
    if words.format in FORMATS:
        require_packages(words.format, EXPORT_PACKAGES[words.format], "export.txt")
    file = checkpoint.find_file(words.model)
    if checkpoint.program_at(file) == "segment":
        if words.input_size or words.num_heads:
            raise ValueError("input_size and num_heads do not apply to a segmenter: its run states them")
        trained = segmenter.load(file)
        output, replace = choose_output(words, trained.run)
        sys.stdout.write(export_segmenter.export(words.format, trained, output, replace=replace))
        return 0
    if words.format not in FORMATS:
        raise ValueError(f"{file} is not a segmenter; torch is a format of segmenters, see also timm")
    size = read(words.input_size, tuple[int, int], "input_size") if words.input_size else None
    encoder = encoders.load(words.model, input_size=size, num_heads=words.num_heads)
    output, replace = choose_output(words, encoder.run)
    checked = export(words.format, encoder, output, replace=replace)
    channels, height, width = encoder.image_shape
    sys.stdout.write(
        f"Written: {output}\n"
        f"  {encoder.method}: {encoder.heads} attention heads, images of {channels} x {height} x {width}, "
        f"features: {encoder.pooling}\n"
        f"  Loaded again: {checked}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
