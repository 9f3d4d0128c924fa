"""Figure 1 of the NoR-MAE paper: closest neighbours in the image, and under them how models encode them."""

from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from tools.figures import neighbors, separation
from tools.figures.style import note
from tools.figures.subject import Subject


def figure1(subject: Subject) -> Figure:
    """Figure 1: one image's closest neighbours on top, the plane of each model's tokens below."""
    one = replace(subject, pixels=subject.pixels[:1], names=subject.names[:1])
    # Both halves show the same neighbours, those of the lower one's rule, which holds for every model.
    one = replace(one, similarity=separation.similarity_of(one))
    top = replace(one, models=one.models[:1])
    below_width, below = separation.size_of(one)
    width = max(neighbors.WIDTH, below_width)
    above = neighbors.height_of(top)
    figure = Figure(figsize=(width, above + below + 1.0), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[above, below], squeeze=False).flat
    neighbors.draw(upper, top)
    separation.draw(lower, one)
    # Which model chose the neighbours matters only where embeddings did.
    note(upper, neighbors.sentences(top)[one.similarity == "pixels" :], width)
    note(lower, separation.sentences(one), width)
    return figure
