#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, on a CPU.
# Guess: x / 127.5 - 1 in float32 is the same number in NumPy, in eager JAX and under jit, as each step is rounded alike.
# Seen: "eager differs in 111 of 256; compiled in 205". Eager JAX compiles each operation too, and the division becomes a
# product with the reciprocal; under jit, the subtraction after it is rounded together with it. The counts are those of
# an x86-64 with FMA; that all three differ is what this checks.
# So code that must give the same bits keeps its kind of array and its jit: pixels made ready on the host and pixels made
# ready inside a compiled function are two different inputs of a model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

pixels = np.arange(256, dtype=np.uint8)
plain = pixels.astype(np.float32) / np.float32(127.5) - 1
eager = np.asarray(jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1)
compiled = np.asarray(jax.jit(lambda x: x.astype(jnp.float32) / 127.5 - 1)(pixels))
print("eager differs in", int((eager != plain).sum()), "of 256; compiled in", int((compiled != plain).sum()))
assert (eager != plain).any(), "changed: eager JAX equals NumPy"
assert (compiled != plain).any(), "changed: compiled JAX equals NumPy"
assert (compiled != eager).any(), "changed: compiled JAX equals eager JAX"
PY
