"""CPU (or what JAX_PLATFORMS says), 8 devices, float32 at the highest precision, and a cache that outlives the run."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that run for milliseconds are compiled for as little as XLA can: a training step in 3 s in place of 20.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):  # later ones know these no more, and end the process at an unknown flag
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
# What is set already stands after these, and wins.
os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))
CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "tora_jax")
# Subprocesses of the tests share it.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)

from importlib import resources

import jax  # after the flags: the backend reads them when it starts
import pytest
from jaxtyping import install_import_hook

from tests import typecheck

# Every shape and dtype in the package's signatures is checked while the tests run.
install_import_hook("tora_jax", f"{typecheck.__name__}.check")

# Tracing makes millions of small objects that stay: looking through them again and again took a tenth of the time.
gc.set_threshold(100_000, 20, 100)

jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """A config of the whole chain, as small as it gets."""
    vae = {
        "spatial": {"channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_groups": 2},
        "temporal": {
            "filters": 4,
            "channel_multipliers": (1, 1, 2),
            "num_res_blocks": 1,
            "norm_groups": 2,
            "temporal_downsample": (True, True),
        },
    }
    return {
        "tora": {
            "stdit": {
                "variant": "1x16x2/2",
                "caption_channels": 8,
                "caption_length": 12,
                "base_resolution": 64.0,
                "dtype": "float32",
            },
            "motion_features": 8,
        },
        "vae": vae,
        "motion_vae": vae,
        "t5": {"vocab_size": 1024, "width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "depth": 1},
        "sampling": {
            "prompt": "a red star.",
            "negative_prompt": "",
            "trajectory": ("arc",),
            "resolution": "",
            "aspect_ratio": "16:9",
            "height": 32,
            "width": 48,
            "num_frames": 5,
            "fps": 8.0,
            "steps": 3,
            "guidance": 7.0,
            "trajectory_guidance": 1.0,
            "seed": 0,
        },
    }


@pytest.fixture(scope="session")
def tiny_models(tiny_config):
    from tora_jax.backbones import assembly

    return assembly.load(tiny_config)


@pytest.fixture(scope="session")
def tiny_release(tiny_models, tiny_config, tmp_path_factory):
    """A release folder with the tiny models' weights."""
    from tora_jax.checkpoints import release

    folder = tmp_path_factory.mktemp("release") / "tiny"
    tokenizer = resources.files("tora_jax").joinpath("assets/tokenizer.model")
    release.save(folder, tiny_config, tiny_models.params, tokenizer, "Random numbers.\n")
    return folder
