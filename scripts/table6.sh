#!/usr/bin/env bash
# Table 6 of the paper; the variables stand in table.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 6 "$@"
