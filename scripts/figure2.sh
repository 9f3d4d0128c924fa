#!/usr/bin/env bash
# Figure 2: a patch and the similarity of its neighbours, and another with the same closest neighbour.
#
#   bash scripts/figure2.sh [MODEL] --images a.jpg b.jpg
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" closeup "$@"
