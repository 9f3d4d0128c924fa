#!/usr/bin/env bash
# Figure 3: how similar patches are to their closest neighbours. The paper shows 4,096 images of ImageNet.
#
#   bash scripts/figure3.sh [MODEL] --images IMAGENET --count 4096 --crop random --num_workers 8
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/figure.sh" similarity "$@"
