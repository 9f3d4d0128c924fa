#!/usr/bin/env bash
# Measure the gain of a very small student from a teacher, on CPU cores: CIFAR-10, pretraining with and without a teacher at
# equal student updates, then nearest neighbours, a linear layer, and fine-tuning.
#
#   DATA=CIFAR10 bash scripts/distill_demo.sh
#   DATA=CIFAR10 SEEDS=0 EPOCHS=2 TEACHER_EPOCHS=2 bash scripts/distill_demo.sh      a short trial
#
# The teacher is an encoder of six blocks of 96 channels, pretrained and fine-tuned on the same training images. The
# students are those of configs/pretrain/mae_vit_cpu_cifar10.yaml. DATA is a folder train/CLASS/* and val/CLASS/*.
# A finished part is not repeated; the accuracies go to OUTPUT/distill.json and to the terminal.
set -euo pipefail

: "${DATA:?is the folder of the images}"
SEEDS="${SEEDS:-0 1 2}"
EPOCHS="${EPOCHS:-40}"
TEACHER_EPOCHS="${TEACHER_EPOCHS:-40}"
FINETUNE_EPOCHS="${FINETUNE_EPOCHS:-10}"
OUTPUT="${OUTPUT:-$(dirname "${BASH_SOURCE[0]}")/../output/distill_demo}"
mkdir -p "$OUTPUT"
OUTPUT="$(cd "$OUTPUT" && pwd)"
DATA="$(cd "$DATA" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
prepare requirements.txt

warmup() {
    printf '%s' "$((($1 + 9) / 10))"
}

# pretrain FOLDER EPOCHS [options]
pretrain() {
    local folder="$1" epochs="$2"
    shift 2
    [ -f "$folder/result.json" ] || "$PYTHON" main_pretrain.py -c configs/pretrain/mae_vit_cpu_cifar10.yaml \
        --data_path "$DATA" --epochs "$epochs" --warmup_epochs "$(warmup "$epochs")" --knn_every 0 \
        --output_dir "$folder" "$@"
}

# finetune CHECKPOINT FOLDER [options]
finetune() {
    local checkpoint="$1" folder="$2"
    shift 2
    [ -f "$folder/result.json" ] || "$PYTHON" main_finetune.py -c configs/finetune/cifar10_cpu.yaml \
        --init_from "$checkpoint" --data_path "$DATA" --epochs "$FINETUNE_EPOCHS" \
        --eval_every "$FINETUNE_EPOCHS" --output_dir "$folder" "$@"
}

# probe CHECKPOINT FOLDER [options]
probe() {
    local checkpoint="$1" folder="$2"
    shift 2
    [ -f "$folder/result.json" ] || "$PYTHON" main_linprobe.py --init_from "$checkpoint" --data_path "$DATA" \
        --total_batch_size 500 --epochs 50 --warmup_epochs 5 --lr 10 --holdout 0 --eval_every 50 --num_workers 0 \
        --device cpu --output_dir "$folder" "$@"
}

larger=(--embed_dim 96 --depth 6 --num_heads 6)
pretrain "$OUTPUT/teacher" "$TEACHER_EPOCHS" "${larger[@]}"
finetune "$OUTPUT/teacher/checkpoints/last.pth" "$OUTPUT/teacher/finetuned"
probe "$OUTPUT/teacher/checkpoints/last.pth" "$OUTPUT/teacher/probe"

taught=(--method dmae --terms.teacher.checkpoint "$OUTPUT/teacher/finetuned/checkpoints/last.pth"
    --terms.teacher.student_block -1 --terms.teacher.teacher_block -1 --terms.teacher.distance cosine)
for seed in $SEEDS; do
    for student in alone taught; do
        options=()
        [ "$student" = alone ] || options=("${taught[@]}")
        folder="$OUTPUT/$student$seed"
        pretrain "$folder" "$EPOCHS" --seed "$seed" ${options[@]+"${options[@]}"}
        probe "$folder/checkpoints/last.pth" "$folder/probe" --seed "$seed"
        finetune "$folder/checkpoints/last.pth" "$folder/finetuned" --seed "$seed"
    done
done
"$PYTHON" -m benchmarks.distill "$OUTPUT"
