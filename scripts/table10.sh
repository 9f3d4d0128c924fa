#!/usr/bin/env bash
# Table 10 of the supplement; table.sh explains the variables.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 10 "$@"
