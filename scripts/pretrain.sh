#!/usr/bin/env bash
# Pretraining on every GPU of this machine: torchrun around main_pretrain.py.
#
#   bash scripts/pretrain.sh -c configs/pretrain/nor_mae_vit_tiny_in1k.yaml --data_path IMAGENET --output_dir output/tiny
#   NPROC=2 bash scripts/pretrain.sh ...          two processes; without NPROC one per GPU, or one on a CPU
#
# Several machines: run the same command on each, with NNODES, NODE_RANK and MASTER=HOST:PORT set.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/scripts/env.sh"
prepare requirements.txt

NPROC="${NPROC:-$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}"
NNODES="${NNODES:-1}"
if ((NNODES > 1)); then
    : "${NODE_RANK:?with NNODES=$NNODES, NODE_RANK says which machine this is, from 0}"
    : "${MASTER:?with NNODES=$NNODES, MASTER is HOST:PORT of machine 0}"
    where=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
else
    where=(--standalone)
fi
# No change of folder here: paths in the options are relative to where the command was typed.
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc_per_node "$NPROC" "$here/main_pretrain.py" "$@"
