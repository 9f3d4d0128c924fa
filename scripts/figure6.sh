#!/usr/bin/env bash
# Figure 6: training curves of the relations side by side.
#
#   bash scripts/figure6.sh output/off_diagonal output/diagonal ...     finished or unfinished runs
#   bash scripts/figure6.sh                                         trains five on the digits first (on a CPU)
#
# The paper holds lambda at 5e-5 for all; the label of each curve gives its weight. WEIGHT and EPOCHS change those of the
# runs that are trained here, which go to output/figure6.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
runs=("$@")
if (($# == 0)); then
    source "$here/scripts/env.sh"
    prepare requirements.txt
    for relation in off_diagonal diagonal token_off_diagonal alignment off_diagonal_squared; do
        run="output/figure6/$relation"
        "$PYTHON" "$here/main_pretrain.py" -c "$here/configs/pretrain/quickstart.yaml" --device cpu --knn_every 10 \
            --epochs "${EPOCHS:-100}" --warmup_epochs 10 --terms.neighbor.weight "${WEIGHT:-0.0128}" \
            --terms.neighbor.relation "$relation" --output_dir "$run"
        runs+=("$run")
    done
fi
exec bash "$here/scripts/figure.sh" relations "${runs[@]}"
