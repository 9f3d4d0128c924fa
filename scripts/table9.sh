#!/usr/bin/env bash
# Table 9 of the supplement; the variables stand in table.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 9 "$@"
