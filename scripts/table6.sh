#!/usr/bin/env bash
# Table 6 of the paper; table.sh explains the variables.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 6 "$@"
