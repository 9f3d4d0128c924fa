#!/usr/bin/env bash
# Any picture of tools.visualize, in the project's environment. The scripts of the paper's figures call it.
#
#   bash scripts/figure.sh PICTURE [MODEL ...] [--images PATH ...] [--output FILE ...]
#   bash scripts/figure.sh --help
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/scripts/env.sh"
prepare requirements.txt
# No change of folder here: paths are relative to where the command was typed.
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m tools.visualize "$@"
