"""Figure 1 of the NoR-MAE paper: closest neighbours in an image, and how models encode them."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tools.figures import neighbors, separation
from tools.figures.style import note
from tools.figures.subject import Subject


def figure1(subject: Subject) -> Figure:
    """Draw Figure 1: closest neighbours of an image (top), and the tokens of each model in a plane (bottom)."""
    one = replace(subject, pixels=subject.pixels[:1], names=subject.names[:1])
    # Both halves show the same neighbours, selected as in the lower half, independent of the model.
    one = replace(one, similarity=separation.choose_similarity(one))
    top = replace(one, models=one.models[:1])
    below_width, below = separation.compute_size(one)
    width = max(neighbors.WIDTH, below_width)
    above = neighbors.compute_height(top)
    figure = Figure(figsize=(width, above + below + 1.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[above, below], squeeze=False).flat
    neighbors.draw(upper, top)
    separation.draw(lower, one)
    # The neighbours depend on the model only if they are selected by embeddings.
    note(upper, neighbors.sentences(top)[one.similarity == "pixels" :], width)
    note(lower, separation.sentences(one), width)
    return figure
