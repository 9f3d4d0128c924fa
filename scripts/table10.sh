#!/usr/bin/env bash
# Table 10 of the supplement; the variables stand in table.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/table.sh" 10 "$@"
