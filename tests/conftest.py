"""CPU, 8 devices, float32 at the highest precision, and a compilation cache that outlives the run."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # after the flags: the backend reads them when it starts

CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(__file__).parent.parent / ".jax_cache")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")
