"""Error handling shared by the commands of this package."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

EXIT_BAD_INPUT = 2

Main = Callable[[Sequence[str] | None], int]


def reports_errors(main: Main) -> Callable[..., int]:
    """Decorate the `main` of a command: ValueError and OSError become one line on stderr and exit code 2."""

    @functools.wraps(main)
    def reporting(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            return EXIT_BAD_INPUT

    return reporting


def require_at_least(given: argparse.Namespace, **least: int) -> None:
    """Raise ValueError if one of the given numbers is smaller than its minimum, such as `batch_size=1`."""
    for name, minimum in least.items():
        if getattr(given, name) < minimum:
            raise ValueError(f"--{name}: must be at least {minimum}, found {getattr(given, name)}")
