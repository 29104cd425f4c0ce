#!/usr/bin/env bash
# One box of GPUs: launch/box.sh, in a checkout or in a container of its Dockerfile.
# Whatever ends the training, it is started again, until it is finished.
set -euo pipefail

CONFIG=configs/tora.py:stage=1
MESH=fsdp=8 # the product is the number of GPUs
WEIGHTS=runs/motion_vae/release
WORKDIR=runs/dense
SOURCES="('cached/dense',)"
STARTS=100

trap 'exit 130' INT
trap 'exit 143' TERM
for ((start = 1; start <= STARTS; start++)); do
  python train.py --config "$CONFIG" --config.mesh "$MESH" --weights "$WEIGHTS" --workdir "$WORKDIR" \
    --config.data.sources "$SOURCES" --config.resume --config.restartable && exit 0
  sleep 30
done
exit 1
