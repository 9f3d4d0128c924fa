#!/usr/bin/env bash
# Small data, small models: pretrain on CIFAR-10 or CIFAR-100 alone at their own 32 pixels, fine-tune there, report.
# The same encoder is also trained from scratch. For the other variables see table.sh.
#
#   DATA=CIFAR10 bash scripts/small_data.sh                     one GPU; MORE="--num_workers 12" for its processors
#   DATA=CIFAR100 SET=cifar100 bash scripts/small_data.sh
#   DATA=CIFAR10 ROWS="*8-blocks*" SEEDS="0 1 2" JOBS=3 bash scripts/small_data.sh
#   DATA=CIFAR10 SET=cpu bash scripts/small_data.sh             a much smaller model, on a CPU core
#
# DATA is what torchvision unpacked (cifar-10-batches-py inside), or a folder train/CLASS/* and val/CLASS/*.
set -euo pipefail

case "${SET:-cifar10}" in
    cifar10 | cifar100 | cpu) table="small_data_${SET:-cifar10}" ;;
    *) printf 'SET is %s; it is cifar10, cifar100 or cpu\n' "$SET" >&2 && exit 2 ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" "$table" "$@"
