"""The form of the motion fuser (Tora, table 4).

Arguments: `form`: extra_channels, cross_attention or adaptive_norm; `stage` and `runlocal` as in base.py.
"""

from tora_jax.configs import common
from tora_jax.configs.ablations import base

TITLE = "fuser form"
PAPER = {"form=extra_channels": 21.07, "form=cross_attention": 18.36, "form=adaptive_norm": 14.25}


def get_config(arg: str | None = None):
    arg = common.parse_arg(arg, form="adaptive_norm", stage="sparse", runlocal=False)
    return base.make(arg.stage, arg.runlocal, fuser=arg.form)
