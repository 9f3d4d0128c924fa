#!/usr/bin/env bash
# What the neighbour term does: its variants at one strength, on CIFAR-10 or, with SET=imagenet100, on ImageNet-100. With
# SET=cpu: on 5,000 images of CIFAR-10 with a small model, paired differences over seeds (see leaderboard.sh).
# table.sh explains the other variables.
#
#   DATA=CIFAR10 SEEDS="0 1 2" bash scripts/table_nor_explained.sh           one GPU is enough
#   DATA=IMAGENET NPROC=8 SET=imagenet100 bash scripts/table_nor_explained.sh
#   DATA=CIFAR10 SET=cpu JOBS=2 bash scripts/table_nor_explained.sh          hours of CPU cores
#
# In little time on a GPU: the four arms that matter most, first all with one seed, several runs on the card at
# once; after nine minutes they save and exit, and finished ones are collected. The same command resumes.
#
#   DATA=CIFAR10 ROWS="mae nor-closest nor-released nor-diagonal" SEEDS="0 1 2" EPOCHS=50 FINETUNE_EPOCHS=20 JOBS=4 \
#       MINUTES=9 MORE="--num_workers 3" bash scripts/table_nor_explained.sh --collect FOLDER --models
set -euo pipefail

case "${SET:-cifar10}" in
    cifar10) table=nor_explained ;;
    imagenet100) table=nor_explained_in100 ;;
    cpu) SET=nor_explained_cpu exec bash "$(dirname "${BASH_SOURCE[0]}")/leaderboard.sh" "$@" ;;
    *) printf 'SET is %s; it is cifar10, imagenet100 or cpu\n' "$SET" >&2 && exit 2 ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" "$table" "$@"
