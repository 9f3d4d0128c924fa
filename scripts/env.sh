#!/usr/bin/env bash
# Create the Python environment. The other scripts source this file and call `prepare`.
#
#   source scripts/env.sh
#   prepare requirements.txt requirements/dev.txt     # then run "$PYTHON" ...
#
# By default the environment is PROJECT/.venv. It is created once, and a list of requirements is installed again only if
# its text has changed. Two variables change that:
#
#   NOR_MAE_VENV=DIR        keep the environment in DIR
#   NOR_MAE_PYTHON=PYTHON   use this interpreter; nothing is created or installed
#                           (for machine images with their own build of torch)
#
# `bash scripts/env.sh` prepares everything, development tools included.
set -euo pipefail

PROJECT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

complain() {
    printf '%s\n' "$@" >&2
    exit 2
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Print the first interpreter on PATH that runs and is new enough. Version managers put names on PATH for versions that
# are not installed, so each one is tried.
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
        "Install one, or set NOR_MAE_PYTHON=/path/to/python to one that has everything in requirements.txt."
}

file_hash() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

# prepare FILE...: set PYTHON to an interpreter with the packages that the FILEs (relative to the project) list.
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
        printf 'Creating the environment %s with %s\n' "$venv" "$("$base" --version)" >&2
        "$base" -m venv "$venv" || complain "Creating the environment failed (on Debian and Ubuntu: apt install python3-venv)."
    fi
    PYTHON="$(cd "$venv/bin" && pwd)/python"
    export PYTHON
    for file in "$@"; do
        note=""
        [[ "$file" != requirements.txt ]] || note="(includes torch: some minutes, about 6 GB of disk)"
        stamp="$venv/installed-${file//\//-}.sha256"
        wanted="$(file_hash "$PROJECT/$file")"
        if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
            printf 'Installing %s %s\n' "$file" "$note" >&2
            "$PYTHON" -m pip install --quiet --disable-pip-version-check --requirement "$PROJECT/$file" \
                || complain "Installing $file failed, see the messages above. Run the same command to try again."
            # Written last, so that an interrupted installation is repeated, and with the earlier hash, so that a list
            # that has changed meanwhile is installed again.
            printf '%s\n' "$wanted" >"$stamp"
        fi
    done
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    prepare requirements.txt requirements/dev.txt requirements/export.txt requirements/tiff.txt requirements/heif.txt
    printf '%s\n' "$PYTHON"
fi
