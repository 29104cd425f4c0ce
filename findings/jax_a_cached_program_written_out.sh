#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, on a CPU.
# Guess: a compiled function can be written out by jax.experimental.serialize_executable and read in another process,
# whether XLA compiled it or JAX's persistent compilation cache gave it.
# Seen: "compiled here: runs; from the cache: NOT_FOUND: Function slice_bitcast_fusion not found (type id: 1)". What came
# from the cache is written out without its machine code, and that is no error until it is read or called elsewhere. So a
# store of executables works until a program is written for the second time.
# So programs that are to be written out are compiled with the persistent cache turned off.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$work/run.py" <<'PY'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

what, path, cache = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x, weight = jnp.ones((2, 64, 64)), jnp.ones(())
if what == "write":
    compiled = jax.jit(lambda x, weight: jnp.tanh(x[1] + weight * (x[0] - x[1])) @ x[0].T).lower(x, weight).compile()
    with open(path, "wb") as file:
        pickle.dump(serialize_executable.serialize(compiled), file)
else:
    with open(path, "rb") as file:
        program, given, out = pickle.load(file)
    try:
        jax.block_until_ready(serialize_executable.deserialize_and_load(program, given, out)(x, weight))
        print("runs")
    except jax.errors.JaxRuntimeError as error:
        print(str(error).splitlines()[0])
PY
export JAX_PLATFORMS=cpu
python=$work/venv/bin/python
"$python" "$work/run.py" write "$work/first" "$work/cache"
"$python" "$work/run.py" write "$work/second" "$work/cache"
first=$("$python" "$work/run.py" read "$work/first" "$work/cache")
second=$("$python" "$work/run.py" read "$work/second" "$work/cache")
echo "compiled here: $first; from the cache: $second"
[[ $first == runs ]] || { echo "changed: a compiled program that was written out does not run"; exit 1; }
[[ $second == *"not found"* ]] || { echo "changed: a program from the cache runs as well"; exit 1; }
