#!/usr/bin/env bash
# Pretraining as a Slurm job that survives preemption and time limits: it saves a checkpoint, requeues itself, and resumes.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/slurm.sh \
#       -c configs/pretrain/nor_mae_vit_tiny_in1k.yaml --data_path /data/imagenet --output_dir output/nor_mae_tiny
#
# One task is one GPU. All arguments go to main_pretrain.py (ENTRY=main_finetune.py for another program); PYTHON is the
# interpreter, by default that of .venv. The last two minutes of the job are for the checkpoint: Slurm's USR1 makes every
# process stop after its step, save once and leave with code 75, and code 75 requeues the job.
#SBATCH --job-name=nor-mae
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --cpus-per-task=8
set -euo pipefail

: "${SLURM_JOB_ID:?this script runs under Slurm: sbatch scripts/slurm.sh ...}"
cd "${SLURM_SUBMIT_DIR:-.}"
PYTHON="${PYTHON:-.venv/bin/python}"
ENTRY="${ENTRY:-main_pretrain.py}"
REQUEUE=75 # "stopped by a signal, everything is saved"

MASTER_ADDR="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)"
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Each task gets its rank from Slurm, and is the training process itself, so that signals reach it directly.
# shellcheck disable=SC2016 # expanded in the task, not here
srun --kill-on-bad-exit=0 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"' task \
    "$PYTHON" "$ENTRY" "$@" &
step=$!
trap 'kill -USR1 "$step"' USR1 # from Slurm to this shell, from here to every task
trap 'kill -TERM "$step"' TERM

code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
done

if [[ "$code" == "$REQUEUE" ]]; then
    printf 'Saved; job %s is requeued.\n' "$SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
