"""Where the fusers stand (Tora, table 5): before the spatial or before the temporal blocks.

Arguments: `blocks`: spatial or temporal; `stage` and `runlocal` as in base.py.
"""

from tora_jax.configs import common
from tora_jax.configs.ablations import base

TITLE = "fuser placement"
PAPER = {"blocks=spatial": 23.39, "blocks=temporal": 14.25}


def get_config(arg: str | None = None):
    arg = common.parse_arg(arg, blocks="temporal", stage="sparse", runlocal=False)
    return base.make(arg.stage, arg.runlocal, placement=arg.blocks)
