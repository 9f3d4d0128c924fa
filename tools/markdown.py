"""Markdown tables of reports and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table with a header and one line per row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)
