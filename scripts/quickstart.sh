#!/usr/bin/env bash
# From a fresh checkout to a pretrained NoR-MAE and what it is worth: handwritten digits, no download of data, no GPU.
#
#   bash scripts/quickstart.sh                    the run goes to output/quickstart
#   bash scripts/quickstart.sh --epochs 20        further words go to main_pretrain.py
#   OUTPUT=/tmp/first bash scripts/quickstart.sh
#
# Running it again resumes an interrupted run; a finished run is only evaluated and drawn again.
set -euo pipefail

OUTPUT="${OUTPUT:-$(dirname "${BASH_SOURCE[0]}")/../output/quickstart}"
mkdir -p "$OUTPUT"
OUTPUT="$(cd "$OUTPUT" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare requirements.txt

"$PYTHON" main_pretrain.py -c configs/pretrain/quickstart.yaml --device cpu --output_dir "$OUTPUT" "$@"

"$PYTHON" -m tools.knn "$OUTPUT" --device cpu

# With 10 labels a class: a linear layer on the frozen encoder, the encoder fine-tuned, and the same from scratch.
encoder=(--init_from "$OUTPUT/checkpoints/last.pth" --device cpu --overwrite) # they take seconds
"$PYTHON" main_linprobe.py -c configs/linprobe/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/linprobe"
"$PYTHON" main_finetune.py -c configs/finetune/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/finetuned"
"$PYTHON" main_finetune.py -c configs/finetune/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/scratch" \
    --from_scratch --layer_decay 1
"$PYTHON" -m tools.classifiers "$OUTPUT"

"$PYTHON" -m tools.visualize reconstruction "$OUTPUT" --device cpu
"$PYTHON" -m tools.report "$OUTPUT"
