#!/usr/bin/env bash
# Every pretraining method at a fixed budget: same encoder, same images; learning rates from a small sweep; k-NN, linear,
# fine-tuned with all and with ten labels per class; means over seeds and paired differences from MAE.
#
#   DATA=CIFAR10 bash scripts/leaderboard.sh                        one CPU core; JOBS=2 for two
#   DATA=CIFAR10 ROWS="nor_mae simmim" bash scripts/leaderboard.sh  the reference (mae) is always run
#   DATA=CIFAR10 SET=gpu JOBS=4 bash scripts/leaderboard.sh         ViT-Tiny/4, all of CIFAR-10, one GPU
#   DATA=IMAGENETTE SET=gpu_imagenette JOBS=4 bash scripts/leaderboard.sh      ViT-Small/16 (DATA: train/CLASS, val/CLASS)
#   SMOKE=1 bash scripts/leaderboard.sh                             check that it works, without data
#
# DATA is what torchvision unpacked (cifar-10-batches-py inside), or a folder train/CLASS/* and val/CLASS/*:
#   python -c "import torchvision; torchvision.datasets.CIFAR10('CIFAR10', download=True)"
# SEEDS, JOBS, MINUTES and MORE are explained in table.sh; OUT is output/comparisons by default. EPOCHS and FINETUNE_EPOCHS
# do not apply: configs/comparisons.yaml has the epochs. The report is OUT/reports/leaderboard_SET.md. A second command
# with the same variables resumes; --report reports what is finished; --collect FOLDER copies the report.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/scripts/env.sh"
prepare requirements.txt
export OUT="${OUT:-$here/output/comparisons}"
case "${SET:-cpu}" in
    cpu | gpu | gpu_imagenette) name="leaderboard_${SET:-cpu}" ;;
    nor_explained_cpu) name="$SET" ;;
    *) printf 'SET is %s; it is cpu, gpu or gpu_imagenette\n' "$SET" >&2 && exit 2 ;;
esac
case "$name" in *cpu) export OMP_NUM_THREADS=1 ;; esac
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m tools.comparison "$name" "$@"
