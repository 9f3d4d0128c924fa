#!/usr/bin/env bash
# What the neighbour term does: its variants at one strength, on CIFAR-10 or, with SET=imagenet100, on ImageNet-100.
# The other variables stand in table.sh.
#
#   DATA=CIFAR10 SEEDS="0 1 2" bash scripts/table_nor_explained.sh           one GPU is enough
#   DATA=IMAGENET NPROC=8 SET=imagenet100 bash scripts/table_nor_explained.sh
set -euo pipefail

case "${SET:-cifar10}" in
    cifar10) table=nor_explained ;;
    imagenet100) table=nor_explained_in100 ;;
    *) printf 'SET is %s; it is cifar10 or imagenet100\n' "$SET" >&2 && exit 2 ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" "$table" "$@"
