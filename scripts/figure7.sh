#!/usr/bin/env bash
# Figure 7: visible patches and closest neighbours as models encode them, with their separation.
#
#   bash scripts/figure7.sh output/mae_tiny output/mae_small output/mae_base output/nor_tiny --images a.jpg b.jpg
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" separation "$@"
