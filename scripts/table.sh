#!/usr/bin/env bash
# A table of the paper: pretrain, fine-tune or profile what is missing, and report our numbers beside the paper's.
# The scripts table1.sh to table11.sh, table_nor_explained.sh and small_data.sh call it.
#
#   DATA=IMAGENET NPROC=8 bash scripts/table1.sh [--dry-run | --report] [--collect FOLDER [--models]]
#
#   DATA              folder of the images to pretrain on: ImageNet, of which tables of ImageNet-100 take their classes
#   TRANSFER          folder that torchvision unpacked the transfer sets of Table 4 in, with ADEChallengeData2016 beside
#                     them (default: DATA)
#   OUT               where the runs go (default: output/tables); runs that tables have in common are shared
#   NPROC             processes, one for each GPU (default: 1)
#   ROWS              rows to run, all without it: "vit-tiny-mae-200 vit-tiny-nor-*"; --dry-run shows what they mean
#   SEEDS             seeds to run each row with (default: 0)
#   EPOCHS            epochs of pretraining in place of each row's, a fifth of them warm-up
#   FINETUNE_EPOCHS   epochs of fine-tuning in place of the recipe's, a twentieth of them warm-up
#   JOBS              runs in parallel, for example on one GPU (default: 1); their output goes to OUT/logs
#   MINUTES           after which runs save and exit; the same command resumes (default: no limit)
#   MORE              further options of every run, for the machine: "--num_workers 12 --batch_size 64"
#   TEACHER_BASE, TEACHER_LARGE    checkpoints of DMAE's teachers (Table 2)
#   BILL, PRICE       options of benchmarks.bill, and price of a device per hour (Tables 10 and 11)
#   SMOKE=1           the whole table with tiny models on a CPU, in OUT/smoke
#
# --dry-run prints the remaining commands. --report reads the runs for the same variables: OUT, EPOCHS and
# FINETUNE_EPOCHS determine their folders. --collect writes curves, results and report to a folder, --models also models.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$here/scripts/env.sh"
prepare requirements.txt
# No change of folder here: paths are relative to where the command was typed.
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m tools.tables "$@"
