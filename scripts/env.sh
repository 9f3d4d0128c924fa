#!/usr/bin/env bash
# The one place that makes the Python environment. The other scripts source it and call `prepare`.
#
#   source scripts/env.sh
#   prepare requirements.txt requirements/dev.txt     # then run "$PYTHON" ...
#
# By default the environment is PROJECT/.venv. It is made once, and each list of requirements is installed again only
# when its text has changed. Two variables change that:
#
#   NOR_MAE_VENV=DIR        keep the environment in DIR
#   NOR_MAE_PYTHON=PYTHON   use this interpreter as it is: nothing is made and nothing is installed
#                           (for a machine image that brings its own build of torch)
#
# Run by itself (bash scripts/env.sh) it prepares everything, development tools included.
set -euo pipefail

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

complain() {
    printf '%s\n' "$@" >&2
    exit 2
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# The first interpreter on PATH that runs and is new enough. A name that exists need not work: version managers put
# names on PATH for versions that are not installed.
find_python() {
    local name
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if command -v "$name" >/dev/null && recent_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    complain "This project needs Python 3.11 or newer, and PATH has none." \
        "Found as python3: $(python3 --version 2>/dev/null || printf 'nothing')." \
        "Install one, or name one you have: NOR_MAE_PYTHON=/path/to/python with everything in requirements.txt."
}

file_hash() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

# prepare FILE...: PYTHON is afterwards an interpreter that has what the FILEs (relative to the project) ask for.
prepare() {
    local file stamp wanted venv base note
    if [[ -n "${NOR_MAE_PYTHON:-}" ]]; then
        PYTHON="$(command -v "$NOR_MAE_PYTHON")" || complain "NOR_MAE_PYTHON is $NOR_MAE_PYTHON, which does not exist."
        recent_enough "$PYTHON" || complain "NOR_MAE_PYTHON ($PYTHON) does not run, or is older than Python 3.11."
        export PYTHON
        return
    fi
    venv="${NOR_MAE_VENV:-$PROJECT/.venv}"
    if [[ -e "$venv/bin/python" ]] && ! recent_enough "$venv/bin/python"; then
        complain "The environment $venv does not run, or its Python is older than 3.11. Delete that folder and run this again."
    fi
    if [[ ! -e "$venv/bin/pip" ]]; then
        base="$(find_python)"
        printf 'Making the environment %s with %s\n' "$venv" "$("$base" --version)" >&2
        "$base" -m venv "$venv" || complain "Making the environment failed (on Debian and Ubuntu: apt install python3-venv)."
    fi
    PYTHON="$(cd "$venv/bin" && pwd)/python"
    export PYTHON
    for file in "$@"; do
        note=""
        [[ "$file" != requirements.txt ]] || note="(torch is among it: some minutes, and about 6 GB of disk)"
        stamp="$venv/installed-${file//\//-}.sha256"
        wanted="$(file_hash "$PROJECT/$file")"
        if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
            printf 'Installing %s %s\n' "$file" "$note" >&2
            "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$PROJECT/$file" \
                || complain "Installing $file failed; the reason stands above. Run the same command to try again."
            # Only now, so that an installation that was cut off is repeated; and the hash of before, so that one whose
            # list was changed meanwhile is too.
            printf '%s\n' "$wanted" >"$stamp"
        fi
    done
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    prepare requirements.txt requirements/dev.txt requirements/export.txt requirements/tiff.txt requirements/heif.txt
    printf '%s\n' "$PYTHON"
fi
