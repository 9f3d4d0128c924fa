#!/usr/bin/env bash
# Figure 1: closest neighbours in an image, and the plane in which each model encodes them.
#
#   bash scripts/figure1.sh output/mae_tiny output/nor_tiny --images a.jpg
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" figure1 "$@"
