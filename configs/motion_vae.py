"""The motion VAE, on flow maps.

  python train.py --config configs/motion_vae.py --weights runs/vae/release --workdir runs/motion_vae \
      --config.data.sources="('clips',)"

It starts from the video VAE's weights: flow maps are RGB so that this is possible (Tora, section 3.2).

Arguments: `phase`: joint, or for less computation first spatial and then causal, from the release folder of that, as
in configs/vae.py; `arch=magvit`: one causal 3D net with strides in space and time, from scratch; `small`: the small
model's; `runlocal`: either of them at the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes

ARCHS = ("video", "magvit")


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, arch="video", phase="joint", small=False, runlocal=False)
    if arg.arch not in ARCHS:
        raise ValueError(f"arch={arg.arch}: there are {', '.join(ARCHS)}")
    if arg.arch == "magvit" and arg.phase != "joint":
        raise ValueError(f"phase={arg.phase}: arch=magvit is one net, trained in one phase, joint")
    config = ConfigDict(model_sizes.trained(small=arg.small, runlocal=arg.runlocal))
    config.update(common.training())
    config.job = "motion_vae"
    config.train = common.vae_part("motion_vae", arg.phase)
    config.from_video_vae = arg.arch == "video" and arg.phase != "causal"
    config.loss = common.vae_loss(arg.phase)
    config.steps = 20_000
    config.data.motion = "mixed"
    config.data.buckets = (common.bucket(17, 256, 256, batch=32, fps=24.0),)
    if arg.arch == "magvit":
        config.motion_vae = model_sizes.magvit(arg.small or arg.runlocal)
        config.loss = {**common.vae_loss("joint"), **common.ONE_NET}
    if arg.small:
        config.optim = {**common.quick(1e-3), "warmup": 20}
        if arg.phase == "spatial":
            config.optim.update({"lr": 1.5e-3, "optimizer": "muon", "muon_rms": 0.8})
            config.data.motion = "dense"  # the hard maps: sparse ones come along
        config.steps = {"spatial": 300, "causal": 100, "joint": 100}[arg.phase]
        config.ema = 0.98
        config.data.crop, config.data.tracks, config.data.max_tracks = 64, "given", 3
        config.data.buckets = (common.bucket(17, 128, 128, batch={"spatial": 2, "causal": 8, "joint": 2}[arg.phase]),)
    if arg.runlocal:
        config.update(common.few_steps())
        config.data.crop = 0
        config.data.buckets = (common.bucket(5, 32, 32, batch=2),)
    return config.lock()
