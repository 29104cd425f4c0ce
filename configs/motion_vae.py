"""The motion VAE, on flow maps.

  python train.py --config configs/motion_vae.py --weights runs/vae/release --workdir runs/motion_vae \
      --config.data.sources="('clips',)"

It starts from the video VAE's weights: flow maps are RGB so that this is possible (Tora, section 3.2).

Arguments: `arch=magvit`: one causal 3D net with strides in space and time, from scratch; `small`: the small model's;
`runlocal`: either of them at the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common

ARCHS = ("video", "magvit")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, arch="video", small=False, runlocal=False)
    if arg.arch not in ARCHS:
        raise ValueError(f"arch={arg.arch}: there are {', '.join(ARCHS)}")
    config = ConfigDict(common.tiny() if arg.runlocal else common.small() if arg.small else common.opensora())
    config.update(common.training())
    config.job = "motion_vae"
    config.train = (r"motion_vae/.*",)
    config.from_video_vae = arg.arch == "video"
    config.loss = common.vae_loss("joint")
    config.steps = 20_000
    config.data.motion = "mixed"
    config.data.buckets = (common.bucket(17, 256, 256, batch=32, fps=24.0),)
    if arg.arch == "magvit":
        config.motion_vae = common.magvit(arg.small or arg.runlocal)
        config.loss = {**common.vae_loss("joint"), "frame": 0.0, "identity": 0.0, "kl_spatial": 0.0}
    if arg.small:
        config.optim = {**common.quick(5e-4), "warmup": 10}
        config.steps = 130
        config.loss.frame = 0.0
        config.data.tracks, config.data.max_tracks = "given", 3
        config.data.buckets = (common.bucket(17, 128, 128, batch=1),)
    if arg.runlocal:
        config.update(common.few_steps())
        config.data.buckets = (common.bucket(5, 32, 32, batch=2),)
    return config.lock()
