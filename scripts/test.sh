#!/usr/bin/env bash
# Everything that must hold before a change is kept: environment, format, lint, types, tests.
#
#   bash scripts/test.sh                          all of it, on a CPU
#   bash scripts/test.sh tests/test_house.py      further words go to pytest
#   bash scripts/test.sh -m slow                  the long tests; -m gpu: those that need a GPU
#   WORKERS=8 bash scripts/test.sh                processes that test side by side (default: 2)
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare requirements.txt requirements/dev.txt requirements/export.txt requirements/tiff.txt requirements/heif.txt

"$PYTHON" -m ruff format --check --quiet . || complain "Not formatted: run '$PYTHON -m ruff format .'"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
# One thread a process: the tests' models are so small that more threads only get in each other's way.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest -n "${WORKERS:-2}" --dist loadfile "$@"
