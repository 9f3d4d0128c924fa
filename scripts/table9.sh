#!/usr/bin/env bash
# Table 9 of the supplement; table.sh explains the variables.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 9 "$@"
