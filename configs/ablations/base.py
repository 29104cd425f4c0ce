"""What the ablations share: the small model at 64x64 pixels and 17 frames, on cached latents, for a few minutes.

The files beside this one each change one thing, as one table of the paper does.
`python -m benchmarks.ablations --out DIR` trains and measures all of them; each is a config of train.py, too:

  python train.py --config configs/ablations/fuser.py:form=cross_attention,stage=sparse --weights DIR --workdir DIR \
      --config.data.sources="('cache',)"

`stage`: dense or sparse, the run's motion. `runlocal`: the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes

from tora_jax.checkpoints import release

STAGES = {"dense": ("dense",), "sparse": ("sparse",), "both": ("dense", "sparse")}
MOTIONS = ("key_frames", "mean_pooling", "motion_vae", "none")
BASE_STEPS = 500  # of what all cells start from: the weights that ship, trained on without trajectories
STEPS = 500  # of a whole cell; two stages have half of them each
HELD_OUT = 64  # clips at the end of a cache


def make(
    stage: str, runlocal: bool, *, fuser: str = "adaptive_norm", placement: str = "temporal", **cell: str
) -> ConfigDict:
    """The config of one stage of a cell.

    Args:
      stage: what this run trains on, "dense" or "sparse".
      cell: `motion`, one of MOTIONS, what the motion maps are compressed by; `stages`, one of STAGES.
    """
    motion, stages = cell.get("motion", "motion_vae"), cell.get("stages", "both")
    for name, value, known in (
        ("stage", stage, STAGES["both"]),
        ("motion", motion, MOTIONS),
        ("stages", stages, STAGES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value}: there are {', '.join(known)}")
    config = ConfigDict(model_sizes.tiny() if runlocal else model_sizes.small_model())
    if not runlocal:
        shipped = release.read_config(release.DEMO)
        config.update({part: shipped[part] for part in ("tora", "vae", "motion_vae", "t5")})
    config.update(common.training())
    config.tora.fuser, config.tora.placement = fuser, placement
    config.sampling.update({"height": 64, "width": 64, "steps": 15})
    config.job = "tora"
    config.train = (r"tora/.*", r"t5/.*")
    config.steps = STEPS // len(STAGES[stages])
    config.optim = {**common.quick(2e-3), "warmup": 50}
    config.ema = 0.99
    config.eval_every = config.save_every = config.steps
    config.keep = 1
    config.loss = {"timesteps": "uniform", "transform": True, "drop_text": 0.1, "drop_motion": 0.1, "path_weight": 10.0}
    config.data.motion = "none" if motion == "none" else stage
    config.data.tracks, config.data.max_tracks = "given", 3
    config.data.split, config.data.validation = f"train[:-{HELD_OUT}]", f"train[-{HELD_OUT}:]"
    config.data.buckets = (common.bucket(17, 64, 64, batch=16),)
    if runlocal:
        config.update(common.few_steps())
        config.sampling.update({"height": 32, "width": 32, "steps": 2, "num_frames": 5})
        config.data.split, config.data.validation = "train[:-2]", "train[-2:]"
        config.data.buckets = (common.bucket(5, 32, 32, batch=2),)
    # For the benchmark that runs the cells; train.py does not read it.
    config.ablation = {"stages": STAGES[stages], "motion": motion}
    return config.lock()
