"""Measure parts of a step: what NoR-MAE adds, our forms against those of the released program, and MaskFeat's target.

    python -m benchmarks.micro                                   # 64 images, ViT-Tiny/16 at 224 px, one CPU thread
    python -m benchmarks.micro --device cuda --amp bf16 --batch_size 512

`relation` is the off-diagonal sum of the two predictions, forward and backward: ours without the P x P matrices, the
restated one through an einsum. `search` finds the companions of the visible patches and returns their tokens: ours by
shifted products, the restated one by gathering the eight neighbours of every patch, `[N, L, 8, D]`. `hog`, where cells
of 8 pixels fill the patches, is the histograms of oriented gradients of a batch beside a whole step of SimMIM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import in_turn, paired_ratios, progress, publish, quartiles, spread, where
from benchmarks.restated_nor_mae import RestatedNoRMAE
from benchmarks.step import (
    AMP,
    OurStep,
    Setting,
    choose_clock,
    measure_seconds,
    peak_bytes,
    restated,
    setting_from,
    setting_parser,
)
from models_mae import take
from models_nor_mae import closest_neighbors, neighbor_relation
from models_targets import HOG_CELL, hog
from tools.markdown import make_table


def works(setting: Setting) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the forms of each part that are compared; the first is the reference."""
    device, dtype = torch.device(setting.device), AMP[setting.amp]
    released = restated(setting, RestatedNoRMAE).model
    assert isinstance(released, RestatedNoRMAE)
    L, D, P = setting.patches, released.cls_token.shape[-1], 3 * setting.patch_size**2
    generator = torch.Generator().manual_seed(setting.seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(setting.batch_size, *shape, generator=generator).to(device, dtype)

    pred_NLP, companion_NLP, tokens_NLD = drawn(L, P).requires_grad_(), drawn(L, P), drawn(L, D)
    ids_NV = drawn(L).argsort(dim=1)[:, : L // 4]

    def backward(relation: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        pred_NLP.grad = None
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = relation(pred_NLP, companion_NLP)
        loss.backward()
        return pred_NLP.grad

    @torch.no_grad()
    def gathered() -> Tensor:
        return take(released.companions(tokens_NLD), ids_NV)

    @torch.no_grad()
    def shifted() -> Tensor:
        grid = (setting.input_size // setting.patch_size,) * 2
        return take(tokens_NLD, closest_neighbors(tokens_NLD, grid).gather(1, ids_NV))

    parts: dict[str, dict[str, Callable[[], object]]] = {
        "relation": {
            "restated": functools.partial(backward, released.relation),
            "ours": functools.partial(backward, neighbor_relation),
        },
        "search": {"restated": gathered, "ours": shifted},
    }
    if setting.patch_size % HOG_CELL == 0:
        images, noise_N1L = drawn(3, setting.input_size, setting.input_size).float(), drawn(1, L).float()
        step = OurStep(setting, "simmim", compiled=False, mask_ratio=0.6)
        parts["hog"] = {
            "simmim step": functools.partial(step, images, noise_N1L),
            "hog": functools.partial(hog, images, setting.patch_size),
        }
    return parts


def measure(setting: Setting, say: Callable[[str], None] = progress) -> dict[str, Any]:
    """Return for each part the seconds by round, their ratios, and the peak bytes."""
    torch.set_num_threads(setting.threads)
    device = torch.device(setting.device)
    parts = {}
    for part, forms in works(setting).items():
        say(part)
        for work in forms.values():
            for _ in range(max(setting.warmup, 1)):
                work()
        turns = {name: functools.partial(measure_seconds, work, setting) for name, work in forms.items()}
        seconds = in_turn(turns, setting.rounds, setting.seed, say)
        memory = {name: peak_bytes(work, device) for name, work in forms.items()}
        parts[part] = {"seconds": seconds, "ratios": paired_ratios(seconds), "peak_bytes": memory}
    return {"clock": choose_clock(setting)[0], "parts": parts}


def markdown(result: Mapping[str, Any]) -> str:
    setting = Setting(**result["setting"])
    rows = []
    for part, found in result["parts"].items():
        first = next(iter(found["seconds"]))
        for name, times in found["seconds"].items():
            faster = "1" if name == first else spread(found["ratios"][f"{first}/{name}"], 2)
            share = found["peak_bytes"][name] / found["peak_bytes"][first]
            milliseconds = spread({key: 1000 * value for key, value in quartiles(times).items()}, 1)
            rows.append([part, name, milliseconds, faster, f"{found['peak_bytes'][name] / 1e6:.1f}", f"{share:.2f}"])
    return (
        f"# Parts of a step: {setting.words}\n\n"
        f"{where(result['machine'])} {setting.rounds} rounds of {setting.steps} run(s), {result['clock']}; medians and "
        "quartiles, ratios within a round.\n\n"
        + make_table(["part", "form", "ms", "times faster", "peak MB", "of the first"], rows)
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = setting_parser(__doc__)
    parser.set_defaults(batch_size=64, rounds=15)
    given = parser.parse_args(argv)
    setting = setting_from(given)
    publish(f"micro_{setting.file}", measure(setting), markdown, setting=asdict(setting), output=given.output)


if __name__ == "__main__":
    main()
