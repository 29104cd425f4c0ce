#!/usr/bin/env bash
# jax and jaxlib 0.10.2, and 0.11.2, numpy 2.4.6, on a CPU; Python 3.12 or newer, which jax 0.11 asks for.
# Guess: the compiler's effort is one option of jax.jit(compiler_options=...), exec_time_optimization_effort or
# optimization_level, and a minor version of jax may add a form but takes the old one for some time.
# Seen: 0.10.2 takes exec_time_optimization_effort=-1.0 and optimization_level=1; 0.11.2 (and 0.12.0.1; 0.11.0 is as
# 0.10.2) takes neither, but optimization_level="O1", which 0.10.2 refuses. No warning came before: each is an error when
# the function is first compiled, of three kinds (JaxRuntimeError, TypeError, ValueError).
# So one who compiles with less effort asks the version at hand: jax.config has jax_exec_time_optimization_effort or not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/run.py" <<'PY'
import jax

taken = []
for options in ({"exec_time_optimization_effort": -1.0}, {"optimization_level": 1}, {"optimization_level": "O1"}):
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(1.0)
        taken.append(str(options))
    except (jax.errors.JaxRuntimeError, TypeError, ValueError):
        pass
print(*taken, hasattr(jax.config, "jax_exec_time_optimization_effort"))
PY
for python in python3 python3.12 python3.13 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23]*/bin/python; do
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null && break
done
for version in 0.10.2 0.11.2; do
  "$python" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q jax==$version jaxlib==$version numpy==2.4.6
  JAX_PLATFORMS=cpu "$work/$version/bin/python" "$work/run.py" > "$work/$version.txt"
  echo "$version takes: $(cat "$work/$version.txt")"
done
[[ $(cat "$work/0.10.2.txt") == "{'exec_time_optimization_effort': -1.0} {'optimization_level': 1} True" ]] ||
  { echo "changed: what 0.10.2 takes"; exit 1; }
[[ $(cat "$work/0.11.2.txt") == "{'optimization_level': 'O1'} False" ]] || { echo "changed: what 0.11.2 takes"; exit 1; }
