"""The small model: every part of the real chain, in seconds on a laptop. `sample.py` runs it by default."""

from ml_collections import ConfigDict
from tora_jax.configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    common.parse_arg(arg)
    return ConfigDict(common.small()).lock()
