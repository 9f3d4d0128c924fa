"""Error handling shared by the commands of this package."""

from __future__ import annotations

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
