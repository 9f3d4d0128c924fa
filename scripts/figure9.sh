#!/usr/bin/env bash
# Figure 9: images, their true classes, and what each segmenter predicts: that after MAE beside that after NoR-MAE.
#
#   bash scripts/figure9.sh output/mae_ade20k output/nor_ade20k --count 6
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" figure9 "$@"
