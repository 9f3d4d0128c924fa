#!/usr/bin/env bash
# What a GPU is needed for, in parts of at most nine minutes. A part that was stopped, or that has more to do, resumes with the
# same command; results go to benchmarks/results (RESULTS).
#
#   bash scripts/gpu_suite.sh check               what is missing: GPU, packages, data
#   bash scripts/gpu_suite.sh tests               the tests that need a GPU
#   IMAGES=PHOTOS bash scripts/gpu_suite.sh speed step, memory, roofline, cost and loading; without IMAGES no loading
#   DATA=CIFAR10 bash scripts/gpu_suite.sh study  MAE, and NoR-MAE with closest, released and diagonal, on CIFAR-10
#   DATA=CIFAR10 bash scripts/gpu_suite.sh small  the small-data recipes
#   SMOKE=1 bash scripts/gpu_suite.sh all         all parts on a CPU with tiny models: does everything run?
#
# DATA is what torchvision unpacked (cifar-10-batches-py inside), or a folder train/CLASS/* and val/CLASS/*. IMAGES is a folder
# of full-size photographs. OUT (default: output/gpu_suite) is where the runs go. Relative paths start at the folder where the
# command is typed. MINUTES (default: 9) is the time of a part. NOR_MAE_PYTHON names a Python that has the packages, where none
# can be installed.
set -euo pipefail

PART="${1:-}"
MINUTES="${MINUTES:-9}"
SMOKE="${SMOKE:-0}"
[ "$SMOKE" = 1 ] || SMOKE=0
for name in DATA IMAGES RESULTS OUT; do
    case "${!name:-}" in "" | /*) ;; *) export "$name=$PWD/${!name}" ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
[[ "$MINUTES" =~ ^[1-9][0-9]{0,5}$ ]] || complain "MINUTES is '$MINUTES': give a whole number of at least 1, such as MINUTES=9."
prepare requirements.txt requirements/dev.txt
RESULTS="${RESULTS:-benchmarks/results}"
export OUT="${OUT:-$PWD/output/gpu_suite}"
END=$((SECONDS + MINUTES * 60))

check() {
    local missing=0
    "$PYTHON" - "$SMOKE" <<'PYTHON' || missing=1
import importlib, sys
missing = []
for name in ("torch", "torchvision", "timm", "numpy", "tensorboard", "yaml", "scipy", "sklearn", "matplotlib", "torchcodec", "pytest"):
    try:
        importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({error})")
print("packages:", "missing " + "; ".join(missing) if missing else "all there")
if sys.argv[1] == "0" and "torch" not in " ".join(missing):
    import torch
    gpu = torch.cuda.is_available()
    print("GPU:", torch.cuda.get_device_name(0) if gpu else "none; SMOKE=1 runs all parts on a CPU")
    missing += [] if gpu else ["GPU"]
sys.exit(bool(missing))
PYTHON
    [ "$SMOKE" = 1 ] && return "$missing"
    if [ -d "${DATA:-}/cifar-10-batches-py" ] || [ -d "${DATA:-}/train" ]; then
        printf 'DATA: %s\n' "$DATA"
    else
        printf 'DATA: no images in "%s"; study and small need CIFAR-10\n' "${DATA:-}"
        case "$PART" in study | small | all | check) missing=1 ;; esac
    fi
    printf 'IMAGES: %s\n' "${IMAGES:-none given; loading is not measured}"
    return "$missing"
}

# measure NAME MODULE [options]: one benchmark, once, while there is time
measure() {
    local output="$RESULTS/$1.json"
    shift
    if [ -e "$output" ]; then
        printf '%s: already measured\n' "$output"
    elif [ "$SECONDS" -ge "$END" ]; then
        printf '%s: no time left; run the same command again\n' "$output"
    else
        timeout "$((END - SECONDS))" "$PYTHON" -m "$@" --output "$output" || printf '%s: not measured (exit code %s)\n' "$output" "$?"
    fi
}

tests() {
    local which=(-m gpu)
    [ "$SMOKE" = 0 ] || which=(-m gpu --collect-only)
    local code=0
    timeout "$((MINUTES * 60))" "$PYTHON" -m pytest -q "${which[@]}" || code=$?
    return "$code"
}

speed() {
    local size how=(--device cuda --amp bf16) loops=(tiny small base) name
    if [ "$SMOKE" = 1 ]; then
        how=(--device cpu --batch_size 2 --rounds 1 --input_size 48 --decoder_depth 1)
        loops=(tiny) name=smoke
    else
        name="$("$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name(0).lower()))')"
    fi
    mkdir -p "$RESULTS"
    for size in "${loops[@]}"; do
        local options=("${how[@]}")
        [ "$SMOKE" = 1 ] || case "$size" in tiny) options+=(--batch_size 512) ;; small) options+=(--batch_size 256) ;; *) options+=(--batch_size 128) ;; esac
        measure "step_${name}_$size" benchmarks.step --size "$size" "${options[@]}" \
            --variants restated_nor mae nor nor_r20 mae+compile nor+compile
        measure "memory_${name}_$size" benchmarks.memory --size "$size" "${options[@]}"
        measure "bill_${name}_$size" benchmarks.bill --size "$size" "${options[@]}" --price "${PRICE:-3.19}"
        measure "roofline_${name}_$size" benchmarks.roofline --size "$size" "${options[@]}" --variants mae nor nor+compile
    done
    [ -z "${IMAGES:-}" ] || measure "input_$name" benchmarks.input "$IMAGES" --num_workers "$(nproc)"
}

study() {
    export MINUTES SMOKE
    [ "$SMOKE" = 1 ] || export EPOCHS="${EPOCHS:-50}" FINETUNE_EPOCHS="${FINETUNE_EPOCHS:-20}" JOBS="${JOBS:-4}" MORE="${MORE:---num_workers 3}"
    ROWS="mae nor-closest nor-released nor-diagonal" SEEDS="${SEEDS:-0 1 2}" \
        bash scripts/table_nor_explained.sh --collect "$RESULTS/nor_explained"
}

small() {
    export MINUTES SMOKE
    [ "$SMOKE" = 1 ] || export JOBS="${JOBS:-3}" MORE="${MORE:---num_workers 4}"
    ROWS="*8-blocks*" bash scripts/small_data.sh --collect "$RESULTS/small_data"
}

case "$PART" in
    check) check ;;
    tests | speed | study | small) check && "$PART" ;;
    all)
        check
        for part in tests speed study small; do
            printf -- '---- %s\n' "$part"
            code=0
            "$part" || code=$?
            [ "$code" = 0 ] || printf '%s: exit code %s\n' "$part" "$code"
            END=$((SECONDS + MINUTES * 60))
        done
        ;;
    *) complain "Name a part: check, tests, speed, study, small or all, found '${PART}'." ;;
esac
