#!/usr/bin/env bash
# Figure 4: visible patches, an arrow to the closest neighbour of each, and these neighbours alone.
#
#   bash scripts/figure4.sh [MODEL] --images a.jpg b.jpg
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" neighbors "$@"
