"""With and without trajectories (Tora, table 1: Open-Sora against Tora at 128 frames).

Arguments: `motion`: none or motion_vae; `stage` and `runlocal` as in base.py.
"""

from tora_jax.configs import common
from tora_jax.configs.ablations import base

TITLE = "trajectory"
PAPER = {"motion=none": 373.17, "motion=motion_vae": 11.72}


def get_config(arg: str | None = None):
    arg = common.parse_arg(arg, motion="motion_vae", stage="sparse", runlocal=False)
    return base.make(arg.stage, arg.runlocal, motion=arg.motion)
