#!/usr/bin/env bash
# SLURM: sbatch launch/slurm.sh, in a checkout on a disk that all nodes share.
# Saves two minutes before its time is up. Unless it is finished or cancelled, it is queued again, and goes on.
#SBATCH --job-name=tora
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8 # one process for each GPU: of several, JAX gives a process under SLURM one alone
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

CONFIG=configs/tora.py:stage=1
MESH=data=4,fsdp=8 # the product is the number of GPUs
WEIGHTS=runs/motion_vae/release
WORKDIR=runs/dense
SOURCES="('cached/dense',)"
STARTS=100

trap 'exit 143' TERM # scancel tells this shell, too; --signal only the processes of srun
srun --kill-on-bad-exit=1 python train.py --distributed --config "$CONFIG" --config.mesh "$MESH" --weights "$WEIGHTS" \
  --workdir "$WORKDIR" --config.data.sources "$SOURCES" --config.resume --config.restartable && exit 0
((${SLURM_RESTART_COUNT:-0} < STARTS)) || exit 1
scontrol requeue "$SLURM_JOB_ID"
