"""Style of all figures, and output as PNG, SVG or PDF and to TensorBoard.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. No figure relies on colour only:
shapes, dashes, edges or labels differ too, so that figures can be printed in grey.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FORMATS = ("png", "svg", "pdf")
DPI = 300
SCREEN_DPI = 150  # resolution of figures in TensorBoard and in reports
SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "figure.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # TrueType: text can be selected and edited
    "svg.hashsalt": "nor-mae",  # reproducible files
}


@contextmanager
def house_style() -> Iterator[None]:
    """Return a context in which figures are independent of the user's matplotlibrc."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every glyph of a PDF
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def line_style(number: int) -> dict[str, Any]:
    """Return colour and dashes of a line by its index."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def curve_style(number: int, points: int) -> dict[str, Any]:
    """Return `line_style` with a marker at the last point, so that curves of one point differ not only in colour."""
    marker = MARKERS[number % len(MARKERS)]
    return line_style(number) | {"marker": marker, "markersize": 3.5, "markevery": (max(0, points - 1), 1)}


def grid_lines(axis: Any) -> None:
    """Draw grid lines behind the curves of a panel."""
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.set_axisbelow(True)


def from_zero(axis: Any) -> None:
    """Set the limits of the y axis from 0 to slightly above the data."""
    axis.set_ylim(0, 1.04 * axis.get_ylim()[1])


def picture(axis: Any, pixels: np.ndarray) -> None:
    """Show `[H, W, 3]` (or `[H, W]` in grey) between 0 and 1, without ticks, in pixels from the upper left corner."""
    height, width = pixels.shape[:2]
    axis.imshow(
        pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=(0, width, height, 0), rasterized=True
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def short_name(name: str, letters: int = 26) -> str:
    """Return the end of a path, for a label."""
    last = Path(name).name
    return last if len(last) <= letters else f"…{last[-letters + 1 :]}"


def note(figure: Any, sentences: Sequence[str], width_inches: float) -> None:
    """Write small wrapped text above the panels."""
    letters = max(40, int(width_inches * 17.5))
    lines = [line for sentence in sentences for line in textwrap.wrap(sentence, letters)]
    figure.suptitle("\n".join(lines), fontsize=7.5, x=0.01, ha="left", linespacing=1.3)


def check_format(path: Path) -> str:
    """Return the format of a file by its suffix. Raises ValueError if it is not supported."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"{path}: a figure is written as {', '.join(f'.{name}' for name in FORMATS)}")
    return kind


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the suffix."""
    kind = check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.04, metadata=undated)


def render(figure: Figure) -> np.ndarray:
    """Render the figure as uint8 `[H, W, 3]`."""
    figure.set_dpi(SCREEN_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_tensorboard(figure: Figure, folder: Path, name: str, step: int) -> None:
    """Add the figure to TensorBoard's files in `folder`, under `name`."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed to draw

    with SummaryWriter(str(folder)) as board:
        board.add_image(name, torch.from_numpy(render(figure)), step, dataformats="HWC")
