"""What is trained on (Tora, table 6): dense flow, sparse trajectories, or one after the other in as many steps.

Arguments: `stages`: dense, sparse or both; `stage` (which of them this run is) and `runlocal` as in base.py.
"""

from tora_jax.configs import common
from tora_jax.configs.ablations import base

TITLE = "training stages"
PAPER = {"stages=dense": 39.34, "stages=sparse": 24.73, "stages=both": 14.25}


def get_config(arg: str | None = None):
    arg = common.parse_arg(arg, stages="both", stage="sparse", runlocal=False)
    return base.make(arg.stage, arg.runlocal, stages=arg.stages)
