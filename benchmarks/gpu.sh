#!/usr/bin/env bash
# Speed and memory on one GPU with 80 GB, in about 20 minutes: bash benchmarks/gpu.sh [PYTHON] > gpu.jsonl
# Wants an environment with tora_jax[cuda,train]. One JSON line for each row of docs/performance.md; weights are random.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 TF_CPP_MIN_LOG_LEVEL=2

run() { # a row that fails leaves the others, and all of them end after 20 minutes
  echo "== $*" >&2
  timeout $((SECONDS < 1200 ? 1200 - SECONDS : 1)) "$python" "$@" || echo "{\"failed\": \"$*\"}"
}

JAX_PLATFORMS=cuda run -m pytest -q -m accelerator tests/models/test_attention.py >&2
# A training step at 480p x 51, and what the fusers cost.
run -m benchmarks.step --job train --num_frames 51 --height 480 --width 854 --batch 1 --repeats 5
run -m benchmarks.step --job train --num_frames 51 --height 480 --width 854 --batch 4 --repeats 5
run -m benchmarks.step --job forward --num_frames 51 --height 480 --width 854 --repeats 5
run -m benchmarks.step --job forward --nomotion --num_frames 51 --height 480 --width 854 --repeats 5
# Whole videos, 30 steps with guidance.
run -m benchmarks.sample --num_frames 51 --height 480 --width 854 --repeats 2
run -m benchmarks.sample --num_frames 102 --height 720 --width 1280 --repeats 1
run -m benchmarks.sample --num_frames 204 --height 720 --width 1280 --repeats 1
