#!/usr/bin/env bash
# Pretrain NoR-MAE on handwritten digits, evaluate the encoder, write a report. No GPU and no download of data.
#
#   bash scripts/quickstart.sh                    run folder: output/quickstart
#   bash scripts/quickstart.sh --epochs 20        further arguments are passed to main_pretrain.py
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

step() { printf '\n== %s\n' "$1"; }

step "1 of 4: pretraining without labels"
"$PYTHON" main_pretrain.py -c configs/pretrain/quickstart.yaml --device cpu --output_dir "$OUTPUT" "$@"

step "2 of 4: classifiers with 10 labels per class: fine-tuned, linear, from scratch"
encoder=(--init_from "$OUTPUT/checkpoints/last.pth" --device cpu --overwrite) # they take seconds
"$PYTHON" main_finetune.py -c configs/finetune/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/finetuned"
"$PYTHON" main_linprobe.py -c configs/linprobe/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/linprobe"
"$PYTHON" main_finetune.py -c configs/finetune/quickstart.yaml "${encoder[@]}" --output_dir "$OUTPUT/scratch" \
    --from_scratch --layer_decay 1

step "3 of 4: nearest neighbours"
"$PYTHON" -m tools.knn "$OUTPUT" --device cpu >/dev/null # the results are printed below

step "4 of 4: pictures and report"
"$PYTHON" -m tools.visualize reconstruction "$OUTPUT" --device cpu
"$PYTHON" -m tools.visualize neighbors "$OUTPUT" --device cpu
"$PYTHON" -m tools.report "$OUTPUT" >/dev/null

step "Results: 10 labels per class, 445 test images"
"$PYTHON" -m tools.classifiers "$OUTPUT"

cat <<END

Report with curves and pictures: $OUTPUT/report.html

Next, your own images (any folder, with or without labels):
  PYTHON=$PYTHON
  \$PYTHON main_pretrain.py -c configs/pretrain/cpu_images.yaml --data_path MY_IMAGES --output_dir output/mine
  \$PYTHON -m tools.report output/mine
and with labels (one folder per class):
  \$PYTHON main_finetune.py -c configs/finetune/my_images.yaml --init_from output/mine/checkpoints/last.pth \\
      --data_path MY_LABELLED_IMAGES --output_dir output/mine_finetuned
  \$PYTHON -m tools.predict output/mine_finetuned NEW_IMAGES
On a GPU use configs/pretrain/few_images.yaml, or my_images.yaml for more than a few thousand images. See docs/faq.md.
END
