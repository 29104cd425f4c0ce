"""The small model: every part of the real chain, in seconds on a laptop. `sample.py` runs it by default."""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes


def get_config(arg: str | None = None) -> ConfigDict:
    common.parse_arg(arg)
    return ConfigDict(model_sizes.small_model()).lock()
