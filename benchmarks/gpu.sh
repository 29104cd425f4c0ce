#!/usr/bin/env bash
# Speed and memory on one GPU with 80 GB, in parts of at most 7 minutes; all parts, the smallest first, or those named:
#   bash benchmarks/gpu.sh [attention] [step] [480p] [720p102] [720p204] >> gpu.jsonl
# Wants an environment with tora_jax[cuda,train], whose Python is $PYTHON. Each row of docs/performance.md is a JSON line,
# printed at once; weights are random. Parts share compiled programs, also with a later start.
set -uo pipefail
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/tora_jax}"
limit=420 # seconds, of a part
parts=("$@")
((${#parts[@]})) || parts=(attention step 480p 720p102 720p204)

run() { # a row that fails leaves the others, and all rows of a part end with its time
  echo "== $*" >&2
  timeout $((SECONDS < limit ? limit - SECONDS : 1)) "${PYTHON:-python}" "$@" || echo "{\"failed\": \"$*\"}"
}

whole() { # a video of 30 steps with guidance: frames, height, width, repeats
  run -m benchmarks.sample --num_frames "$1" --height "$2" --width "$3" --repeats "$4"
}

step() { # at 480p x 51
  run -m benchmarks.step --num_frames 51 --height 480 --width 854 --repeats 5 "$@"
}

for part in "${parts[@]}"; do
  SECONDS=0
  case $part in
    attention) JAX_PLATFORMS=cuda run -m pytest -q -m accelerator tests/models/test_attention.py >&2 ;; # and gradients
    step)
      step --job train --batch 1
      step --job train --batch 4
      step --job forward
      step --job forward --nomotion # what the fusers cost
      ;;
    480p) whole 51 480 854 2 ;;
    720p102) whole 102 720 1280 1 ;;
    720p204) whole 204 720 1280 1 ;;
    *)
      echo "gpu.sh: error: $part: no such part; choose attention, step, 480p, 720p102 or 720p204" >&2
      exit 2
      ;;
  esac
done
