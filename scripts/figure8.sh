#!/usr/bin/env bash
# Figure 8: as figure 7, for patches of 4 pixels, of which an image has 3,136. Without a model: fresh weights.
#
#   bash scripts/figure8.sh output/mae_tiny_patch4 output/nor_tiny_patch4 --images a.jpg
set -euo pipefail

[[ $# -gt 0 && "$1" != -* ]] || set -- mae_vit_tiny_patch4 "$@"
exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" separation "$@"
