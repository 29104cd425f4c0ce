"""What the motion maps are compressed by (Tora, table 3): every fourth frame, the mean of four, or the motion VAE.

Arguments: `form`: key_frames, mean_pooling or motion_vae; `stage` and `runlocal` as in base.py.
"""

from tora_jax.configs import common
from tora_jax.configs.ablations import base

TITLE = "motion compression"
PAPER = {"form=key_frames": 27.61, "form=mean_pooling": 20.97, "form=motion_vae": 14.25}  # TrajError, the worst first


def get_config(arg: str | None = None):
    arg = common.parse_arg(arg, form="motion_vae", stage="sparse", runlocal=False)
    return base.make(arg.stage, arg.runlocal, motion=arg.form)
