"""Export a trained segmenter as an ONNX graph, or as a PyTorch program that does not depend on this project.

Both take normalised images of one size (the crop of training, or a window of evaluation) and return logits of that
size. export.json contains what is needed to use them: classes, mean and standard deviation, size, and the stride of
sliding windows for larger images.

N images   K classes   H W rows and columns of a window
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import new_folder, write_json, write_text
from engine_segment import make_windows, short_side
from tools.encoder import TOLERANCE, Mismatch
from tools.segmenter import Trained

FORMATS = ("onnx", "torch")
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}


class Graph(nn.Module):
    """Compute logits `[N, K, H, W]` for normalised images `[N, C, H, W]` of one size."""

    def __init__(self, trained: Trained, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size = trained.model, size

    def forward(self, images: Tensor) -> Tensor:
        logits, _ = self.model(images)
        return F.interpolate(logits, size=self.size, mode="bilinear", align_corners=False)


def describe(trained: Trained, name: str) -> dict[str, Any]:
    """Return the content of export.json."""
    options, (mean, std) = trained.options, trained.statistics
    rows, columns = options.input_size
    stride = make_windows(options, trained.model.patch).stride
    return {
        "format": name,
        "task": "semantic segmentation",
        "classes": trained.class_names,
        "input": {
            "name": "images",
            "channels": options.in_chans,
            "height": rows,
            "width": columns,
            "scale": "0 to 1, then minus mean, over std",
            "mean": list(mean),
            "std": list(std),
            "value_range": list(options.value_range),
            "short_side": short_side(options),
            "interpolation": "bilinear, antialiased",
            "window_stride": list(stride),
        },
        "output": {"name": "logits", "shape": ["N", len(trained.class_names), rows, columns]},
        "origin": {"checkpoint": trained.checkpoint.name, "model": options.model, "updates": trained.updates},
    }


def write_onnx(
    graph: nn.Module, images: Tensor, about: Mapping[str, Any], path: Path, outputs: Sequence[str] = ("logits",)
) -> None:
    """Write an ONNX graph for any batch size and a fixed image size, with `about` as its metadata."""
    program = torch.onnx.export(
        graph,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=list(outputs),
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
    )
    assert program is not None
    program.model.metadata_props["export.json"] = json.dumps(about)
    program.save(str(path))


def write_torch(graph: Graph, images: Tensor, about: Mapping[str, Any], path: Path) -> None:
    program = torch.export.export(graph, (images,), dynamic_shapes={"images": {0: torch.export.Dim("N")}})
    torch.export.save(program, path, extra_files={"export.json": json.dumps(about)})


def read(name: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Load an exported file with the library of its format."""
    if name == "torch":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def usage(name: str) -> str:
    """Return an example of using the exported files, in five lines."""
    if name == "torch":
        load, run = 'model = torch.export.load("FOLDER/model.pt2").module()', "model(images)"
        library = "torch"
    else:
        load = 'session = onnxruntime.InferenceSession("FOLDER/model.onnx", providers=["CPUExecutionProvider"])'
        run, library = 'torch.from_numpy(session.run(None, {"images": images.numpy()})[0])', "onnxruntime, torch"
    return f"""import json, {library}
{load}
about = json.load(open("FOLDER/export.json"))["input"]
mean, std = (torch.tensor(about[name]).view(-1, 1, 1) for name in ("mean", "std"))
images = (pixels / 255 - mean) / std  # pixels: uint8 [N, channels, height, width]
classes = {run}.argmax(dim=1)  # [N, height, width]
"""


@torch.inference_mode()
def check(graph: Graph, name: str, path: Path) -> float:
    """Compute the largest difference between the logits of the file, loaded again, and those of the model.

    Raises:
        Mismatch: If it exceeds rounding errors.
    """
    rows, columns = graph.size
    channels = graph.model.patch_embed.proj.in_channels
    images = torch.randn(3, channels, rows, columns, generator=torch.Generator().manual_seed(0))
    expected, found = graph(images), read(name, path)(images)
    difference = (found - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if found.shape != expected.shape or not difference <= allowed:  # NaN is a mismatch too
        raise Mismatch(f"the {name} export, loaded again, differs by {difference:.2g}; rounding explains {allowed:.2g}")
    return difference


def export(name: str, trained: Trained, output: Path, *, replace: bool = False) -> str:
    """Write a segmenter to a new or empty folder, check it, and return a summary.

    Args:
        replace: Replace an earlier export in the folder, once the new one is complete.

    Raises:
        ValueError: If segmenters cannot be exported to this format, or the folder is not empty.
        Mismatch: If the check failed; what was written is removed.
    """
    if name not in FORMATS:
        raise ValueError(
            f"{trained.checkpoint} is a segmenter, and {name} holds encoders and classifiers; a segmenter is exported "
            f"to {' or '.join(FORMATS)}"
        )
    rows, columns = trained.options.input_size
    about, path = describe(trained, name), output / FILES[name]
    with new_folder(output, replace=replace) as folder:
        graph = Graph(trained, (rows, columns)).eval()
        file = folder / FILES[name]
        {"onnx": write_onnx, "torch": write_torch}[name](
            graph, torch.zeros(2, trained.options.in_chans, rows, columns), about, file
        )
        about["largest_difference"] = difference = check(graph, name, file)
        write_json(folder / "export.json", about)
        classes = ", ".join(f"{number} {name}" for number, name in enumerate(trained.class_names))
        write_text(
            folder / "README.md",
            f"# A segmenter of {len(trained.class_names)} classes\n\n{trained.options.model} with UPerNet, "
            f"{trained.updates:,} updates. Images of {rows} x {columns} pixels; larger ones are covered by overlapping "
            f"windows (export.json).\n\n```python\n{usage(name)}```\n\nClasses: {classes}\n",
        )
    return (
        f"Written: {output}\n"
        f"  a segmenter of {len(trained.class_names)} classes, images of {trained.options.in_chans} x {rows} x "
        f"{columns} ({path.name})\n  Loaded again: the largest difference is {difference:.1e} in logits\n"
    )
