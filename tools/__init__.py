"""Command-line tools for finished and future runs: `python -m tools.NAME`."""
