#!/usr/bin/env bash
# How many small faults the tests notice: slow, and not part of scripts/test.sh.
#
#   bash scripts/mutation.sh                            every module, ten minutes each
#   bash scripts/mutation.sh models_nor_mae             one module; --minutes 60 raises its limit, --sample 40 tries 40 mutants
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare requirements.txt requirements/dev.txt

nice -n 15 "$PYTHON" tests/mutation.py "$@"
