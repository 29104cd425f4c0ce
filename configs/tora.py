"""Tora on the released sizes: ST-DiT XL/2, the v1.2 video VAE, T5 v1.1 XXL.

  python sample.py --config configs/tora.py --weights DIR --resolution 480p --aspect_ratio 16:9
  python train.py --config configs/tora.py:stage=1 --weights DIR --workdir runs/dense --config.data.sources="('clips',)"
  python train.py --config configs/tora.py:stage=2 --weights runs/dense/release --workdir runs/sparse ...
  python train.py --config configs/tora.py:runlocal ...      the same, shrunk to seconds on a laptop

Arguments: `variant` (XL/2, 3B/2 or DEPTHxWIDTHxHEADS/PATCH); `stage`: 1 trains on dense flow, 2 on sparse
trajectories; `buckets=N`: clips of all shapes, 144p to 360p and 51 to 204 frames, for N devices (data x fsdp);
`small`: the small model, of which everything trains; `runlocal`: either of them at the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, variant="XL/2", stage=1, buckets=0, small=False, runlocal=False)
    if arg.stage not in (1, 2):
        raise ValueError(f"stage={arg.stage}: there are 1 (dense flow) and 2 (sparse trajectories)")
    config = ConfigDict(model_sizes.trained(arg.variant, small=arg.small, runlocal=arg.runlocal))
    config.update(common.training())
    config.job = "tora"
    # Tora, section 4.1: the temporal blocks and the new parts train, all else stays as Open-Sora left it.
    config.train = (r"tora/extractor/.*", r"tora/stdit/blocks/temporal.*", r"tora/stdit/blocks/.*_fuser/.*")
    config.steps = 20_000 if arg.stage == 1 else 10_000
    config.optim.lr = 2e-5
    config.loss = {
        "timesteps": "logit_normal",
        "transform": True,
        "drop_text": 0.1,
        "drop_motion": 0.1,
        "path_weight": 0.0,
    }
    config.data.motion = "dense" if arg.stage == 1 else "sparse"
    config.data.buckets = (common.bucket(51, 480, 854, batch=32, fps=24.0),)
    if arg.buckets:
        config.data.buckets = common.opensora_buckets(arg.buckets)
    config.data.frame_masks = {
        "random": 0.05,
        "interpolate": 0.005,
        "quarter_random": 0.005,
        "quarter_head": 0.005,
        "quarter_tail": 0.005,
        "quarter_head_tail": 0.005,
        "image_random": 0.025,
        "image_head": 0.05,
        "image_tail": 0.025,
        "image_head_tail": 0.025,
    }
    config.evaluation.clips = 4
    if arg.small:
        config.train = (r"tora/.*", r"t5/.*")
        config.steps = 100 if arg.stage == 1 else 3000
        # After 100 steps Muon is where AdamW is not yet after 150: see docs/LOG.md.
        config.optim = {**common.quick(2.5e-3), "optimizer": "muon", "muon_rms": 0.8}
        config.optim.warmup = 50 if arg.stage == 1 else 100
        config.ema = 0.997
        config.loss.timesteps = "uniform"
        config.loss.path_weight = 10.0  # objects are 3 to 5 % of a frame
        config.data.buckets = (common.bucket(17, 128, 128, batch=16),)
        config.data.tracks, config.data.max_tracks = "given", 3
        config.data.frame_masks = {"image_head": 0.15, "image_tail": 0.05, "random": 0.05}
    if arg.runlocal:
        config.update(common.few_steps())
        config.data.buckets = (common.bucket(5, 32, 32, batch=2),)
    return config.lock()
